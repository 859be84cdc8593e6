"""What is read at every state: lenses against the model's own answers, rollout and artefacts against definitions."""

import pytest
import torch
from torch import nn

from raptor_hf import RaptorForImageClassification
from raptor_hf.dynamics.lens import TunedLens, artefacts, attention_maps, patch_readings, readings, rollout
from raptor_hf.families import FAMILIES
from raptor_hf.teacher import Teacher
from raptor_hf.tokens import TokenLayout
from tests.support.tiny_models import DIM, NUM_LAYERS, images, tiny_dinov2
from tests.support.tiny_raptors import tiny_images, tiny_model
from tests.support.tiny_vits import WITH_CLASSIFIER, own_inputs, tiny_vit


def models():
    cases = {"dinov2": (lambda: tiny_dinov2(num_labels=5), images), "raptor": (raptor, tiny_images)}
    return cases | {family: (lambda f=family: tiny_vit(f, num_labels=5), images) for family in WITH_CLASSIFIER}


def raptor():
    return tiny_model(RaptorForImageClassification)


@pytest.mark.parametrize("name", models())
def test_the_last_reading_is_the_model_s_own_answer(name):
    make, pictures = models()[name]
    model = make()
    with torch.no_grad():
        arguments = {"pixel_values": pictures()} if name == "raptor" else own_inputs(model, pictures())
        expected = model(**arguments).logits
    teacher = Teacher(model)
    states = teacher.trajectory(pictures())
    torch.testing.assert_close(readings(teacher, states)[:, -1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", models())
def test_readings_of_patches_average_to_that_of_the_image(name):
    make, pictures = models()[name]
    teacher = Teacher(make())
    states = teacher.trajectory(pictures())
    patches = patch_readings(teacher, states)
    assert patches.shape[2] == states.shape[2] - teacher.num_prefix_tokens
    if "patches" in teacher.head:
        first = teacher.num_prefix_tokens
        alike = states.clone()
        alike[:, :, first:] = states[:, :, first : first + 1]
        torch.testing.assert_close(patches[:, :, 0], readings(teacher, alike), rtol=1e-4, atol=1e-5)
        if FAMILIES[teacher.family].pooled_norm is None:  # such a norm is not linear
            torch.testing.assert_close(patches.mean(2), readings(teacher, states), rtol=1e-4, atol=1e-5)
    else:
        # a patch in the place of the class token is read as this one is
        moved = states[:, :, [teacher.num_prefix_tokens, *range(1, states.shape[2])]]
        torch.testing.assert_close(patches[:, :, 0], readings(teacher, moved), rtol=1e-4, atol=1e-5)


def test_a_probe_reads_where_there_is_no_classifier():
    teacher = Teacher(tiny_dinov2())
    states = teacher.trajectory(images())
    with pytest.raises(ValueError, match="has no classifier; give a probe"):
        readings(teacher, states)
    probe = nn.Linear(2 * DIM, 3)
    norm = teacher.final_norm(states[:, 2])
    expected = probe(torch.cat([norm[:, 0], norm[:, teacher.num_prefix_tokens :].mean(1)], 1))
    torch.testing.assert_close(readings(teacher, states, probe)[:, 2], expected)


def test_the_tuned_lens_is_ridge_regression_on_the_last_state():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 3, 5, 4, generator=generator, dtype=torch.float64).cumsum(1) + 2
    tuned = TunedLens(num_layers=2, hidden_size=4)
    for batch in states.split([1, 3, 2]):
        tuned.update(batch)
    lens = tuned.fit(ridge=0.1)
    for step in range(2):
        x, y = states[:, step].flatten(0, 1), states[:, 2].flatten(0, 1)
        x_centred, y_centred = x - x.mean(0), y - y.mean(0)
        penalty = 0.1 * x_centred.square().mean() * len(x)
        # ridge as least squares with further rows
        rows = torch.cat([x_centred, penalty.sqrt() * torch.eye(4, dtype=x.dtype)])
        weight = torch.linalg.lstsq(rows, torch.cat([y_centred, torch.zeros(4, 4, dtype=x.dtype)])).solution
        expected = x_centred @ weight + y.mean(0)
        torch.testing.assert_close(lens.apply(states)[:, step].flatten(0, 1), expected)
        explained = 1 - (expected - y).square().sum() / y_centred.square().sum()
        torch.testing.assert_close(lens.explained[step], explained)
    assert torch.equal(lens.apply(states)[:, 2], states[:, 2]) and lens.explained[2] == 1


def test_the_tuned_lens_finds_a_linear_path():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    states = [torch.randn(10, 6, 8, generator=generator, dtype=torch.float64)]
    for _ in range(3):
        states.append(states[-1] @ turn + 1)
    states = torch.stack(states, 1)
    tuned = TunedLens(3, 8)
    tuned.update(states)
    lens = tuned.fit(ridge=0)
    torch.testing.assert_close(lens.apply(states), states[:, -1:].expand_as(states))
    with pytest.raises(ValueError, match="ridge is -1"):
        tuned.fit(ridge=-1)
    with pytest.raises(ValueError, match="states is .10, 4, 6, 8.; it must be"):
        TunedLens(3, 7).update(states)


def test_attention_maps_need_eager_attention():
    model = tiny_dinov2()
    model.set_attn_implementation("eager")
    maps = attention_maps(Teacher(model), images())
    assert maps.shape == (2, NUM_LAYERS, 3, 7, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation is 'sdpa'.*must be 'eager'"):
        attention_maps(Teacher(model), images())


def test_rollout_is_the_product_of_the_steps():
    attentions = torch.rand(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    rolled = rollout(attentions)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    one, two, three = ((attentions[0, step].mean(0) + torch.eye(5)) / 2 for step in range(3))
    torch.testing.assert_close(rolled[0, -1], three @ two @ one)
    assert torch.equal(rollout(attentions, residual=1.0)[1, 2], torch.eye(5, dtype=torch.float64))


def test_artefacts_are_patches_of_an_outlying_norm():
    generator = torch.Generator().manual_seed(0)
    states = 1 + 0.1 * torch.randn(2, 3, 1 + 2 + 20, 16, generator=generator)
    states[:, :, :3] *= 50  # cls and registers do not count
    states[1, 2, 3 + 7] *= 4
    found = artefacts(states, TokenLayout(num_registers=2))
    assert found.nonzero().tolist() == [[1, 2, 7]]
    assert not artefacts(torch.ones(1, 2, 9, 4), TokenLayout()).any()
