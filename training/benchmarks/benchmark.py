"""Benchmark: what this package costs beside what else does the job, as ratios of two things that run alternately.

    python -m training.benchmarks.benchmark  # everything, on this machine's CPU, at most 40 minutes
    python -m training.benchmarks.benchmark --parts training --sizes digits  # one part; the page keeps the others
    python -m training.benchmarks.benchmark --device cuda --dtypes float32 bfloat16 --output_dir runs/benchmark_gpu

Parts: "forward", students against transformers' own DINOv2 with registers; "training", a step against the plain loop of
training/raptor_minimal.py; "growth" of a step with its sizes; "input", the loader. Each writes a JSON file to
output_dir, and all of them together README.md there. Time to fidelity is a study of its own:
training/configs/study/time_to_fidelity_*.yaml.
"""

from raptor_settings.parse import parse_settings

from .settings import BenchmarkSettings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(BenchmarkSettings)

import json
import logging
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment
from raptor_hf.recipes.settings import user_errors

from . import forward, report, training
from .growth import GROWTH, StepShape, growth, phase_growth
from .input import input_pipeline
from .measuring import count_flops, matmul_peak
from .training import TrainingCase

logger = logging.getLogger("benchmark")


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
        write_json(output_dir / f"{part}.json", RUNS[part](settings, device) | facts)
    records = {part: json.loads(path.read_text()) for part in RUNS if (path := output_dir / f"{part}.json").exists()}
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


RUNS: dict[str, Callable[[BenchmarkSettings, torch.device], dict[str, Any]]] = {
    "forward": run_forward,
    "training": run_training,
    "growth": run_growth,
    "input": run_input,
}


if __name__ == "__main__":
    main()
