"""Experiments on models: models that are exactly linear, identities that must hold, and loops over edits."""

import math

import numpy as np
import pytest
import torch

from raptor_hf.dynamics.extrapolation import DepthExtrapolation, EarlyExit, exit_steps, paced_layers
from raptor_hf.dynamics.interventions import (
    EditExperiment,
    Perturbation,
    contraction_rate,
    layer_edits,
    mean_interval,
)
from raptor_hf.phases import Partition
from raptor_hf.teacher import Teacher
from raptor_hf.tokens import TokenLayout
from tests.support.tiny_models import NUM_LAYERS, images, tiny_dinov2

PARTITION = Partition.from_boundaries([3, 5], 6)


class LinearModel:
    """A model whose layers shrink all deviations from a fixed state by `rate`; its classes are signs of feature 0."""

    tokens, hidden_size = TokenLayout(), 4

    def __init__(self, rate, num_layers=6, classifier=True):
        self.rate, self.num_layers = rate, num_layers
        self.classifier = object() if classifier else None
        self.centre = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) + 3

    def run_layers(self, state, layers):
        states = [state]
        for _ in layers:
            states.append(self.centre + self.rate * (states[-1] - self.centre))
        return torch.stack(states, 1)

    def logits(self, last):
        score = last[:, 0, 0] - self.centre[0, 0]
        return None if self.classifier is None else torch.stack([-score, score], 1)


def tiny_teacher(num_labels=3):
    return Teacher(tiny_dinov2(num_labels=num_labels).double())


def tiny_states(teacher, batch=5):
    return teacher.trajectory(images(batch=batch).double())


@pytest.mark.parametrize("rate", [0.5, 0.9, 1.2])
def test_rate_of_a_linear_contraction_is_found(rate):
    model = LinearModel(rate)
    start = model.centre.expand(3, -1, -1)  # the fixed state: only the noise moves
    experiment = Perturbation(model, sizes=(1e-4, 1e-3), layers=(0, 2))
    experiment.update(model.run_layers(start, range(6)))
    result = experiment.compute()
    np.testing.assert_allclose(result.relative_rate.mean, rate, 1e-6)
    np.testing.assert_allclose(result.rate.mean, rate, 1e-2)  # of angles, only nearly linear
    np.testing.assert_allclose(result.relative_distance.mean[1, :, 2], [1e-4, 1e-3], 1e-6)
    depth = np.arange(5)
    np.testing.assert_allclose(result.relative_distance.mean[1, 1, 2:], 1e-3 * rate**depth, 1e-6)
    assert result.angle.mean[1, :, :2].isnan().all() and not result.angle.mean[1, :, 2:].isnan().any()


def test_fitted_rate_is_the_least_squares_slope_of_the_logarithm():
    distance = torch.tensor([[math.nan, 1.0, 0.4, 0.3, 0.1], [math.nan] * 4 + [1.0]], dtype=torch.float64)
    rates = contraction_rate(distance)
    assert rates[0] == pytest.approx(np.exp(np.polyfit([1, 2, 3, 4], np.log([1.0, 0.4, 0.3, 0.1]), 1)[0]))
    assert rates[1].isnan()
    assert contraction_rate(torch.zeros(3)).isfinite()


def test_perturbation_is_the_model_run_on_from_noise():
    teacher = tiny_teacher()
    states = tiny_states(teacher)
    experiment = Perturbation(teacher, sizes=(0.3,), layers=(0, 3), seed=4)
    experiment.update(states)
    result = experiment.compute()
    generator = torch.Generator().manual_seed(4)
    for j, layer in enumerate((0, 3)):
        noise = torch.randn(states[:, layer].shape, generator=generator).double()
        noise = 0.3 * noise / noise.norm(dim=-1, keepdim=True) * states[:, layer].norm(dim=-1, keepdim=True)
        perturbed = teacher.run_layers(states[:, layer] + noise, range(layer + 1, NUM_LAYERS + 1))
        same = teacher.logits(perturbed[:, -1]).argmax(1) == teacher.logits(states[:, -1]).argmax(1)
        assert result.unchanged.mean[j, 0] == pytest.approx(same.double().mean().item())
        for offset, layer_after in enumerate(range(layer, NUM_LAYERS + 1)):
            a, b = perturbed[:, offset], states[:, layer_after]
            angle = torch.cosine_similarity(a, b, dim=-1).acos().mean()
            distance = ((a - b).norm(dim=-1) / b.norm(dim=-1)).mean()
            np.testing.assert_allclose(result.angle.mean[j, 0, layer_after], angle, 1e-6)
            np.testing.assert_allclose(result.relative_distance.mean[j, 0, layer_after], distance, 1e-6)
    again = Perturbation(teacher, sizes=(0.3,), layers=(0, 3), seed=4)
    again.update(states)
    assert torch.equal(again.sums().nan_to_num(), experiment.sums().nan_to_num())


def test_impossible_perturbations_are_refused():
    teacher = tiny_teacher()
    for sizes, layers, message in (((0.0,), (0,), "sizes"), ((0.1,), (4,), r"0\.\.3"), ((0.1,), (), "layers")):
        with pytest.raises(ValueError, match=message):
            Perturbation(teacher, sizes, layers)
    with pytest.raises(ValueError, match="no images"):
        Perturbation(teacher, (0.1,), (0,)).compute()


def test_single_edits_are_all_pairs_of_layers():
    owners = PARTITION.layer_to_block
    for relation in ("within", "across"):
        pairs = {(a, b) for a in range(6) for b in range(6) if a != b}
        pairs = {(a, b) for a, b in pairs if (owners[a] == owners[b]) == (relation == "within")}
        replaced = layer_edits(PARTITION, "replace", relation, 1)
        assert {(edit.pairs[0][0] - 1, edit.pairs[0][1] - 1) for edit in replaced} == pairs
        for edit in replaced:
            ((layer, substitute),) = edit.pairs
            assert edit.layers == tuple(substitute if i == layer else i for i in range(1, 7))
        swapped = layer_edits(PARTITION, "swap", relation, 1)
        assert len(swapped) == len(pairs) / 2
        assert all(sorted(edit.layers) == list(range(1, 7)) for edit in swapped)


@pytest.mark.parametrize("kind", ["replace", "swap"])
@pytest.mark.parametrize("relation", ["within", "across"])
def test_several_edits_are_disjoint_of_the_right_kind_and_fixed_by_the_seed(kind, relation):
    edits = layer_edits(PARTITION, kind, relation, 2, max_edits=5, seed=1)
    owners = dict(enumerate(PARTITION.layer_to_block, start=1))
    assert 1 <= len(edits) <= 5 and len(set(edits)) == len(edits)
    for edit in edits:
        changed = [layer for layer in range(1, 7) if edit.layers[layer - 1] != layer]
        assert len(changed) == (2 if kind == "replace" else 4)
        for layer in changed:
            assert (owners[layer] == owners[edit.layers[layer - 1]]) == (relation == "within")
    assert edits == layer_edits(PARTITION, kind, relation, 2, max_edits=5, seed=1)
    if relation == "across":
        assert edits != layer_edits(PARTITION, kind, relation, 2, max_edits=5, seed=2)


def test_edits_that_phases_do_not_allow_are_an_empty_list_and_impossible_ones_refused():
    assert layer_edits(Partition.from_boundaries([1], 2), "swap", "within", 1) == []
    assert layer_edits(PARTITION, "swap", "within", 3, max_edits=4) == []  # phases of 3, 2 and 1 hold two pairs
    for arguments in (("move", "within", 1), ("swap", "near", 1), ("swap", "within", 0), ("swap", "within", 2)):
        with pytest.raises(ValueError):
            layer_edits(PARTITION, *arguments)


def test_edited_models_score_what_a_loop_over_them_scores():
    teacher = tiny_teacher()
    partition, labels = Partition.from_boundaries([2], 4), torch.tensor([0, 1, 2, 0, 1])
    edits = layer_edits(partition, "replace", "across", 1) + layer_edits(partition, "swap", "within", 1)
    states = tiny_states(teacher)
    experiment = EditExperiment(teacher, edits)
    for part, classes in zip(states.split(3), labels.split(3), strict=True):
        experiment.update(part, classes)
    result = experiment.compute()
    own = teacher.logits(states[:, -1]).argmax(1)
    for index, edit in enumerate(edits):
        last = teacher.run_layers(states[:, 0], edit.layers)[:, -1]
        predicted = teacher.logits(last).argmax(1)
        cosine = torch.cosine_similarity(last, states[:, -1], dim=-1).mean()
        assert result.cosine.mean[index] == pytest.approx(cosine.item(), rel=1e-9)
        assert result.agreement.mean[index] == pytest.approx((predicted == own).double().mean().item())
        assert result.accuracy.mean[index] == pytest.approx((predicted == labels).double().mean().item())
        spread = torch.cosine_similarity(last, states[:, -1], dim=-1).mean(1).std().item()
        entry = result.to_dict()["edits"][index]
        assert entry["cosine"] == result.cosine.mean[index] and entry["cosine_std"] == pytest.approx(spread, rel=1e-6)
    summary = result.summary("agreement")
    assert summary.keys() == {("replace", "across", 1), ("swap", "within", 1)}
    chosen = result.agreement.mean[:8]
    assert summary["replace", "across", 1].mean == pytest.approx(chosen.mean().item())
    assert summary["replace", "across", 1].count == 8


def test_without_labels_there_is_agreement_and_without_a_classifier_the_cosine():
    for teacher, names in ((tiny_teacher(), {"agreement"}), (tiny_teacher(num_labels=None), set())):
        states = tiny_states(teacher)
        edits = EditExperiment(teacher, layer_edits(Partition.from_boundaries([2], 4), "swap", "within", 1))
        edits.update(states)
        depth = DepthExtrapolation(teacher, (2, 6))
        depth.update(states, states[:, -1])
        exits = EarlyExit(teacher, (0.5,))
        exits.update(states)
        noise = Perturbation(teacher, (0.1,), (1,))
        noise.update(states)
        for experiment in (edits, depth, exits):
            result = experiment.compute()
            assert {name for name in ("agreement", "accuracy") if getattr(result, name) is not None} == names
            assert result.cosine is not None
        assert (noise.compute().unchanged is None) == (not names)


def test_interval_is_the_percentile_bootstrap():
    values = np.random.default_rng(0).normal(5, 2, 400).tolist()
    interval = mean_interval(values)
    half = 1.96 * np.std(values) / 20
    assert interval.mean == pytest.approx(np.mean(values)) and interval.count == 400
    assert interval.low == pytest.approx(np.mean(values) - half, abs=0.05)
    assert interval.high == pytest.approx(np.mean(values) + half, abs=0.05)
    single = mean_interval([0.25])
    assert single.low == single.high == single.mean == 0.25


def test_paces_hold_the_last_layer_or_spread_over_all():
    assert paced_layers(4, 2, "hold") == [1, 2] and paced_layers(4, 6, "hold") == [1, 2, 3, 4, 4, 4]
    assert paced_layers(4, 2, "spread") == [2, 4] and paced_layers(4, 8, "spread") == [1, 1, 2, 2, 3, 3, 4, 4]
    assert paced_layers(12, 12, "hold") == paced_layers(12, 12, "spread") == list(range(1, 13))
    with pytest.raises(ValueError, match="num_steps is 0"):
        paced_layers(4, 0, "hold")
    with pytest.raises(ValueError, match="pace is 'fast'"):
        DepthExtrapolation(LinearModel(0.5), (2,), "fast")


@pytest.mark.parametrize("pace", ["hold", "spread"])
def test_extrapolation_scores_the_runs_of_other_numbers_of_steps(pace):
    teacher = tiny_teacher()
    states, labels = tiny_states(teacher), torch.tensor([0, 1, 2, 0, 1])
    reference = torch.randn_like(states[:, -1])
    experiment = DepthExtrapolation(teacher, (2, 4, 7), pace)
    experiment.update(states, reference, labels)
    result = experiment.compute()
    truth = teacher.logits(reference).argmax(1)
    for index, steps in enumerate((2, 4, 7)):
        run = teacher.run_layers(states[:, 0], paced_layers(4, steps, pace))
        last, predicted = run[:, -1], teacher.logits(run[:, -1]).argmax(1)
        cosine = torch.cosine_similarity(last, reference, dim=-1).mean()
        speed = torch.cosine_similarity(last, run[:, -2], dim=-1).acos().mean()
        error = ((last - reference).norm(dim=(1, 2)) / reference.norm(dim=(1, 2))).mean()
        np.testing.assert_allclose(result.cosine.mean[index], cosine, 1e-9, 1e-9)
        np.testing.assert_allclose(result.last_speed.mean[index], speed, 1e-6)
        np.testing.assert_allclose(result.relative_error.mean[index], error, 1e-9)
        assert result.agreement.mean[index] == pytest.approx((predicted == truth).double().mean().item())
        assert result.accuracy.mean[index] == pytest.approx((predicted == labels).double().mean().item())


def test_a_contraction_converges_beyond_its_trained_depth():
    model = LinearModel(0.5)
    states = model.run_layers(torch.randn(3, 5, 4, dtype=torch.float64), range(6))
    experiment = DepthExtrapolation(model, (1, 6, 40))
    experiment.update(states, model.centre.expand(3, -1, -1))
    result = experiment.compute()
    assert result.relative_error.mean[0] > 0.01 and result.relative_error.mean[2] < 1e-9
    assert result.last_speed.mean[2] < 1e-8 < result.last_speed.mean[0]


def test_exit_is_at_the_first_step_below_the_threshold_or_at_the_last():
    settling = torch.tensor([[0.9, 0.3, 0.5, 0.1], [0.9, 0.8, 0.7, 0.6]])
    assert exit_steps(settling, (0.4, 0.2, 0.05, 1.0), 4).tolist() == [[2, 4, 4, 1], [4, 4, 4, 1]]


@pytest.mark.parametrize("rule", ["angular_speed", "second_difference"])
def test_early_exit_scores_the_states_at_which_images_settle(rule):
    teacher = tiny_teacher()
    states, labels = tiny_states(teacher, batch=7), torch.arange(7) % 3
    cls = states[:, :, 0] / states[:, :, 0].norm(dim=-1, keepdim=True)
    if rule == "angular_speed":
        settling = (cls[:, 1:] * cls[:, :-1]).sum(-1).acos()
    else:
        settling = torch.full((7, 4), torch.inf, dtype=torch.float64)
        settling[:, 1:] = (cls[:, 2:] - 2 * cls[:, 1:-1] + cls[:, :-2]).norm(dim=-1)
    thresholds = [float(settling[:, 1:].quantile(q)) for q in (0.62, 0.88)] + [0.0]
    experiment = EarlyExit(teacher, thresholds, rule)
    experiment.update(states, labels)
    result = experiment.compute()
    final = teacher.logits(states[:, -1]).argmax(1)
    for index, threshold in enumerate(thresholds):
        steps = [next((s for s in range(1, 5) if row[s - 1] < threshold), 4) for row in settling]
        last = torch.stack([states[i, s] for i, s in enumerate(steps)])
        predicted = teacher.logits(last).argmax(1)
        assert result.num_steps.mean[index] == pytest.approx(np.mean(steps))
        assert result.agreement.mean[index] == pytest.approx((predicted == final).double().mean().item())
        assert result.accuracy.mean[index] == pytest.approx((predicted == labels).double().mean().item())
        cosine = torch.cosine_similarity(last, states[:, -1], dim=-1).mean()
        assert result.cosine.mean[index] == pytest.approx(cosine.item())
    assert result.num_steps.mean[0] < 4 and result.num_steps.mean[2] == 4
    assert result.agreement.mean[2] == 1
    with pytest.raises(ValueError, match="rule is 'late'"):
        EarlyExit(teacher, (0.1,), "late")
    with pytest.raises(ValueError, match="thresholds"):
        EarlyExit(teacher, ())
