"""Depths chosen for a budget, and thresholds of early exit found on held-out images, against searches by hand."""

import pytest
import torch

import raptor_hf
from raptor_hf import RaptorForImageClassification, RaptorModel
from raptor_hf.configuration_raptor import EXIT_CRITERIA
from raptor_hf.teacher import macs
from tests.support.tiny_raptors import tiny_images, tiny_model


@pytest.fixture
def model() -> RaptorForImageClassification:
    return tiny_model(RaptorForImageClassification, step_scaling=True)


def test_depth_for_a_budget_is_the_last_that_fits(model):
    costs = {n: macs(lambda images, n=n: model(images, num_steps=n), tiny_images()) for n in range(3, 7)}
    assert sorted(costs.values()) == list(costs.values())
    for num_steps, cost in costs.items():
        assert raptor_hf.depth_for(model, tiny_images(), max_macs=cost) == num_steps
        assert raptor_hf.depth_for(model, tiny_images(), max_macs=cost + 1) == num_steps
    with pytest.raises(ValueError, match="it must be at least .*, which 3 steps need"):
        raptor_hf.depth_for(model, tiny_images(), max_macs=costs[3] - 1)


def test_depth_for_an_agreement_is_the_first_that_reaches_it(model):
    images = tiny_images(64)
    with torch.no_grad():
        trained = model(images).logits.argmax(1)
        agreement = {n: (model(images, num_steps=n).logits.argmax(1) == trained).float().mean() for n in range(3, 7)}
    assert agreement[3] < agreement[6] == 1
    for wanted in (0.0, float(agreement[3]), float(agreement[3]) + 1e-4, 1.0):
        first = next(n for n, share in agreement.items() if share >= wanted)
        assert raptor_hf.depth_for(model, images, min_agreement=wanted) == first


def test_depth_that_cannot_be_chosen_is_refused(model):
    with pytest.raises(ValueError, match="give one of them"):
        raptor_hf.depth_for(model, tiny_images())
    with pytest.raises(ValueError, match="give one of them"):
        raptor_hf.depth_for(model, tiny_images(), max_macs=1, min_agreement=1)
    with pytest.raises(ValueError, match="min_agreement is 2"):
        raptor_hf.depth_for(model, tiny_images(), min_agreement=2)
    with pytest.raises(ValueError, match="step_scaling is False"):
        raptor_hf.depth_for(tiny_model(RaptorForImageClassification), tiny_images(), max_macs=1)
    with pytest.raises(ValueError, match="model is a RaptorModel"):
        raptor_hf.depth_for(tiny_model(RaptorModel, step_scaling=True), tiny_images(), min_agreement=1)


@pytest.mark.parametrize("num_steps", [None, 9])
@pytest.mark.parametrize("criterion", EXIT_CRITERIA)
def test_calibrated_model_does_on_its_images_what_the_calibration_says(model, criterion, num_steps):
    images = tiny_images(120)
    found = raptor_hf.calibrate_exit(model, images.split(50), criterion, max_disagreement=0.1, num_steps=num_steps)
    with torch.no_grad():
        whole = model(images, num_steps=num_steps).logits.argmax(1)
        output = model(images, num_steps=num_steps, exit_criterion=criterion)
    assert model.config.exit_thresholds == {criterion: found.threshold}
    assert (output.logits.argmax(1) == whole).float().mean().item() == pytest.approx(found.agreement, abs=1e-6)
    assert output.num_steps.float().mean().item() == pytest.approx(found.mean_steps, abs=1e-5)
    assert found.agreement >= 0.9 and found.mean_steps < (num_steps or 6)


@pytest.mark.parametrize("criterion", EXIT_CRITERIA)
def test_more_may_be_saved_where_more_may_change(model, criterion):
    images = [tiny_images(120)]
    steps = [raptor_hf.calibrate_exit(model, images, criterion, share).mean_steps for share in (0.0, 0.05, 0.3, 1.0)]
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]


def test_threshold_is_saved_with_the_model(model, tmp_path):
    found = raptor_hf.calibrate_exit(model, [tiny_images(60)], "head_margin", 0.1)
    raptor_hf.calibrate_exit(model, [tiny_images(60)], "step_size", 0.1)
    model.save_pretrained(tmp_path)
    loaded = RaptorForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.exit_thresholds == model.config.exit_thresholds
    with torch.no_grad():
        one, other = (m(tiny_images(), exit_criterion="head_margin").num_steps for m in (loaded, model))
    assert torch.equal(one, other) and loaded.config.exit_thresholds["head_margin"] == found.threshold


def test_calibration_that_cannot_work_is_refused(model):
    with pytest.raises(ValueError, match="batches is empty"):
        raptor_hf.calibrate_exit(model, [], "step_size")
    with pytest.raises(ValueError, match="max_disagreement is 2"):
        raptor_hf.calibrate_exit(model, [tiny_images()], "step_size", 2)
    with pytest.raises(ValueError, match="exit_criterion is 'entropy'"):
        raptor_hf.calibrate_exit(model, [tiny_images()], "entropy")
    with pytest.raises(ValueError, match="model is a RaptorModel"):
        raptor_hf.calibrate_exit(tiny_model(RaptorModel), [tiny_images()], "step_size")
