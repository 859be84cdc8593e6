"""Depth as time: what trajectories do, and what happens to them when a model is changed.

`motion`: how directions converge and turn. `ranks`: of the updates. `basins`: angles of the classes. `dmd`: one linear
map per phase. `interventions`: perturbed states, swapped and replaced layers. `extrapolation`: more or fewer steps.
`lens`: what heads, attention and norms say at every state. `patching`: which tokens carry the difference of two images,
and whether a student's states serve its teacher. `confidence`: whether a prediction is wrong or an image foreign.
`findings`: which of the paper's hold. `report`, `figures`, `experiment_figures`: all of it to read. `explorer`: the
page to look inside.
"""
