"""Patching between images and swaps between models, against edits by address and against what must be."""

import pytest
import torch

from raptor_hf import RaptorForImageClassification
from raptor_hf.conversion import student_from_teacher
from raptor_hf.dynamics.patching import CausalPatching, StateSwap
from raptor_hf.phases import Partition
from raptor_hf.steps import patch
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import NUM_LAYERS, images, tiny_dinov2
from tests.support.tiny_raptors import tiny_images, tiny_model


@pytest.fixture(scope="module")
def teacher():
    return Teacher(tiny_dinov2(num_labels=5))


@pytest.fixture(scope="module")
def untied(teacher):
    """A student with a block for every layer and its weights: the teacher itself."""
    partition = Partition.from_boundaries(range(1, NUM_LAYERS), NUM_LAYERS)
    student = student_from_teacher(teacher, partition, init="first", depth_conditioning="none")
    return Teacher(student)


def test_patching_is_what_edits_of_these_places_do():
    model = tiny_model(RaptorForImageClassification)
    student = Teacher(model)
    pair = torch.cat([tiny_images(4, seed=1), tiny_images(4, seed=2)])
    states = student.trajectory(pair)
    predicted = student.logits(states[:, -1]).argmax(1)
    first = next(i for i in range(4) if predicted[i] != predicted[4 + i])
    experiment = CausalPatching(student)
    experiment.update(states[first : first + 1], states[4 + first : 5 + first])
    result = experiment.compute()
    assert result.groups == ["cls", "registers", "patches", "all tokens"]
    a, b = predicted[first], predicted[4 + first]
    with torch.no_grad():
        logits = model(pair[[first, 4 + first]]).logits
        low, high = (row[b] - row[a] for row in logits)
        for step in (0, 2, 5):
            for index, tokens in enumerate((slice(0, 1), slice(1, 3), slice(3, None))):

                def edit(value, tokens=tokens, step=step):
                    value = value.clone()
                    value[:, tokens] = states[4 + first, step, tokens]
                    return value

                with patch(model, {f"step.{step}": edit}):
                    patched = model(pair[first : first + 1]).logits[0]
                expected = (patched[b] - patched[a] - low) / (high - low)
                torch.testing.assert_close(result.effect.mean[step, index].float(), expected, rtol=1e-3, atol=1e-4)
                assert result.flipped.mean[step, index] == (patched.argmax() == b)


@pytest.mark.parametrize("num_labels", [5, None])
def test_all_tokens_carry_all_of_the_difference(num_labels):
    teacher = Teacher(tiny_dinov2(num_labels=num_labels))
    states = teacher.trajectory(images(batch=6))
    experiment = CausalPatching(teacher)
    for batch in (states[:2], states[2:]):
        experiment.update(batch, batch.roll(1, 0))
    result = experiment.compute()
    every = result.effect.mean[:, result.groups.index("all tokens")]
    torch.testing.assert_close(every, torch.ones_like(every), rtol=1e-4, atol=1e-4)
    # in the last state the registers have no say
    assert result.effect.mean[-1, result.groups.index("registers")] == 0
    assert (result.flipped is None) == (num_labels is None)


def test_an_image_paired_with_itself_is_left_out(teacher):
    experiment = CausalPatching(teacher)
    states = teacher.trajectory(images())
    experiment.update(states, states)
    with pytest.raises(ValueError, match="has seen no"):
        experiment.compute()


def test_states_of_the_same_function_are_as_good_as_one_s_own(teacher, untied):
    swap = StateSwap(teacher, untied)
    swap.update(teacher.trajectory(images()), untied.trajectory(images()))
    result = swap.compute()
    assert result.epsilon.mean.max() < 1e-5 and result.distance.mean.max() < 1e-5
    assert result.agreement.mean.min() == 1


def test_a_swap_is_the_model_run_on_from_the_other_s_state(teacher):
    partition = Partition.from_boundaries([2], NUM_LAYERS)
    student = Teacher(student_from_teacher(teacher, partition, init="middle"))
    own, other = teacher.trajectory(images()), student.trajectory(images())
    swap = StateSwap(teacher, student)
    swap.update(own, other)
    result = swap.compute()
    for step in range(NUM_LAYERS + 1):
        with patch(teacher, {f"step.{step}": other[:, step]}):
            last = teacher.trajectory(images())[:, -1]
        relative = ((last - own[:, -1]).norm(dim=-1) / own[:, -1].norm(dim=-1)).mean()
        torch.testing.assert_close(result.distance.mean[step].float(), relative, rtol=1e-4, atol=1e-6)
        same = (teacher.logits(last).argmax(1) == teacher.logits(own[:, -1]).argmax(1)).float().mean()
        assert result.agreement.mean[step] == same
    # noise as large as the difference, where nothing comes after it
    torch.testing.assert_close(result.random_distance.mean[-1], result.epsilon.mean[-1])
    assert result.random_distance.mean[0] == result.epsilon.mean[0] == 0


def test_models_of_other_steps_cannot_swap(teacher):
    with pytest.raises(ValueError, match="the models have 4 steps.*and 6 steps"):
        StateSwap(teacher, Teacher(tiny_model(RaptorForImageClassification)))
