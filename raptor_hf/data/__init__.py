"""Opens images with their labels, masks or depth maps, and makes batches of them.

`sources` finds the files and splits of a data set. `images` opens photographs. `labels` names their classes. `dense`
opens images with masks or depth maps. `scenes` makes a small set of these. `transforms` crops, flips and pads. `sizes`
chooses the image size of each step. `loaders` makes batches, in an order that a resumed run repeats.
"""
