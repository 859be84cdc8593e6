"""Benchmark: a Raptor beside the DINOv2 of the same shape, alternately in one process; ratios, not absolute times.

    python training/benchmark.py                              # ViT-S/14 at 224 px, batch 1 and 8, all cores
    python training/benchmark.py --size digits --batch_sizes 1 8 64 --repeats 50

Prints a table and writes training/results/benchmark/forward_SIZE.json: median time of either model, the median of the
ratio pair by pair with its quartiles, and what importing raptor_hf adds to importing transformers' DINOv2.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf import RaptorConfig, RaptorModel
from raptor_hf.recipe import describe_environment, write_json
from raptor_hf.settings import parse_settings, user_errors

SHAPES = {
    "digits": dict(hidden_size=96, num_attention_heads=3, image_size=8, patch_size=2, num_register_tokens=2),
    "vits14": dict(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14),
    "vitb14": dict(hidden_size=768, num_attention_heads=12, image_size=224, patch_size=14),
}


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured; weights are random, which does not change the speed."""

    size: Literal["digits", "vits14", "vitb14"] = "vits14"
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    conditionings: list[str] = field(default_factory=lambda: ["none", "low_rank", "scale"])
    repeats: int = 15
    warmup: int = 3
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    output_dir: str = "training/results/benchmark"

    def __post_init__(self) -> None:
        if self.repeats < 3 or self.warmup < 1:
            raise ValueError(f"repeats is {self.repeats} and warmup {self.warmup}; they must be at least 3 and 1")


def main() -> None:
    settings = parse_settings(BenchmarkSettings)
    with user_errors():
        device = torch.device(settings.device)
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, settings.dtype)
    shape = SHAPES[settings.size]
    teacher = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape)).to(device, dtype).eval()
    result: dict[str, Any] = {"size": settings.size, "dtype": settings.dtype, "forward": []}
    print(f"{'student':>16} {'batch':>5} {'teacher ms':>11} {'student ms':>11} {'ratio':>7}  quartiles")
    for conditioning in settings.conditionings:
        config = RaptorConfig.from_teacher(teacher.config, (7, 3, 2), depth_conditioning=conditioning)
        student = RaptorModel(config).to(device, dtype).eval()
        for batch_size in settings.batch_sizes:
            size = shape["image_size"]
            pixel_values = torch.randn(batch_size, 3, size, size, device=device, dtype=dtype)
            times = alternate([teacher, student], pixel_values, settings)
            ratios = np.percentile(times[1] / times[0], (25, 50, 75))
            row = {
                "student": f"mlp, {conditioning}",
                "batch_size": batch_size,
                "teacher_ms": float(np.median(times[0]) * 1e3),
                "student_ms": float(np.median(times[1]) * 1e3),
                "ratio": ratios[1],
                "ratio_quartiles": [ratios[0], ratios[2]],
            }
            result["forward"].append(row)
            print(
                f"{row['student']:>16} {batch_size:>5} {row['teacher_ms']:>11.2f} {row['student_ms']:>11.2f} "
                f"{ratios[1]:>7.3f}  {ratios[0]:.3f} to {ratios[2]:.3f}"
            )
    result["import_seconds_added"] = import_seconds("import raptor_hf") - import_seconds("")
    print(f"importing raptor_hf adds {result['import_seconds_added']:.3f} s to importing transformers' DINOv2")
    result |= {"repeats": settings.repeats, "threads": torch.get_num_threads(), **describe_environment(device)}
    write_json(Path(settings.output_dir) / f"forward_{settings.size}.json", result)


@torch.no_grad()
def alternate(
    models: list[Callable[[torch.Tensor], Any]], pixel_values: torch.Tensor, settings: BenchmarkSettings
) -> np.ndarray:
    """Seconds of every model in every repeat, (models, repeats), taken in turn so that drift meets all of them."""
    times = np.zeros((len(models), settings.repeats))
    for repeat in range(-settings.warmup, settings.repeats):
        for index, model in enumerate(models):
            began = time.perf_counter()
            model(pixel_values)
            if pixel_values.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                times[index, repeat] = time.perf_counter() - began
    return times


def import_seconds(statement: str, repeats: int = 5) -> float:
    """Least time of a fresh process to import transformers' DINOv2 and then run a statement; seconds of the latter."""
    program = (
        "import time, torch; from transformers import Dinov2WithRegistersModel, Dinov2WithRegistersConfig, AutoModel\n"
        f"began = time.perf_counter()\n{statement}\nprint(time.perf_counter() - began)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(repeats)]
    for run in runs:
        if run.returncode:
            raise RuntimeError(f"python -c failed: {run.stderr[-500:]}")
    return min(float(run.stdout) for run in runs)


if __name__ == "__main__":
    main()
