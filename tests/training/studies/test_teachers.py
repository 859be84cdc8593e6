"""What a study of teachers computes and says, on made-up records and states."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from raptor_hf.metrics import FidelityAccumulator
from raptor_hf.tokens import TokenLayout
from training.studies.teachers import (
    Claim,
    breaking_sentence,
    broken_variants,
    change_r2,
    claims_of,
    layer_similarity,
    plot_teacher_study,
    role_of,
    similarity_claims,
    stochastic_depth_claims,
    training_time_claims,
)
from training.studies.uncertainty import Estimate, rank_correlation


def record(variant, seed=0, **changes):
    return {
        "variant": variant,
        "seed": seed,
        "drop_path_rate": 0.0,
        "teacher_accuracy": 0.9,
        "train_accuracy": 0.95,
        "student_accuracy": 0.8,
        "retained": 0.8 / 0.9,
        "similarity": 0.5,
        "contrast": 0.2,
        "r2_mean": 0.9,
        "change_r2": 0.8,
    } | changes


def depth_records(sign, rates=(0.0, 0.1, 0.3, 0.5, 0.7)):
    """Similarity and R^2 that rise with the rate, or fall for sign -1, a little more than seeds differ."""
    return [
        record(
            f"p = {rate}",
            seed,
            drop_path_rate=rate,
            similarity=0.5 + sign * rate / 2 + 0.01 * seed,
            r2_mean=0.6 + sign * rate / 3 + 0.01 * seed,
            change_r2=0.5 - sign * rate / 3 + 0.01 * seed,
        )
        for seed in range(3)
        for rate in rates
    ]


def time_records(sign):
    """Untrained and overfitted teachers that bear the claims out, or contradict them for sign -1."""
    shifts = {"untrained": 0.05, "early, 60 steps": 0.02, "converged": 0.0, "overfitted, 100 images": -0.05}
    return [
        record(
            name,
            seed,
            similarity=0.5 + sign * shift + 0.001 * seed,
            r2_mean=0.9 + sign * shift + 0.001 * seed,
            change_r2=0.8 + sign * shift + 0.001 * seed,
            train_accuracy=0.95 - sign * shift,
        )
        for seed in range(3)
        for name, shift in shifts.items()
    ]


def outcomes(claims):
    return [claim.outcome for claim in claims]


def test_similarity_is_the_mean_cosine_of_all_pairs_of_layers():
    layers = np.random.default_rng(0).normal(size=(4, 7))
    unit = layers / np.linalg.norm(layers, axis=1, keepdims=True)
    expected = np.mean([unit[i] @ unit[j] for i in range(4) for j in range(4) if i < j])
    distance = 1 - unit @ unit.T
    np.fill_diagonal(distance, 0)
    assert layer_similarity(distance) == pytest.approx(expected)
    with pytest.raises(ValueError, match="1 layer"):
        layer_similarity(np.zeros((1, 1)))


def test_r2_of_the_change_is_the_share_of_the_copys_error_that_the_student_removes():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 5, 6, 4, generator=generator).cumsum(dim=1)
    student = teacher + 0.3 * torch.randn(3, 5, 6, 4, generator=generator)
    r2 = []
    for states in (student, teacher[:, :1].expand_as(teacher)):
        fidelity = FidelityAccumulator(num_layers=4, tokens=TokenLayout(1))
        fidelity.update(teacher, states)
        r2.append(fidelity.compute().r2.tolist())
    errors = [((states - teacher) ** 2).sum(dim=(0, 2, 3))[1:] for states in (student, teacher[:, :1])]
    assert change_r2(*r2) == pytest.approx((1 - errors[0] / errors[1]).mean().item(), rel=1e-5)
    assert change_r2(r2[1], r2[1]) == 0 and change_r2([1.0], [0.9]) == 1


def test_r2_of_no_change_is_refused():
    with pytest.raises(ValueError, match="nothing has changed"):
        change_r2([0.9, 0.9], [0.5, 1.0])
    with pytest.raises(ValueError, match="r2 has 1 layers, copy_r2 has 2"):
        change_r2([0.9], [0.5, 0.5])


@pytest.mark.parametrize(
    ("low", "high", "expected", "outcome"),
    [
        (0.1, 0.3, 1, "holds"),
        (-0.3, -0.1, -1, "holds"),
        (-0.3, -0.1, 1, "does not hold, the opposite does"),
        (0.1, 0.3, -1, "does not hold, the opposite does"),
        (-0.1, 0.1, 1, "stays open"),
        (0.0, 0.2, 1, "stays open"),
        (math.nan, math.nan, 1, "stays open"),
    ],
)
def test_claim_holds_only_if_the_whole_interval_has_its_sign(low, high, expected, outcome):
    claim = Claim("Something", "number", Estimate((low + high) / 2, low, high), expected)
    assert claim.outcome == claim.to_dict()["outcome"] == outcome
    assert claim.sentence().startswith(f"Something: {outcome} (number ")


def test_more_stochastic_depth_is_judged_in_both_directions():
    up, down, opposite = "holds", "does not hold, the opposite does", depth_records(-1)
    assert outcomes(stochastic_depth_claims(depth_records(1))) == [up, up, down]
    assert outcomes(stochastic_depth_claims(opposite)) == [down, down, up]
    estimate = stochastic_depth_claims(opposite)[0].estimate
    pairs = [(run["drop_path_rate"], run["similarity"]) for run in opposite]
    assert estimate.value == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    assert "[-" in stochastic_depth_claims(opposite)[0].sentence()
    variants = [run["variant"] for run in opposite]
    assert estimate == rank_correlation(*zip(*pairs, strict=True), groups=variants)


def test_rates_whose_training_broke_do_not_count_in_any_correlation():
    records = depth_records(1)
    for run in records:
        if run["drop_path_rate"] == 0.7:
            run |= {"teacher_accuracy": 0.2, "similarity": 0.0, "r2_mean": 0.0}
    assert broken_variants(records) == {"p = 0.7"}
    claims, held = claims_of("stochastic_depth", records), depth_records(1, rates=(0.0, 0.1, 0.3, 0.5))
    assert claims == stochastic_depth_claims(held) + similarity_claims(held)
    assert outcomes(claims)[:2] == ["holds", "holds"]
    assert all("over 12 teachers of 4 variants" in claim.quantity for claim in claims)
    assert "over 12 teachers of 4 variants" in plot_teacher_study("stochastic_depth", records).axes[-1].get_title()


def test_untrained_teachers_count_in_a_study_of_training_time():
    records = time_records(1)
    for run in records:
        run["teacher_accuracy"] = 0.1 if run["variant"] == "untrained" else 0.9
    assert claims_of("training_time", records)[-3].quantity == "rank correlation over 12 teachers of 4 variants"


def test_sentence_says_whether_training_breaks_where_the_paper_saw_it():
    records = depth_records(1)
    held = breaking_sentence(records)
    assert "not seen up to p = 0.7" in held and "At p = 0.7 accuracy is 90.0 %, +0.0" in held
    for run in records:
        run["teacher_accuracy"] = 0.9 - 0.7 * (run["drop_path_rate"] == 0.7) + 0.001 * run["seed"]
    broke = breaking_sentence(records)
    assert ": holds. " in broke and "20.1 %, -70.0 [-70.1, -69.9] points" in broke
    for run in records:  # already at rates at which it should not
        run["teacher_accuracy"] = 0.9 if run["drop_path_rate"] < 0.3 else 0.2
    assert ": it already breaks at p = 0.3. " in breaking_sentence(records)
    assert breaking_sentence(depth_records(1, rates=(0.0, 0.5))).endswith("not tested.")


def test_training_time_is_judged_in_both_directions():
    up, down = "holds", "does not hold, the opposite does"
    claims = training_time_claims(time_records(1))
    assert outcomes(claims) == [up] * 6 and claims[0].estimate.value == pytest.approx(0.05)
    assert [claim.expected for claim in claims] == [1, 1, 1, -1, -1, -1]
    assert outcomes(training_time_claims(time_records(-1))) == [down] * 6
    # the gap between training and test images, against that of the converged
    assert claims[2].estimate.value == pytest.approx(0.05)


def test_without_converged_teachers_there_is_nothing_to_compare_with():
    records = [run for run in time_records(1) if run["variant"] != "converged"]
    assert training_time_claims(records) == []


def test_similarity_predicts_among_seeds_only_what_variants_do_not_make():
    # both rise from variant to variant, but within each of them the one falls as the other rises
    noise = 0.01 * np.random.default_rng(0).normal(size=(5, 3))
    records = [
        record(name, seed, similarity=0.1 * place + shift, r2_mean=0.1 * place - shift, change_r2=0.5)
        for place, (name, shifts) in enumerate(zip("abcde", noise, strict=True))
        for seed, shift in enumerate(shifts)
    ]
    overall, of_change, within = similarity_claims(records)
    assert (overall.outcome, within.outcome) == ("holds", "does not hold, the opposite does")
    assert within.estimate.value == pytest.approx(-1)
    assert of_change.outcome == "stays open" and "not defined" in of_change.sentence()


def test_deviations_are_in_standard_deviations_of_their_variant_and_none_without_spread():
    generator = np.random.default_rng(1)
    spreads = {"narrow": 0.001, "wide": 0.1, "wider": 0.3}
    values = {name: spread * generator.normal(size=(2, 4)) for name, spread in spreads.items()}
    records = [
        record(name, seed, similarity=similarity, r2_mean=r2)
        for name, pairs in values.items()
        for seed, (similarity, r2) in enumerate(pairs.T)
    ]
    flat = [record("flat", seed, similarity=0.1 * seed) for seed in range(4)] + [record("single", r2_mean=0.1)]
    within = similarity_claims(records + flat)[-1]
    scores = np.concatenate([stats.zscore(pairs, axis=1, ddof=1) for pairs in values.values()], axis=1)
    assert within.estimate.value == pytest.approx(stats.spearmanr(*scores).statistic)
    plain = np.concatenate([pairs - pairs.mean(axis=1, keepdims=True) for pairs in values.values()], axis=1)
    assert within.estimate.value != pytest.approx(stats.spearmanr(*plain).statistic)
    assert within.quantity.endswith("in its standard deviations, over 12 teachers of 3 variants with a spread")


def test_claims_of_a_study_that_has_just_begun_stay_open():
    first = [record("p = 0", drop_path_rate=0.0), record("p = 0.1", drop_path_rate=0.1)]
    assert set(outcomes(claims_of("stochastic_depth", first))) == {"stays open"}
    assert set(outcomes(claims_of("training_time", [record("converged"), record("untrained")]))) == {"stays open"}


def test_role_is_the_first_word_of_a_variant():
    assert role_of("overfitted, 100 images") == "overfitted" and role_of("untrained") == "untrained"
    assert role_of("untrainedish") is None and role_of("p = 0.1") is None and role_of(" ") is None


def test_figure_has_a_dot_per_seed_and_a_line_through_the_means(tmp_path):
    records = depth_records(1)
    figure = plot_teacher_study("stochastic_depth", records, tmp_path / "figure.png")
    line, dots = figure.axes[1].lines
    rates = [0.0, 0.1, 0.3, 0.5, 0.7]
    assert line.get_xdata() == pytest.approx(rates)
    assert line.get_ydata() == pytest.approx([0.5 + rate / 2 + 0.01 for rate in rates])
    expected = sorted((run["drop_path_rate"], run["similarity"]) for run in records)
    assert np.array(sorted(map(tuple, dots.get_xydata()))) == pytest.approx(np.array(expected))
    scatter = figure.axes[-1].lines
    assert len(scatter) == 5 and scatter[0].get_xydata() == pytest.approx(
        np.array([(run["similarity"], run["r2_mean"]) for run in records if run["variant"] == "p = 0.0"])
    )
    assert "rank correlation +" in figure.axes[-1].get_title()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_figure_of_training_time_names_the_stages_in_their_order():
    accuracy = plot_teacher_study("training_time", time_records(1)).axes[0]
    assert [label.get_text().replace("\n", " ") for label in accuracy.get_xticklabels()] == [
        "untrained",
        "early, 60 steps",
        "converged",
        "overfitted, 100 images",
    ]
    assert len(accuracy.lines) == 6  # line and dots of teacher, teacher on its training images, and student
