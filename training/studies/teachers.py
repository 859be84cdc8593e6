"""Effects of the training of a teacher on its layers and its students: quantities, claims and a figure.

A study holds one record per teacher and its student, made by study_teachers.py:

    {"variant": "p = 0.3", "seed": 0, "drop_path_rate": 0.3, "similarity": 0.61, "r2_mean": 0.95, ...}

The claims are those of "Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941) on small ViTs: more
stochastic depth makes layers more alike and R^2 higher, until training breaks; untrained ViTs are easier to reconstruct
than trained ones; overfitting lowers similarity and R^2. Whether they hold is told from the records alone.
"""

import math
import os
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raptor_hf.figures import saved
from raptor_hf.phases import as_distance_matrix

from .conclusions import Record, by_variant
from .settings import Study, role_of
from .uncertainty import CONFIDENCE, Estimate, difference_interval, rank_correlation

BROKEN_SHARE = 0.5  # of the best variant's accuracy, below which training has broken
BREAKING_RATE = 0.7  # of stochastic depth, from where on the paper saw it break


def layer_similarity(distance: np.ndarray) -> float:
    """Mean cosine similarity of two different layers: the mean of 1 - distance over all pairs of layers.

    Args:
        distance: (L, L) between layers, 1 - cos, as in phases.json; L at least 2.

    Raises:
        ValueError: if the matrix holds no distances, or those of a single layer.
    """
    distance = as_distance_matrix(distance)
    if len(distance) < 2:
        raise ValueError("distance has 1 layer; a similarity needs two")
    return float(1 - distance[np.triu_indices(len(distance), 1)].mean())


def change_r2(r2: Sequence[float], copy_r2: Sequence[float]) -> float:
    """Share of the change since the embedding that a student gets right, mean over layers.

    In layer l it is 1 - ||s_l - a_l||^2 / ||a_0 - a_l||^2, with s the student's states and a the teacher's: 0 for a
    student that hands on the embedding, 1 for a perfect one. Unlike R^2, it is not high just because the states of a
    teacher hardly change.

    Args:
        r2: of the student in layers 1..L.
        copy_r2: of the embedding a_0 in place of the states of layers 1..L, on the same images.

    Raises:
        ValueError: of different length, or a teacher whose state does not change at all.
    """
    if len(r2) != len(copy_r2):
        raise ValueError(f"r2 has {len(r2)} layers, copy_r2 has {len(copy_r2)}; they must agree")
    if max(copy_r2) >= 1:
        raise ValueError(f"copy_r2 is {max(copy_r2)} in some layer: its states are the embedding, nothing has changed")
    return statistics.fmean(1 - (1 - own) / (1 - copied) for own, copied in zip(r2, copy_r2, strict=True))


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and its outcome here.

    Args:
        statement: the claim in words.
        quantity: what was estimated.
        estimate: with its interval.
        expected: sign that the estimate has if the claim is true.
    """

    statement: str
    quantity: str
    estimate: Estimate
    expected: Literal[-1, 1]

    @property
    def outcome(self) -> str:
        """Holds, or the opposite does, where the interval lies on one side of 0; otherwise it stays open."""
        low, high = sorted((self.expected * self.estimate.low, self.expected * self.estimate.high))
        if low > 0:
            return "holds"
        return "does not hold, the opposite does" if high < 0 else "stays open"

    def sentence(self) -> str:
        """Claim, outcome and the number behind it."""
        return f"{self.statement}: {self.outcome} ({self.quantity} {interval_text(self.estimate)})."

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        named = {"statement": self.statement, "outcome": self.outcome, "quantity": self.quantity}
        return named | self.estimate.to_dict()


def interval_text(estimate: Estimate, digits: int = 3) -> str:
    """A change or a correlation with its sign, and its interval where there is one."""
    if not math.isfinite(estimate.value):
        return "not defined"
    text = f"{estimate.value:+.{digits}f}"
    if math.isfinite(estimate.low):
        text += f" [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"
    return text


def claims_of(study: Study, records: Sequence[Record]) -> list[Claim]:
    """The claims that a study can test with the teachers it has.

    Args:
        study: what it varies.
        records: one per teacher.
    """
    records = compared(study, records)
    own = stochastic_depth_claims(records) if study == "stochastic_depth" else training_time_claims(records)
    return own + similarity_claims(records)


def compared(study: Study, records: Sequence[Record]) -> list[Record]:
    """The teachers that claims are about: of stochastic depth those whose training held.

    In a study of training time all are, as there an untrained teacher is a stage, not a failure.

    Args:
        study: what it varies.
        records: with "variant" and "teacher_accuracy".
    """
    broken = broken_variants(records) if study == "stochastic_depth" else set()
    return [record for record in records if record["variant"] not in broken]


def stochastic_depth_claims(records: Sequence[Record]) -> list[Claim]:
    """Effects of stochastic depth, by rank correlations with its rate p.

    Args:
        records: of teachers whose training held, with "variant", "drop_path_rate", "similarity", "r2_mean" and
            "change_r2".
    """
    rates = [record["drop_path_rate"] for record in records]
    claims = []
    for key, statement, name in (
        ("similarity", "More stochastic depth makes the layers more alike", "layer similarity"),
        ("r2_mean", "More stochastic depth makes R² of the student higher", "R²"),
        ("change_r2", "More stochastic depth makes R² of the change since the embedding higher", "R² of the change"),
    ):
        estimate = _correlation(records, rates, [record[key] for record in records])
        quantity = f"rank correlation of p and {name} over {_number(records)}"
        claims.append(Claim(statement, quantity, estimate, 1))
    return claims


def breaking_sentence(records: Sequence[Record]) -> str:
    """Whether training breaks at high rates of stochastic depth, in the paper at 0.7 to 0.9.

    Args:
        records: with "variant", "drop_path_rate" and "teacher_accuracy".
    """
    statement = f"Training breaks at high rates of stochastic depth, from p = {BREAKING_RATE:g} on"
    lowest = min(record["drop_path_rate"] for record in records)
    highest = max(record["drop_path_rate"] for record in records)
    if highest < BREAKING_RATE or lowest == highest:
        return f"{statement}: not tested."
    accuracies = [
        [100 * record["teacher_accuracy"] for record in records if record["drop_path_rate"] == rate]
        for rate in (lowest, highest)
    ]
    broken = broken_variants(records)
    rates = [record["drop_path_rate"] for record in records if record["variant"] in broken]
    outcome = f"not seen up to p = {highest:g}"
    if rates:
        outcome = "holds" if min(rates) >= BREAKING_RATE else f"it already breaks at p = {min(rates):g}"
    return (
        f"{statement}: {outcome}. At p = {highest:g} accuracy is {statistics.fmean(accuracies[1]):.1f} %, "
        f"{interval_text(difference_interval(*accuracies), 1)} points from p = {lowest:g}; below "
        f"{100 * BROKEN_SHARE:g} % of the best variant's counts as broken, and is left out of the correlations."
    )


def broken_variants(records: Sequence[Record]) -> set[str]:
    """The variants whose training has broken: less than half of the best variant's accuracy.

    Args:
        records: with "variant" and "teacher_accuracy".
    """
    accuracy = {
        name: statistics.fmean(record["teacher_accuracy"] for record in runs)
        for name, runs in by_variant(records).items()
    }
    return {name for name, value in accuracy.items() if value < BROKEN_SHARE * max(accuracy.values())}


def training_time_claims(records: Sequence[Record]) -> list[Claim]:
    """Effects of training and overfitting, by differences from the converged teachers.

    Args:
        records: of variants whose names begin with one of `ROLES`, with "similarity", "r2_mean", "change_r2",
            "teacher_accuracy" and "train_accuracy".
    """
    variants = by_variant(records)
    converged = next((runs for name, runs in variants.items() if role_of(name) == "converged"), None)
    if converged is None:
        return []
    claims = []
    for name, runs in variants.items():
        if role_of(name) == "untrained":
            lines = (
                ("r2_mean", "Untrained teachers are easier to reconstruct than converged ones", "R²", 1),
                (
                    "change_r2",
                    "The change since the embedding is easier to reconstruct in untrained ones",
                    "R² of the change",
                    1,
                ),
            )
        elif role_of(name) == "overfitted":
            lines = (
                (
                    "gap",
                    f'The teachers "{name}" do overfit',
                    "accuracy on training images minus that on test images",
                    1,
                ),
                ("similarity", f'Overfitting ("{name}") makes the layers less alike', "layer similarity", -1),
                ("r2_mean", f'Overfitting ("{name}") lowers R² of the student', "R²", -1),
                (
                    "change_r2",
                    f'Overfitting ("{name}") lowers R² of the change since the embedding',
                    "R² of the change",
                    -1,
                ),
            )
        else:
            continue
        for key, statement, quantity, expected in lines:
            estimate = difference_interval(_values(converged, key), _values(runs, key))
            claims.append(Claim(statement, f"{quantity} against converged", estimate, expected))
    return claims


def similarity_claims(records: Sequence[Record]) -> list[Claim]:
    """Whether the similarity of a teacher's layers predicts the fidelity of its student.

    Over all teachers, and once more from deviations from the mean of each variant, which what the variants differ in
    cannot make. These are in standard deviations of the variant, so that one of large spread does not decide alone.

    Args:
        records: with "variant", "similarity", "r2_mean" and "change_r2".
    """
    similarity = [record["similarity"] for record in records]
    quantity, claims = f"rank correlation over {_number(records)}", []
    for key, statement in (
        ("r2_mean", "Similarity of the layers predicts R² of the student"),
        ("change_r2", "Similarity of the layers predicts R² of the change since the embedding"),
    ):
        estimate = _correlation(records, similarity, [record[key] for record in records])
        claims.append(Claim(statement, quantity, estimate, 1))
    varying = [
        record
        for runs in by_variant(records).values()
        if min(len(set(_values(runs, key))) for key in ("similarity", "r2_mean")) > 1
        for record in runs
    ]
    deviations = (_standard_deviations(varying, key) for key in ("similarity", "r2_mean"))
    quantity = (
        "rank correlation of the deviations from the variant's mean, in its standard deviations, over "
        f"{_number(varying)} with a spread"
    )
    estimate = _correlation(varying, *deviations)
    return [*claims, Claim("Similarity predicts R² among seeds of one variant", quantity, estimate, 1)]


def plot_teacher_study(study: Study, records: Sequence[Record], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws accuracies, similarity, contrast and R^2 of every variant, a dot per seed and lines through the means, and
    R^2 of the students against the similarity of the teachers' layers.

    Args:
        study: what it varies: the rate p of stochastic depth is an axis, stages of training stand side by side.
        records: one per teacher, as training/studies/study_teachers.py makes them.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
    """
    figure = Figure(figsize=(12.0, 7.0), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, (label, unit, lines) in zip(panels, _panels(records), strict=False):
        for index, (key, name) in enumerate(lines):
            _draw_variants(axes, study, records, key, unit, f"C{index}", name)
        axes.set(ylabel=label)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    _draw_scatter(figure.axes[-1], study, records)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return saved(figure, path, dpi=150)


def _panels(records: Sequence[Record]) -> list[tuple[str, float, list[tuple[str, str]]]]:
    """Of the panels but the last: what the axis shows, its unit, and key and name of every line."""
    accuracies = [("teacher_accuracy", "teacher, test images"), ("train_accuracy", "teacher, its training images")]
    return [
        ("accuracy (%)", 100, [*accuracies, ("student_accuracy", "student, test images")]),
        ("similarity of two layers (mean cosine)", 1, [("similarity", "")]),
        ("phase contrast (cosine within \N{MINUS SIGN} across)", 1, [("contrast", "")]),
        ("R² of the student, mean of layers", 1, [("r2_mean", "of the states"), ("change_r2", "of their change")]),
        ("accuracy kept by the student (%)", 100, [("retained", "")]),
    ]


def _draw_variants(
    axes: Axes, study: Study, records: Sequence[Record], key: str, unit: float, color: str, name: str
) -> None:
    """Dots of all seeds and a line through the means of the variants."""
    variants = by_variant(records)
    if study == "stochastic_depth":
        places = [runs[0]["drop_path_rate"] for runs in variants.values()]
        axes.set_xlabel("rate p of stochastic depth")
        axes.set_xticks(sorted(places))
    else:
        places = list(range(len(variants)))
        axes.set_xticks(places, [textwrap.fill(variant, 11) for variant in variants], fontsize=8)
        axes.margins(x=0.1)
    values = [[unit * run[key] for run in runs] for runs in variants.values()]
    means = sorted(zip(places, map(statistics.fmean, values), strict=True))
    axes.plot(*zip(*means, strict=True), "-", color=color, linewidth=1.2, alpha=0.7, label=name or None)
    dots = [(place, value) for place, seeds in zip(places, values, strict=True) for value in seeds]
    axes.plot(*zip(*dots, strict=True), "o", color=color, markersize=4)


def _draw_scatter(axes: Axes, study: Study, records: Sequence[Record]) -> None:
    """R^2 of the students against the similarity of the teachers' layers."""
    for index, (variant, runs) in enumerate(by_variant(records).items()):
        points = [(run["similarity"], run["r2_mean"]) for run in runs]
        axes.plot(*zip(*points, strict=True), "o", color=f"C{index}", markersize=5, label=variant)
    kept = compared(study, records)
    correlation = interval_text(similarity_claims(kept)[0].estimate, 2)
    title = f"rank correlation {correlation}, {100 * CONFIDENCE:g} % interval\nover {_number(kept)}"
    axes.set_title(title, fontsize=9)
    axes.set(xlabel="similarity of two layers (mean cosine)", ylabel="R² of the student, mean of layers")
    axes.legend(frameon=False, fontsize=8)


def _values(runs: Sequence[Record], key: str) -> list[float]:
    if key == "gap":
        return [run["train_accuracy"] - run["teacher_accuracy"] for run in runs]
    return [run[key] for run in runs]


def _number(records: Sequence[Record]) -> str:
    """How many teachers, of how many variants."""
    return f"{len(records)} teachers of {len(by_variant(records))} variants"


def _correlation(records: Sequence[Record], x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Of two numbers per record; variants are resampled, as their seeds are not independent teachers."""
    if len(records) < 3:
        return Estimate(math.nan, math.nan, math.nan)
    return rank_correlation(x, y, groups=[record["variant"] for record in records])


def _standard_deviations(records: Sequence[Record], key: str) -> list[float]:
    """By how many standard deviations of its variant each record is above the variant's mean."""
    values = {name: _values(runs, key) for name, runs in by_variant(records).items()}
    means = {name: statistics.fmean(own) for name, own in values.items()}
    spreads = {name: statistics.stdev(own) for name, own in values.items()}
    return [(record[key] - means[record["variant"]]) / spreads[record["variant"]] for record in records]
