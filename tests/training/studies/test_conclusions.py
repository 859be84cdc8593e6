"""What studies say: verdicts on made-up records, in both directions."""

import numpy as np
import pytest
from scipy import stats

from training.studies import conclusions
from training.studies.uncertainty import CONFIDENCE, INTERVALS


def record(variant, seed, r2_last=0.9, accuracy=0.9, **changes):
    return {
        "variant": variant,
        "seed": seed,
        "r2_last": r2_last,
        "r2_mean": r2_last - 0.1,
        "student_accuracy": accuracy,
        "batch_size": 10,
        "mixed_precision": "no",
        "blocks": [[1, 2], [3, 4]],
    } | changes


def draws(values, found, blocks=(), kind="random contiguous"):
    """Records of one number of blocks: the found partition, and draws of one kind."""
    records = [record("max-cut, k=2", seed, value) for seed, value in enumerate(found)]
    for seed, value in enumerate(values):
        changes = {"blocks": blocks[seed]} if blocks else {"blocks": [[1], [2, 3, 4]]}
        records.append(record(f"{kind}, k=2", seed, value, **changes))
    return conclusions.by_variant(records)


def of_score(conclusion, score="r2_last", **keys):
    (entry,) = (e for e in conclusion.numbers if e["score"] == score and all(e[k] == keys[k] for k in keys))
    return entry


@pytest.mark.parametrize(
    ("shift", "verdict", "sentence"),
    [
        (0.2, "better", "for 1 of 1 numbers of blocks, by more than one standard deviation of the draws for 1."),
        (0.012, "better", "for 1 of 1 numbers of blocks, by more than one standard deviation of the draws for 0."),
        (0.0, "undecided", "for 0 of 1 numbers of blocks, by more than one standard deviation of the draws for 0."),
        (-0.2, "worse", "for 0 of 1 numbers of blocks, by more than one standard deviation of the draws for 0."),
    ],
)
def test_max_cut_is_better_or_worse_than_draws_as_its_interval_says(shift, verdict, sentence):
    values = 0.7 + 0.02 * np.array([-1, -1, -1, -1, 0, 0, 1, 1, 1, 1])
    found = np.array([0.699, 0.7, 0.701]) + shift
    conclusion = conclusions.partitions_conclusion(draws(values.tolist(), found.tolist()))
    entry = of_score(conclusion)
    assert entry["verdict"] == verdict and f"R² of the last layer: {verdict} at k=2" in conclusion.text
    assert entry["z_score"] == pytest.approx(shift / values.std(ddof=1))
    assert entry["difference"]["value"] == pytest.approx(shift)
    assert entry["share_beaten"] == pytest.approx(np.mean(0.7 + shift > values))
    assert sentence in conclusion.text


def test_equal_draws_have_no_z_score_and_missing_accuracy_no_row():
    variants = draws([0.5] * 10, [0.6, 0.6, 0.6])
    for runs in variants.values():
        for run in runs:
            run["student_accuracy"] = None
    conclusion = conclusions.partitions_conclusion(variants)
    assert {entry["score"] for entry in conclusion.numbers} == {"r2_last", "r2_mean"}
    assert "z -, 100 % of the draws beaten" in conclusion.text


def test_draws_that_repeat_or_are_the_found_partition_are_counted():
    blocks = [[[1, 2], [3, 4]], [[1, 2], [3, 4]], [[1], [2, 3, 4]], [[1, 2, 3], [4]]]
    text = conclusions.partitions_conclusion(draws([0.1, 0.2, 0.3, 0.4], [0.3], blocks)).text
    assert (
        "k=2: max-cut takes [1-2][3-4]; the 4 draws of random contiguous are 3 different partitions, of these " in text
    )
    assert "draws 2 gave max-cut's own (left in)." in text
    fragmented = [[[1, 3], [2, 4]], [[1, 4], [2, 3]]]
    text = conclusions.partitions_conclusion(draws([0.1, 0.2], [0.3], fragmented, "random fragmented")).text
    assert "2 draws of random fragmented are 2 different partitions, none of them max-cut's" in text


def test_draws_with_a_block_of_one_layer_are_named_where_the_found_partition_has_none():
    short, even = [[1], [2, 3, 4]], [[1, 2], [3, 4]]
    text = conclusions.partitions_conclusion(draws([0.1, 0.2, 0.3], [0.3], [short, even, short])).text
    assert "blocks of one layer, those of max-cut have at least two as long as that is possible" in text
    assert "part of z may be the sizes of the blocks. With such a block: 2 of 3 draws at k=2." in text
    without = draws([0.1, 0.2, 0.3], [0.3], [even] * 3)
    assert "blocks of one layer" not in conclusions.partitions_conclusion(without).text
    crowded = draws([0.1, 0.2, 0.3], [0.3], [short] * 3)
    crowded["max-cut, k=2"][0]["blocks"] = short
    assert "blocks of one layer" not in conclusions.partitions_conclusion(crowded).text


def test_verdicts_on_partitions_say_what_their_intervals_are_worth():
    assert f"{100 * CONFIDENCE:g} % bootstrap" in INTERVALS and "not corrected for the number of comp" in INTERVALS
    assert (
        f"behind better, undecided and worse: {INTERVALS}."
        in conclusions.partitions_conclusion(draws([0, 1], [1])).text
    )


def test_partition_whose_runs_are_missing_is_left_out():
    variants = draws([0.1, 0.2], [0.3]) | {"random fragmented, k=2": [], "max-cut, k=3": []}
    conclusion = conclusions.partitions_conclusion(variants)
    assert {(entry["label"], entry["against"]) for entry in conclusion.numbers} == {("k=2", "random contiguous")}
    assert "k=3" not in conclusion.text


def training(name, seed, r2, accuracy, seconds_per_step, every=5):
    """A run that is evaluated every so many steps."""
    pairs = enumerate(zip(r2, accuracy, strict=True), start=1)
    evaluations = [
        {"step": every * i, "seconds": every * i * seconds_per_step}
        | {"r2_last": a, "r2_mean": a + 0.1, "student_accuracy": b}
        for i, (a, b) in pairs
    ]
    return record(name, seed, evaluations=evaluations)


def race(ours_r2=(0.5, 0.7, 0.8), seconds_per_step=1.0):
    """The reference ends at R² 0.6 and accuracy 0.8 after 10 steps, 20 seconds; ours, and a seed that ours lacks."""
    reference = [training("published", seed, (0.3, 0.6), (0.8, 0.8), 2.0) for seed in (0, 1, 2)]
    ours = [training("ours", seed, ours_r2, (0.1, 0.2, 0.3), seconds_per_step) for seed in (0, 1)]
    return conclusions.by_variant(reference + ours)


@pytest.mark.parametrize(("goal", "word"), [(0.5, "met"), (0.4, "missed")])
def test_time_to_fidelity_is_that_of_the_first_evaluation_at_the_end_of_the_reference(goal, word):
    conclusion = conclusions.time_to_fidelity_conclusion(race(), [goal])
    entry = of_score(conclusion, variant="ours")
    assert entry["targets"] == [0.6, 0.6] and entry["reached"] == 2
    assert (entry["seconds"], entry["steps"], entry["images"]) == ([10.0, 10.0], [10, 10], [100, 100])
    assert (entry["seconds_ratio"], entry["steps_ratio"], entry["images_ratio"]) == ([0.5, 0.5], [1, 1], [1, 1])
    assert entry["goal_met"] is (word == "met")
    assert f"the goal of at most {goal:g} of its time is {word}" in conclusion.text


@pytest.mark.parametrize(
    ("r2", "step"),
    [
        ((0.7, 0.5, 0.6, 0.7), 15),  # the first crossing was noise
        ((0.7, 0.6, 0.5, 0.5), 5),
        ((0.5, 0.7, 0.5, 0.6), 20),  # no evaluation follows the last
        ((0.7, 0.5, 0.7, 0.5), None),
        ((0.5, 0.5, 0.5, 0.5), None),
    ],
)
def test_arrival_is_where_the_next_evaluation_is_at_the_target_too(r2, step):
    evaluations = training("ours", 0, r2, r2, 1.0)["evaluations"]
    arrival = conclusions.first_to_stay(evaluations, "r2_last", 0.6)
    assert (arrival and arrival["step"]) == step
    reference = [training("published", 0, (0.3, 0.6), (0.1, 0.2), 2.0)]
    conclusion = conclusions.time_to_fidelity_conclusion(
        conclusions.by_variant([*reference, training("ours", 0, r2, r2, 1.0)])
    )
    assert of_score(conclusion, variant="ours")["steps"] == [step]
    assert "reaches the target and is followed by another that does, or by none" in conclusion.text


def test_variants_of_different_precision_are_named():
    variants = race()
    assert "precision" not in conclusions.time_to_fidelity_conclusion(variants).text
    for run in variants["ours"]:
        run["mixed_precision"] = "bf16"
    text = conclusions.time_to_fidelity_conclusion(variants).text
    assert 'in which variants differ: "published" in fp32, "ours" in bf16.' in text


def test_time_to_fidelity_is_measured_by_the_mean_over_layers_too():
    variants = race()
    for run in variants["ours"]:  # the last layer is there one evaluation later
        run["evaluations"][0]["r2_mean"] = 0.75
    entry = of_score(conclusions.time_to_fidelity_conclusion(variants, [0.3]), "r2_mean", variant="ours")
    assert entry["targets"] == pytest.approx([0.7, 0.7]) and entry["steps"] == [5, 5]
    assert entry["seconds_ratio"] == [0.25, 0.25] and entry["goal_met"] is True


def test_reference_may_be_at_its_end_before_its_training_ends():
    entry = of_score(conclusions.time_to_fidelity_conclusion(race()), "student_accuracy", variant="published")
    assert entry["seconds"] == [10.0] * 3 and entry["seconds_ratio"] == [0.5] * 3 and entry["goal_met"] is None


def test_target_that_is_not_reached_in_all_seeds_misses_the_goal():
    conclusion = conclusions.time_to_fidelity_conclusion(race(), [1.0])
    entry = of_score(conclusion, "student_accuracy", variant="ours")
    assert entry["seconds"] == [None, None] and entry["goal_met"] is False
    assert '"published" ends (80.0 %)**: never, in 0 of 2 seeds; the goal of at most 1 of its time is missed.' in (
        conclusion.text
    )
    variants = race()
    for evaluation in variants["ours"][1]["evaluations"]:
        evaluation["r2_last"] = 0.1
    entry = of_score(conclusion := conclusions.time_to_fidelity_conclusion(variants, [1.0]), variant="ours")
    assert entry["seconds_ratio"] == [0.5, None] and entry["reached"] == 1 and entry["goal_met"] is False
    assert "in 1 of 2 seeds; the goal of at most 1 of its time is missed." in conclusion.text


def test_every_reference_has_its_own_goal_and_end():
    variants = {"slow": race()["published"], **race()}
    for run in variants["slow"]:
        run["variant"] = "slow"
        run["evaluations"] = [entry | {"r2_last": 0.5} for entry in run["evaluations"]]
    conclusion = conclusions.time_to_fidelity_conclusion(variants, [0.2, 0.9])
    entries = [of_score(conclusion, reference=name, variant="ours") for name in ("slow", "published")]
    assert [entry["goal"] for entry in entries] == [0.2, 0.9]
    assert [entry["seconds_ratio"][0] for entry in entries] == [0.25, 0.5]
    assert [entry["goal_met"] for entry in entries] == [False, True]


def test_evaluations_without_seconds_are_refused():
    variants = race()
    del variants["ours"][0]["evaluations"][0]["seconds"]
    with pytest.raises(ValueError, match="'ours' has evaluations without seconds"):
        conclusions.time_to_fidelity_conclusion(variants)


def test_difference_is_judged_by_its_interval():
    for estimate, verdict in (
        (conclusions.Estimate(0.1, 0.05, 0.2), "better"),
        (conclusions.Estimate(-0.1, -0.2, -0.05), "worse"),
        (conclusions.Estimate(0.1, -0.05, 0.2), "undecided"),
        (conclusions.Estimate(0.1, float("nan"), float("nan")), "undecided"),
    ):
        assert conclusions.judged(estimate) == verdict


def test_interval_of_the_table_is_that_of_scipy():
    random, found = [0.1, 0.15, 0.3, 0.2], [0.4, 0.5, 0.45]
    entry = of_score(conclusions.partitions_conclusion(draws(random, found)))
    expected = stats.bootstrap(
        (random, found),
        lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (entry["difference"]["low"], entry["difference"]["high"]) == pytest.approx(tuple(expected), abs=0.01)
