"""Treats depth as time: measures how trajectories move, and what happens when a model is changed.

`motion` measures how directions converge and turn, `ranks` the ranks of the updates, `basins` the angles between
classes. `dmd` fits one linear map to each phase. `interventions` perturbs states, and swaps and replaces layers.
`extrapolation` runs more or fewer steps. `lens` reads heads, attention and norms at every state. `patching` finds which
tokens carry the difference of two images, and whether a student's states serve its teacher. `confidence` scores whether
a prediction is right and an image familiar. `findings` judges which findings of the paper hold. `subject` describes the
model. `report`, `figures` and `experiment_figures` write the report. `explorer` makes a page of photographs.
"""
