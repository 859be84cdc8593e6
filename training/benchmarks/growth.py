"""How the cost of training grows: with depth, tokens, width, batch and blocks; phases with depth; processes.

    from .growth import StepShape, growth, phase_growth, process_scaling
    for record in growth(StepShape(), GROWTH, device=torch.device("cpu"), repeats=5):
        print(record["symbol"], record["time_slope"], record["memory_slope"])

One variable at a time moves away from a base shape that a CPU trains on. All values of a variable run alternately in
one process; what counts is the ratio to the base, and the slope on logarithmic axes: 1 is proportional.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.conversion import student_from_teacher
from raptor_hf.distillation.task import DistillationTask, TrajectoryLoss
from raptor_hf.phases import Partition, find_phases
from raptor_hf.teacher import Teacher
from raptor_hf.tokens import TokenLayout

from .measuring import Comparison, alternate, count_flops, saved_bytes

ROOT = Path(__file__).parents[2]
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


@dataclass(frozen=True)
class StepShape:
    """Shape of a training step: teacher, student and batch.

    Args:
        num_layers: L, of the teacher; steps of the student.
        num_blocks: k, of the student, each for as equal a number of layers as there can be.
        hidden_size: D, a multiple of `head_size`.
        image_size: side in pixels, a multiple of `patch_size`.
        batch_size: B.
        head_size: D / heads.
        patch_size: side in pixels.
        num_registers: R.

    Raises:
        ValueError: the sizes do not divide, or there are fewer layers than blocks.
    """

    num_layers: int = 12
    num_blocks: int = 3
    hidden_size: int = 96
    image_size: int = 16
    batch_size: int = 8
    head_size: int = 32
    patch_size: int = 2
    num_registers: int = 2

    def __post_init__(self) -> None:
        if self.hidden_size % self.head_size or self.image_size % self.patch_size:
            raise ValueError(
                f"hidden_size={self.hidden_size} and image_size={self.image_size} must be multiples of "
                f"head_size={self.head_size} and patch_size={self.patch_size}"
            )
        if not 1 <= self.num_blocks <= self.num_layers:
            raise ValueError(f"num_blocks={self.num_blocks} must be in 1..{self.num_layers}, the layers")

    @property
    def num_tokens(self) -> int:
        """T: cls, registers and patches."""
        return 1 + self.num_registers + (self.image_size // self.patch_size) ** 2

    @property
    def partition(self) -> Partition:
        """Layers of each block."""
        ends = np.linspace(0, self.num_layers, self.num_blocks + 1).round().astype(int)
        return Partition.from_boundaries(ends[1:-1].tolist(), self.num_layers)


class TrainingStep:
    """Stage 2 with the teacher online, as the distillation recipe trains: loss of every layer, clipped AdamW step.

    Weights and images are random numbers, which does not change the speed.

    Args:
        shape: of teacher, student and batch.
        device: where.
        dtype: of autocast; float32 for none.
    """

    def __init__(self, shape: StepShape, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        config = Dinov2WithRegistersConfig(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.hidden_size // shape.head_size,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            num_register_tokens=shape.num_registers,
        )
        self.teacher = Teacher(Dinov2WithRegistersModel(config).to(device))
        student = student_from_teacher(self.teacher, shape.partition, seed=0, depth_conditioning="low_rank").train()
        student.base_model.embeddings.requires_grad_(False)
        student.base_model.layernorm.requires_grad_(False)
        scale = torch.ones(shape.num_layers + 1, device=device)
        loss = TrajectoryLoss(tokens=TokenLayout(shape.num_registers), layer_scale=scale)
        self.task = DistillationTask(student.to(device), loss, stage2_weights=[0.45, 0.10, 0.45])
        self.trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=device.type in ("cpu", "cuda"))
        self.pixel_values = torch.randn(shape.batch_size, 3, shape.image_size, shape.image_size, device=device)
        self._autocast = (
            contextlib.nullcontext
            if dtype == torch.float32
            else functools.partial(torch.autocast, device.type, dtype=dtype)
        )

    def __call__(self) -> None:
        """Runs one step."""
        self.loss(self.states()).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def states(self) -> Tensor:
        """The teacher's trajectory, (B, L + 1, T, D)."""
        with self._autocast():
            return self.teacher.trajectory(self.pixel_values)

    def loss(self, states: Tensor) -> Tensor:
        """The scalar to differentiate."""
        with self._autocast():
            return self.task(states, stage=2)["loss"]

    def saved_bytes(self) -> int:
        """Bytes of the activations that the student keeps for its backward pass, the teacher's states left out."""
        states = self.states()
        return saved_bytes(lambda: self.loss(states), exclude=[*self.task.parameters(), states])


def growth(
    base: StepShape,
    values: Mapping[str, Sequence[int]],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
    warmup: int = 1,
) -> list[dict[str, Any]]:
    """Measures the training step of a base shape, and of shapes that differ from it in one variable.

    Args:
        base: the shape that all are compared with.
        values: of some of the variables L, T (as `image_size`), D, B and k, named as the fields of `StepShape`.
        device: where.
        dtype: of autocast; float32 for none.
        repeats: repetitions that are timed.
        warmup: repetitions before these.

    Returns:
        A record for every variable: its symbol, the `points` (value x, median seconds, saved bytes, bytes of the
        teacher's states, FLOPs, and the ratios of time, memory and FLOPs to the base's, that of time with quartiles),
        and slopes d log y / d log x: over all points, and of time between the two largest, where overhead counts least.

    Raises:
        ValueError: an unknown variable, fewer than 2 values of one, or a shape that cannot be.
    """
    if unknown := values.keys() - SYMBOLS.keys():
        raise ValueError(f"values has {sorted(unknown)}; the variables are {list(SYMBOLS)}")
    shapes = {}
    for name in values:
        swept = sorted({*values[name], getattr(base, name)})
        if len(swept) < 2:
            raise ValueError(f"{name} has the one value {swept[0]}; growth needs at least one other than the base's")
        shapes[name] = [replace(base, **{name: value}) for value in swept]
    return [_growth_record(name, base, shapes[name], device, dtype, repeats, warmup) for name in shapes]


def _growth_record(
    name: str,
    base: StepShape,
    shapes: list[StepShape],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    warmup: int,
) -> dict[str, Any]:
    steps = [TrainingStep(shape, device, dtype) for shape in shapes]
    times = alternate(steps, repeats=repeats, warmup=warmup, device=device)
    memory = [step.saved_bytes() for step in steps]
    flops = [count_flops(step) for step in steps]
    origin = shapes.index(base)
    points = []
    for index, shape in enumerate(shapes):
        comparison = Comparison(times[origin].tolist(), times[index].tolist())
        states = shape.batch_size * (shape.num_layers + 1) * shape.num_tokens * shape.hidden_size * dtype.itemsize
        points.append(
            {
                "x": shape.num_tokens if name == "image_size" else getattr(shape, name),
                "seconds": float(np.median(times[index])),
                "time_ratio": comparison.ratio,
                "time_ratio_quartiles": [1 / speedup for speedup in reversed(comparison.quartiles)],
                "saved_bytes": memory[index],
                "memory_ratio": memory[index] / memory[origin],
                "states_bytes": states,
                "flops": flops[index],
                "flops_ratio": flops[index] / flops[origin],
            }
        )
    x = [point["x"] for point in points]
    seconds = [point["seconds"] for point in points]
    return {
        "variable": name,
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
        As the records of `growth`, of time alone; the first L is the base.
    """
    layers = sorted(set(num_layers))
    generator = np.random.default_rng(seed)
    searches = [functools.partial(find_phases, _distance(length, generator), num_blocks) for length in layers]
    times = alternate(searches, repeats=repeats, warmup=1, device=torch.device("cpu"))
    seconds = np.median(times, axis=1).tolist()
    return {
        "variable": "num_layers",
        "symbol": "L",
        "base": layers[0],
        "num_blocks": num_blocks,
        "points": [
            {"x": length, "seconds": median, "time_ratio": Comparison(times[0].tolist(), own.tolist()).ratio}
            for length, median, own in zip(layers, seconds, times, strict=True)
        ],
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


@dataclass(frozen=True)
class Launch:
    """A way to run the recipe on the CPU: processes, and threads in each."""

    num_processes: int
    num_threads: int

    @property
    def name(self) -> str:
        """For tables."""
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        return f"{processes} x {self.num_threads} thread{'s' if self.num_threads > 1 else ''}"


# the first is what the others are compared with
LAUNCHES = (Launch(1, 1), Launch(1, 2), Launch(2, 1))


def process_scaling(
    config: str = "training/configs/distill/digits_k3.yaml",
    *,
    steps: int = 60,
    log_every: int = 10,
    repeats: int = 3,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures training by `accelerate launch` with one process and with two, at the same global batch.

    Every repetition launches each of `LAUNCHES` once. Rates are those of training/distill.py's own log, loading of
    images included, without the first interval, in which everything warms up.

    Args:
        config: of training/distill.py, with stage 2 and a teacher that is there, relative to the project.
        steps: of stage 2 in each run.
        log_every: steps in an interval.
        repeats: runs of each launch.
        options: further settings of the recipe.

    Returns:
        The launches, each with images per second of each run, the speed-up over the first launch with quartiles, and
        the last loss, which is the same where the work was; or "skipped", the reason, on fewer than 2 usable cores.

    Raises:
        RuntimeError: a run failed, with the end of its output.
    """
    num_cores = len(os.sched_getaffinity(0))
    if num_cores < 2:
        return {"skipped": f"two processes need 2 cores, and this one may use {num_cores}"}
    settings = {"stage1_steps": 0, "stage2_steps": steps, "log_every": log_every, "checkpoint_every": steps}
    settings |= {"warmup_steps": 1, "phase_images": 64, "num_bootstraps": 0, "eval_images": 100}
    settings |= options or {}
    runs = [{launch: _launched(launch, config, settings) for launch in LAUNCHES} for _ in range(repeats)]
    rates = {launch: [run[launch][0] for run in runs] for launch in LAUNCHES}
    seconds = {launch: [1 / rate for rate in rates[launch]] for launch in LAUNCHES}
    return {
        "config": config,
        "steps": steps,
        "num_cores": num_cores,
        "launches": [
            {
                "name": launch.name,
                "images_per_second": rates[launch],
                **Comparison(seconds[LAUNCHES[0]], seconds[launch]).to_dict(),
                "last_loss": runs[-1][launch][1],
            }
            for launch in LAUNCHES
        ],
    }


def _launched(launch: Launch, config: str, settings: Mapping[str, Any]) -> tuple[float, float]:
    """Runs the recipe once; images per second after the first interval, and the loss of the last one."""
    file = f"training/accelerate/cpu{launch.num_processes if launch.num_processes > 1 else ''}.yaml"
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
        command += ["training/distill.py", config, *flags, "--output_dir", str(output)]
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": str(launch.num_threads),
            "PYTHONPATH": str(ROOT),
        }
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{launch.name}: {' '.join(command)} failed: {(run.stdout + run.stderr)[-2000:]}")
        history = json.loads((output / "losses.json").read_text())["stage2"]
    return rate_after_warmup(history), history[-1]["loss"]


def rate_after_warmup(history: Sequence[Mapping[str, float]]) -> float:
    """Images per second of a run's log without its first interval.

    Args:
        history: records of `IntervalLog`, at least two.

    Raises:
        ValueError: fewer.
    """
    if len(history) < 2:
        raise ValueError(f"the log has {len(history)} intervals; it takes at least 2 to leave the first one out")
    seconds = [record["seconds"] - before["seconds"] for before, record in pairwise(history)]
    images = sum(record["images_per_second"] * duration for record, duration in zip(history[1:], seconds, strict=True))
    return images / sum(seconds)
