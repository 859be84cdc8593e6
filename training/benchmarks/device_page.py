"""The page of the device benchmark: what its JSON files say, as Markdown."""

from collections.abc import Mapping
from typing import Any

from training.studies.conclusions import markdown_table

from .report import NAMES, with_quartiles

COMMAND = "python -m training.benchmarks.device"
# points that quantisation may cost
GOAL = 0.5
# titles of what `_compared` gives
COMPARED = ("ms, teacher", "ms, student", "time of the teacher's")


def page(records: Mapping[str, dict[str, Any]]) -> str:
    """The page, from what there is.

    Args:
        records: contents of the JSON files, by part.
    """
    parts = ["# Small on a device", f"    {COMMAND}"]
    writers = {
        "latency": latency_part,
        "streamed": streamed_part,
        "start": start_part,
        "merged": merged_part,
        "agreement": agreement_part,
    }
    for part, writer in writers.items():
        if part in records:
            parts += writer(records[part][part])
            versions = ", ".join(f"{name} {version}" for name, version in records[part]["versions"].items())
            parts.append(f"Measured on {records[part]['device']}; {versions}.")
    return "\n\n".join(parts) + "\n"


def latency_part(rows: list[dict[str, Any]]) -> list[str]:
    """Bytes, memory, start and latency of the files."""
    batches = sorted({row["batch_size"] for row in rows})
    cases = list(dict.fromkeys((row["size"], row["model"], row["runtime"]) for row in rows))
    lines = []
    for case in cases:
        own = {row["batch_size"]: row for row in rows if (row["size"], row["model"], row["runtime"]) == case}
        any_row = next(iter(own.values()))
        line = [NAMES[case[0]], *case[1:], f"{any_row['bytes'] / 1e6:.1f}", f"{any_row['peak_bytes'] / 1e6:.0f}"]
        line.append(f"{any_row['start_seconds']:.2f}")
        for batch in batches:
            line += [f"{1e3 * own[batch]['seconds']:.0f}", with_quartiles(own[batch], "ratio", 2)]
        lines.append(line)
    titles = ["size", "model", "runtime", "MB on disk", "MB of memory", "s to the first output"]
    titles += [title for batch in batches for title in (f"ms, batch {batch}", "of the teacher's in torch")]
    return [
        "## Size, memory, start and latency",
        "A student of 3 blocks with low-rank conditioning beside transformers' `Dinov2WithRegistersModel` of 12 "
        "layers, on images of 224 px, one thread, random weights. Latency is processor time; all ran in turn in one "
        "process, ratios are medians over pairs of calls, quartiles in brackets. Memory and start, the latter by the "
        "clock, are of a process each, from a file that was not in memory, libraries loaded. int8 in torch is made "
        "from the float32 file when it is loaded.",
        markdown_table(titles, lines, 3),
    ]


def streamed_part(rows: list[dict[str, Any]]) -> list[str]:
    """Ratios where reading weights is most of the work."""
    lines = [
        [
            NAMES[row["size"]],
            row["what"],
            str(row["num_processes"]),
            str(row["num_cores"]),
            *_compared(row, "teacher", "student"),
        ]
        for row in rows
    ]
    titles = ["size", "", "processes", "cores", *COMPARED]
    return [
        "## Where weights are streamed",
        "One image of 2 x 2 patches in PyTorch, float32, one thread a process: a weight that was read is used for nine "
        "tokens. Memory-mapped: the weights are the pages of the file, which are dropped before each pass, "
        "and seconds are by the clock; otherwise they are processor time.",
        markdown_table(titles, lines, 2),
    ]


def start_part(rows: list[dict[str, Any]]) -> list[str]:
    """Ratios of a process that is started for one image."""
    lines = [[NAMES[row["size"]], row["runtime"], *_compared(row, "teacher", "student")] for row in rows]
    return [
        "## From the start of a process to its first output",
        "A Python process that imports onnxruntime, opens a file that was not in memory, and runs one image of 224 px "
        "in one thread, by the clock. The ratio is a median over pairs, quartiles in brackets.",
        markdown_table(["size", "runtime", *COMPARED], lines, 2),
    ]


def merged_part(rows: list[dict[str, Any]]) -> list[str]:
    """What weights for each step gain."""
    lines = [
        [NAMES[row["size"]], row["dtype"], str(row["batch_size"]), *_compared(row, "student", "merged")] for row in rows
    ]
    titles = ["size", "numbers", "batch", "ms, student", "ms, merged", "time of the student's"]
    return [
        "## Weights for each step",
        "Where memory allows, `raptor_hf.conversion.to_dinov2` merges the low-rank terms of every step into weights of "
        "its own: the same function, in the memory of the teacher. PyTorch, one thread, processor time.",
        markdown_table(titles, lines, 3),
    ]


def _compared(row: dict[str, Any], *names: str) -> list[str]:
    """Milliseconds of two, and the ratio with its quartiles."""
    return [*(f"{1e3 * row[f'{name}_seconds']:.1f}" for name in names), with_quartiles(row, "ratio", 2)]


def agreement_part(rows: list[dict[str, Any]]) -> list[str]:
    """What quantisation costs."""
    before = {row["name"]: row["agreement"] for row in rows if row["precision"] == "float32"}
    lines, lost = [], {}
    for row in rows:
        points = 100 * (before[row["name"]] - row["agreement"])
        lost[f"{row['name']} in {row['precision']}"] = points
        lines.append(
            [row["name"], row["precision"], f"{row['bytes'] / 1e6:.2f}", f"{row['bytes'] / row['parameter_bytes']:.2f}"]
            + [f"{row['num_images']:,} images, {row['what']}", f"{row['agreement']:.2%}", f"{points:+.2f}"]
            + [f"{row['with_student']:.2%}"]
        )
    worst = max(lost, key=lost.get)
    titles = ["student", "precision", "MB", "of the parameters' bytes", "on", "agreement with the teacher"]
    titles += ["points lost", "agreement with the student"]
    verdict = "met" if lost[worst] <= GOAL else "missed"
    return [
        "## What quantisation costs",
        f"ONNX files of trained students. Goal: at most {GOAL} points lost; {verdict}, the worst is {worst} with "
        f"{lost[worst]:.2f}.",
        markdown_table(titles, lines, 2),
    ]
