"""Forward passes: students beside transformers' own model of the same shape.

benchmark.py calls this file and writes what it finds. Weights are random, which does not change the speed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, PreTrainedModel

from raptor_hf import RaptorConfig, RaptorModel

from .measuring import Comparison, alternate
from .training import BLOCK_REPEATS, SHAPES

TEACHER = "teacher"
# name of the row: fields of the student's configuration
STUDENTS: dict[str, dict[str, Any]] = {
    "mlp": dict(ffn_type="mlp", depth_conditioning="none"),
    "mlp, low_rank": dict(ffn_type="mlp", depth_conditioning="low_rank"),
    "swiglu, scale": dict(ffn_type="swiglu", depth_conditioning="scale"),
}


def build(size: str, name: str) -> PreTrainedModel:
    """A model of `SHAPES` in eval mode, on the CPU: the teacher's or one of `STUDENTS`."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SHAPES[size])
    if name == TEACHER:
        return Dinov2WithRegistersModel(config).eval()
    options = STUDENTS[name] | {"intermediate_size": 4 * config.hidden_size}
    return RaptorModel(RaptorConfig.from_teacher(config, BLOCK_REPEATS, **options)).eval()


def images_of(size: str, batch_size: int) -> Tensor:
    """Random images, (B, 3, H, W)."""
    side = SHAPES[size]["image_size"]
    return torch.randn(batch_size, 3, side, side)


def compare_forward(
    size: str,
    batch_size: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    repeats: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """
    Latency of all students against the teacher, in turn in one process.

    Args:
        size: of `SHAPES`.
        batch_size: images.
        device: where.
        dtype: of weights and images.
        compiled: whether all of them are compiled.
        repeats: repetitions that are timed.
        warmup: repetitions before these.

    Returns:
        A JSON-able row per student; `ratio` is the student's time over the teacher's, below 1 is faster.
    """
    names = [TEACHER, *STUDENTS]
    images = images_of(size, batch_size).to(device, dtype)
    models: list[Callable[[Tensor], Any]] = [build(size, name).to(device, dtype) for name in names]
    if compiled:
        # what earlier rows compiled counts towards the limit of graphs per function, past which it stays eager
        torch.compiler.reset()
        models = [torch.compile(model) for model in models]
    with torch.no_grad():
        calls = [partial(model, images) for model in models]
        times = alternate(calls, repeats=repeats, warmup=max(warmup, 3 if compiled else 1), device=device)
    seconds = np.median(times, axis=1).tolist()
    rows = []
    for index, name in enumerate(names[1:], start=1):
        comparison = Comparison(times[0].tolist(), times[index].tolist())
        rows.append(
            {
                "size": size,
                "batch_size": batch_size,
                "student": name,
                "precision": str(dtype).removeprefix("torch."),
                "compiled": compiled,
                "teacher_seconds": seconds[0],
                "seconds": seconds[index],
                "ratio": comparison.ratio,
                "ratio_quartiles": list(comparison.ratio_quartiles),
                "images_per_second": batch_size / seconds[index],
                "repeats": repeats,
            }
        )
    return rows
