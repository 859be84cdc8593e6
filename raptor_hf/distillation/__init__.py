"""Distils a teacher's trajectory into recurrent blocks.

`inputs` opens and checks teacher and images. `partition` finds or reads the phases, which `tied_costs` can judge.
`student` makes the model to train. `start` fits its blocks to their phases before the first step. `task` has the losses
of both stages. `trajectory_cache` keeps states of images that come again. `image_sizes` chooses the sizes of training
and evaluation. `evaluation` measures how near the student is to its teacher.
"""
