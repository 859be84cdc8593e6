"""The settings of the benchmark, and the sizes that it knows; light, so that --help answers at once."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from raptor_settings.declare import check_settings, setting

PARTS = ("forward", "training", "growth", "input")
SHAPES: dict[str, dict[str, int]] = {
    "digits": dict(hidden_size=96, num_attention_heads=3, image_size=8, patch_size=2, num_register_tokens=2),
    "vits14": dict(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14),
    "vitb14": dict(hidden_size=768, num_attention_heads=12, image_size=224, patch_size=14),
}


@dataclass(frozen=True)
class BenchmarkSettings:
    """Measure what this package costs beside what else does the job."""

    recipe: ClassVar[str] = "benchmark"
    command: ClassVar[str] = "python -m training.benchmarks.benchmark"
    example: ClassVar[str] = "--parts training --sizes digits"

    parts: list[str] = setting(list(PARTS), help="parts of the benchmark", group="run")
    sizes: list[str] = setting(list(SHAPES), help="sizes of the models", group="teacher")
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
