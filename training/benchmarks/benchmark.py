"""Benchmark: what this package costs beside what else does the job, as ratios of two things that run alternately.

    python -m training.benchmarks.benchmark  # everything, on this machine's CPU, at most 40 minutes
    python -m training.benchmarks.benchmark --parts training --sizes digits  # one part; the page keeps the others
    python -m training.benchmarks.benchmark --device cuda --dtypes float32 bfloat16 --output_dir runs/benchmark_gpu

Parts: "forward", students against transformers' own DINOv2 with registers; "training", a step against the plain loop of
training/raptor_minimal.py; "growth" of a step with its sizes; "input", the loader. Each writes a JSON file to
output_dir, and all of them together README.md there. Time to fidelity is a study of its own:
training/configs/study/time_to_fidelity_*.yaml.
"""

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import torch
from raptor_settings.declare import check_settings, setting

from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment
from raptor_hf.recipes.settings import parse_settings, user_errors

from . import forward, report, training
from .growth import GROWTH, StepShape, growth, phase_growth
from .input import input_pipeline
from .measuring import count_flops, matmul_peak
from .training import SHAPES, TrainingCase

logger = logging.getLogger("benchmark")


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
    page = report.page(records, fidelity_results(output_dir), (output_dir / "measured_once.md").exists())
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
    """Decides by FLOPs which rows are measured, and how often.

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
    """Latency of students against the teacher, eager and, at the batch size in the middle, compiled."""
    planner = Planner(settings, device)
    rows = []
    compiled_batch = sorted(settings.batch_sizes)[len(settings.batch_sizes) // 2]
    for size, dtype, batch_size in product(settings.sizes, settings.dtypes, settings.batch_sizes):
        repeats = planner.repeats(size, batch_size, dtype, 1, len(forward.STUDENTS) + 1)
        is_compiled = batch_size == compiled_batch and size in settings.compiled_sizes
        for compiled in (False, True) if is_compiled else (False,):
            if repeats:
                options = {"device": device, "dtype": getattr(torch, dtype), "compiled": compiled}
                own = forward.compare_forward(size, batch_size, **options, repeats=repeats, warmup=settings.warmup)
                for row in own:
                    log_row(row, f"{row['ratio']:.3f} of the teacher's time")
                rows += own
    return {"forward": rows, "left_out": planner.left_out}


def run_training(settings: BenchmarkSettings, device: torch.device) -> dict[str, Any]:
    """Training steps against the reference loop."""
    planner = Planner(settings, device)
    rows = []
    for size, batch_size, dtype in product(settings.sizes, settings.batch_sizes, settings.dtypes):
        # teacher, student, and its backward pass, which costs two
        if repeats := planner.repeats(size, batch_size, dtype, 4, 2):
            for case in training_cases(size, batch_size, dtype, device):
                row = training.compare_training(case, repeats, settings.warmup)
                log_row(row, f"{row['speedup']:.3f} times as fast as the reference, MFU {row['mfu']['ours']:.0%}")
                rows.append(row)
    return {"training": rows, "left_out": planner.left_out}


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


def run_growth(settings: BenchmarkSettings, device: torch.device) -> dict[str, Any]:
    """How a step grows with its sizes, and the search of phases with depth."""
    records = growth(StepShape(), GROWTH, device=device, repeats=min(5, settings.repeats), warmup=1)
    return {"growth": records, "phases": phase_growth()}


def run_input(settings: BenchmarkSettings, device: torch.device) -> dict[str, Any]:
    """The loader."""
    return {"input": input_pipeline(settings.data, repeats=min(5, settings.repeats))}


def log_row(row: dict[str, Any], what: str) -> None:
    """One line for a finished row."""
    names = ("size", "batch_size", "student", "ffn_type", "stage", "precision")
    logger.info("%s: %s", ", ".join(str(row[name]) for name in names if name in row), what)


PARTS: dict[str, Callable[[BenchmarkSettings, torch.device], dict[str, Any]]] = {
    "forward": run_forward,
    "training": run_training,
    "growth": run_growth,
    "input": run_input,
}


if __name__ == "__main__":
    main()
