"""Distilling a teacher's trajectory into recurrent blocks.

`task`: the losses of both stages. `student`: the partition and the model to train. `settings`: what the recipe takes.
"""
