"""Writes ONNX files in float32, int8 and 4 bits, for any batch and image size.

    save_onnx(model, "model.onnx")
    quantize_onnx("model.onnx", "model_int8.onnx", "int8_dynamic")

The steps of a block stand one after another in the graph and share its weights. Static quantisation finds a range of
activations for each of them, which it needs, for activations differ from step to step.
"""

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor
from transformers import PreTrainedModel

from .programs import ImageProgram, output_names
from .rounding import round_weights

ONNX_PRECISIONS = ("int8_dynamic", "int8_static", "int4")
# weights that share a scale in 4 bits
INT4_BLOCK = 16
# in the names of what a step has for itself, whose thin products stay as they are
CONDITIONERS = ".conditioners."


@torch.no_grad()
def save_onnx(model: PreTrainedModel, path: str | Path, image_size: tuple[int, int] | None = None) -> None:
    """Write an ONNX file; its input is "pixel_values", its outputs are named as the model's.

    Args:
        model: as in `ImageProgram`.
        path: of the file.
        image_size: as in `ImageProgram`.
    """
    program = ImageProgram(model, image_size)
    exported = torch.onnx.export(
        program,
        kwargs={"pixel_values": program.example()},
        input_names=["pixel_values"],
        output_names=output_names(model),
        dynamic_shapes=program.open_dimensions(),
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    # before anything is folded, for then weights have their names
    _store_transposed(exported.model.graph)
    exported.optimize()
    # metadata names folders of this machine, and is longer than the graph
    for tidy in (common.RemoveUnusedNodesPass(), common.ClearMetadataAndDocStringPass()):
        tidy(exported.model)
    onnx_ir.save(exported.model, path)


def _store_transposed(graph: onnx_ir.Graph) -> None:
    """Store weights as matrix products read them; each step would otherwise transpose them anew."""
    for weight in list(graph.initializers.values()):
        nodes = [node for node, _ in weight.uses()]
        orders = {tuple(node.attributes["perm"].as_ints()) for node in nodes if node.op_type == "Transpose"}
        if len(orders) != 1 or any(node.op_type != "Transpose" for node in nodes):
            continue
        array = np.ascontiguousarray(weight.const_value.numpy().transpose(orders.pop()))
        transposed = onnx_ir.val(f"{weight.name}.transposed", const_value=onnx_ir.tensor(array))
        graph.register_initializer(transposed)
        for node in nodes:
            node.outputs[0].replace_all_uses_with(transposed)
            graph.remove(node, safe=True)
        del graph.initializers[weight.name]


def quantize_onnx(
    source: str | Path, target: str | Path, precision: str, calibration: Iterable[Tensor] | None = None
) -> None:
    """Write a smaller file: blocks and head in few bits, other large tensors in float16, computed with in float32.

    int8 has a scale for each output channel of a weight; "int8_dynamic" finds the range of activations at run time,
    "int8_static" on calibration images, step by step. "int4" has a scale for every `INT4_BLOCK` weights of a block's
    matrices, and activations in float32; with calibration images, weights are rounded by `round_weights`, which halves
    the error.

    Args:
        source: a file of `save_onnx`.
        target: the file to write.
        precision: one of `ONNX_PRECISIONS`.
        calibration: batches of processed images, (B, C, H, W), which "int8_static" must and "int4" should have.

    Raises:
        ValueError: the precision is none of these, or calibration images are missing.
    """
    if precision not in ONNX_PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(ONNX_PRECISIONS)}")
    if precision == "int8_static" and calibration is None:
        raise ValueError("calibration is None; precision 'int8_static' must have images to find ranges on")
    model = onnx.load(source)
    kept = {tensor.name for tensor in model.graph.initializer}
    weighted = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in kept]
    names = [node.name for node in weighted if CONDITIONERS not in node.input[1]]
    # which the quantisers make of a Gemm
    names += [f"{node.name}_MatMul" for node in weighted if node.op_type == "Gemm"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        common_options = {"per_channel": True, "weight_type": quantization.QuantType.QInt8, "nodes_to_quantize": names}
        if precision == "int4":
            # it tells of every node that it leaves
            logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
            skipped = [node.name for node in weighted if node.name not in names]
            if calibration is not None:
                taken = [node for node in weighted if node.name in names and node.op_type == "MatMul"]
                round_weights(model, taken, calibration, INT4_BLOCK)
            quantizer = MatMulNBitsQuantizer(model, block_size=INT4_BLOCK, is_symmetric=False, nodes_to_exclude=skipped)
            quantizer.process()
            onnx.save(quantizer.model.model, path)
        elif precision == "int8_dynamic":
            quantization.quantize_dynamic(source, path, op_types_to_quantize=["MatMul", "Gemm"], **common_options)
        else:
            quantization.quantize_static(
                source,
                path,
                _Calibration(calibration),
                activation_type=quantization.QuantType.QUInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
                extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
                **common_options,
            )
        quantized = onnx.load(path)
    scales = {tensor.name for tensor in quantized.graph.initializer if tensor.name.endswith("_scales")}
    _halve(quantized, kept | scales)
    onnx.save(quantized, target)


class _Calibration(quantization.CalibrationDataReader):
    """Batches of images as onnxruntime's calibration asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch.numpy()}


def _halve(model: onnx.ModelProto, names: set[str]) -> None:
    """Store matrices and larger tensors among `names` in float16, and cast them where they are read."""
    for tensor in model.graph.initializer:
        if tensor.name not in names or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        array = numpy_helper.to_array(tensor)
        if np.abs(array).max() > np.finfo(np.float16).max:
            continue
        stored = f"{tensor.name}.float16"
        model.graph.node.insert(0, helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), stored))
