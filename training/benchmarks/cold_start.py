"""Open an ONNX file and run it on one image: the process whose start device.py times. It imports what that takes alone.

python training/benchmarks/cold_start.py model.onnx 224
"""

import sys

import numpy as np
import onnxruntime

if __name__ == "__main__":
    path, side = sys.argv[1], int(sys.argv[2])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {"pixel_values": np.zeros((1, 3, side, side), dtype=np.float32)})
