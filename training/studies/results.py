"""Gather finished runs into one table: teacher, students and baselines side by side.

    python -m training.studies.results training/configs/results/digits.yaml

The runs are model folders with a metrics.json, as distill.py and probe.py leave them; every row is a name and a pattern
that finds the folders of its seeds. Numbers come from these files only; a number that no run has is left empty.
"""

from raptor_settings.parse import parse_settings

from .settings import ResultsSettings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(ResultsSettings)

import logging
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from raptor_hf import figures
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.run_metrics import METRICS_FILE, StudentMetrics
from raptor_hf.recipes.settings import user_errors

logger = logging.getLogger("results")

# what the columns are called and how they are written: factor and digits
METRICS = {
    "accuracy": ("accuracy (%)", 100, 1),
    "top5_accuracy": ("top-5 (%)", 100, 1),
    "mean_iou": ("mIoU (%)", 100, 1),
    "pixel_accuracy": ("pixel accuracy (%)", 100, 1),
    "rmse": ("RMSE (m)", 1, 3),
    "abs_rel": ("abs. rel.", 1, 3),
    "delta1": ("delta1 (%)", 100, 1),
    "knn_accuracy": ("k-NN (%)", 100, 1),
    "logistic_regression_accuracy": ("log. reg. (%)", 100, 1),
}


def main() -> None:
    settings = parse_settings(ResultsSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        rows = {name: read_runs(name, pattern) for name, pattern in split_rows(settings.rows)}
        heads = {variant for runs in rows.values() for run in runs for variant in run.metrics.probes}
        if unknown := set(settings.variants or ()) - heads:
            raise ValueError(f"variants has {sorted(unknown)}; the heads of these runs are {sorted(heads)}")
        output_dir = Path(settings.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "training.studies.results", *sys.argv[1:]])
    records = [summary(name, runs, settings.variants) for name, runs in rows.items()]
    write_json(output_dir / "results.json", {"title": settings.title, "command": command, "rows": records})
    metric = first_metric(records)
    if metric is not None:
        figures.plot_cost(records, metric, METRICS[metric.split("/")[-1]], output_dir / "figure.png")
    text = table(settings.title, command, records, has_figure=metric is not None)
    write_text_atomically(output_dir / "table.md", text)
    print(text)
    print(f"saved to {output_dir}: results.json and table.md")


def split_rows(rows: Sequence[str]) -> list[tuple[str, str]]:
    """Names and patterns."""
    return [tuple(row.rsplit(" = ", 1)) for row in rows]


@dataclass(frozen=True)
class ProbedRun:
    """A folder with heads: its numbers, and the bytes of its weights without them."""

    folder: Path
    metrics: StudentMetrics
    num_bytes: int


def read_runs(name: str, pattern: str) -> list[ProbedRun]:
    """All folders that a pattern finds.

    Raises:
        FileNotFoundError: there is none, or one of them belongs to a run that has not finished.
        ValueError: one of them has no probes.
    """
    runs = []
    for folder in sorted(map(Path, glob(pattern))):
        if not (folder / METRICS_FILE).is_file():
            raise FileNotFoundError(f"row {name!r}: {folder} holds no metrics.json; finish that run, or leave it out")
        metrics = StudentMetrics.read(folder)
        if not metrics.probes or metrics.macs.student is None:
            raise ValueError(f"row {name!r}: {folder} was not probed; run training/probe.py on it first")
        runs.append(ProbedRun(folder, metrics, (folder / "model.safetensors").stat().st_size))
    if not runs:
        raise FileNotFoundError(f"row {name!r}: no folder is found by {pattern!r}")
    return runs


def summary(name: str, runs: Sequence[ProbedRun], variants: Sequence[str] | None) -> dict[str, Any]:
    """One row: every number as a list over runs and seeds of the head."""
    values: dict[str, list[float]] = {}
    directions = {}
    for metrics in (run.metrics for run in runs):
        for variant, probe in metrics.probes.items():
            if variants is None or variant in variants:
                directions[f"{variant}/{probe.metric}"] = probe.higher_is_better
                for metric, numbers in probe.last.items():
                    values.setdefault(f"{variant}/{metric}", []).extend(numbers)
        for variant, checks in metrics.quick_checks.items():
            for metric, number in checks.items():
                if metric in METRICS and (variants is None or variant in variants):
                    values.setdefault(f"{variant}/{metric}", []).append(number)
        if metrics.fidelity and metrics.fidelity.r2:
            values.setdefault("r2_last", []).append(metrics.fidelity.r2[-1])
    return {
        "name": name,
        "folders": [run.folder.as_posix() for run in runs],
        "values": values,
        "higher_is_better": directions,
        "parameters": runs[0].metrics.parameters.student,
        "macs": runs[0].metrics.macs.student,
        "bytes": runs[0].num_bytes,
    }


def first_metric(records: Sequence[dict[str, Any]]) -> str | None:
    """The main metric of the first head, for the figure."""
    return next(iter(records[0]["higher_is_better"]), None)


def table(title: str, command: str, records: Sequence[dict[str, Any]], has_figure: bool) -> str:
    """The Markdown page."""
    names = list(dict.fromkeys(name for record in records for name in record["values"] if name != "r2_last"))
    main = [name for name in names if any(name in record["higher_is_better"] for record in records)]
    columns: dict[str, list[str]] = {}
    for name in names:
        source, metric = name.rsplit("/", 1)
        label, factor, digits = METRICS.get(metric, (metric, 1, 3))
        columns[f"{source}: {label}"] = [spread(record["values"].get(name), factor, digits) for record in records]
        if name in main:
            columns[f"{source}: retained (%)"] = [retained(record, records[0], name) for record in records]
    if any("r2_last" in record["values"] for record in records):
        columns["R², last layer"] = [spread(record["values"].get("r2_last"), 1, 3) for record in records]
    reference = records[0]
    columns["parameters (M)"] = [share(record["parameters"], reference["parameters"], 1e6) for record in records]
    columns["MACs (M)"] = [share(record["macs"], reference["macs"], 1e6) for record in records]
    columns["on disk (MB)"] = [f"{record['bytes'] / 1e6:.2f}" for record in records]
    lines = [
        "| model | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(
            "| " + " | ".join((record["name"], *cells)) + " |"
            for record, *cells in zip(records, *columns.values(), strict=True)
        ),
    ]
    parts = [
        f"# {title}",
        f"    {command}",
        "Mean ± standard deviation over the seeds of models and heads, after the last epoch. Retained is the share of "
        f"what {reference['name']} reaches (for errors its inverse); in brackets the share of its cost. Parameters and "
        "multiply-accumulates are those of the backbone.",
        "\n".join(lines),
    ]
    if has_figure:
        parts.append(f"![{title}](figure.png)")
    return "\n\n".join(parts) + "\n"


def spread(values: Sequence[float] | None, factor: float, digits: int) -> str:
    """Mean and standard deviation; empty where nothing was measured."""
    if not values:
        return ""
    mean = f"{factor * statistics.fmean(values):.{digits}f}"
    return mean + (f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def retained(record: dict[str, Any], reference: dict[str, Any], name: str) -> str:
    """What a row keeps of the reference, in percent."""
    if name not in record["values"] or name not in reference["values"]:
        return ""
    ratio = statistics.fmean(record["values"][name]) / statistics.fmean(reference["values"][name])
    return f"{100 * (ratio if record['higher_is_better'].get(name, True) else 1 / ratio):.1f}"


def share(value: float, reference: float, unit: float) -> str:
    """A cost, and its share of the reference's."""
    return f"{value / unit:.2f} ({value / reference:.0%})"


if __name__ == "__main__":
    main()
