"""One student at many depths beside students of one depth each: the conclusion of the figure "depths".

    conclusion = depths_conclusion(by_variant(records))

A variant is elastic if it learned several numbers of steps, and dedicated if it learned one; it is compared with the
elastic ones at that number. Students of fewer layers than their teacher are shown beside them, by their cost.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raptor_hf.figures import mean_and_deviation

from .conclusions import Conclusion, Record, markdown_table

# what an elastic student may lose against a dedicated one and count as good, by the means over seeds
MARGINS = {"r2": 0.015, "student_accuracy": 0.01}
# of R², what it may lose at one step per layer
FULL_DEPTH_MARGIN = 0.003


@dataclass(frozen=True)
class Depth:
    """A variant at one number of steps.

    Args:
        macs: multiply-accumulates per image.
        r2: of the last layer, one per seed.
        student_accuracy: one per seed, None where it is not known.
    """

    macs: int
    r2: list[float]
    student_accuracy: list[float | None]


def learned_steps(run: Record) -> list[int]:
    """The numbers of steps that a student was trained for."""
    num_layers = sum(map(len, run["blocks"]))
    elastic, share = run["overrides"].get("elastic"), run["overrides"].get("elastic_share", 0.6)
    if not elastic or not share:
        return [num_layers]
    return sorted({*elastic, num_layers} if share < 1 else set(elastic))


def depths_of(runs: Sequence[Record]) -> dict[int, Depth]:
    """What a variant reaches at each number of steps that it learned."""
    found = {}
    for num_steps in learned_steps(runs[0]):
        rows = [_scores(run, num_steps) for run in runs]
        found[num_steps] = Depth(
            rows[0]["macs"], [row["r2"] for row in rows], [row["student_accuracy"] for row in rows]
        )
    return found


def is_elastic(runs: Sequence[Record]) -> bool:
    """Whether a variant learned several numbers of steps."""
    return len(learned_steps(runs[0])) > 1


def depths_conclusion(variants: Mapping[str, Sequence[Record]]) -> Conclusion:
    """Every elastic variant against the dedicated ones, at the number of steps of each."""
    num_layers = max(sum(map(len, runs[0]["blocks"])) for runs in variants.values())
    whole = {name: runs for name, runs in variants.items() if sum(map(len, runs[0]["blocks"])) == num_layers}
    dedicated = {learned_steps(runs[0])[0]: depths_of(runs) for runs in whole.values() if not is_elastic(runs)}
    parts, numbers = [], []
    for name, runs in whole.items():
        if not is_elastic(runs):
            continue
        own = depths_of(runs)
        entries = [
            {"variant": name, "num_steps": num_steps, **_against(own[num_steps], other[num_steps])}
            for num_steps, other in sorted(dedicated.items())
            if num_steps in own
        ]
        numbers += entries
        held = [entry["num_steps"] for entry in entries if entry["within"]]
        full = [entry["difference"]["r2"] for entry in entries if entry["num_steps"] == num_layers]
        parts.append(
            f"**{name}, beside a student of each number of steps** ({len(runs)} seed{'s' * (len(runs) > 1)}): within "
            f"{MARGINS['r2']} of R² and {100 * MARGINS['student_accuracy']:g} point of accuracy at {len(held)} of "
            f"{len(entries)} numbers of steps ({_verdict(len(held) == len(entries))})."
            + "".join(
                f" At one step per layer R² is {loss:+.4f} apart, and may be {FULL_DEPTH_MARGIN} below "
                f"({_verdict(loss >= -FULL_DEPTH_MARGIN)})."
                for loss in full
            )
        )
        parts.append(_table(own, dedicated))
    parts.append(
        "In the first table R², accuracy and MACs are those of one step per layer, for which the students of another "
        "number of steps were not trained."
    )
    return Conclusion("\n\n".join(parts), numbers)


def _scores(run: Record, num_steps: int) -> Mapping[str, Any]:
    if num_steps == sum(map(len, run["blocks"])):
        return {"r2": run["r2_last"], "student_accuracy": run["student_accuracy"], "macs": run["macs"]["student"]}
    return run["by_steps"][str(num_steps)]


def _against(own: Depth, other: Depth) -> dict[str, Any]:
    """Differences of the means over seeds, elastic minus dedicated, and whether both are within the margins."""
    gains = {"r2": statistics.fmean(own.r2) - statistics.fmean(other.r2)}
    if None not in (*own.student_accuracy, *other.student_accuracy):
        gains["student_accuracy"] = statistics.fmean(own.student_accuracy) - statistics.fmean(other.student_accuracy)
    return {"difference": gains, "within": all(gain >= -MARGINS[score] for score, gain in gains.items())}


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _table(own: Mapping[int, Depth], dedicated: Mapping[int, Mapping[int, Depth]]) -> str:
    titles = ("steps", "MACs (M)", "R², elastic", "R², dedicated", "accuracy (%), elastic", "accuracy (%), dedicated")
    rows = []
    for num_steps, depth in sorted(own.items()):
        other = dedicated.get(num_steps, {}).get(num_steps)
        cells = [_written(depth.r2, 1, 3), _written(other.r2, 1, 3) if other else "-"]
        cells += [_written(depth.student_accuracy, 100, 1), _written(other.student_accuracy, 100, 1) if other else "-"]
        rows.append([str(num_steps), f"{depth.macs / 1e6:.1f}", *cells])
    return markdown_table(titles, rows, text_columns=0)


def _written(values: Sequence[float | None], unit: float, digits: int) -> str:
    if None in values:
        return "-"
    mean, deviation = mean_and_deviation([unit * value for value in values])
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")
