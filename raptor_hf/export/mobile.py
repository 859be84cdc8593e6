"""Writes files for phones and small boards: ExecuTorch (.pte) and Core ML (.mlpackage).

    save_executorch(model, "model.pte", image_size=(224, 224))
    save_coreml(model, "model.mlpackage", image_size=(224, 224))

Both take any batch of images of one size: neither runtime interpolates positions as PyTorch does. The packages
`executorch` and `coremltools` are no dependencies of this one; a function imports its own when it is called.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .programs import MAX_BATCH, ImageProgram, output_names

EXECUTORCH_PRECISIONS = ("float32", "int8_dynamic", "int8_static")
COREML_PRECISIONS = ("float32", "int8_weights", "int4")


def save_executorch(
    model: PreTrainedModel,
    path: str | Path,
    image_size: tuple[int, int],
    precision: str = "float32",
    calibration: Iterable[Tensor] | None = None,
) -> None:
    """Write a program for ExecuTorch's XNNPACK, which runs on the CPUs of phones.

    Args:
        model: as in `ImageProgram`.
        path: of the file, which ends in .pte.
        image_size: height and width of the images that it takes.
        precision: one of `EXECUTORCH_PRECISIONS`; those of int8 have a scale for each output channel of a weight, and
            find the ranges of activations at run time or on calibration images, step by step.
        calibration: batches of processed images, (B, C, H, W), for "int8_static".

    Raises:
        ValueError: the precision is none of these, or calibration images are missing.
        ImportError: the package executorch is not installed.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    if precision not in EXECUTORCH_PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(EXECUTORCH_PRECISIONS)}")
    program = ImageProgram(model, image_size)
    exported = program.export()
    if precision != "float32":
        if precision == "int8_static" and calibration is None:
            raise ValueError("calibration is None; precision 'int8_static' must have images to find ranges on")
        batches = [program.example()] if precision == "int8_dynamic" else calibration
        quantised = _quantised(exported.module(), precision == "int8_dynamic", batches)
        dimensions = program.open_dimensions()
        exported = torch.export.export(quantised, (program.example(),), dynamic_shapes=dimensions, strict=False)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    with open(path, "wb") as file:
        lowered.write_to_file(file)


@torch.no_grad()
def _quantised(graph: torch.nn.Module, dynamic: bool, batches: Iterable[Tensor]) -> torch.nn.Module:
    """A graph whose linear layers are quantised as XNNPACK computes them."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
    prepared = prepare_pt2e(graph, quantizer)
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)


def save_coreml(
    model: PreTrainedModel, path: str | Path, image_size: tuple[int, int], precision: str = "float32"
) -> None:
    """Write a package for Core ML (iOS 18, macOS 15); it is written on any system, and runs on Apple's alone.

    Args:
        model: as in `ImageProgram`.
        path: of the package, which ends in .mlpackage.
        image_size: height and width of the images that it takes.
        precision: one of `COREML_PRECISIONS`: "int8_weights" has a scale for each output channel, "int4" one for every
            32 weights.

    Raises:
        ValueError: the precision is none of these.
        ImportError: the package coremltools is not installed.
    """
    import coremltools

    if precision not in COREML_PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(COREML_PRECISIONS)}")
    program = ImageProgram(model, image_size)
    example = program.example()
    # bounded, for Core ML's range of a dimension is part of its type
    batch = coremltools.RangeDim(lower_bound=1, upper_bound=MAX_BATCH, default=1)
    package = coremltools.convert(
        program.export().run_decompositions(),
        inputs=[coremltools.TensorType("pixel_values", (batch, *example.shape[1:]))],
        outputs=[coremltools.TensorType(name) for name in output_names(model)],
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT32,
        skip_model_load=True,
    )
    if precision != "float32":
        package = coremltools.optimize.coreml.linear_quantize_weights(package, _coreml_config(precision))
    package.save(str(path))


def _coreml_config(precision: str) -> Any:
    from coremltools.optimize.coreml import OpLinearQuantizerConfig, OptimizationConfig

    small = {"dtype": "int4", "granularity": "per_block", "block_size": 32} if precision == "int4" else {}
    return OptimizationConfig(global_config=OpLinearQuantizerConfig(mode="linear_symmetric", **small))
