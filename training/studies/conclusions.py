"""The conclusions of a study of distillations: sentences, tables and numbers computed from the records of its runs.

    conclusion = partitions_conclusion(by_variant(records))
    conclusion.text      # Markdown
    conclusion.numbers   # the same, for results.json

A record is one run of one variant and one seed, as study.py gathers it. Every word is a function of the
numbers: a study that is run again writes its verdict again. Better and worse mean that the bootstrap interval of a
difference, at `uncertainty.CONFIDENCE`, does not hold 0; if it does, that is called undecided.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raptor_hf.figures import mean_and_deviation
from raptor_hf.phases import Partition

from .uncertainty import INTERVALS, Estimate, difference_interval, z_score

# how a score is called and written: name, factor, digits
SCORES = {
    "r2_last": ("R² of the last layer", 1, 3),
    "r2_mean": ("mean R²", 1, 3),
    "student_accuracy": ("accuracy", 100, 1),
}

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Conclusion:
    """The conclusion of a study.

    Args:
        text: Markdown, sentences and tables.
        numbers: every comparison, for JSON.
    """

    text: str
    numbers: list[dict[str, Any]] = field(default_factory=list)


def by_variant(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The runs of every variant."""
    variants: dict[str, list[Record]] = {}
    for record in records:
        variants.setdefault(record["variant"], []).append(record)
    return variants


def series_of(variants: Mapping[str, Sequence[Record]]) -> dict[str, list[dict[str, Any]]]:
    """The points of a trade-off figure: a variant "series, label" is one of its series."""
    series: dict[str, list[dict[str, Any]]] = {}
    for name, runs in variants.items():
        line, _, label = name.rpartition(", ")
        point = {key: [run[key] for run in runs] for key in ("r2_last", "r2_mean")}
        point |= {key: runs[0][key]["student"] for key in ("parameters", "macs")}
        series.setdefault(line, []).append({"label": label, **point})
    return series


def difference(low: Sequence[float], high: Sequence[float], digits: int = 3, unit: str = "") -> str:
    """Difference of the means of two variants, and whether it exceeds the spread over seeds."""
    (before, spread_before), (after, spread_after) = map(mean_and_deviation, (low, high))
    change, spread = after - before, math.hypot(spread_before, spread_after)
    text = f"{change:+z.{digits}f}{unit}"
    return text if abs(change) > spread else f"{text} (within the spread over seeds, {spread:.{digits}f})"


def ladder_caption(variants: Mapping[str, Sequence[Record]]) -> str:
    """The effect of all rungs of a ladder together, and of each against the rung below."""
    names = list(variants)
    r2 = {name: [run["r2_last"] for run in runs] for name, runs in variants.items()}
    accuracy = {name: [run["student_accuracy"] for run in runs] for name, runs in variants.items()}
    has_accuracy = all(value is not None for values in accuracy.values() for value in values)
    first, last = (statistics.fmean(r2[name]) for name in (names[0], names[-1]))
    whole = f"From the first rung to the last, R² of the last layer goes from {first:.3f} to {last:.3f}"
    if has_accuracy:
        first, last = (100 * statistics.fmean(accuracy[name]) for name in (names[0], names[-1]))
        whole += f" and accuracy from {first:.1f} % to {last:.1f} %"
    changes = []
    for lower, upper in itertools.pairwise(names):
        text = f"{upper}: R² {difference(r2[lower], r2[upper])}"
        if has_accuracy:
            points = ([100 * value for value in accuracy[name]] for name in (lower, upper))
            text += f", accuracy {difference(*points, digits=1, unit=' points')}"
        changes.append(text)
    return f"{whole}. Against the rung below, {'; '.join(changes)}." if changes else f"{whole}."


def convergence_caption(variants: Mapping[str, Sequence[Record]]) -> str:
    """The variant that is nearer to the teacher at the end, and when it passed the other's final score."""
    final = {name: [run["r2_last"] for run in runs] for name, runs in variants.items()}
    ranking = sorted(final, key=lambda name: statistics.fmean(final[name]), reverse=True)
    best = ranking[0]
    sentences = [
        f'After the last step "{best}" is nearest to the teacher: last-layer R² {statistics.fmean(final[best]):.3f}.'
    ]
    for other in ranking[1:]:
        end = statistics.fmean(final[other])
        curve = zip(*(run["evaluations"] for run in variants[best]), strict=True)
        # the last evaluation, the end of the best, is one
        passed = next(
            entries[0]["step"] for entries in curve if statistics.fmean(entry["r2_last"] for entry in entries) >= end
        )
        sentences.append(
            f'"{other}" ends at {end:.3f}, {difference(final[best], final[other])} from it; '
            f'"{best}" was there at its evaluation after {passed} steps.'
        )
    return " ".join(sentences)


def trade_off_caption(variants: Mapping[str, Sequence[Record]]) -> str:
    """Every series against those before it, at the same label or else the nearest size, with what it costs more."""
    series = series_of(variants)
    sentences = []
    for first, name in itertools.combinations(series, 2):
        base = {point["label"]: point for point in series[first]}
        pairs = [(base[point["label"]], point, point["label"]) for point in series[name] if point["label"] in base]
        for point in series[name] if not pairs else ():
            nearest = min(series[first], key=lambda other: abs(other["parameters"] - point["parameters"]))
            pairs.append((nearest, point, f"{point['label']} against {nearest['label']}, the nearest in size,"))
        parts = [
            f"{label} {difference(reference['r2_last'], point['r2_last'])} "
            f"({point['parameters'] / reference['parameters'] - 1:+z.0%} parameters, "
            f"{point['macs'] / reference['macs'] - 1:+z.0%} multiply-accumulates)"
            for reference, point, label in pairs
        ]
        sentences.append(f"R² of the last layer, {name} against {first}: {'; '.join(parts)}.")
    if not sentences:
        ((name, points),) = series.items()
        parts = [f"{point['label']} {statistics.fmean(point['r2_last']):.3f}" for point in points]
        sentences.append(f"R² of the last layer, {name}: {'; '.join(parts)}.")
    return " ".join(sentences)


def partitions_conclusion(variants: Mapping[str, Sequence[Record]]) -> Conclusion:
    """A partition of the layers against random ones: z-scores, differences, shares of draws beaten.

    Args:
        variants: named "kind, label", as in "max-cut, k=2". The first kind is compared with the others at every label;
            the runs of the others are draws of random partitions. Records have the "blocks" of their run.
    """
    kinds: dict[str, dict[str, Sequence[Record]]] = {}
    for name, runs in variants.items():
        kind, _, label = name.rpartition(", ")
        kinds.setdefault(kind, {})[label] = runs
    reference, *others = kinds
    numbers: list[dict[str, Any]] = []
    for kind, label in itertools.product(others, kinds[reference]):
        found, draws = kinds[reference][label], kinds[kind].get(label, ())
        for score in measured_scores([*found, *draws]) if found and len(draws) > 1 else ():
            values, random = ([run[score] for run in runs] for runs in (found, draws))
            value, (mean, deviation) = statistics.fmean(values), mean_and_deviation(random)
            estimate = difference_interval(random, values)
            numbers.append(
                {"label": label, "against": kind, "score": score, "value": value, "draws": len(random)}
                | {"mean": float(mean), "deviation": float(deviation), "lowest": min(random), "highest": max(random)}
                | {"z_score": z_score(value, random), "difference": estimate.to_dict(), "verdict": judged(estimate)}
                | {"share_beaten": statistics.fmean(value > draw for draw in random)}
            )
    judged_kinds = [kind for kind in others if any(entry["against"] == kind for entry in numbers)]
    sentences = [_partition_verdict(reference, kind, numbers) for kind in judged_kinds]
    sentences += [_draws_sentence(reference, label, kinds) for label, found in kinds[reference].items() if found]
    sentences.append(
        "The paper reports that max-cut beats random partitions, often by more than one standard deviation. "
        f"A difference is the mean of {reference} minus the mean of the draws, of accuracies in points; z is the same "
        f"in standard deviations of the draws. In brackets, and behind better, undecided and worse: {INTERVALS}."
    )
    sentences += _block_sizes_sentences(reference, kinds)
    rows = [
        [
            *(entry["label"], entry["against"], SCORES[entry["score"]][0]),
            *(written(entry[name], entry["score"]) for name in ("value", "mean", "deviation", "lowest", "highest")),
            written_z(entry),
            written_difference(entry["difference"], entry["score"]),
            f"{100 * entry['share_beaten']:.0f} %",
        ]
        for entry in numbers
    ]
    titles = ("", "against", "score", reference, "mean of draws", "deviation", "lowest", "highest", "z")
    table = [markdown_table((*titles, "difference", "draws beaten"), rows, text_columns=3)] if rows else []
    return Conclusion("\n\n".join((*sentences, *table)), numbers)


def _partition_verdict(reference: str, other: str, numbers: Sequence[dict[str, Any]]) -> str:
    """Where the reference is better than the draws of one kind, and the same score by score."""
    scores = grouped((entry for entry in numbers if entry["against"] == other), lambda entry: entry["score"])
    better = [entry for entry in scores["r2_last"] if entry["verdict"] == "better"]
    claim = (
        f"**{reference} against {other} partitions**: better in R² of the last layer for {len(better)} of "
        f"{len(scores['r2_last'])} numbers of blocks, by more than one standard deviation of the draws for "
        f"{sum(entry['z_score'] > 1 for entry in better)}."
    )
    return " ".join((claim, *(verdicts_sentence(entries, _drawn_word) for entries in scores.values())))


def _drawn_word(entry: Mapping[str, Any]) -> str:
    return f"{entry['label']} (z {written_z(entry)}, {100 * entry['share_beaten']:.0f} % of the draws beaten)"


def written_z(entry: Mapping[str, Any]) -> str:
    """A z-score; none where the draws do not vary."""
    return f"{entry['z_score']:+.1f}" if math.isfinite(entry["z_score"]) else "-"


def _draws_sentence(reference: str, label: str, kinds: Mapping[str, Mapping[str, Sequence[Record]]]) -> str:
    """Which partition was found, how many different ones were drawn, and how often the found one was among them."""
    found = [partition_of(run) for run in kinds[reference][label]]
    text = f"{label}: {reference} takes {' or '.join(sorted(set(map(str, found))))}"
    for other, labels in kinds.items():
        drawn = [partition_of(run) for run in labels.get(label, ())]
        if other == reference or not drawn:
            continue
        same = sum(one in found for one in drawn)
        text += f"; the {len(drawn)} draws of {other} are {len(set(drawn))} different partitions, " + (
            f"of these draws {same} gave {reference}'s own (left in)" if same else f"none of them {reference}'s"
        )
    return text + "."


def _block_sizes_sentences(reference: str, kinds: Mapping[str, Mapping[str, Sequence[Record]]]) -> list[str]:
    """Draws with a block of one layer, where the found partition has none: how much else than the layers they change.

    `find_phases` asks for two layers per block as long as 2 K <= L, random partitions are drawn without.
    """
    counts = []
    for label, found in kinds[reference].items():
        draws = [run for kind, labels in kinds.items() if kind != reference for run in labels.get(label, ())]
        if found and min(map(_smallest_block, found)) > 1:
            short = sum(_smallest_block(run) == 1 for run in draws)
            counts += [f"{short} of {len(draws)} draws at {label}"] if short else []
    if not counts:
        return []
    return [
        f"Random partitions may have blocks of one layer, those of {reference} have at least two as long as that is "
        f"possible, so part of z may be the sizes of the blocks. With such a block: {', '.join(counts)}."
    ]


def _smallest_block(record: Record) -> int:
    return min(map(len, record["blocks"]))


def partition_of(record: Record) -> Partition:
    """The partition that a run was made with."""
    return Partition(tuple(map(tuple, record["blocks"])))


def time_to_fidelity_conclusion(
    variants: Mapping[str, Sequence[Record]], goals: Sequence[float] | None = None
) -> Conclusion:
    """Time each variant needs to reach another variant's final score, in seconds, steps and images.

    Seed by seed: the target is the score of the reference's last evaluation, the time that of the first evaluation that
    reaches it together with the next one, and the ratio is to the reference's whole training.

    Args:
        variants: each but the last is a reference. One without runs is left out.
        goals: for every reference, the share of its time that the last variant may take.

    Raises:
        ValueError: evaluations do not hold the seconds of training.
    """
    for name, runs in variants.items():
        if any("seconds" not in entry for run in runs for entry in run["evaluations"]):
            raise ValueError(f"variant {name!r} has evaluations without seconds, of an older distill.py; run it again")
    *references, last = variants
    goal_of = dict(zip(references, goals or [None] * len(references), strict=True))
    numbers = []
    for reference, score, name in itertools.product(references, SCORES, variants):
        pairs = paired(*({run["seed"]: run for run in variants[key]} for key in (reference, name)))
        evaluations = [entry for pair in pairs for run in pair for entry in run["evaluations"]]
        if evaluations and all(entry.get(score) is not None for entry in evaluations):
            goal = goal_of[reference] if name == last else None
            entry = {"reference": reference, "score": score, "variant": name, "goal": goal}
            numbers.append(entry | _arrival(pairs, score, goal))
    sentences = [_arrival_sentence(entry) for entry in numbers if entry["variant"] == last]
    sentences.append(
        "A time is that of the first evaluation that reaches the target and is followed by another that does, or by "
        "none; it is without the evaluations themselves. The ratio is to the whole training of the one that ends "
        "there, which may itself have been there before its end. Mean ± standard deviation over the seeds that reach "
        "it."
    )
    sentences += _precision_sentences(variants)
    rows = [
        [
            *(entry["reference"], SCORES[entry["score"]][0], entry["variant"]),
            f"{entry['reached']} of {len(entry['targets'])}",
            written(statistics.fmean(entry["targets"]), entry["score"]),
            *(
                cell
                for unit, digits in (("seconds", 1), ("steps", 0), ("images", 0))
                for cell in (spread(entry[unit], digits), spread(entry[f"{unit}_ratio"], 2))
            ),
        ]
        for entry in numbers
    ]
    titles = ["end of", "score", "reached by", "seeds", "target"]
    titles += [title for unit in ("seconds", "steps", "images") for title in (unit, "ratio")]
    return Conclusion("\n\n".join((*sentences, markdown_table(titles, rows, text_columns=3))), numbers)


def _arrival(pairs: Sequence[tuple[Record, Record]], score: str, goal: float | None) -> dict[str, Any]:
    """First evaluation at which each run reaches the final score of the reference with its seed; None if none."""
    numbers: dict[str, list[float | None]] = {}
    for reference, run in pairs:
        end = reference["evaluations"][-1]
        arrival = first_to_stay(run["evaluations"], score, end[score])
        whole, taken = effort(reference, end), arrival and effort(run, arrival)
        numbers.setdefault("targets", []).append(end[score])
        for unit in whole:
            numbers.setdefault(unit, []).append(taken and taken[unit])
            numbers.setdefault(f"{unit}_ratio", []).append(taken and taken[unit] / whole[unit])
    ratios = [ratio for ratio in numbers["seconds_ratio"] if ratio is not None]
    is_met = len(ratios) == len(pairs) and goal is not None and statistics.fmean(ratios) <= goal
    return numbers | {"reached": len(ratios), "goal_met": is_met if goal is not None else None}


def first_to_stay(evaluations: Sequence[Mapping[str, float]], score: str, target: float) -> Mapping[str, float] | None:
    """The first evaluation that reaches the target with the next one, as one alone may do by chance; or the last."""
    reached = [entry[score] >= target for entry in evaluations]
    pairs = zip(evaluations, reached, [*reached[1:], True], strict=True)
    return next((entry for entry, now, next_too in pairs if now and next_too), None)


def _precision_sentences(variants: Mapping[str, Sequence[Record]]) -> list[str]:
    """The precision of each variant, if they differ: seconds depend on it."""
    kinds = {name: {run["mixed_precision"].replace("no", "fp32") for run in runs} for name, runs in variants.items()}
    if len(set().union(*kinds.values())) < 2:
        return []
    parts = (f'"{name}" in {" and ".join(sorted(found))}' for name, found in kinds.items() if found)
    return [f"Seconds depend on the precision of training, in which variants differ: {', '.join(parts)}."]


def effort(run: Record, evaluation: Mapping[str, float]) -> dict[str, float]:
    """Seconds, steps and images of training until an evaluation."""
    steps = evaluation["step"]
    return {"seconds": evaluation["seconds"], "steps": steps, "images": steps * run["batch_size"]}


def _arrival_sentence(entry: Mapping[str, Any]) -> str:
    """The verdict on one target."""
    score, target = SCORES[entry["score"]][0], written(statistics.fmean(entry["targets"]), entry["score"])
    text = f'**"{entry["variant"]}" to the {score} with which "{entry["reference"]}" ends ({target})**: '
    if entry["reached"]:
        text += (
            f"{spread(entry['seconds'], 1)} s, {spread(entry['seconds_ratio'], 2)} of its time and "
            f"{spread(entry['steps_ratio'], 2)} of its steps"
        )
    if entry["reached"] < len(entry["targets"]):
        text += ", in " if entry["reached"] else "never, in "
        text += f"{entry['reached']} of {len(entry['targets'])} seeds"
    if entry["goal"] is not None:
        text += f"; the goal of at most {entry['goal']:g} of its time is {'met' if entry['goal_met'] else 'missed'}"
    return text + "."


def paired(first: Mapping[int, Any], second: Mapping[int, Any]) -> list[tuple[Any, Any]]:
    """What two variants have at the same seeds."""
    return [(first[seed], second[seed]) for seed in first if seed in second]


def measured_scores(runs: Sequence[Record]) -> list[str]:
    """The scores that all of these runs have."""
    return [score for score in SCORES if all(run[score] is not None for run in runs)]


def judged(estimate: Estimate) -> str:
    """Whether the second group is better, worse or undecided, by the interval of the difference."""
    if not estimate.excludes(0):
        return "undecided"
    return "better" if estimate.value > 0 else "worse"


def grouped(entries: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    """Entries by a key, in the order of their first ones."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def written(value: float, score: str) -> str:
    """A score with its digits; accuracy in percent."""
    _, factor, digits = SCORES[score]
    return f"{factor * value:.{digits}f}" + (" %" if factor == 100 else "")


def signed(value: float, score: str) -> str:
    """A difference of scores, with one more digit; of accuracies in points of percent."""
    _, factor, digits = SCORES[score]
    return f"{factor * value:+z.{digits + 1}f}"


def verdicts_sentence(entries: Sequence[dict[str, Any]], word: Callable[[dict[str, Any]], str]) -> str:
    """Of comparisons in one score: which are better, undecided and worse, each in a word or two."""
    groups = grouped(entries, lambda entry: entry["verdict"])
    name = SCORES[entries[0]["score"]][0]
    parts = [
        f"{verdict} at {', '.join(map(word, groups[verdict]))}"
        for verdict in ("better", "undecided", "worse")
        if verdict in groups
    ]
    return f"{name[0].upper()}{name[1:]}: {'; '.join(parts)}."


def written_difference(estimate: Mapping[str, float | None], score: str) -> str:
    """A difference with its interval, where there is one."""
    text = signed(estimate["value"], score)
    if estimate["low"] is None:
        return text
    return f"{text} [{signed(estimate['low'], score)}, {signed(estimate['high'], score)}]"


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and standard deviation of those that are numbers; "never" if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    mean, deviation = mean_and_deviation(known)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(known) > 1 else "")


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table with so many columns of text on the left, the others being numbers."""
    rule = "|" + "---|" * text_columns + "---:|" * (len(titles) - text_columns)
    return "\n".join(("| " + " | ".join(titles) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)))
