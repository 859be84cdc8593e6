"""The frontier of a study: which models give the most for their parameters, beside baselines of other studies.

    points = baseline_points(json.loads(path.read_text()), "teacher's first *")
    conclusion = frontier_conclusion(records, points)

Series of a study, such as k = 1..6 of one kind of depth conditioning, are compared with one another and with the
baselines at equal parameters, linearly interpolated between their points.
"""

import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .conclusions import (
    SCORES,
    Conclusion,
    Record,
    by_variant,
    grouped,
    judged,
    markdown_table,
    measured_scores,
    paired,
    signed,
    verdicts_sentence,
    written,
    written_difference,
)
from .uncertainty import INTERVALS, difference_interval

RETAINED = 0.99  # of the teacher's accuracy, what counts as kept


@dataclass(frozen=True)
class Point:
    """A model of the frontier, with all its seeds.

    Args:
        name: of series and label.
        series: what it is one of.
        label: which one.
        parameters: of the backbone.
        values: for every score that was measured, the values of all seeds.
        seeds: as the values are ordered; None where they are not known.
        is_probed: whether its accuracy is that of a trained probe; else of the teacher's own classifier.
    """

    name: str
    series: str
    label: str
    parameters: int
    values: Mapping[str, Sequence[float]]
    seeds: tuple[int, ...] | None = None
    is_probed: bool = False

    def mean(self, score: str) -> float:
        """Of one score, over the seeds."""
        return statistics.fmean(self.values[score])


def study_points(records: Iterable[Record]) -> list[Point]:
    """Points of a study's variants; their accuracy is with the teacher's own classifier."""
    points = []
    for name, runs in by_variant(records).items():
        values = {score: [run[score] for run in runs] for score in measured_scores(runs)}
        seeds = tuple(run["seed"] for run in runs)
        points.append(Point(name, *split_name(name), runs[0]["parameters"]["student"], values, seeds))
    return points


def baseline_points(results: Mapping[str, Any], pattern: str = "*") -> list[Point]:
    """Points of a results.json, of a study or of a table of probes, whose names match a shell pattern.

    Args:
        results: its content. Accuracy in a table of probes is that of its first classification head.

    Raises:
        ValueError: it is neither, or no name matches.
    """
    if "runs" in results:
        names = [run["variant"] for run in results["runs"]]
        points = study_points(run for run in results["runs"] if fnmatchcase(run["variant"], pattern))
    elif "rows" in results:
        names, points = [row["name"] for row in results["rows"]], []
        for row in results["rows"]:
            head = next((name for name in row["values"] if name.endswith("/accuracy")), None)
            values = {"r2_last": row["values"].get("r2_last"), "student_accuracy": row["values"].get(head)}
            if fnmatchcase(row["name"], pattern):
                known = {score: numbers for score, numbers in values.items() if numbers}
                points.append(Point(row["name"], *split_name(row["name"]), row["parameters"], known, is_probed=True))
    else:
        raise ValueError(f"results hold {sorted(results)}, neither runs nor rows; give those of study.py or results.py")
    if not points:
        raise ValueError(f"no name matches {pattern!r}; the names are {sorted(set(names))}")
    return points


def split_name(name: str) -> tuple[str, str]:
    """Series and label: of "untied, 3 layers" what the comma parts, of "first 3 layers" the number; else no label."""
    series, _, label = name.rpartition(", ")
    if not series and (match := re.fullmatch(r"(\D*\S )(\d+) (\D+)", name)):
        return match[1] + match[3], match[2]
    return (series, label) if series else (name, "")


def pareto(points: Iterable[Point], score: str) -> list[Point]:
    """The points that no other point equals with as few parameters, by the means over seeds; from small to large."""
    frontier: list[Point] = []
    known = [point for point in points if score in point.values]
    for point in sorted(known, key=lambda point: (point.parameters, -point.mean(score))):
        if not frontier or point.mean(score) > frontier[-1].mean(score):
            frontier.append(point)
    return frontier


def interpolated(line: Iterable[Point], score: str, parameters: int) -> list[float] | None:
    """A score of a series at a number of parameters: linear between two of its points, seed by seed; None outside."""
    ordered = sorted((point for point in line if score in point.values), key=lambda point: point.parameters)
    for low, high in itertools.pairwise(ordered):
        if low.parameters <= parameters <= high.parameters and low.parameters < high.parameters:
            weight = (parameters - low.parameters) / (high.parameters - low.parameters)
            ends = (dict(zip(point.seeds, point.values[score], strict=True)) for point in (low, high))
            return [(1 - weight) * a + weight * b for a, b in paired(*ends)] or None
    return None


def frontier_conclusion(records: Sequence[Record], baselines: Sequence[Point] = ()) -> Conclusion:
    """The points on the frontier, series and baselines at equal parameters, and the smallest that keeps the accuracy.

    Args:
        records: of variants named "series, label". Series after the first are compared with those before, and baselines
            with all, where the numbers of parameters overlap.
        baselines: further points.
    """
    own = study_points(records)
    scores = [score for score in ("r2_last", "student_accuracy") if any(score in point.values for point in own)]
    lines: dict[str, list[Point]] = {}
    for point in own:
        lines.setdefault(point.series, []).append(point)
    numbers = []
    for index, (name, line) in enumerate(lines.items()):
        later = [point for other in list(lines)[index + 1 :] for point in lines[other]]
        for point, score in itertools.product((*later, *baselines), scores):
            level = interpolated(line, score, point.parameters) if score in point.values else None
            if level is not None:
                estimate = difference_interval(level, point.values[score])
                numbers.append(
                    {"point": point.name, "series": point.series, "label": point.label, "against": name, "score": score}
                    | {"parameters": point.parameters, "value": point.mean(score), "level": statistics.fmean(level)}
                    | {"difference": estimate.to_dict(), "verdict": judged(estimate)}
                )
    sentences = [_frontier_sentence((*own, *baselines), score) for score in scores]
    sentences += _equal_size_sentences(numbers)
    if "student_accuracy" in scores:
        sentences += [_retained_sentence(name, line, records[0]["teacher_accuracy"]) for name, line in lines.items()]
        sentences.append(_reading_sentence(baselines))
    sentences.append(f"In brackets, and behind better, undecided and worse: {INTERVALS}.")
    rows = [
        [
            *(entry["point"], entry["against"], SCORES[entry["score"]][0], f"{entry['parameters'] / 1e6:.2f}"),
            *(written(entry[key], entry["score"]) for key in ("value", "level")),
            written_difference(entry["difference"], entry["score"]),
        ]
        for entry in numbers
    ]
    titles = ("point", "against", "score", "parameters (M)", "point's", "interpolated", "difference")
    table = [markdown_table(titles, rows, text_columns=3)] if rows else []
    return Conclusion("\n\n".join((*sentences, *table)), numbers)


def _frontier_sentence(points: Sequence[Point], score: str) -> str:
    """The frontier in one score, and which of its steps are within their interval."""
    frontier = pareto(points, score)
    text = "; ".join(f"{p.name} ({p.parameters / 1e6:.2f} M, {written(p.mean(score), score)})" for p in frontier)
    unsure = [
        f"{low.name} to {high.name}"
        for low, high in itertools.pairwise(frontier)
        if judged(difference_interval(low.values[score], high.values[score])) != "better"
    ]
    return f"**On the Pareto frontier by parameters, {SCORES[score][0]}**: {text}." + (
        f" Steps of it whose interval holds 0: {'; '.join(unsure)}." if unsure else ""
    )


def _equal_size_sentences(numbers: Sequence[dict[str, Any]]) -> list[str]:
    """Difference of one series from the line of another, score by score."""
    sentences = []
    for (against, series), entries in grouped(numbers, lambda entry: (entry["against"], entry["series"])).items():
        scores = grouped(entries, lambda entry: entry["score"]).values()
        words = " ".join(verdicts_sentence(compared, _compared_word) for compared in scores)
        sentences.append(f"**{series} against {against} at equal parameters**: {words}")
    return sentences


def _compared_word(entry: dict[str, Any]) -> str:
    return f"{entry['label'] or entry['point']} ({signed(entry['difference']['value'], entry['score'])})"


def _retained_sentence(series: str, line: Sequence[Point], teacher_accuracy: float) -> str:
    """The first of a series to keep the teacher's accuracy."""
    level = RETAINED * teacher_accuracy
    wanted = (
        f"{100 * RETAINED:.0f} % of the teacher's accuracy, which is {written(teacher_accuracy, 'student_accuracy')}"
    )
    for point in line:
        if point.mean("student_accuracy") >= level:
            values = point.values["student_accuracy"]
            share = 100 * point.mean("student_accuracy") / teacher_accuracy
            seeds = f"in {sum(value >= level for value in values)} of {len(values)} seeds"
            return f"**{series}** first retains {wanted}, at {point.label}: {share:.1f} %, {seeds}."
    best = max(line, key=lambda point: point.mean("student_accuracy"))
    share = 100 * best.mean("student_accuracy") / teacher_accuracy
    return f"**{series}** nowhere retains {wanted}; the most is {share:.1f} %, at {best.label}."


def _reading_sentence(baselines: Sequence[Point]) -> str:
    """A sentence on the heads that the accuracies are measured with, as they differ."""
    probed = list(dict.fromkeys(point.series for point in baselines if point.is_probed))
    text = "Accuracy is that of the teacher's own classifier, untrained on the student's states"
    if probed:
        text += f", but for {' and '.join(probed)} that of a linear probe trained on its features: another reading"
    return text + ". Differences of accuracies are in points."
