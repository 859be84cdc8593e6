"""Benchmark: what this package costs beside what else does the job, as ratios of two things that run alternately.

    python -m training.benchmarks.benchmark  # everything, on this machine's CPU, about 40 minutes
    python -m training.benchmarks.benchmark --parts training --sizes digits  # one part; the page keeps the others
    python -m training.benchmarks.benchmark --device cuda --dtypes float32 bfloat16 --output_dir runs/benchmark_gpu

Parts: "forward", students against transformers' own DINOv2 with registers; "training", a step against the plain loop
of reference_loop.py; "candidates", what was tried to make it cheaper; "growth" of a step with its sizes; "input", the
loader against what a step eats. Each writes a JSON file to output_dir, and all of them together README.md there. Time
to fidelity is a study of its own: training/configs/study/time_to_fidelity_*.yaml.
"""

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from raptor_settings.declare import check_settings, setting

from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment
from raptor_hf.recipes.settings import parse_settings, user_errors

from . import candidates, forward, report, training
from .growth import GROWTH, StepShape, growth, phase_growth, process_scaling
from .input import estimated_rate, input_pipeline
from .measuring import count_flops, matmul_peak, memory_bandwidth
from .training import SHAPES, TrainingCase

logger = logging.getLogger("benchmark")

# bf16 without sparsity, as the vendor states it; for the estimate of what a GPU eats
H100_PEAK = 989e12


@dataclass(frozen=True)
class BenchmarkSettings:
    """Measure what this package costs beside what else does the job."""

    recipe: ClassVar[str] = "benchmark"
    command: ClassVar[str] = "python -m training.benchmarks.benchmark"
    example: ClassVar[str] = "--parts training --sizes digits"

    parts: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": "parts of the benchmark", "group": "run"}
    )
    sizes: list[str] = field(
        default_factory=lambda: list(SHAPES), metadata={"help": "sizes of the models", "group": "teacher"}
    )
    compiled_sizes: list[str] = setting(
        ["digits", "vits14"], help="sizes that are also compiled, a minute for each model", group="teacher"
    )
    batch_sizes: list[int] = setting([1, 8, 64], help="batch sizes", group="images", unit="images", at_most=1_048_576)
    dtypes: list[str] = setting(["float32"], help="precisions; on a GPU also bfloat16", group="machine")
    device: str = setting("cpu", help="device of PyTorch", group="machine")
    num_threads: int | None = setting(
        None, help="threads of PyTorch on the CPU; none takes all cores", group="machine", at_most=4096
    )
    repeats: int = setting(15, help="timings of each row", group="run", at_most=1_000_000)
    warmup: int = setting(2, help="calls before the timings", group="run", at_most=1_000_000)
    max_call_seconds: float = setting(
        15.0,
        help="sizes and batches whose single call takes longer are left out and listed",
        group="run",
        unit="seconds",
        above=0,
    )
    max_row_seconds: float = setting(
        60.0, help="rows that would take longer get fewer repeats, at least 3", group="run", unit="seconds", above=0
    )
    data: str = setting("data", help="folder of the parquet files for the input pipeline", group="images")
    output_dir: str = setting("training/results/benchmark", help="folder of the numbers and the page", group="run")

    def __post_init__(self) -> None:
        if self.repeats < 3 or self.warmup < 1:
            raise ValueError(f"repeats is {self.repeats} and warmup {self.warmup}; they must be at least 3 and 1")
        for name, known in self._choices():
            values = getattr(self, name)
            if (not values and name != "compiled_sizes") or any(value not in known for value in values):
                raise ValueError(f"{name} is {values}; it must hold some of {', '.join(known)}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes is {self.batch_sizes}; it must hold numbers of at least 1")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads is {self.num_threads}; it must be at least 1")
        check_settings(self)

    @staticmethod
    def _choices() -> tuple[tuple[str, Collection[str]], ...]:
        dtypes = "float32", "bfloat16"
        return ("parts", PARTS), ("sizes", SHAPES), ("compiled_sizes", SHAPES), ("dtypes", dtypes)


def main() -> None:
    settings = parse_settings(BenchmarkSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        device = open_device(settings.device)
        output_dir = Path(settings.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    for part in settings.parts:
        logger.info("%s", part)
        facts = {"device_type": device.type, "num_threads": torch.get_num_threads(), **describe_environment(device)}
        write_json(output_dir / f"{part}.json", PARTS[part](settings, device) | facts)
    records = {part: json.loads(path.read_text()) for part in PARTS if (path := output_dir / f"{part}.json").exists()}
    page = report.page(records, fidelity_results(output_dir))
    write_text_atomically(output_dir / "README.md", page)
    print(page)


def open_device(name: str) -> torch.device:
    """The device of a name, tried.

    Raises:
        ValueError: there is none.
    """
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which cannot be used here: {error}") from error


def fidelity_results(output_dir: Path) -> dict[str, Any]:
    """Results of the studies of time to fidelity beside the benchmark, by folder."""
    paths = sorted(output_dir.glob("fidelity_*/results.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


class Planner:
    """Decides by FLOPs what is worth measuring, and how often.

    Args:
        settings: its limits.
        device: whose matmul peak is measured.
    """

    def __init__(self, settings: BenchmarkSettings, device: torch.device) -> None:
        self.settings = settings
        self.peaks = {name: matmul_peak(device, getattr(torch, name)) for name in settings.dtypes}
        self.flops: dict[str, int] = {}
        self.left_out: list[str] = []

    def seconds(self, size: str, batch_size: int, dtype: str, passes: int) -> float:
        """About what a call of `passes` forward passes takes."""
        if size not in self.flops:
            model, images = forward.build(size, "teacher"), forward.images_of(size, 1)
            self.flops[size] = count_flops(lambda: model(images))
        # overhead of small sizes, and operators that are no matrix products
        return 0.02 + 1.4 * passes * batch_size * self.flops[size] / self.peaks[dtype]

    def repeats(self, size: str, batch_size: int, dtype: str, passes: int, calls: int) -> int | None:
        """How often to repeat a row of `calls` calls of `passes` forward passes each; None to leave it out."""
        seconds = self.seconds(size, batch_size, dtype, passes)
        if seconds > self.settings.max_call_seconds:
            self.left_out.append(f"{size}, batch {batch_size}, {dtype}: about {seconds:.0f} s a call")
            return None
        return int(min(self.settings.repeats, max(3, self.settings.max_row_seconds / (calls * seconds))))


def run_forward(settings: BenchmarkSettings, device: torch.device) -> dict[str, Any]:
    """Part 1: latency eager and compiled, memory, disk, start-up, compile time."""
    planner = Planner(settings, device)
    record: dict[str, Any] = {"forward": [], "memory": [], "disk_and_start": []}
    compiled_batch = sorted(settings.batch_sizes)[len(settings.batch_sizes) // 2]
    for size in settings.sizes:
        for dtype in settings.dtypes:
            for batch_size in settings.batch_sizes:
                repeats = planner.repeats(size, batch_size, dtype, 1, len(forward.STUDENTS) + 1)
                if repeats is None:
                    continue
                is_compiled = batch_size == compiled_batch and size in settings.compiled_sizes
                for compiled in (False, True) if is_compiled else (False,):
                    rows = forward.compare_forward(
                        size,
                        batch_size,
                        device=device,
                        dtype=getattr(torch, dtype),
                        compiled=compiled,
                        repeats=repeats,
                        warmup=settings.warmup,
                    )
                    for row in rows:
                        log_row(row, f"{row['ratio']:.3f} of the teacher's time")
                    record["forward"] += rows
        batch_size = min(8, max(settings.batch_sizes))
        memory = forward.peak_memories(size, batch_size, device)
        record["memory"].append({"size": size, "batch_size": batch_size, "bytes": memory})
        record["disk_and_start"].append(forward.disk_and_start(size, 3, device))
    record["compile"] = forward.compile_seconds(device)
    return record | {"left_out": planner.left_out}


def run_training(settings: BenchmarkSettings, device: torch.device) -> dict[str, Any]:
    """Part 2: training steps against the reference loop, and where their time goes."""
    planner = Planner(settings, device)
    rows, memory, profiles = [], [], []
    for size in settings.sizes:
        cases = []
        for batch_size in settings.batch_sizes:
            for dtype in settings.dtypes:
                # teacher, student, and its backward pass, which costs two
                if repeats := planner.repeats(size, batch_size, dtype, 4, 2):
                    cases += [(case, repeats) for case in training_cases(size, batch_size, dtype, device)]
        for case, repeats in cases:
            row = training.compare_training(case, repeats, settings.warmup)
            log_row(row, f"{row['speedup']:.3f} times as fast as the reference, MFU {row['mfu']['ours']:.0%}")
            rows.append(row)
        if cases:
            largest = cases[-1][0]
            case = TrainingCase(size, largest.batch_size, "mlp", "2", device)
            memory.append({"size": size, "batch_size": case.batch_size, "bytes": training.peak_memories(case)})
            profiles.append(training.profile_step(case, steps=3))
    bandwidth = memory_bandwidth(device)
    return {
        "training": rows,
        "memory": memory,
        "profiles": profiles,
        "memory_bandwidth": bandwidth,
        "left_out": planner.left_out,
    }


def training_cases(size: str, batch_size: int, dtype: str, device: torch.device) -> list[TrainingCase]:
    """What is compared at one size: stage 2 of both kinds of FFN, stage 1 of the published one, ours in bf16."""
    autocast = None if dtype == "float32" else torch.bfloat16
    case = partial(TrainingCase, size, batch_size, device=device)
    cases = [case("mlp", "2", autocast=autocast), case("swiglu", "2", autocast=autocast)]
    if batch_size > 1:
        cases += [case("swiglu", stage, autocast=autocast) for stage in training.STAGES if stage != "2"]
    if autocast is None and device.type == "cpu":
        cases.append(case("mlp", "2", autocast=torch.bfloat16))
    if device.type == "cuda":
        cases.append(case("mlp", "2", autocast=autocast, compile=True))
    return cases


def run_candidates(settings: BenchmarkSettings, device: torch.device) -> dict[str, Any]:
    """What was tried to make a step cheaper, at sizes that are not too long."""
    planner, rows = Planner(settings, device), []
    for size in settings.sizes:
        for batch_size in sorted(settings.batch_sizes, reverse=True):
            calls = 1 + len(candidates.CANDIDATES)
            seconds = planner.seconds(size, batch_size, settings.dtypes[0], 4)
            if seconds < settings.max_row_seconds / calls:  # else a smaller batch
                repeats = int(min(settings.repeats, max(3, settings.max_row_seconds / (calls * seconds))))
                case = TrainingCase(size, batch_size, "mlp", "2", device)
                rows += candidates.compare_candidates(case, repeats, 1)
                break
    return {"candidates": rows}


def run_growth(settings: BenchmarkSettings, device: torch.device) -> dict[str, Any]:
    """Part 4: how a step grows, phases, processes."""
    return {
        "growth": growth(StepShape(), GROWTH, device=device, repeats=min(5, settings.repeats), warmup=1),
        "phases": phase_growth(),
        "processes": process_scaling(steps=40, repeats=2),
    }


def run_input(settings: BenchmarkSettings, device: torch.device) -> dict[str, Any]:
    """Part 5: the loader against the rate of a step here, and of one on a GPU, estimated."""
    case = TrainingCase("vits14", 8, "mlp", "2", device)
    row = training.compare_training(case, 3, 1)
    estimate = estimated_rate(H100_PEAK)
    needed = {
        "ViT-S/14 on this machine": row["images_per_second"]["ours"],
        "ViT-B/14 on one H100, estimated": estimate["images_per_second"],
    }
    record = input_pipeline(settings.data, needed, device=device, repeats=min(5, settings.repeats))
    return {"input": record, "estimate": estimate}


def log_row(row: dict[str, Any], what: str) -> None:
    """One line for a finished row."""
    names = ("size", "batch_size", "student", "ffn_type", "stage", "precision")
    logger.info("%s: %s", ", ".join(str(row[name]) for name in names if name in row), what)


PARTS: dict[str, Callable[[BenchmarkSettings, torch.device], dict[str, Any]]] = {
    "forward": run_forward,
    "training": run_training,
    "candidates": run_candidates,
    "growth": run_growth,
    "input": run_input,
}


if __name__ == "__main__":
    main()
