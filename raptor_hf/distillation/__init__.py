"""Distilling a teacher's trajectory into recurrent blocks.

`task`: the losses of both stages. `partition`: the phases of the teacher, found or read. `student`: the model to train.
`start`: blocks fitted to their phases before the first step. `trajectory_cache`: states of images that come again.
`image_sizes`: of each training step, and of the evaluation. `evaluation`: how near the student is. `inputs`: teacher
and images, checked before any work.
"""
