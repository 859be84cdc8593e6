"""Writes the report of an analysis of dynamics: figures, captions, and the page that joins them.

Captions say what a figure shows, and what is seen in it according to the numbers.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..phases import Partition
from ..recipes.files import write_text_atomically
from . import experiment_figures, figures
from .basins import Projection, principal_plane
from .findings import (
    Analysis,
    Finding,
    Thresholds,
    judge_basins,
    judge_self_correction,
    judge_swap,
    score_name,
)
from .motion import DEGREES, to_plain


@dataclass(frozen=True, eq=False)
class Sample:
    """The images that the projection shows, as every model sees them.

    Attributes:
        vectors: by model, one summary per image and layer, (N, L + 1, D).
        labels: class of each image, (N,), or None.
        class_names: by class, or None.
    """

    vectors: Mapping[str, Tensor]
    labels: Tensor | None
    class_names: Sequence[str] | None


def write_report(
    folder: Path,
    analyses: Sequence[Analysis],
    partition: Partition,
    sample: Sample,
    numbers: Mapping[str, Any],
    command: str,
) -> None:
    """Writes report.md, numbers.json and figures/ beside the folder, then moves them in: none is ever half written.

    Args:
        folder: of the report; a report that is there is replaced. Its parent exists.
        analyses: the first is the reference.
        partition: the phases that mark the figures.
        sample: what the projection shows.
        numbers: as in `report_text`; what else it holds goes to numbers.json, too.
        command: that made the report.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    draw_figures(temporary / "figures", analyses, partition, sample)
    record = to_plain(numbers | {"partition": partition.to_dict(), "models": analyses})
    # in one line, as most of it are long lists
    text = json.dumps(_rounded(record), ensure_ascii=False, allow_nan=False)
    write_text_atomically(temporary / "numbers.json", text + "\n")
    write_text_atomically(temporary / "report.md", report_text(analyses, partition, numbers, command))
    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    for name in ("figures", "numbers.json", "report.md"):
        os.replace(temporary / name, folder / name)
    temporary.rmdir()


def _rounded(value: Any) -> Any:
    """The same for JSON: numbers of five digits, more than is meant by any of them, and None for what is no number."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def draw_figures(folder: Path, analyses: Sequence[Analysis], partition: Partition, sample: Sample) -> None:
    """Draws all figures of a report into a folder, which is created.

    Args:
        folder: must not exist.
        analyses: the first is the reference.
        partition: the phases that mark the figures.
        sample: what the projection shows.
    """
    folder.mkdir(parents=True)
    boundaries = partition.boundaries
    dynamics = {a.name: a.dynamics for a in analyses}
    for file, quantities in (
        ("directions.png", ("gamma", "angular_speed", "angular_second_difference", "angular_turning")),
        ("motion.png", ("norm", "update_norm", "second_difference", "turning")),
    ):
        figures.plot_quantities(dynamics, quantities, boundaries, folder / file)
    ranks = {a.name: (a.spectra, a.dynamics.coherence) for a in analyses}
    figures.plot_ranks(ranks, boundaries, folder / "ranks.png")
    if any(a.fidelity is not None for a in analyses):
        figures.plot_epsilon({a.name: a.fidelity for a in analyses}, boundaries, folder / "epsilon.png")
    if all(a.class_angles is not None for a in analyses):
        angles = {a.name: a.class_angles for a in analyses}
        figures.plot_class_angles(angles, boundaries, folder / "class_angles.png")
    planes = {a.name: _plane(a, analyses[0], sample) for a in analyses}
    shown = {name: (plane, sample.vectors[name], shared) for name, (plane, shared) in planes.items()}
    figures.plot_projection(shown, sample.labels, sample.class_names, folder / "projection.png")
    noise = {a.name: a.perturbation for a in analyses}
    experiment_figures.plot_perturbation(noise, boundaries, folder / "perturbation.png")
    metric = score_name(analyses)
    edits = {a.name: a.edits for a in analyses}
    experiment_figures.plot_edits(edits, partition, metric, folder / "edits.png")
    experiment_figures.plot_dmd({a.name: (a.dmd, a.operators) for a in analyses}, folder / "dmd.png")
    experiment_figures.plot_depth(
        {a.name: a.extrapolation for a in analyses},
        {a.name: a.exits for a in analyses},
        metric,
        partition.num_layers,
        folder / "depth.png",
    )


def _plane(a: Analysis, reference: Analysis, sample: Sample) -> tuple[Projection, bool]:
    """The reference's plane for itself and its students, the model's own for others; whether it is shared."""
    shared = a is reference or a.fidelity is not None
    return principal_plane(sample.vectors[reference.name if shared else a.name]), shared


def report_text(analyses: Sequence[Analysis], partition: Partition, numbers: Mapping[str, Any], command: str) -> str:
    """Writes the page, in Markdown.

    Args:
        analyses: the first is the reference.
        partition: the phases.
        numbers: what is saved as JSON beside it: "findings" (of `findings`), "images", "num_images",
            "intervention_images", "analysis_cost" (or None), "device", "versions" and "settings", of which the report
            tells the "rank_stride"; and "about", sentences on what the first model is and what not to expect of it.
        command: that made the report.
    """
    results: Sequence[Finding] = numbers["findings"]
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    parts = [
        f"# Depth as time: {', '.join(a.name for a in analyses)}",
        "\n".join(f"- {sentence}" for sentence in numbers["about"]),
        f"    {command}",
        f"{numbers['num_images']} images of {numbers['images']}; experiments on {numbers['intervention_images']} of "
        f"them. Phases {partition} ({partition.method}). {numbers['device']}. {versions}.",
        _models_table(analyses),
        "## Findings",
        summary_text(results),
        findings_text(results),
    ]
    texts = captions(analyses, partition.boundaries, numbers["settings"]["rank_stride"])
    for title, files in SECTIONS.items():
        present = [file for file in files if file in texts]
        if present:
            parts.append(f"## {title}")
        for file in present:
            parts += [f"![{title}](figures/{file})", *texts[file]]
        if "edits.png" in present:
            parts.append(_edits_table(analyses))
        if "dmd.png" in present:
            parts.append(_continuation_table(analyses))
    if numbers["analysis_cost"]:
        parts += ["## Cost", _cost_text(numbers["analysis_cost"], numbers["settings"]["rank_stride"])]
    return "\n\n".join(parts) + "\n"


SECTIONS = {
    "Directions": ("directions.png",),
    "States": ("motion.png",),
    "Ranks": ("ranks.png",),
    "Epsilon of the block-recurrent hypothesis": ("epsilon.png",),
    "Angular basins": ("class_angles.png", "projection.png"),
    "Perturbations": ("perturbation.png",),
    "Layers replaced and swapped": ("edits.png",),
    "Linear models of the phases": ("dmd.png",),
    "Depth": ("depth.png",),
}


def _models_table(analyses: Sequence[Analysis]) -> str:
    lines = ["| model | from | family | parameters (M) | accuracy (%) |", "|---|---|---|---:|---:|"]
    for a in analyses:
        accuracy = "-" if a.accuracy is None else f"{100 * a.accuracy:.1f}"
        lines.append(f"| {a.name} | {a.source} | {a.family} | {a.num_parameters / 1e6:.2f} | {accuracy} |")
    return "\n".join(lines)


def _edits_table(analyses: Sequence[Analysis]) -> str:
    metric = score_name(analyses)
    unit, digits = (1, 3) if metric == "cosine" else (100, 1)
    summaries = {a.name: a.edits.summary(metric) for a in analyses}
    rows = [f"| {metric}{'' if unit == 1 else ' (%)'} | edits | " + " | ".join(summaries) + " |"]
    rows.append("|---|---:|" + "---:|" * len(summaries))
    for key in next(iter(summaries.values())):
        kind, relation, number = key
        cells = [
            f"{unit * i.mean:.{digits}f} [{unit * i.low:.{digits}f}, {unit * i.high:.{digits}f}]"
            for i in (summary[key] for summary in summaries.values())
        ]
        count = next(iter(summaries.values()))[key].count
        where = "within a phase" if relation == "within" else "across phases"
        rows.append(f"| {kind} {number} {where} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _continuation_table(analyses: Sequence[Analysis]) -> str:
    lines = [
        "A whole phase by its linear map, 1 - cosine to the true states, mean over tokens: where the phase ends, after "
        "the model's own remaining layers, and after these if the phase is left out. Then, where the phase ends, for "
        "cls and patches, the power K^n of the map against one map fitted to the whole phase.",
        "",
        "| model | layers | at its end | after the rest | left out | K^n, cls / patches | one map, cls / patches "
        "| predictions kept (%) |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for a in analyses:
        for rest, errors in zip(a.continuation, a.dmd, strict=True):
            kept = "-" if rest.agreement is None else f"{100 * float(rest.agreement.mean):.1f}"
            whole = [
                " / ".join(
                    f"{float(c.mean):.3f}" for g, c in errors.whole_cosine_error[kind].items() if g != "registers"
                )
                for kind in ("dmd", "endpoint")
            ]
            numbers = (rest.error_at_end, rest.error_at_last, rest.identity_at_last)
            cells = " | ".join(f"{float(curve.mean):.3f}" for curve in numbers)
            layers = f"{rest.span[0] + 1} to {rest.span[1]}"
            lines.append(f"| {a.name} | {layers} | {cells} | {whole[0]} | {whole[1]} | {kept} |")
    return "\n".join(lines)


def _cost_text(cost: Mapping[str, Any], rank_stride: int) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in cost["shares"].items())
    return (
        f"The streamed analysis of all models costs {cost['total']:.0%} of the forward passes it needs ({shares}; "
        f"forward passes {1000 * cost['forward_seconds']:.0f} ms for {cost['batch_size']} images), median of "
        f"{cost['repeats']} repeats taken in turn. Ranks take {_every(rank_stride)}, linear "
        "models about half of them."
    )


def _every(stride: int) -> str:
    return "all images" if stride == 1 else f"one in {stride} images"


def findings_text(results: Sequence[Finding]) -> str:
    """Writes the findings as a Markdown table with the first model's numbers; criteria and other numbers are folded."""
    names = list(results[0].verdicts)
    words = {True: "yes", False: "no", None: "-"}
    lines = [f"| finding | {' | '.join(names)} | {names[0]}, in numbers |", "|---|" + "---|" * (len(names) + 1)]
    for finding in results:
        cells = [words[verdict.holds] for verdict in finding.verdicts.values()]
        lines.append(f"| **{finding.title}** | {' | '.join(cells)} | {finding.verdicts[names[0]].evidence} |")
    folded = ["<details><summary>When a finding counts as holding, and the numbers of the other models</summary>", ""]
    for finding in results:
        folded.append(f"- {finding.title}: {finding.criterion}.")
        others = list(finding.verdicts.items())[1:]
        folded += [f"  - {name}, {words[v.holds]}: {v.evidence}." for name, v in others if v.holds is not None]
    return "\n".join([*lines, "", *folded, "", "</details>"])


def summary_text(results: Sequence[Finding]) -> str:
    """One sentence per model: which findings hold for it."""
    sentences = []
    for name in results[0].verdicts:
        holding = [finding.title for finding in results if finding.verdicts[name].holds]
        judged = sum(finding.verdicts[name].holds is not None for finding in results)
        what = f": {', '.join(holding)}" if holding else ""
        sentences.append(f"{name}: {len(holding)} of {judged} findings hold{what}.")
    return "\n\n".join(sentences)


def captions(analyses: Sequence[Analysis], boundaries: Sequence[int], rank_stride: int) -> dict[str, list[str]]:
    """Says what every figure shows, and in a list what is seen in it of each model, by the name of its file."""
    metric, reference = score_name(analyses), analyses[0]
    lines = f"Dotted lines: phase boundaries after layers {', '.join(map(str, boundaries))}. " if boundaries else ""
    bands = "Bands: one standard deviation over images. "
    size = reference.perturbation.sizes[len(reference.perturbation.sizes) // 2]
    angles = reference.class_angles
    num_compared = "" if angles is None else f", of {angles.within.num_images} images"
    result = {
        "directions.png": "Directions x / ||x|| of cls, registers and patches: cosine to the final state, turn per "
        f"layer, second difference, and cosine of successive updates. {bands}{lines}"
        + _each(analyses, _seen_directions),
        "motion.png": "The states themselves: norm, relative size of the update, second difference, cosine of "
        f"successive updates. {bands}{lines}" + _each(analyses, _seen_motion),
        "ranks.png": "In how many directions a layer moves its tokens. Left, of each image; middle, of all images "
        "together; right, coherence of the patches and the spectrum. Ranks and spectrum are those of "
        f"{_every(rank_stride)}, {reference.spectra.stable_rank['raw'].num_images} in number. {bands}{lines}"
        + _each(analyses, _seen_ranks),
        "epsilon.png": "Distance of the student's states from the teacher's, relative and absolute, and cosines by "
        f"kind of token. {lines}" + _each([a for a in analyses if a.fidelity is not None], _seen_epsilon),
        "class_angles.png": f"Angles between images of one class (solid) and of different classes (dashed), and the "
        f"silhouette{num_compared}. {lines}"
        + _each(analyses, lambda a: judge_basins(a, reference, Thresholds()).evidence),
        "projection.png": "Directions of the mean patch of a sample of images, from the embeddings (star: their mean) "
        "to the last layer (dots), coloured by class; a student is drawn in the teacher's plane.",
        "perturbation.png": f"Above, angle between perturbed and unperturbed tokens over depth, for noise of {size:g} "
        "times the norm that enters after each layer. Below, factor per layer fitted to it and to the relative "
        "distance (whiskers: standard deviation over images), and predictions unchanged against the size (whiskers: "
        f"least and most over the layers of the noise). {lines}"
        + _each(analyses, lambda a: judge_self_correction(a, reference, Thresholds()).evidence),
        "edits.png": f"Layers replaced or swapped without retraining, {metric}. Above, each layer replaced by each "
        "other; squares are phases. Below, mean over all or a sample of edits, whiskers 95 % bootstrap intervals over "
        "edits. " + _each(analyses, lambda a: judge_swap(a, reference, Thresholds()).evidence),
        "dmd.png": "One linear map per phase, fitted on half of the images, on the other half: error of p steps, "
        "dotted the error of taking the state itself, grey the 0.02 of the literature; below, its eigenvalues and the "
        "unit circle. " + _each(analyses, _seen_dmd),
        "depth.png": "Above, fewer and more steps than trained (dotted line): the first steps and then the last layer "
        "again, or all layers spread over the steps. A student's reference are the teacher's final states, any other "
        "model's its own. Below, images stopped where cls has settled: score against the average number of steps, and "
        "the thresholds behind it. " + _each(analyses, _seen_depth),
    }
    present = {"epsilon.png": any(a.fidelity for a in analyses), "class_angles.png": angles is not None}
    # the sentences, then the list
    return {
        name: [part.strip() for part in text.split("\n\n")] for name, text in result.items() if present.get(name, True)
    }


def _each(analyses: Sequence[Analysis], seen: Callable[[Analysis], str]) -> str:
    return "\n\n" + "\n".join(f"- {a.name}: {seen(a)}." for a in analyses)


def _seen_directions(a: Analysis) -> str:
    parts = []
    for group, curve in a.dynamics.angular_speed.items():
        speed = DEGREES * np.asarray(curve.mean)
        parts.append(f"{group} turns fastest in layer {speed.argmax() + 1} ({speed.max():.0f} degrees)")
    return ", ".join(parts)


def _seen_motion(a: Analysis) -> str:
    norm, turning = a.dynamics.norm["patches"].mean, a.dynamics.turning["patches"].mean
    return (
        f"norm of patches from {norm[0]:.1f} to {norm[-1]:.1f}, successive updates of patches have cosine "
        f"{turning.min():.2f} to {turning.max():.2f}"
    )


def _seen_ranks(a: Analysis) -> str:
    ranks = a.spectra.effective_rank["angular"].mean
    low, high = ranks.argmin(), ranks.argmax()
    coherence = a.dynamics.coherence.mean
    return (
        f"effective rank per image {ranks[high]:.1f} (layer {high + 1}) down to {ranks[low]:.1f} (layer {low + 1}), "
        f"coherence from {coherence[0]:.2f} to {coherence[-1]:.2f}"
    )


def _seen_epsilon(a: Analysis) -> str:
    relative, absolute = a.fidelity.relative_epsilon, a.fidelity.epsilon
    worst = int(relative.argmax())
    return (
        f"relative epsilon {relative.min():.3f} to {relative.max():.3f}, largest in layer {worst + 1}, "
        f"{relative[-1]:.3f} (absolute {absolute[-1]:.2f}) in the last"
    )


def _seen_dmd(a: Analysis) -> str:
    parts = []
    for operator in a.operators:
        size = operator.eigenvalues.abs()
        parts.append(
            f"{operator.span[0] + 1} to {operator.span[1]} largest {size.max():.2f}, median {size.median():.2f}"
        )
    return "moduli of eigenvalues in layers " + ", ".join(parts)


def _seen_depth(a: Analysis) -> str:
    metric = score_name([a])
    parts = []
    for result in a.exits:
        score = np.asarray(getattr(result, metric).mean)
        steps = np.asarray(result.num_steps.mean)
        full = score[steps.argmax()]
        kept = steps[score >= full - Thresholds().lost_score].min()
        parts.append(f"{kept:.1f} steps by {result.rule.replace('_', ' ')}")
    return f"within {Thresholds().lost_score:.0%} of the {metric} of its latest exits with " + ", ".join(parts)
