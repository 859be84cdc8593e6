"""Writes students as files for other runtimes; a file stores the weights of a block once, however often it is applied.

`programs` exports a model as a program and as a .pt2 file. `onnx_files` writes ONNX, in float32, int8 or 4 bits.
`rounding` rounds weights to four bits. `mobile` writes for ExecuTorch and Core ML, where their packages are installed.
`agreement` runs a file and compares it with the student.
"""
