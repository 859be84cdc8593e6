"""Compare teachers, trained in different ways over seeds, and the students that distillation makes of them.

    python -m training.studies.study_teachers training/configs/study/digits_stochastic_depth.yaml --jobs 2

A variant is a name followed by flags of train_teacher.py. For every seed and variant a teacher is trained, then
distill.py makes a student of it, with the same settings for all. Given again, the same command leaves what has
finished, and resumes an interrupted run from its last checkpoint; the results are written from whatever is finished.
Studies that name the same folders share the teachers and students of variants with the same name and flags. What a
study costs and gives stands in its config file.
"""

from raptor_settings.parse import parse_settings

from .settings import TeacherStudySettings, slug, split_variants

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(TeacherStudySettings)

import functools
import logging
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from raptor_settings.distill import DistillSettings
from raptor_settings.teacher import TeacherSettings
from torch import Tensor

from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.data.loaders import ImageLoader, eval_loader
from raptor_hf.data.sources import open_splits
from raptor_hf.distillation.inputs import check_blocks
from raptor_hf.metrics import FidelityAccumulator
from raptor_hf.phases import Partition, phase_contrast
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.run_metrics import StudentMetrics, TeacherMetrics, read_json
from raptor_hf.recipes.settings import check_same_run, user_errors
from raptor_hf.teacher import Teacher, load_teacher

from .children import exit_on_sigterm
from .conclusions import by_variant, markdown_table
from .study import (
    PlannedRun,
    flag_list,
    machines,
    measured,
    run_all,
)
from .teachers import (
    breaking_sentence,
    change_r2,
    claims_of,
    layer_similarity,
    plot_teacher_study,
)
from .uncertainty import INTERVALS

RECIPES = Path(__file__).parents[1]

logger = logging.getLogger("study_teachers")


@dataclass(frozen=True)
class Pair:
    """A teacher and its student, one run of train_teacher.py and one of distill.py."""

    variant: str
    teacher_settings: TeacherSettings
    teacher: PlannedRun
    student: PlannedRun

    @property
    def seed(self) -> int:
        return self.teacher.seed


def main() -> None:
    settings = parse_settings(TeacherStudySettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        pairs = plan_pairs(settings)
        for pair in pairs:  # refuses folders that hold runs of other settings
            for run in (pair.teacher, pair.student):
                check_same_run(run.folder, run.settings)
            check_blocks(pair.student.settings, pair.teacher_settings.num_layers)
        exit_on_sigterm()
        output_dir = Path(settings.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
    try:
        failed = run_pairs(pairs, settings)
    finally:  # after an interrupt, too
        if records := records_of(pairs, settings):
            write_results(settings, records, output_dir, command_line(sys.argv[1:]))
            print(f"saved to {output_dir}: results.json, table.md and figure.png")
    if failed:
        names = "; ".join(f"{run.variant}, seed {run.seed}" for run in failed)
        raise SystemExit(f"{len(failed)} of {2 * len(pairs)} runs failed: {names}")


def plan_pairs(settings: TeacherStudySettings) -> list[Pair]:
    """All teachers with their students, with their settings checked by the recipes' own rules.

    Raises:
        ValueError: a flag or value that a recipe refuses, or variants that do not differ in what the study is of.
    """
    pairs = []
    for seed in settings.seeds:  # the outer loop: a study that is cut short has compared all variants on some seeds
        for name, flags in split_variants(settings.variants):
            place = Path(slug(name)) / f"seed-{seed}"
            folders = [Path(folder) / place for folder in (settings.teachers_dir, settings.runs_dir)]
            common = [["--seed", str(seed), "--output_dir", folder.as_posix()] for folder in folders]
            teacher = [settings.teacher_base, *shlex.split(settings.teacher_flags), *flags, *common[0]]
            student = [settings.student_base, *shlex.split(settings.student_flags)]
            student += ["--teacher", folders[0].as_posix(), *common[1]]
            try:
                teacher_settings = parse_settings(TeacherSettings, teacher, exit_on_error=False)
                student_settings = parse_settings(DistillSettings, student, exit_on_error=False)
            except ValueError as error:
                raise ValueError(f"variant {name!r}: {error}") from error
            runs = [
                PlannedRun(f"{name}, {kind}", seed, parsed, [sys.executable, str(script), *arguments])
                for kind, parsed, script, arguments in (
                    ("teacher", teacher_settings, RECIPES / "train_teacher.py", teacher),
                    ("student", student_settings, RECIPES / "distill.py", student),
                )
            ]
            pairs.append(Pair(name, teacher_settings, *runs))
    rates = [pair.teacher_settings.drop_path_rate for pair in pairs if pair.seed == settings.seeds[0]]
    if settings.study == "stochastic_depth" and len(set(rates)) < len(rates):
        raise ValueError(f"the variants have drop_path_rate {rates}; a study of stochastic_depth needs each rate once")
    return pairs


def run_pairs(pairs: Sequence[Pair], settings: TeacherStudySettings) -> list[PlannedRun]:
    """Trains what is missing, seed by seed, teachers before their students; the runs that failed.

    The students of teachers that failed are not run.
    """
    failed = []
    for seed in settings.seeds:
        own = [pair for pair in pairs if pair.seed == seed]
        failed += run_all([pair.teacher for pair in own], settings.jobs)
        failed += run_all([pair.student for pair in own if pair.teacher.is_done], settings.jobs)
    return failed


def records_of(pairs: Sequence[Pair], settings: TeacherStudySettings) -> list[dict[str, Any]]:
    """The records of all pairs that are finished, variants in the order of the settings."""
    order = [name for name, _ in split_variants(settings.variants)]
    done = [pair for pair in pairs if pair.teacher.is_done and pair.student.is_done]
    return [record_of(pair) for pair in sorted(done, key=lambda pair: order.index(pair.variant))]


def record_of(pair: Pair) -> dict[str, Any]:
    """The record of one teacher and its student."""
    teacher, student = TeacherMetrics.read(pair.teacher.folder), StudentMetrics.read(pair.student.folder)
    phases, fidelity = read_json(pair.student.folder / "phases.json"), student.fidelity
    partition, measures = Partition.from_dict(phases), measures_of(pair)
    return {
        "variant": pair.variant,
        "seed": pair.seed,
        "drop_path_rate": pair.teacher_settings.drop_path_rate,
        "teacher_steps": pair.teacher_settings.steps,
        "student_steps": pair.student.settings.stage1_steps + pair.student.settings.stage2_steps,
        "teacher_accuracy": fidelity.teacher_accuracy,
        "train_accuracy": measures["train"]["accuracy"],
        "test_loss": measures["test"]["loss"],
        "train_loss": measures["train"]["loss"],
        "teacher_evaluations": [entry.to_dict() for entry in teacher.evaluations],
        "similarity": layer_similarity(phases["distance"]),
        "contrast": phase_contrast(phases["distance"], partition),
        "blocks": student.blocks,
        "r2_last": fidelity.r2[-1],
        "r2_mean": statistics.fmean(fidelity.r2),
        "copy_r2_mean": statistics.fmean(measures["copy_r2"]),
        "change_r2": change_r2(fidelity.r2, measures["copy_r2"]),
        "agreement": fidelity.agreement,
        "student_accuracy": fidelity.student_accuracy,
        "retained": fidelity.student_accuracy / (fidelity.teacher_accuracy or math.nan),
        "teacher_seconds": teacher.seconds,
        "student_seconds": student.seconds,
        "device": student.device,
        "versions": student.versions,
    }


def measures_of(pair: Pair) -> dict[str, Any]:
    """Measures of the teacher that neither run writes, kept beside it: accuracy and loss on training and test images
    without augmentation or label smoothing, and R^2 of its embedding in place of the states of all layers.
    """
    path = pair.teacher.folder / "measures.json"
    if not path.exists():
        write_json(path, measure_teacher(pair.teacher_settings))
    return read_json(path)


def measure_teacher(settings: TeacherSettings) -> dict[str, Any]:
    """Measures a trained teacher on its own images.

    Args:
        settings: of its training.

    Returns:
        "train" and "test": "accuracy", a fraction, and "loss", the cross-entropy in nats; "copy_r2": R^2 that the
        embedding has in place of the states of layers 1..L, on the test images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(settings.output_dir, device=device)
    processor = load_image_processor(settings.output_dir)
    sources = {"config_name": settings.dataset_config, "revision": settings.dataset_revision}
    columns = {"image_column": settings.image_column, "label_column": settings.label_column}
    open_split = functools.partial(open_images, settings.dataset, **sources, **columns)
    measures = {}
    for name, images in zip(
        ("train", "test"), open_splits(open_split, settings.train_split, settings.test_split), strict=True
    ):
        share = {"batch_size": settings.batch_size, "num_workers": settings.num_workers}
        batches = eval_loader(images, processor, max_failures=settings.max_decode_failures, **share)
        measures[name], copy_r2 = _measure_split(teacher, batches, device)
    return measures | {"copy_r2": copy_r2}


@torch.no_grad()
def _measure_split(teacher: Teacher, batches: ImageLoader, device: torch.device) -> tuple[dict[str, float], Tensor]:
    copied = FidelityAccumulator(teacher.num_layers, teacher.tokens)
    num_images, num_correct, loss = 0, 0, 0.0
    for batch in batches:
        labels = batch["labels"].to(device)
        states = teacher.trajectory(batch["pixel_values"].to(device))
        copied.update(states, states[:, :1].expand_as(states))
        logits = teacher.logits(states[:, -1]).float()
        num_images += len(labels)
        num_correct += int((logits.argmax(dim=1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": num_correct / num_images, "loss": loss / num_images}, copied.compute().r2


def write_results(
    settings: TeacherStudySettings, records: Sequence[dict[str, Any]], output_dir: Path, command: str
) -> None:
    """results.json, table.md and figure.png."""
    claims = claims_of(settings.study, records)
    sentences = [claim.sentence() for claim in claims]
    if settings.study == "stochastic_depth":
        sentences.append(breaking_sentence(records))
    write_json(
        output_dir / "results.json",
        {
            "title": settings.title,
            "command": command,
            "study": settings.study,
            "teacher_base": settings.teacher_base,
            "teacher_flags": settings.teacher_flags,
            "student_base": settings.student_base,
            "student_flags": settings.student_flags,
            "variants": settings.variants,
            "claims": [claim.to_dict() for claim in claims],
            "verdict": sentences,
            "runs": records,
        },
    )
    plot_teacher_study(settings.study, records, output_dir / "figure.png")
    write_text_atomically(output_dir / "table.md", table(settings, records, command, sentences))


def table(
    settings: TeacherStudySettings, records: Sequence[dict[str, Any]], command: str, sentences: Sequence[str]
) -> str:
    """The Markdown page: how the numbers were made, the numbers, the conclusion."""
    seeds = ", ".join(map(str, sorted({run["seed"] for run in records})))
    columns = (
        ("teacher's accuracy (%)", "teacher_accuracy", 100, 1),
        ("on its training images (%)", "train_accuracy", 100, 1),
        ("test loss", "test_loss", 1, 3),
        ("similarity", "similarity", 1, 3),
        ("contrast", "contrast", 1, 3),
        ("R² last layer", "r2_last", 1, 3),
        ("R² mean", "r2_mean", 1, 3),
        ("R² of copying", "copy_r2_mean", 1, 3),
        ("R² of the change", "change_r2", 1, 3),
        ("agreement (%)", "agreement", 100, 1),
        ("student's accuracy (%)", "student_accuracy", 100, 1),
        ("kept (%)", "retained", 100, 1),
    )
    rows = [
        (name, *(measured(runs, key, unit, digits) for _, key, unit, digits in columns))
        for name, runs in by_variant(records).items()
    ]
    parts = (
        f"# {settings.title}",
        f"    {command}",
        f"Teachers by {settings.teacher_base} `{settings.teacher_flags.strip()}`, students by {settings.student_base} "
        f"`{settings.student_flags.strip()}`; seeds {seeds}, of both, on: {machines(records)}.",
        "Mean ± standard deviation over seeds, on the test images where nothing else is said. Similarity is the mean "
        "cosine of two layers, contrast the same within phases minus across them. R² of copying is that of the "
        "embedding in place of all states, R² of the change the share of its error that the student removes; both, "
        "like R² mean, are means over layers. Kept is the student's accuracy over the teacher's, which says little of "
        "a teacher near chance.",
        markdown_table(("variant", *(title for title, *_ in columns)), rows),
        f"![{settings.title}](figure.png)",
        f"What the paper says of large ViTs, here. In brackets: {INTERVALS}; for rank correlations whole variants are "
        "resampled, as seeds of one variant are not independent teachers.",
        "\n".join(f"- {sentence}" for sentence in sentences),
        "The flags of the variants:",
        flag_list(settings.variants),
    )
    return "\n\n".join(parts) + "\n"


def command_line(arguments: Sequence[str]) -> str:
    """The command that a table names."""
    return "python -m training.studies.study_teachers " + shlex.join(arguments)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command goes on from there") from None
