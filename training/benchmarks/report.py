"""The page of the benchmark: what its JSON files say, as Markdown, with the targets and by how much they are missed."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.studies.conclusions import markdown_table

NAMES = {"digits": "digits (8 px, D=96)", "vits14": "ViT-S/14, 224 px", "vitb14": "ViT-B/14, 224 px"}
COMMAND = "python -m training.benchmarks.benchmark"
SCORES = {"r2_last": "last-layer R²", "r2_mean": "mean R²", "student_accuracy": "accuracy"}


@dataclass(frozen=True)
class Target:
    """A goal, and what was measured.

    Args:
        name: what is wanted.
        measured: the worst row's figure.
        goal: to be reached.
        at_least: whether more is better.
        where: the worst row.
    """

    name: str
    measured: float
    goal: float
    at_least: bool
    where: str

    @property
    def is_met(self) -> bool:
        """Whether even the worst row reaches it."""
        return self.measured >= self.goal if self.at_least else self.measured <= self.goal

    @property
    def verdict(self) -> str:
        """In words, with the distance."""
        if self.is_met:
            return "met"
        return f"missed by {abs(self.measured / self.goal - 1):.1%}"


def page(
    records: Mapping[str, dict[str, Any]], fidelity: Mapping[str, dict[str, Any]] | None = None, has_notes: bool = False
) -> str:
    """
    The page, from what there is.

    Args:
        records: contents of the JSON files, by part.
        fidelity: contents of results.json of the studies of time to fidelity, by their folders beside the page.
        has_notes: whether measured_once.md stands beside the page.
    """
    fidelity = fidelity or {}
    parts = [
        "# Speed",
        f"    {COMMAND}",
        "Every ratio is the median over pairs of calls that ran alternately in one process, quartiles in brackets; "
        "seconds are of this machine at that moment, and mean little elsewhere.",
    ]
    targets = targets_of(records) + _fidelity_targets(fidelity)
    if targets:
        rows = [
            [target.name, target.verdict, target.where, f"{target.measured:.4g}"]
            + [f"{'≥' if target.at_least else '≤'} {target.goal:g}"]
            for target in targets
        ]
        titles = ["", "", "the worst row, which counts", "measured", "target"]
        parts += ["## Targets", markdown_table(titles, rows, 3)]
    writers = {
        "forward": forward_part,
        "training": training_part,
        "growth": growth_part,
        "input": input_part,
    }
    for part, writer in writers.items():
        if part in records:
            parts += writer(records[part])
            parts.append(circumstances(records[part]))
    if fidelity:
        parts.append("## Time to fidelity")
        links = ", ".join(f"[{name.removeprefix('fidelity_')}]({name}/table.md)" for name in fidelity)
        parts.append(f"Time our recipe needs to reach the published recipe's final score: {links}.")
    if has_notes:
        parts.append(
            "[Measured once](measured_once.md): what was tried to make a step cheaper, memory, start-up, processes."
        )
    return "\n\n".join(parts) + "\n"


def targets_of(records: Mapping[str, dict[str, Any]]) -> list[Target]:
    """The goals that the measured rows speak to; those for CPUs and those for GPUs differ."""
    return [*_training_targets(records.get("training", {})), *_forward_targets(records.get("forward", {}))]


def _training_targets(record: Mapping[str, Any]) -> list[Target]:
    rows = record.get("training", [])
    equal = [row for row in rows if row["precision"] == "float32" and not row["compiled"]]
    targets = worst(equal, "relative difference of the losses", lambda row: row["loss_difference"], 1e-4, False)
    if record.get("device_type") == "cuda":
        half = [row for row in rows if row["precision"] == "bfloat16"]
        targets += worst(half, "bf16 training step, times the fp32 reference", _speedup, 5.0, True)
        large = [row for row in half if row["size"] == "vitb14" and row["batch_size"] == 64]
        return targets + worst(large, "MFU, ViT-B/14, batch 64", _mfu, 0.4, True)
    for size, goal in (("digits", 1.3), ("vits14", 1.1), ("vitb14", 1.1)):
        own = [row for row in equal if row["size"] == size]
        targets += worst(own, f"training step, {NAMES[size]}, times the reference", _speedup, goal, True)
    targets += worst(equal, "saved activations, of the reference's", saved_ratio, 0.8, False)
    small = [row for row in equal if row["size"] == "vits14" and row["batch_size"] == 8]
    return targets + worst(small, "MFU, ViT-S/14, batch 8", _mfu, 0.8, True)


def _forward_targets(record: Mapping[str, Any]) -> list[Target]:
    plain = [row for row in record.get("forward", []) if row["student"] == "mlp"]
    eager = [row for row in plain if not row["compiled"]]
    if record.get("device_type") == "cuda":
        compiled = [row for row in plain if row["compiled"]]
        targets = worst(compiled, '"mlp" forward, both compiled, of the teacher\'s time', _ratio, 1.0, False)
        single = [row for row in eager if row["batch_size"] == 1]
        return targets + worst(single, '"mlp" latency, batch 1, of the teacher\'s', _ratio, 1.0, False)
    targets = worst(eager, '"mlp" forward, of the teacher\'s time', _ratio, 1.03, False)
    return targets


def _fidelity_targets(fidelity: Mapping[str, dict[str, Any]]) -> list[Target]:
    """Shares of the published recipe's time; a seed that never gets there makes it infinite."""
    targets = []
    for folder, results in fidelity.items():
        for entry in results["comparisons"]:
            if entry["goal"] is None:
                continue
            arrived = entry["reached"] == len(entry["targets"])
            share = statistics.fmean(entry["seconds_ratio"]) if arrived else math.inf
            name = f'time to the {SCORES[entry["score"]]} of "{entry["reference"]}", of its time'
            targets.append(Target(name, share, entry["goal"], False, folder.removeprefix("fidelity_")))
    return targets


def worst(
    rows: Sequence[dict[str, Any]], name: str, value: Callable[[dict[str, Any]], float], goal: float, at_least: bool
) -> list[Target]:
    """
    The target of a set of rows, none if there are no rows.

    Args:
        rows: all of which should reach the goal.
        name: of the target.
        value: of a row.
        goal: to be reached.
        at_least: whether more is better.
    """
    if not rows:
        return []
    row = (min if at_least else max)(rows, key=value)
    where = [NAMES[row["size"]], f"batch {row['batch_size']}"]
    where += [row[key] for key in ("student", "ffn_type") if key in row]
    if "stage" in row:
        where.append(f"stage {row['stage']}")
    where += [row["precision"], *(["compiled"] if row["compiled"] else [])]
    return [Target(name, value(row), goal, at_least, ", ".join(where))]


def _speedup(row: dict[str, Any]) -> float:
    return row["speedup"]


def _ratio(row: dict[str, Any]) -> float:
    return row["ratio"]


def _mfu(row: dict[str, Any]) -> float:
    return row["mfu"]["ours"]


def saved_ratio(row: dict[str, Any]) -> float:
    """Saved activations of ours over the reference's."""
    return row["saved_bytes"]["ours"] / row["saved_bytes"]["reference"]


def with_quartiles(row: Mapping[str, Any], name: str, digits: int) -> str:
    """A median and its quartiles, "1.00 [0.98, 1.03]"."""
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def forward_part(record: dict[str, Any]) -> list[str]:
    """Latency against the teacher."""
    rows = [
        [
            *(NAMES[row["size"]], str(row["batch_size"]), row["student"], row["precision"]),
            "compiled" if row["compiled"] else "eager",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['images_per_second']:.1f}",
            with_quartiles(row, "ratio", 3),
        ]
        for row in record["forward"]
    ]
    titles = ["size", "batch", "student", "precision", "", "ms", "images/s", "time of the teacher's"]
    parts = ["## Forward pass", "Students against transformers' `Dinov2WithRegistersModel` of the same shape."]
    parts.append(markdown_table(titles, rows, 5))
    return parts


def training_part(record: dict[str, Any]) -> list[str]:
    """Steps against the reference loop."""
    rows = [
        [
            *(NAMES[row["size"]], str(row["batch_size"]), row["ffn_type"], row["stage"]),
            row["precision"] + (", compiled" if row["compiled"] else ""),
            with_quartiles(row, "speedup", 2),
            f"{row['images_per_second']['ours']:.1f}",
            *(f"{row['mfu'][name]:.0%}" for name in ("reference", "ours")),
            f"{1e3 * row['seconds']['ours']:.1f}",
            f"{saved_ratio(row):.2f}",
            f"{row['loss_difference']:.0e}",
        ]
        for row in record["training"]
    ]
    titles = ["size", "batch", "FFN", "stage", "ours in", "times the reference", "images/s", "MFU, reference", "ours"]
    titles += ["ms", "saved activations, of the reference's", "difference of losses"]
    parts = [
        "## Training step",
        "One step with the teacher online, against the plain loop of training/raptor_minimal.py, always in fp32. "
        "MFU is FLOPs over the peak of matrix products measured in the same run at the same precision. In stage 1 "
        "both go from block to block; what either saves is what is held at once.",
        markdown_table(titles, rows, 5),
    ]
    return parts


def growth_part(record: dict[str, Any]) -> list[str]:
    """Growth of a step and of the search of phases."""
    rows = [
        [
            row["symbol"],
            ", ".join(str(point["x"]) for point in row["points"]),
            ", ".join(f"{point['time_ratio']:.2f}" for point in row["points"]),
            *(f"{row[name]:.2f}" for name in ("time_slope", "time_slope_at_the_end", "memory_slope", "flops_slope")),
        ]
        for row in record["growth"]
    ]
    base = ", ".join(f"{row['symbol']}={row['base']}" for row in record["growth"])
    titles = ["", "values", "time of the base's", "slope of time", "at the end", "of saved activations", "of FLOPs"]
    parts = [
        "## Growth",
        f"Stage 2, one variable at a time from {base}; slopes on logarithmic axes, 1 is proportional.",
        markdown_table(titles, rows, 2),
    ]
    phases = record["phases"]
    rows = [[str(point["x"]), f"{1e3 * point['seconds']:.2f}"] for point in phases["points"]]
    parts.append(
        f"The search of {phases['num_blocks']} phases; slope {phases['time_slope_at_the_end']:.2f} between the two "
        "largest:"
    )
    parts.append(markdown_table(["L", "ms"], rows, 0))
    return parts


def input_part(record: dict[str, Any]) -> list[str]:
    """The loader."""
    parts = ["## Input pipeline"]
    for source in record["input"]:
        if "skipped" in source:
            parts.append(f"{source['source']}: not measured, {source['skipped']}.")
            continue
        rows = [[str(row["num_workers"]), f"{row['images_per_second']:.0f}"] for row in source["workers"]]
        split = ", ".join(f"{name} {value:.0f}" for name, value in source["split"].items())
        parts += [
            f"{source['source']}, to {source['image_size'][0]} px, batch {source['batch_size']}, on "
            f"{source['num_cores']} core{'s' if source['num_cores'] > 1 else ''}:",
            markdown_table(["workers", "images/s"], rows, 0),
            f"Microseconds per image: {split}.",
        ]
    return parts


def circumstances(record: dict[str, Any]) -> str:
    """Where a part was measured, and what was left out."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = f"Measured on {record['device']}; {versions}."
    if left_out := record.get("left_out"):
        text += f" Left out for their length: {'; '.join(dict.fromkeys(left_out))}."
    return text
