"""Forward passes: students beside transformers' own model of the same shape; latency, memory, disk, start, compiling.

benchmark.py calls this file and writes what it finds. Weights are random, which does not change the speed.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, PreTrainedModel

from raptor_hf import RaptorConfig, RaptorModel

from .measuring import Comparison, alternate, fresh_process_seconds, peak_memory
from .training import BLOCK_REPEATS, SHAPES

TEACHER = "teacher"
# name of the row: fields of the student's configuration
STUDENTS: dict[str, dict[str, Any]] = {
    "mlp": dict(ffn_type="mlp", depth_conditioning="none"),
    "mlp, low_rank": dict(ffn_type="mlp", depth_conditioning="low_rank"),
    "swiglu, scale": dict(ffn_type="swiglu", depth_conditioning="scale"),
}
# layers and blocks of the students whose compile times are compared
COMPILED_SHAPES = ((12, 2), (24, 2), (12, 4), (24, 4))
COMPILE_PROGRAM = """
import os
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
import time
import torch
from raptor_hf import RaptorConfig, RaptorModel
torch.set_num_threads({threads})
config = RaptorConfig(block_repeats={repeats}, num_hidden_layers={layers}, **{shape})
model = torch.compile(RaptorModel(config).eval().to({device!r}))
images = torch.randn(2, 3, config.image_size, config.image_size, device={device!r})
with torch.no_grad():
    began = time.perf_counter()
    model(images).last_hidden_state.sum().item()
    print(time.perf_counter() - began)
"""
START_PROGRAM = """
import torch
{imported}from transformers import AutoModel
torch.set_num_threads({threads})
with torch.no_grad():
    model = AutoModel.from_pretrained({folder!r}).to({device!r})
    model(torch.zeros(1, 3, {side}, {side}, device={device!r})).last_hidden_state.sum().item()
"""


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
        low, high = comparison.quartiles
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
                "ratio_quartiles": [1 / high, 1 / low],
                "images_per_second": batch_size / seconds[index],
                "repeats": repeats,
            }
        )
    return rows


def peak_memories(size: str, batch_size: int, device: torch.device) -> dict[str, int]:
    """Bytes by which model and forward pass raise the memory in use; on a CPU each in a process of its own."""
    return {name: peak_memory(partial(_forward, size, batch_size, name, device), device) for name in (TEACHER, "mlp")}


def _forward(size: str, batch_size: int, name: str, device: torch.device) -> None:
    with torch.no_grad():
        build(size, name).to(device)(images_of(size, batch_size).to(device))


def disk_and_start(size: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """Bytes of the saved weights, and seconds of a process that imports, loads them, and gives its first output."""
    record: dict[str, Any] = {"size": size, "disk_bytes": {}, "start_seconds": {TEACHER: [], "mlp": []}}
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / name.replace(", ", "-") for name in (TEACHER, *STUDENTS)}
        for name, folder in folders.items():
            build(size, name).save_pretrained(folder)
            record["disk_bytes"][name] = (folder / "model.safetensors").stat().st_size
        for _ in range(repeats):
            for name, seconds in record["start_seconds"].items():
                program = START_PROGRAM.format(
                    imported="" if name == TEACHER else "import raptor_hf\n",  # who uses a teacher does not
                    folder=str(folders[name]),
                    side=SHAPES[size]["image_size"],
                    device=str(device),
                    threads=torch.get_num_threads(),
                )
                seconds += fresh_process_seconds(program, 1)
    return record


def compile_seconds(
    device: torch.device, shapes: Sequence[tuple[int, int]] = COMPILED_SHAPES, repeats: int = 1
) -> list[dict[str, Any]]:
    """Seconds of the first call of a compiled student with (layers, blocks), in a fresh process without a cache."""
    records = []
    for layers, blocks in shapes:
        program = COMPILE_PROGRAM.format(
            layers=layers,
            repeats=[layers // blocks] * blocks,
            shape=SHAPES["digits"],
            device=str(device),
            threads=torch.get_num_threads(),
        )
        seconds = fresh_process_seconds(program, repeats)
        records.append({"num_layers": layers, "num_blocks": blocks, "seconds": seconds})
    return records
