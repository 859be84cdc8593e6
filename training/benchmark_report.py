"""The page of the benchmark: what its JSON files say, as Markdown, with the targets and by how much they are missed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raptor_hf.studies import markdown_table

NAMES = {"digits": "digits (8 px, D=96)", "vits14": "ViT-S/14, 224 px", "vitb14": "ViT-B/14, 224 px"}
COMMAND = "python training/benchmark.py"


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
        return f"missed by {abs(self.measured / self.goal - 1):.0%}"


def page(records: Mapping[str, dict[str, Any]], fidelity: Sequence[str] = ()) -> str:
    """
    Args:
        records: contents of the JSON files, by part.
        fidelity: folders of studies of time to fidelity, beside the page.
    """
    parts = [
        "# Speed",
        f"    {COMMAND}",
        "Every ratio is the median over pairs of calls that ran alternately in one process, quartiles in brackets; "
        "seconds are of this machine at that moment, and mean little elsewhere.",
    ]
    targets = targets_of(records)
    if targets:
        rows = [
            [target.name, f"{target.measured:.2f}", f"{'≥' if target.at_least else '≤'} {target.goal:g}"]
            + [target.verdict, target.where]
            for target in targets
        ]
        parts += ["## Targets", "The worst row counts.", markdown_table(["", "measured", "target", "", "row"], rows, 1)]
    writers = {"forward": forward_part, "training": training_part, "growth": growth_part, "input": input_part}
    for part, writer in writers.items():
        if part in records:
            parts += writer(records[part])
            parts.append(circumstances(records[part]))
    if fidelity:
        parts.append("## Time to fidelity")
        parts.append("How soon our recipe is where the published one ends: " + ", ".join(
            f"[{name.removeprefix('fidelity_')}]({name}/table.md)" for name in fidelity) + ".")  # fmt: skip
    return "\n\n".join(parts) + "\n"


def targets_of(records: Mapping[str, dict[str, Any]]) -> list[Target]:
    """The goals that the measured rows speak to."""
    targets = []
    rows = records.get("training", {}).get("training", [])
    equal = [row for row in rows if row["precision"] == "float32" and not row["compiled"]]
    on_cpu = "cuda" not in str(records.get("training", {}).get("device", "")).lower()
    for size, goal in (("digits", 1.3), ("vits14", 1.1), ("vitb14", 1.1)) if on_cpu else ():
        own = [row for row in equal if row["size"] == size]
        targets += worst(own, f"training step, {NAMES[size]}, times the reference", lambda r: r["speedup"], goal, True)
    targets += worst(equal, "saved activations, of the reference's", saved_ratio, 0.8, False)
    small = [row for row in equal if row["size"] == "vits14" and row["batch_size"] == 8 and row["stage"] == "2"]
    if on_cpu:
        targets += worst(small, "MFU, ViT-S/14, batch 8", lambda r: r["mfu"]["ours"], 0.8, True)
    targets += worst(equal, "relative difference of the losses", lambda r: r["loss_difference"], 1e-4, False)
    half = [row for row in rows if row["precision"] == "bfloat16" and row["size"] == "vitb14"]
    if not on_cpu:
        targets += worst(half, "bf16 training step, times the fp32 reference", lambda r: r["speedup"], 5.0, True)
        large = [row for row in half if row["batch_size"] == 64]
        targets += worst(large, "MFU, ViT-B/14, batch 64", lambda r: r["mfu"]["ours"], 0.4, True)
    forward = records.get("forward", {}).get("forward", [])
    plain = [row for row in forward if row["student"] == "mlp" and not row["compiled"]]
    targets += worst(plain, '"mlp" forward, of the teacher\'s time', lambda r: r["ratio"], 1.03, False)
    return targets


def worst(rows: Sequence[dict[str, Any]], name: str, value: Any, goal: float, at_least: bool) -> list[Target]:
    """The target of a set of rows, none if there are no rows."""
    if not rows:
        return []
    row = (min if at_least else max)(rows, key=value)
    names = ("size", "student", "ffn_type", "stage", "precision")
    where = ", ".join([*(str(row[key]) for key in names if key in row), f"batch {row['batch_size']}"])
    return [Target(name, value(row), goal, at_least, where.replace("stage", "stage "))]


def saved_ratio(row: dict[str, Any]) -> float:
    """Saved activations of ours over the reference's."""
    return row["saved_bytes"]["ours"] / row["saved_bytes"]["reference"]


def forward_part(record: dict[str, Any]) -> list[str]:
    """Latency, memory, disk, start, compile time."""
    rows = [
        [
            *(NAMES[row["size"]], str(row["batch_size"]), row["student"], row["precision"]),
            "compiled" if row["compiled"] else "eager",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['images_per_second']:.1f}",
            f"{row['ratio']:.3f} [{row['ratio_quartiles'][0]:.3f}, {row['ratio_quartiles'][1]:.3f}]",
        ]
        for row in record["forward"]
    ]
    titles = ["size", "batch", "student", "precision", "", "ms", "images/s", "time of the teacher's"]
    parts = ["## Forward pass", "Students against transformers' `Dinov2WithRegistersModel` of the same shape."]
    parts.append(markdown_table(titles, rows, 5))
    rows = []
    for memory, disk in zip(record["memory"], record["disk_and_start"], strict=True):
        start = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in disk["start_seconds"].items()}
        rows.append(
            [
                NAMES[disk["size"]],
                *(f"{megabytes(memory['bytes'][name])}" for name in ("teacher", "mlp")),
                *(megabytes(size) for size in disk["disk_bytes"].values()),
                *(f"{start[name]:.1f}" for name in ("teacher", "mlp")),
            ]
        )
    students = list(record["disk_and_start"][0]["disk_bytes"])[1:]
    titles = ["size", "peak memory, teacher (MB)", '"mlp"', "weights on disk, teacher (MB)", *students]
    titles += ["process start to first output, teacher (s)", '"mlp"']
    parts.append(markdown_table(titles, rows, 1))
    rows = [
        [str(row["num_layers"]), str(row["num_blocks"]), ", ".join(f"{seconds:.1f}" for seconds in row["seconds"])]
        for row in record["compile"]
    ]
    parts.append("First call of a compiled student of the digits size, in a fresh process without a cache:")
    parts.append(markdown_table(["steps", "blocks", "s"], rows, 0))
    return parts


def training_part(record: dict[str, Any]) -> list[str]:
    """Steps against the reference loop, memory, profile."""
    rows = [
        [
            *(NAMES[row["size"]], str(row["batch_size"]), row["ffn_type"], row["stage"]),
            row["precision"] + (", compiled" if row["compiled"] else ""),
            f"{row['speedup']:.2f} [{row['speedup_quartiles'][0]:.2f}, {row['speedup_quartiles'][1]:.2f}]",
            f"{row['images_per_second']['ours']:.1f}",
            *(f"{row['mfu'][name]:.0%}" for name in ("reference", "ours")),
            f"{1e3 * row['floor_seconds']:.1f} of {1e3 * row['seconds']['ours']:.1f}",
            f"{saved_ratio(row):.2f}",
            f"{row['loss_difference']:.0e}",
        ]
        for row in record["training"]
    ]
    titles = ["size", "batch", "FFN", "stage", "ours in", "times the reference", "images/s", "MFU, reference", "ours"]
    titles += ["floor, of ms", "saved activations, of the reference's", "difference of losses"]
    parts = [
        "## Training step",
        "One step with the teacher online, against the plain loop of training/reference_loop.py, always in fp32. "
        "MFU is FLOPs of matrix products over the peak measured in the same run at the same precision; the floor is "
        "what these FLOPs take at that peak, nothing else counted.",
        markdown_table(titles, rows, 5),
    ]
    rows = [
        [NAMES[row["size"]], str(row["batch_size"]), *(megabytes(row["bytes"][name]) for name in ("reference", "ours"))]
        for row in record["memory"]
    ]
    parts.append("Peak memory of two steps of stage 2, models included:")
    parts.append(markdown_table(["size", "batch", "reference (MB)", "ours (MB)"], rows, 1))
    parts.append(
        f"Where the time of our step of stage 2 goes (shares of operators' own time, fp32); memory moves at "
        f"{record['memory_bandwidth'] / 1e9:.0f} GB/s:"
    )
    kinds = list(dict.fromkeys(kind for row in record["profiles"] for kind in row["shares"]))
    rows = [[kind, *(f"{row['shares'].get(kind, 0):.0%}" for row in record["profiles"])] for kind in kinds]
    titles = ["", *(f"{NAMES[row['size']]}, batch {row['batch_size']}" for row in record["profiles"])]
    return [*parts, markdown_table(titles, rows, 1)]


def growth_part(record: dict[str, Any]) -> list[str]:
    """Growth of a step, of the search of phases, and with processes."""
    rows = [
        [
            row["symbol"],
            ", ".join(str(point["x"]) for point in row["points"]),
            ", ".join(f"{point['time_ratio']:.2f}" for point in row["points"]),
            *(f"{row[name]:.2f}" for name in ("time_slope", "time_slope_at_the_end", "memory_slope", "flops_slope")),
        ]
        for row in record["growth"]
    ]
    titles = ["", "values", "time of the base's", "slope of time", "at the end", "of saved activations", "of FLOPs"]
    parts = [
        "## Growth",
        "Stage 2, one variable at a time from L=12, T=67, D=96, B=8, k=3; slopes on logarithmic axes, 1 is "
        "proportional.",
        markdown_table(titles, rows, 2),
    ]
    phases = record["phases"]
    rows = [[str(point["x"]), f"{1e3 * point['seconds']:.2f}"] for point in phases["points"]]
    parts.append(
        f"The search of {phases['num_blocks']} phases; slope {phases['time_slope_at_the_end']:.2f} between the two "
        "largest:"
    )
    parts.append(markdown_table(["L", "ms"], rows, 0))
    processes = record["processes"]
    if "skipped" in processes:
        return [*parts, f"Processes: not measured, {processes['skipped']}."]
    rows = [
        [row["name"], f"{row['speedup']:.2f} [{row['speedup_quartiles'][0]:.2f}, {row['speedup_quartiles'][1]:.2f}]"]
        + [f"{row['last_loss']:.6f}"]
        for row in processes["launches"]
    ]
    parts.append(
        f"`accelerate launch training/distill.py {processes['config']}`, images per second of the first line's:"
    )
    return [*parts, markdown_table(["", "speed", "last loss"], rows, 1)]


def input_part(record: dict[str, Any]) -> list[str]:
    """The loader."""
    parts = ["## Input pipeline"]
    for source in record["input"]:
        if "skipped" in source:
            parts.append(f"{source['source']}: not measured, {source['skipped']}.")
            continue
        rows = [[str(row["num_workers"]), f"{row['images_per_second']:.0f}"] for row in source["workers"]]
        split = ", ".join(f"{name} {value:.0f}" for name, value in source["split"].items())
        needs = "; ".join(
            f"{need['name']} eats {need['images_per_second']:.0f} images/s: {need['num_workers']} "
            f"worker{'s' if need['num_workers'] > 1 else ''}"
            for need in source["needed"]
        )
        parts += [
            f"{source['source']}, to {source['image_size'][0]} px, batch {source['batch_size']}, on "
            f"{source['num_cores']} core{'s' if source['num_cores'] > 1 else ''}:",
            markdown_table(["workers", "images/s"], rows, 0),
            f"Microseconds per image: {split}. The processor's one call per batch is "
            f"{source['batched']['speedup']:.1f} times as fast as one per image. {needs}, each on a core of its own.",
        ]
    estimate = record["estimate"]
    parts.append(
        f"The GPU's rate is an estimate: {estimate['flops_per_image'] / 1e9:.0f} GFLOP per image at "
        f"{estimate['utilisation']:.0%} of {estimate['peak_flops'] / 1e12:.0f} TFLOP/s."
    )
    return parts


def circumstances(record: dict[str, Any]) -> str:
    """Where a part was measured, and what was left out."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = f"Measured on {record['device']}, {record['num_threads']} thread{'s' if record['num_threads'] > 1 else ''}; "
    text += versions + "."
    if left_out := record.get("left_out"):
        text += f" Left out for their length: {'; '.join(dict.fromkeys(left_out))}."
    return text


def megabytes(count: int) -> str:
    """Bytes as MB."""
    return f"{count / 1e6:.1f}" if count < 1e8 else f"{count / 1e6:.0f}"
