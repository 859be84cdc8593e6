"""GPTQ: rounds weights to four bits; the weights that are not yet rounded compensate for each error.

    round_weights(model, nodes, batches, block_size=16)

Frantar et al., "GPTQ", https://arxiv.org/abs/2210.17323, with the second moments of all steps that a weight serves.
onnxruntime 1.32 has a function of this name, but it reads the triangle of its factor that holds zeros, so that nothing
is compensated.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from torch import Tensor

# of the mean second moment, added to all; keeps the compensation small where images say little
DAMPING = 0.1
# images whose activations are in memory at once
CHUNK = 8


def round_weights(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], calibration: Iterable[Tensor], block_size: int
) -> None:
    """Round weights of a model to four bits, in place.

    Args:
        model: with the input "pixel_values".
        nodes: its MatMul nodes whose second input is a weight, (inputs, outputs).
        calibration: batches of processed images, (B, C, H, W).
        block_size: consecutive inputs of an output that share a scale and a zero.
    """
    moments = second_moments(model, nodes, calibration)
    for tensor in model.graph.initializer:
        if tensor.name in moments:
            rounded = gptq(numpy_helper.to_array(tensor), moments[tensor.name], block_size)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))


def second_moments(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], calibration: Iterable[Tensor]
) -> dict[str, np.ndarray]:
    """Sum x x^T, (inputs, inputs), over images, tokens and steps, where x is what a weight is multiplied by."""
    readers = defaultdict(list)
    for node in nodes:
        readers[node.input[1]].append(node.input[0])
    names = sorted({name for own in readers.values() for name in own})
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    del opened.graph.output[:]
    opened.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(opened.SerializeToString(), providers=["CPUExecutionProvider"])
    moments: dict[str, np.ndarray] = {}
    for batch in calibration:
        for images in batch.split(CHUNK):
            values = dict(zip(names, session.run(names, {"pixel_values": images.numpy()}), strict=True))
            for weight, own in readers.items():
                for name in own:
                    rows = values[name].reshape(-1, values[name].shape[-1])
                    moments[weight] = moments.get(weight, 0) + (rows.T @ rows).astype(np.float64)
    return moments


def gptq(weight: np.ndarray, moment: np.ndarray, block_size: int) -> np.ndarray:
    """Round a weight to four bits, input by input; the rows of later inputs change to compensate for each error.

    Args:
        weight: (inputs, outputs).
        moment: of its inputs, (inputs, inputs).
        block_size: as in `round_weights`.

    Returns:
        (inputs, outputs) in float32; an output has at most 16 different values in each block of inputs.
    """
    left, rounded = weight.astype(np.float64), np.zeros(weight.shape)
    damped = moment + DAMPING * max(np.diag(moment).mean(), np.finfo(np.float32).tiny) * np.eye(len(moment))
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    for start in range(0, len(left), block_size):
        end = min(start + block_size, len(left))
        block = left[start:end]
        # as onnxruntime chooses them: the grid holds zero
        low, high = np.minimum(block.min(axis=0), 0), np.maximum(block.max(axis=0), 0)
        scale = np.where(high > low, (high - low) / 15, 1)
        zero = np.round(-low / scale)
        lost = np.zeros_like(block)
        for row in range(start, end):
            rounded[row] = scale * (np.clip(np.round(left[row] / scale) + zero, 0, 15) - zero)
            lost[row - start] = (left[row] - rounded[row]) / factor[row, row]
            left[row + 1 : end] -= np.outer(factor[row, row + 1 : end], lost[row - start])
        left[end:] -= factor[start:end, end:].T @ lost
    return rounded.astype(np.float32)
