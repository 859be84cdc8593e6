"""Judges from the numbers of an analysis, for every model, which findings of the paper hold.

All sentences are made from the numbers, by the thresholds of `Thresholds`, so that running an analysis again rewrites
them. `report` puts them on a page. Most findings are those of "Block-Recurrent Dynamics in Vision Transformers" (arXiv
2512.19941) on DINOv2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..metrics import Fidelity
from .basins import ClassAngles
from .dmd import DMDContinuation, DMDSpanErrors, SpanOperator
from .extrapolation import EarlyExitResult, ExtrapolationResult
from .interventions import EditResult, PerturbationResult, mean_interval
from .motion import DEGREES, MAX_PLACEMENTS, Dynamics, Result, SpeedJumps
from .ranks import Spectra


@dataclass(frozen=True)
class Thresholds:
    """Limits from which a finding holds."""

    gamma_drop: float = 0.05  # the most that gamma may fall from one layer to the next
    late_turn: float = 1.5  # speed of cls in the last third over its speed before
    jump_p_value: float = 0.05
    rank_ratio: float = 0.5  # effective rank in the last third over that in the first
    coherence_rise: float = 0.1  # last third minus first third
    contraction: float = 0.95  # factor per layer, which halves an angle in 13 layers
    contracting_share: float = 0.75  # of the layers
    silhouette: float = 0.25  # at the last layer, and above the embeddings
    linear_error: float = 0.02  # 1 - cos of p-step predictions
    lost_score: float = 0.01  # of accuracy or agreement, what counts as lost
    lost_cosine: float = 0.02  # to the reference, from which on states are called drifting
    gamma_difference: float = 0.05  # from the reference's, mean over layers
    speed_difference: float = 5.0  # degrees per layer, likewise


@dataclass(frozen=True, eq=False)
class Analysis(Result):
    """Everything measured of one model.

    Attributes:
        name: in figures and tables.
        source: folder or name on the Hub, or what else it is.
        family: its `model_type`.
        num_parameters: without heads.
        accuracy: on the analysed images, None without labels or classifier.
        jumps: test of speed jumps at phase boundaries by token group, empty without boundaries.
        class_angles: None without labels, or with too few images per class.
        fidelity: to the reference, None for the reference and for models that do not share its embeddings.
    """

    name: str
    source: str
    family: str
    num_parameters: int
    accuracy: float | None
    dynamics: Dynamics
    spectra: Spectra
    jumps: dict[str, SpeedJumps]
    class_angles: ClassAngles | None
    perturbation: PerturbationResult
    edits: EditResult
    dmd: list[DMDSpanErrors]
    operators: list[SpanOperator]
    continuation: list[DMDContinuation]
    extrapolation: list[ExtrapolationResult]
    exits: list[EarlyExitResult]
    fidelity: Fidelity | None


@dataclass(frozen=True)
class Verdict(Result):
    """Whether a finding holds for a model, True, False or None (cannot be told), and the numbers that say so."""

    holds: bool | None
    evidence: str


@dataclass(frozen=True)
class Finding(Result):
    """One finding of the paper.

    Attributes:
        title: of two or three words.
        criterion: when it counts as holding.
        verdicts: by model.
    """

    title: str
    criterion: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def findings(analyses: Sequence[Analysis], thresholds: Thresholds | None = None) -> list[Finding]:
    """Judges every finding for every model; the first is the reference that students are compared with."""
    t = thresholds or Thresholds()
    return [
        Finding(title, criterion, {a.name: judge(a, analyses[0], t) for a in analyses})
        for title, criterion, judge in _criteria(t)
    ]


def _criteria(t: Thresholds) -> list[tuple[str, str, Callable[[Analysis, Analysis, Thresholds], Verdict]]]:
    """Title, criterion and judge of every finding; a judge is given model and reference."""
    return [
        (
            "S-curve of directions",
            f"gamma of all kinds of tokens never falls by over {t.gamma_drop:g}, and rises fastest in the middle third",
            _s_curve,
        ),
        ("cls turns late", f"speed of cls in the last third at least {t.late_turn:g} times that before", _late_turn),
        ("registers are slow", "mean speed of registers below that of patches", _slow_registers),
        (
            "speed jumps at phases",
            f"test over all placements of the boundaries (or {MAX_PLACEMENTS} random ones), p <= {t.jump_p_value:g} / "
            "number of kinds of tokens, as each is tested, for one of them",
            judge_jumps,
        ),
        (
            "rank collapse",
            f"effective rank of angular updates in the last third at most {t.rank_ratio:g} of that in the first",
            _rank_collapse,
        ),
        (
            "coherence rises late",
            f"that of the last third is at least {t.coherence_rise:g} above the first's, and rises faster than before",
            _coherence,
        ),
        (
            "angular basins",
            f"silhouette of the last layer's summaries above {t.silhouette:g} and above that of the embeddings",
            judge_basins,
        ),
        (
            "self-correction",
            f"the angle of noise shrinks by {t.contraction:g} per layer or less, for {t.contracting_share:.0%} of the "
            "layers it enters at",
            judge_self_correction,
        ),
        (
            "swap within phases",
            "a layer is replaced better by one of its phase than by others: the difference is above 0 for most layers, "
            f"and its mean over layers, the largest left out, at least {t.lost_score:g} with a 95 % interval above 0",
            judge_swap,
        ),
        (
            "linear phases",
            f"K^p within {t.linear_error:g} of the cosine in every phase, for cls and patches, up to the last p",
            _linear,
        ),
        (
            "stable beyond its depth",
            f"at twice the steps, the last layer held, no more than {t.lost_score:.0%} is lost, neither of the "
            "accuracy nor of the agreement with the reference",
            judge_extrapolation,
        ),
        (
            "same dynamics",
            f"gamma and speed of all kinds of tokens differ from the reference's by at most {t.gamma_difference:g} and "
            f"{t.speed_difference:g} degrees, mean over layers",
            _same,
        ),
    ]


def score_name(analyses: Sequence[Analysis]) -> str:
    """The best score that all models have: "accuracy", "agreement" or "cosine"."""
    for name in ("accuracy", "agreement"):
        if all(getattr(a.edits, name) is not None for a in analyses):
            return name
    return "cosine"


def thirds(values: Sequence[float]) -> tuple[float, float, float]:
    """Means over the first, the middle and the last third; a remainder goes to the middle."""
    values, size = np.asarray(values, dtype=float), max(1, len(values) // 3)
    rest = values[size:-size] if len(values) > 2 * size else values
    return float(values[:size].mean()), float(rest.mean()), float(values[-size:].mean())


def _s_curve(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    parts, holds = [], []
    for group, curve in a.dynamics.gamma.items():
        rises = np.diff(np.asarray(curve.mean))
        first, middle, last = thirds(rises)
        holds.append(rises.min() >= -t.gamma_drop and middle >= max(first, last))
        parts.append(f"{group} from {curve.mean[0]:.2f}, rising by {first:.3f} / {middle:.3f} / {last:.3f} per layer")
    return Verdict(bool(np.all(holds)), "; ".join(parts) + " in the three thirds")


def _late_turn(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    if "cls" not in a.dynamics.angular_speed:
        return Verdict(None, "no cls token")
    speed = DEGREES * np.asarray(a.dynamics.angular_speed["cls"].mean)
    size = max(1, len(speed) // 3)
    late, before = speed[-size:].mean(), speed[:-size].mean()
    evidence = (
        f"{late:.1f} degrees per layer in the last third, {before:.1f} before; fastest in layer {speed.argmax() + 1}"
    )
    return Verdict(bool(late >= t.late_turn * before), evidence)


def _slow_registers(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    speeds = {group: DEGREES * float(curve.mean.mean()) for group, curve in a.dynamics.angular_speed.items()}
    evidence = ", ".join(f"{group} {speed:.1f}" for group, speed in speeds.items()) + " degrees per layer"
    return Verdict(speeds["registers"] < speeds["patches"] if "registers" in speeds else None, evidence)


def judge_jumps(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    """Judges whether speed jumps at phase boundaries."""
    if not a.jumps:
        return Verdict(None, "no phase boundary")
    parts = [
        f"{group} {DEGREES * jump.at_boundaries:.1f} against {DEGREES * jump.elsewhere:.1f} (p = {jump.p_value:.2f})"
        for group, jump in a.jumps.items()
    ]
    holds = any(j.p_value <= t.jump_p_value / len(a.jumps) for j in a.jumps.values())
    return Verdict(holds, "change of speed in degrees, at boundaries against elsewhere: " + ", ".join(parts))


def _rank_collapse(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    ranks = a.spectra.effective_rank["angular"].mean
    first, _, last = thirds(ranks)
    pooled = a.spectra.pooled_effective_rank["angular"]
    evidence = (
        f"{first:.1f} in the first third, {last:.1f} in the last, {ranks[-1]:.1f} in the last layer; "
        f"all images pooled {pooled[0]:.0f} in the first layer, {pooled[-1]:.0f} in the last"
    )
    return Verdict(bool(last <= t.rank_ratio * first), evidence)


def _coherence(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    coherence = np.asarray(a.dynamics.coherence.mean)
    first, _, last = thirds(coherence)
    rises, size = np.diff(coherence), len(coherence) // 3
    before, late = rises[:-size].mean(), rises[-size:].mean()
    evidence = (
        f"{first:.2f} in the first third, {last:.2f} in the last, {coherence[-1]:.2f} at the end; "
        f"{before:+.3f} per layer before the last third, {late:+.3f} in it"
    )
    return Verdict(bool(last - first >= t.coherence_rise and late > before), evidence)


def judge_basins(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    """Judges whether images of a class end up in one direction."""
    if a.class_angles is None:
        return Verdict(None, "no labels, or too few images per class")
    angles = a.class_angles
    first, last = float(angles.silhouette.mean[0, -1]), float(angles.silhouette.mean[-1, -1])
    within, between = (DEGREES * float(curve.mean[-1, -1]) for curve in (angles.within, angles.between))
    evidence = (
        f"mean patch at the last layer: {within:.0f} degrees within a class, {between:.0f} between classes; "
        f"silhouette {first:.2f} in the embeddings, {last:.2f} at the end"
    )
    return Verdict(last > t.silhouette and last > first, evidence)


def judge_self_correction(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    """Judges whether perturbations shrink."""
    p = a.perturbation
    size = len(p.sizes) // 2
    rates = np.asarray(p.rate.mean[:, size])
    share = float((rates <= t.contraction).mean())
    evidence = (
        f"noise of {p.sizes[size]:g} times the norm: factor per layer {rates.min():.2f} to {rates.max():.2f}, "
        f"at most {t.contraction:g} for {share:.0%} of the layers"
    )
    if p.unchanged is not None:
        evidence += f"; {100 * float(p.unchanged.mean[:, size].mean()):.1f} % of the predictions unchanged"
    return Verdict(share >= t.contracting_share, evidence)


def judge_swap(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    """Judges whether layers of one phase stand in for each other better than layers of other phases.

    Edits are compared layer by layer, because the loss depends on the replaced layer far more than on its substitute,
    and because layers have different shares of substitutes within their phase.
    """
    metric = score_name([a])
    gaps = replacement_gaps(a.edits, metric)
    if len(gaps) < 2:
        return Verdict(None, "the phases allow no comparison")
    num_above, largest = sum(gap > 0 for gap in gaps.values()), max(gaps, key=gaps.get)
    # one layer that nothing can stand in for would decide the mean of all
    interval = mean_interval([gap for layer, gap in gaps.items() if layer != largest])
    evidence = (
        f"{metric} within minus across, by layer replaced: above 0 for {num_above} of {len(gaps)}, largest "
        f"{gaps[largest]:+.3f}, of layer {largest}; mean of the others {interval.mean:+.3f} "
        f"[{interval.low:+.3f}, {interval.high:+.3f}]"
    )
    holds = num_above > len(gaps) / 2 and interval.low > 0 and interval.mean >= t.lost_score
    return Verdict(holds, evidence)


def replacement_gaps(edits: EditResult, metric: str) -> dict[int, float]:
    """Mean score with a layer replaced by others of its phase minus that by layers of other phases, for every layer."""
    scores: dict[int, dict[str, list[float]]] = {}
    for edit, value in zip(edits.edits, getattr(edits, metric).mean.tolist(), strict=True):
        if edit.kind == "replace" and edit.num_edits == 1:
            ((layer, _),) = edit.pairs
            scores.setdefault(layer, {"within": [], "across": []})[edit.relation].append(value)
    return {
        layer: float(np.mean(row["within"]) - np.mean(row["across"]))
        for layer, row in sorted(scores.items())
        if row["within"] and row["across"]
    }


def _linear(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    worst, parts = 0.0, []
    for span in a.dmd:
        errors = {g: float(c.mean[-1]) for g, c in span.cosine_error["dmd"].items() if g in ("cls", "patches")}
        identity = {g: float(c.mean[-1]) for g, c in span.cosine_error["identity"].items() if g in errors}
        steps = len(span.cosine_error["dmd"]["patches"].mean)
        worst = max([worst, *(float(c.mean.max()) for g, c in span.cosine_error["dmd"].items() if g in errors)])
        numbers = ", ".join(f"{g} {e:.3f} (state itself {identity[g]:.3f})" for g, e in errors.items())
        parts.append(f"layers {span.span[0] + 1} to {span.span[1]}, {steps} steps: {numbers}")
    return Verdict(worst <= t.linear_error, "1 - cos in " + "; ".join(parts))


def judge_extrapolation(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    """Judges whether a model keeps its score at twice the steps; the evidence says what its states do."""
    metric = score_name([a])
    hold = next((r for r in a.extrapolation if r.pace == "hold"), None)
    num_layers = len(a.dynamics.angular_speed["patches"].mean)
    if hold is None or not {num_layers, 2 * num_layers} <= set(hold.num_steps):
        return Verdict(None, "not run for twice the steps")
    scores = getattr(hold, metric) or hold.cosine
    trained, twice = (float(scores.mean[hold.num_steps.index(n)]) for n in (num_layers, 2 * num_layers))
    near, far = (float(hold.cosine.mean[hold.num_steps.index(n)]) for n in (num_layers, 2 * num_layers))
    speed = DEGREES * float(hold.last_speed.mean[hold.num_steps.index(2 * num_layers)])
    evidence = (
        f"{metric} {trained:.3f} at {num_layers} steps, {twice:.3f} at {2 * num_layers}, "
        f"where the tokens still turn by {speed:.1f} degrees per step; "
        f"cosine to the reference's final states {near:.3f} and {far:.3f}"
    )
    # accuracy at chance is kept by any prediction
    kept = scores if hold.agreement is None else hold.agreement
    before, after = (float(kept.mean[hold.num_steps.index(n)]) for n in (num_layers, 2 * num_layers))
    if kept is not scores:
        evidence += f", agreement with its predictions {before:.3f} and {after:.3f}"
    holds = twice >= trained - t.lost_score and after >= before - t.lost_score
    if holds and far < near - t.lost_cosine:
        evidence += " (stable prediction, drifting state)"
    return Verdict(holds, evidence)


def _same(a: Analysis, reference: Analysis, t: Thresholds) -> Verdict:
    if a is reference:
        return Verdict(None, "the reference")
    parts, holds = [], []
    for name, unit, limit in (("gamma", 1.0, t.gamma_difference), ("angular_speed", DEGREES, t.speed_difference)):
        ours, theirs = getattr(a.dynamics, name), getattr(reference.dynamics, name)
        differences = {
            group: unit * float((ours[group].mean - theirs[group].mean).abs().mean())
            for group in ours
            if group in theirs
        }
        holds += [value <= limit for value in differences.values()]
        numbers = ", ".join(f"{group} {value:.{3 if unit == 1 else 1}f}" for group, value in differences.items())
        parts.append(f"{name.replace('_', ' ')} {numbers}{'' if unit == 1 else ' degrees per layer'}")
    evidence = "mean difference of " + "; ".join(parts)
    if a.fidelity is not None:
        evidence += f"; relative epsilon {float(a.fidelity.relative_epsilon.mean()):.3f} on average over layers"
    return Verdict(all(holds), evidence)
