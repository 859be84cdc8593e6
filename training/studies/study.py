"""Compare variants of a distillation over seeds: run what is missing, then write a table, a figure and the numbers.

    python -m training.studies.study training/configs/study/digits_ladder.yaml --jobs 2

A variant is a name followed by flags of distill.py, which is run once for every variant and seed. Given again, the same
command leaves the runs that have finished, and resumes an interrupted one from its last checkpoint. What a study costs
and gives stands in its config file.
"""

from raptor_settings.parse import parse_settings, read_yaml

from .settings import StudySettings, slug, split_variants

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(StudySettings)

import json
import logging
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raptor_settings.distill import DistillSettings

from raptor_hf.data.loaders import usable_cores
from raptor_hf.distillation.inputs import check_blocks, count_layers
from raptor_hf.figures import mean_and_deviation
from raptor_hf.hub.card_words import device_words
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.lock import find_writer
from raptor_hf.recipes.run_metrics import METRICS_FILE, StudentMetrics, read_json
from raptor_hf.recipes.settings import check_same_run, read_run_id, settings_to_dict, user_errors

from . import figures
from .children import Children, exit_on_sigterm
from .conclusions import (
    Conclusion,
    Record,
    by_variant,
    convergence_caption,
    ladder_caption,
    markdown_table,
    partitions_conclusion,
    series_of,
    time_to_fidelity_conclusion,
    trade_off_caption,
)
from .depths import depths_conclusion
from .frontier import Point, baseline_points, frontier_conclusion, study_points

logger = logging.getLogger("study")

NOT_COMPARED = ("output_dir", "seed", "override")
NEED_EVALUATIONS = ("convergence", "time_to_fidelity")


@dataclass(frozen=True)
class PlannedRun:
    """One run of distill.py."""

    variant: str
    seed: int
    settings: DistillSettings
    command: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def is_done(self) -> bool:
        """Whether the folder holds the numbers of this run, at its end, on the images that are wanted now."""
        try:
            metrics = json.loads((self.folder / METRICS_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        except ValueError:
            return True  # which reading the numbers will refuse, by name
        if not isinstance(metrics, dict):
            return True
        # runs of older versions have neither
        run_id, evaluated_on = read_run_id(self.folder), metrics.get("evaluated_on") or {}
        if None not in (run_id, metrics.get("run_id")) and metrics["run_id"] != run_id:
            return False
        split, limit = getattr(self.settings, "test_split", None), getattr(self.settings, "eval_images", None)
        same_split = split is None or evaluated_on.get("split", split) == split
        return same_split and evaluated_on.get("num_images", limit) == limit


def main() -> None:
    settings = parse_settings(StudySettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        runs = plan_runs(settings)
        for run in runs:
            check_same_run(run.folder, run.settings)
        check_students(runs)
        exit_on_sigterm()
        read_baselines(settings.baselines)
        output_dir = Path(settings.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
    failed = run_all(runs, settings.jobs)
    order = [name for name, _ in split_variants(settings.variants)]
    done = sorted((run for run in runs if run.is_done), key=lambda run: order.index(run.variant))
    records = [record_of(run, settings.base) for run in done]
    if records:
        write_results(settings, records, output_dir, command_line(sys.argv[1:]))
        print(f"saved to {output_dir}: results.json, table.md and figure.png")
    if failed:
        names = "; ".join(f"{run.variant}, seed {run.seed}" for run in failed)
        raise SystemExit(f"{len(failed)} of {len(runs)} runs failed: {names}")


def plan_runs(settings: StudySettings) -> list[PlannedRun]:
    """All runs, with their settings checked by distill.py's own rules.

    Raises:
        ValueError: a flag or value that distill.py refuses, or one that gives the figure nothing to show.
    """
    runs = []
    variants = split_variants(settings.variants)
    num_seeds = settings.num_seeds or [len(settings.seeds)] * len(variants)
    # the outer loop: a study that is cut short has compared all variants on some seeds
    for index, seed in enumerate(settings.seeds):
        for (name, flags), wanted in zip(variants, num_seeds, strict=True):
            if index >= wanted:
                continue
            folder = Path(settings.runs_dir) / slug(name) / f"seed-{seed}"
            arguments = [settings.base, *shlex.split(settings.common_flags), *flags]
            arguments += ["--seed", str(seed), "--output_dir", folder.as_posix()]
            try:
                parsed = parse_settings(DistillSettings, arguments, exit_on_error=False)
            except ValueError as error:
                raise ValueError(f"variant {name!r}: {error}") from error
            if settings.figure in NEED_EVALUATIONS and not parsed.eval_every:
                raise ValueError(f"variant {name!r} has eval_every 0; the figure {settings.figure!r} needs evaluations")
            command = [sys.executable, str(Path(__file__).parents[1] / "distill.py"), *arguments]
            runs.append(PlannedRun(name, seed, parsed, command))
    return runs


def run_all(runs: Sequence[PlannedRun], jobs: int) -> list[PlannedRun]:
    """Runs what is not finished, `jobs` at a time with an equal share of the cores; returns the runs that failed."""
    missing = [run for run in runs if not run.is_done]
    logger.info("%d of %d runs to do, %d at a time", len(missing), len(runs), jobs)
    cores = usable_cores()
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    failed, began = [], time.perf_counter()
    pool, children = ThreadPoolExecutor(jobs), Children()
    try:
        futures = {pool.submit(run_one, run, environment, children): run for run in missing}
        for number, future in enumerate(as_completed(futures), start=1):
            run, (status, outcome) = futures[future], future.result()
            minutes = (time.perf_counter() - began) / 60
            logger.info(
                "%d/%d | %.1f min | %s, seed %d: %s", number, len(missing), minutes, run.variant, run.seed, outcome
            )
            if status != 0:
                failed.append(run)
    except BaseException:  # an interrupt, too: what is under way ends, and nothing new is started
        children.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def run_one(run: PlannedRun, environment: dict[str, str], children: Children) -> tuple[int, str]:
    """The exit status of one run, whose output goes to its log, and how it ended in words."""
    if writer := find_writer(run.folder):  # as after a kill -9 of the study that started it; its log is its own
        return 1, f"NOT STARTED, as {writer} writes into {run.folder}"
    run.folder.mkdir(parents=True, exist_ok=True)
    status = children.run(run.command, log_file(run), environment)
    if status == 0 and run.is_done:
        return 0, "done"
    status = status or 1
    return status, f"FAILED with status {status}, the end of {log_file(run)}:\n{tail(log_file(run))}"


def log_file(run: PlannedRun) -> Path:
    """File that takes the output of a run."""
    return run.folder / "log.txt"


def tail(path: Path, num_lines: int = 15) -> str:
    """The last lines of a log, without the states that progress bars overwrote."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lasting = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
    return "\n".join("    " + line for line in [line for line in lasting if line.strip()][-num_lines:])


def check_students(runs: Sequence[PlannedRun]) -> None:
    """Refuse students that no teacher can have, before the first of them is trained.

    Raises:
        ValueError: a student has more blocks than its teacher has layers, or its layers do not add up to the teacher's.
        OSError: there is no such teacher.
    """
    for run in runs:
        try:
            check_blocks(run.settings, count_layers(run.settings))
        except (ValueError, OSError) as error:
            raise type(error)(f"variant {run.variant!r}: {error}") from error


def check_numbers(run: PlannedRun, metrics: StudentMetrics) -> None:
    """Refuse numbers that are not of a student as the settings describe it.

    Raises:
        ValueError: the blocks differ; the message names both.
    """
    settings, repeats = run.settings, [len(layers) for layers in metrics.blocks or ()]
    if settings.block_repeats is not None and repeats != list(settings.block_repeats):
        raise ValueError(f"{run.folder} has blocks of {repeats} layers; its settings ask for {settings.block_repeats}")
    if settings.num_blocks not in (None, len(repeats)):
        raise ValueError(f"{run.folder} has {len(repeats)} blocks; its settings ask for {settings.num_blocks}")


def record_of(run: PlannedRun, base: str) -> dict[str, Any]:
    """The record of one finished run."""
    metrics, settings = StudentMetrics.read(run.folder), run.settings
    check_numbers(run, metrics)
    fidelity, seconds = metrics.fidelity, metrics.seconds
    # a recipe pays for its phases and for its start as well as for its steps
    before = seconds.get("phases", 0.0) + seconds.get("fit", 0.0)
    base_settings = settings_to_dict(parse_settings(DistillSettings, [base], exit_on_error=False))
    return {
        "variant": run.variant,
        "seed": run.seed,
        "overrides": {
            name: value
            for name, value in settings_to_dict(settings).items()
            if name not in NOT_COMPARED and value != base_settings[name]
        },
        "r2_last": fidelity.r2[-1],
        "r2_mean": statistics.fmean(fidelity.r2),
        "agreement": fidelity.agreement,
        "student_accuracy": fidelity.student_accuracy,
        "teacher_accuracy": fidelity.teacher_accuracy,
        "parameters": metrics.parameters.to_dict(),
        "macs": metrics.macs.to_dict(),
        "training_steps": settings.stage1_steps + settings.stage2_steps,
        "training_seconds": before + seconds.get("stage1", 0.0) + seconds.get("stage2", 0.0),
        "batch_size": settings.batch_size,
        # runs of older versions have no field for it, and no "auto"
        "mixed_precision": metrics.mixed_precision or settings.mixed_precision or "no",
        "blocks": metrics.blocks,
        **({"by_steps": {n: row.to_dict() for n, row in fidelity.by_steps.items()}} if fidelity.by_steps else {}),
        "evaluations": [evaluation_of(entry.to_dict(), settings.stage1_steps, before) for entry in metrics.evaluations],
        "device": metrics.device,
        "versions": metrics.versions,
    }


def evaluation_of(entry: Mapping[str, Any], stage1_steps: int, before: float = 0.0) -> dict[str, Any]:
    """The record of one evaluation during training; steps count over both stages, seconds from `before` on."""
    # runs of older versions do not have these
    known = {name: entry[name] for name in ("seconds", "agreement", "student_accuracy") if name in entry}
    if known.get("seconds") is not None:  # of both stages, without the evaluations
        known["seconds"] += before
    return {
        "step": entry["step"] + (stage1_steps if entry["stage"] == 2 else 0),
        "r2_last": entry["r2"][-1],
        "r2_mean": statistics.fmean(entry["r2"]),
        **known,
    }


def read_baselines(baselines: Sequence[str] | None) -> list[Point]:
    """The points of "file" or "file = pattern of names".

    Raises:
        OSError: a file cannot be read.
        ValueError: it holds no results, or none of that name.
    """
    points = []
    for text in baselines or ():
        path, _, pattern = text.partition(" = ")
        try:
            points += baseline_points(read_json(Path(path)), pattern or "*")
        except ValueError as error:
            raise ValueError(f"baselines has {text!r}: {error}") from error
    return points


def write_results(settings: StudySettings, records: Sequence[Record], output_dir: Path, command: str) -> None:
    """results.json, table.md and figure.png."""
    conclusion = conclude(settings, records, output_dir / "figure.png")
    write_json(
        output_dir / "results.json",
        {
            "title": settings.title,
            "command": command,
            "base": settings.base,
            # as the file was: it may change, and then the page no longer says what was run
            "base_settings": read_yaml(Path(settings.base)),
            "common_flags": settings.common_flags,
            "published": settings.published,
            "published_name": settings.published_name if settings.published else None,
            **({"comparisons": conclusion.numbers} if conclusion.numbers else {}),
            "runs": records,
        },
    )
    page = table(settings, by_variant(records), command, conclusion.text)
    write_text_atomically(output_dir / "table.md", page)


def conclude(settings: StudySettings, records: Sequence[Record], figure: Path) -> Conclusion:
    """Draws the figure, and says what it shows."""
    variants = by_variant(records)
    # a variant whose runs have all failed keeps its place
    wanted = {name: variants.get(name, []) for name, _ in split_variants(settings.variants)}
    if settings.figure == "ladder":
        keys = ("r2_last", "r2_mean", "agreement", "student_accuracy")
        scores = {name: {key: [run[key] for run in runs] for key in keys} for name, runs in variants.items()}
        figures.plot_ladder(scores, figure, teacher_accuracy=records[0]["teacher_accuracy"])
        return Conclusion(ladder_caption(variants))
    if settings.figure == "convergence":
        curves = {name: [run["evaluations"] for run in runs] for name, runs in variants.items()}
        figures.plot_convergence(curves, figure)
        return Conclusion(convergence_caption(variants))
    if settings.figure == "partitions":
        draws: dict[str, dict[str, dict[str, list[float]]]] = {}
        for name, runs in variants.items():
            kind, _, label = name.rpartition(", ")
            scores = {key: [run[key] for run in runs] for key in ("r2_last", "student_accuracy")}
            draws.setdefault(label, {})[kind] = scores
        figures.plot_partitions(draws, figure)
        return partitions_conclusion(wanted)
    if settings.figure == "frontier":
        baselines = read_baselines(settings.baselines)
        teacher_accuracy = records[0]["teacher_accuracy"]
        figures.plot_frontier(study_points(records), baselines, teacher_accuracy, figure)
        return frontier_conclusion(records, baselines)
    if settings.figure == "depths":
        figures.plot_depths(variants, records[0]["teacher_accuracy"], records[0]["macs"]["teacher"], figure)
        return depths_conclusion(variants)
    if settings.figure == "time_to_fidelity":
        conclusion = time_to_fidelity_conclusion(wanted, settings.goals)
        figures.plot_time_to_fidelity(wanted, figure)
        return conclusion
    teacher = records[0]["parameters"]["teacher"], records[0]["macs"]["teacher"]
    figures.plot_trade_off(series_of(variants), *teacher, figure)
    return Conclusion(trade_off_caption(variants))


def table(settings: StudySettings, variants: Mapping[str, Sequence[Record]], command: str, caption: str) -> str:
    """The Markdown page: how the numbers were made, the numbers, the conclusion."""
    records = [run for runs in variants.values() for run in runs]
    teacher_accuracy = records[0]["teacher_accuracy"]
    seeds = ", ".join(map(str, sorted({run["seed"] for run in records})))
    columns = {
        "R² last layer": [measured(runs, "r2_last", digits=3) for runs in variants.values()],
        "R² mean": [measured(runs, "r2_mean", digits=3) for runs in variants.values()],
        "accuracy (%)": [measured(runs, "student_accuracy", unit=100) for runs in variants.values()],
        "agreement (%)": [measured(runs, "agreement", unit=100) for runs in variants.values()],
        "parameters (M)": [share(runs[0]["parameters"]) for runs in variants.values()],
        "MACs (M)": [share(runs[0]["macs"]) for runs in variants.values()],
        "steps": [str(runs[0]["training_steps"]) for runs in variants.values()],
        "training (s)": [measured(runs, "training_seconds", digits=0) for runs in variants.values()],
    }
    if settings.published:
        names = [name for name, _ in split_variants(settings.variants)]
        published = dict(zip(names, settings.published, strict=True))
        columns[settings.published_name] = [f"{published[name]:g}" for name in variants]
    header = [
        f"# {settings.title}",
        f"    {command}",
        f"Base {settings.base}, for all variants `{settings.common_flags.strip()}`; seeds {seeds}; "
        f"{settings.jobs} run{'s' * (settings.jobs > 1)} at a time on: {machines(records)}."
        + (f" The teacher's accuracy is {100 * teacher_accuracy:.1f} %." if teacher_accuracy is not None else ""),
        "Mean ± standard deviation over seeds, on the test images, after the last step; in brackets the share of the "
        "teacher's cost. Seconds are wall-clock time beside whatever else the machine ran.",
    ]
    rows = zip(variants, *columns.values(), strict=True)
    parts = (
        *header,
        markdown_table(("variant", *columns), rows),
        f"![{settings.title}](figure.png)",
        caption,
        "The flags of the variants:",
        flag_list(settings.variants),
    )
    return "\n\n".join(parts) + "\n"


def machines(records: Sequence[Record]) -> str:
    """Devices and versions of all runs."""
    devices = sorted({device_words(run["device"]) for run in records})
    versions = sorted({", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in records})
    return f"{'; '.join(devices)}. {'; '.join(versions)}"


def flag_list(variants: Sequence[str]) -> str:
    """The flags of every variant, a line each."""
    return "\n".join(f"- {name}: `{shlex.join(flags)}`" for name, flags in split_variants(variants))


def measured(runs: Sequence[Record], key: str, unit: float = 1, digits: int = 1) -> str:
    """Mean and standard deviation over the seeds of one number."""
    values = [run[key] for run in runs]
    if any(value is None for value in values):
        return "-"
    mean, deviation = mean_and_deviation([unit * value for value in values])
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def share(cost: dict[str, float]) -> str:
    """The student's cost in millions and as a share of the teacher's."""
    return f"{cost['student'] / 1e6:.2f} ({cost['student'] / cost['teacher']:.0%})"


def command_line(arguments: Sequence[str]) -> str:
    """The command that a table names."""
    return "python -m training.studies.study " + shlex.join(arguments)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command goes on with what is missing") from None
