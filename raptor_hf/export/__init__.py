"""Students as files for other runtimes, with the weights of a block stored once, however often it is applied.

`programs`: a model as an exported program, and as a .pt2 file. `onnx_files`: ONNX, in float32, int8 or 4 bits.
`rounding`: weights in four bits. `mobile`: ExecuTorch and Core ML, where their packages are installed. `agreement`:
what a file computes, and how far it agrees with the student.
"""
