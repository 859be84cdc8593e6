"""How the cost of training grows with depth, tokens, width, batch and blocks, and the search of phases with depth.

One variable at a time moves away from a base shape that a CPU trains on. All values of a variable run alternately in
one process; what counts is the ratio to the base, and the slope on logarithmic axes: 1 is proportional.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.conversion import student_from_teacher
from raptor_hf.phases import Partition, find_phases
from raptor_hf.teacher import Teacher

from .measuring import Comparison, alternate, count_flops
from .training import OurStep

SYMBOLS = {"num_layers": "L", "image_size": "T", "hidden_size": "D", "batch_size": "B", "num_blocks": "k"}
# of StepShape; num_blocks changes neither steps nor tokens
GROWTH = {
    "num_layers": (6, 12, 24, 48),
    "image_size": (8, 16, 32, 48),
    "hidden_size": (96, 192, 384),
    "batch_size": (2, 8, 32),
    "num_blocks": (1, 3, 6, 12),
}
PHASE_LAYERS = (12, 24, 48, 100, 200, 500, 1000)
HEAD_SIZE, PATCH_SIZE, NUM_REGISTERS = 32, 2, 2


@dataclass(frozen=True)
class StepShape:
    """Shape of a training step: L layers, k blocks, D, side of the images in pixels, B."""

    num_layers: int = 12
    num_blocks: int = 3
    hidden_size: int = 96
    image_size: int = 16
    batch_size: int = 8

    @property
    def num_tokens(self) -> int:
        """T: cls, registers and patches."""
        return 1 + NUM_REGISTERS + (self.image_size // PATCH_SIZE) ** 2

    @property
    def partition(self) -> Partition:
        """Layers of each block, as equally many as there can be."""
        ends = np.linspace(0, self.num_layers, self.num_blocks + 1).round().astype(int)
        return Partition.from_boundaries(ends[1:-1].tolist(), self.num_layers)


def make_step(shape: StepShape, device: torch.device) -> OurStep:
    """Stage 2 of our recipe at a shape; weights and images are random numbers, which does not change the speed."""
    config = Dinov2WithRegistersConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.hidden_size // HEAD_SIZE,
        image_size=shape.image_size,
        patch_size=PATCH_SIZE,
        num_register_tokens=NUM_REGISTERS,
    )
    teacher = Teacher(Dinov2WithRegistersModel(config).to(device))
    student = student_from_teacher(teacher, shape.partition, seed=0, depth_conditioning="low_rank").to(device)
    images = torch.randn(shape.batch_size, 3, shape.image_size, shape.image_size, device=device)
    return OurStep(teacher, student, images, learning_rate=1e-4)


def growth(
    base: StepShape, values: Mapping[str, Sequence[int]], *, device: torch.device, repeats: int = 5, warmup: int = 1
) -> list[dict[str, Any]]:
    """Measures the training step of a base shape, and of shapes that differ from it in one variable.

    Args:
        base: the shape that all are compared with.
        values: of fields of `StepShape`; T is varied by the size of the images.
        device: where.
        repeats: repetitions that are timed.
        warmup: repetitions before these.

    Returns:
        A record for every variable: its symbol, the `points` (value x, median seconds, saved bytes, FLOPs, and the
        ratios of time, memory and FLOPs to the base's), and slopes d log y / d log x: over all points, and of time
        between the two largest, where overhead counts least.
    """
    return [_growth_record(name, base, own, device, repeats, warmup) for name, own in values.items()]


def _growth_record(
    name: str, base: StepShape, values: Sequence[int], device: torch.device, repeats: int, warmup: int
) -> dict[str, Any]:
    shapes = [replace(base, **{name: value}) for value in sorted({*values, getattr(base, name)})]
    steps = [make_step(shape, device) for shape in shapes]
    x = [shape.num_tokens if name == "image_size" else getattr(shape, name) for shape in shapes]
    times = alternate(steps, repeats=repeats, warmup=warmup, device=device)
    memory, flops = [step.saved_bytes() for step in steps], [count_flops(step) for step in steps]
    origin = shapes.index(base)
    seconds = np.median(times, axis=1).tolist()
    points = [
        {
            "x": x[index],
            "seconds": seconds[index],
            "time_ratio": Comparison(times[origin].tolist(), times[index].tolist()).ratio,
            "saved_bytes": memory[index],
            "memory_ratio": memory[index] / memory[origin],
            "flops": flops[index],
            "flops_ratio": flops[index] / flops[origin],
        }
        for index in range(len(shapes))
    ]
    return {
        "symbol": SYMBOLS[name],
        "base": x[origin],
        "points": points,
        "time_slope": log_slope(x, seconds),
        "time_slope_at_the_end": log_slope(x[-2:], seconds[-2:]),
        "memory_slope": log_slope(x, memory),
        "flops_slope": log_slope(x, flops),
    }


def phase_growth(
    num_layers: Sequence[int] = PHASE_LAYERS, *, num_blocks: int = 8, repeats: int = 7, seed: int = 0
) -> dict[str, Any]:
    """Measures the search of phases, `find_phases`, against the number of layers.

    Args:
        num_layers: L, at least two different ones.
        num_blocks: k.
        repeats: repetitions that are timed.
        seed: of the distances: those of points along a line, disturbed.

    Returns:
        `points` and slopes as in the records of `growth`, of time alone.
    """
    layers = sorted(set(num_layers))
    generator = np.random.default_rng(seed)
    searches = [partial(find_phases, _distance(length, generator), num_blocks) for length in layers]
    times = alternate(searches, repeats=repeats, warmup=1, device=torch.device("cpu"))
    seconds = np.median(times, axis=1).tolist()
    return {
        "num_blocks": num_blocks,
        "points": [{"x": length, "seconds": median} for length, median in zip(layers, seconds, strict=True)],
        "time_slope": log_slope(layers, seconds),
        "time_slope_at_the_end": log_slope(layers[-2:], seconds[-2:]),
    }


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y against log x by least squares: p where y is proportional to x^p."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _distance(num_layers: int, generator: np.random.Generator) -> np.ndarray:
    """Distances between layers, (L, L), that grow with the number of layers between them."""
    places = np.sort(generator.random(num_layers))
    noise = np.triu(0.05 * generator.random((num_layers, num_layers)), 1)
    return abs(places - places[:, None]) + noise + noise.T
