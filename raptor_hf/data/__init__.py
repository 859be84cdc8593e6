"""Images and what is true of them, from anywhere, as batches.

`images`: photographs with class labels. `dense`: with segmentation masks or depth maps. `scenes`: an embedded stand-in
for dense data sets. `transforms`: random crops and flips, tensors from batches. `loaders`: batches, in an order that a
resumed run finds again.
"""
