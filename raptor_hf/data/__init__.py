"""Images and what is true of them, from anywhere, as batches.

`sources`: where they are, and their splits. `images`: photographs. `labels`: their classes. `dense`: images with
masks or depth maps. `scenes`: an embedded stand-in for those. `transforms`: random crops and flips, tensors from
batches. `sizes`: the image size of each step. `loaders`: batches, in an order that a resumed run finds again.
"""
