"""The frontier by parameters: interpolation, dominance and verdicts on made-up records, in both directions."""

import numpy as np
import pytest

from training.studies.frontier import (
    Point,
    baseline_points,
    frontier_conclusion,
    interpolated,
    pareto,
    split_name,
    study_points,
)
from training.studies.uncertainty import INTERVALS


def record(variant, seed, parameters, r2_last, accuracy=0.9):
    return {
        "variant": variant,
        "seed": seed,
        "parameters": {"teacher": 1000, "student": parameters},
        "r2_last": r2_last,
        "r2_mean": r2_last,
        "student_accuracy": accuracy,
        "teacher_accuracy": 0.95,
    }


def series(name, r2_by_parameters, accuracy=0.9):
    """Three seeds at every number of parameters."""
    return [
        record(f"{name}, k={k}", seed, parameters, r2 + 0.001 * seed, accuracy)
        for k, (parameters, r2) in enumerate(r2_by_parameters.items(), start=1)
        for seed in range(3)
    ]


def of(conclusion, point, against, score="r2_last"):
    (entry,) = (e for e in conclusion.numbers if (e["point"], e["against"], e["score"]) == (point, against, score))
    return entry


def test_frontier_is_what_no_other_point_dominates():
    generator = np.random.default_rng(0)
    points = [
        Point(str(i), "a", str(i), int(size), {"r2_last": [value]})
        for i, (size, value) in enumerate(zip(generator.integers(1, 12, 40), generator.random(40), strict=True))
    ]

    def dominates(a, b):
        better = a.parameters < b.parameters or a.mean("r2_last") > b.mean("r2_last")
        return better and a.parameters <= b.parameters and a.mean("r2_last") >= b.mean("r2_last")

    expected = {b.name for b in points if not any(dominates(a, b) for a in points)}
    assert {point.name for point in pareto(points, "r2_last")} == expected
    assert pareto(points, "student_accuracy") == []


def test_interpolation_goes_seed_by_seed_between_neighbours():
    line = study_points(series("a", {100: 0.5, 200: 0.7, 300: 0.8}))
    for parameters in (100, 130, 200, 260, 300):
        expected = [
            np.interp(parameters, [100, 200, 300], np.array([0.5, 0.7, 0.8]) + 0.001 * seed) for seed in range(3)
        ]
        assert interpolated(line, "r2_last", parameters) == pytest.approx(expected)
    assert interpolated(line, "r2_last", 99) is None and interpolated(line, "r2_last", 301) is None
    other_seeds = study_points([record("a, k=1", 0, 100, 0.5), record("a, k=2", 1, 200, 0.7)])
    assert interpolated(other_seeds, "r2_last", 150) is None


@pytest.mark.parametrize(("shift", "verdict"), [(0.05, "better"), (0.0, "undecided"), (-0.05, "worse")])
def test_series_are_compared_at_equal_parameters(shift, verdict):
    records = series("scale", {100: 0.5, 200: 0.7}) + series("low_rank", {150: 0.6 + shift, 250: 0.9})
    conclusion = frontier_conclusion(records)
    entry = of(conclusion, "low_rank, k=1", "scale")
    assert entry["verdict"] == verdict and entry["difference"]["value"] == pytest.approx(shift)
    assert f"R² of the last layer: {verdict} at k=1 ({shift:+z.4f})" in conclusion.text
    # beyond the largest of the other series nothing is extrapolated
    assert {entry["point"] for entry in conclusion.numbers} == {"low_rank, k=1"}


def test_baselines_are_compared_with_every_series_in_what_they_have():
    probed = Point("cut", "cut", "", 150, {"student_accuracy": [0.5, 0.5]}, is_probed=True)
    untied = Point("untied, 3 layers", "untied", "3 layers", 150, {"r2_last": [0.9, 0.91, 0.92]}, (0, 1, 2))
    records = series("scale", {100: 0.5, 200: 0.7}) + series("low_rank", {110: 0.5, 210: 0.7})
    conclusion = frontier_conclusion(records, [probed, untied])
    for against in ("scale", "low_rank"):
        assert of(conclusion, "untied, 3 layers", against)["verdict"] == "better"
        assert of(conclusion, "cut", against, "student_accuracy")["verdict"] == "worse"
    assert "M, 0.910)" in conclusion.text  # the untied one is on the frontier
    assert "but for cut that of a linear probe trained" in conclusion.text
    assert "linear probe" not in frontier_conclusion(records, [untied]).text


def test_first_size_that_keeps_99_percent_of_the_accuracy_is_named():
    records = [
        record("a, k=1", 0, 100, 0.5, accuracy=0.94),
        record("a, k=1", 1, 100, 0.5, accuracy=0.90),
        record("a, k=2", 0, 200, 0.6, accuracy=0.95),
        record("a, k=2", 1, 200, 0.6, accuracy=0.94),
        record("b, k=1", 0, 100, 0.5, accuracy=0.80),
    ]
    text = frontier_conclusion(records).text
    assert (
        "**a** first retains 99 % of the teacher's accuracy, which is 95.0 %, at k=2: 99.5 %, in 1 of 2 seeds." in text
    )
    assert "**b** nowhere retains 99 % of the teacher's accuracy, which is 95.0 %; the most is 84.2 %, at k=1." in text


def test_steps_of_the_frontier_that_seeds_leave_open_are_named():
    clear, close = {100: 0.5, 200: 0.7}, {100: 0.5, 200: 0.5001}
    assert "interval holds 0: a, k=1 to a, k=2" in frontier_conclusion(series("a", close)).text
    text = frontier_conclusion(series("a", clear)).text.split("accuracy")[0]
    assert "interval holds 0" not in text and "a, k=1 (0.00 M, 0.501); a, k=2 (0.00 M, 0.701)" in text


def test_verdicts_on_the_frontier_say_what_their_intervals_are_worth():
    for accuracy in ({}, {"student_accuracy": None, "teacher_accuracy": None}):
        records = [run | accuracy for run in series("a", {100: 0.5, 200: 0.6})]
        assert f"behind better, undecided and worse: {INTERVALS}." in frontier_conclusion(records).text


def test_students_without_accuracy_have_a_frontier_of_fidelity_alone():
    records = [run | {"student_accuracy": None, "teacher_accuracy": None} for run in series("a", {100: 0.5, 200: 0.6})]
    text = frontier_conclusion(records).text
    assert "R² of the last layer" in text and "accuracy" not in text.lower()


def test_baselines_are_read_from_studies_and_from_tables_of_probes():
    study = {"runs": series("untied", {100: 0.5}) + series("other", {200: 0.6})}
    (point,) = baseline_points(study, "untied*")
    assert (point.name, point.parameters, point.is_probed) == ("untied, k=1", 100, False)
    assert point.values["r2_last"] == pytest.approx([0.5, 0.501, 0.502])
    values = {"digits/knn_accuracy": [0.1], "digits/accuracy": [0.8, 0.9], "scenes/mean_iou": [0.2]}
    rows = [{"name": f"teacher's first {n} layers", "parameters": n, "values": values} for n in (3, 4)]
    points = baseline_points({"rows": [*rows, {"name": "teacher", "parameters": 9, "values": values}]}, "*first*")
    assert [(p.series, p.label, p.parameters) for p in points] == [
        ("teacher's first layers", "3", 3),
        ("teacher's first layers", "4", 4),
    ]
    assert all(p.is_probed and p.values == {"student_accuracy": [0.8, 0.9]} for p in points)


def test_baselines_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"no name matches 'c\*'; the names are \['a, k=1', 'b, k=1'\]"):
        baseline_points({"runs": series("a", {1: 0.5}) + series("b", {1: 0.5})}, "c*")
    with pytest.raises(ValueError, match=r"results hold \['x'\], neither runs nor rows"):
        baseline_points({"x": 1})


def test_names_are_split_at_the_comma_or_at_the_number():
    names = ("low_rank, k=3", "untied student, 3 layers", "teacher's first 4 layers", "teacher", "Raptor k=2")
    assert list(map(split_name, names)) == [
        ("low_rank", "k=3"),
        ("untied student", "3 layers"),
        ("teacher's first layers", "4"),
        ("teacher", ""),
        ("Raptor k=2", ""),
    ]
