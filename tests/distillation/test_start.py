"""The fitted start: normal equations against an independent solver, and what a fit must never be worse than."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from raptor_settings.distill import DistillSettings

from raptor_hf.conversion import student_from_teacher, to_dinov2
from raptor_hf.distillation.start import (
    TOKENS_PER_IMAGE,
    NormalEquations,
    TokenSample,
    fit_student,
    fit_to_teacher,
    solve_ridge,
    solve_with_intercept,
)
from raptor_hf.distillation.task import LayerVariance
from raptor_hf.teacher import Teacher, load_teacher
from tests.support.tiny_models import randomize, tiny_dinov2
from tests.support.tiny_vits import tiny_vit

ROOT = Path(__file__).parents[2]
IMAGES = torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(4))


def states_of(student, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(student.base_model(pixel_values, output_hidden_states=True).hidden_states, dim=1)


def normalised_loss(teacher: Teacher, student, pixel_values: torch.Tensor) -> float:
    """Mean over layers of the squared error over the teacher's variance: 1 for a student that predicts the mean."""
    states = teacher.trajectory(pixel_values)
    variance = LayerVariance(teacher.num_layers, teacher.hidden_size)
    variance.update(states)
    errors = (states_of(student, pixel_values) - states).square().mean(dim=(0, 2, 3))
    return float((errors / variance.compute())[1:].mean())


def test_normal_equations_in_batches_solve_as_least_squares_over_all_rows():
    generator = np.random.default_rng(0)
    features, targets = generator.normal(2.0, 1.0, (60, 5)), generator.normal(size=(60, 3))
    equations = NormalEquations(5, 3)
    for rows in (slice(0, 20), slice(20, 60)):
        equations.add(torch.tensor(features[rows]).view(2, -1, 5), torch.tensor(targets[rows]).view(2, -1, 3))
    prior = torch.zeros(5, 3, dtype=torch.float64)
    weight, intercept = solve_with_intercept(equations.gram, equations.cross, prior, ridge=0.0)
    expected = np.linalg.lstsq(np.c_[features, np.ones(60)], targets, rcond=None)[0]
    np.testing.assert_allclose(weight, expected[:-1], atol=1e-5)
    np.testing.assert_allclose(intercept, expected[-1], atol=1e-5)
    assert equations.spread() == pytest.approx(np.sqrt(((targets - targets.mean(0)) ** 2).sum()), rel=1e-5)


def test_products_and_residual_of_a_weight_are_those_of_its_rows():
    generator = np.random.default_rng(2)
    features, targets, weight = generator.normal(2, 1, (50, 4)), generator.normal(size=(50, 3)), np.ones((4, 3))
    gain, equations = np.array([0.5, 1.0, -2.0]), NormalEquations(4, 3)
    equations.add(torch.tensor(features), torch.tensor(targets))
    products = equations.products(torch.tensor(weight))
    outputs, wanted = features @ weight, targets - targets.mean(0)
    outputs -= outputs.mean(0)
    np.testing.assert_allclose(products[0], (outputs**2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(products[1], (outputs * wanted).sum(0), rtol=1e-4, atol=1e-5)
    expected = ((outputs * gain - wanted) ** 2).sum(1).mean()
    assert equations.residual(torch.tensor(gain), *products) == pytest.approx(expected, rel=1e-5)


def test_of_a_long_image_the_cls_token_and_others_of_all_places_enter_the_regressions():
    sample, states = TokenSample(), torch.zeros(2, 101, 8)
    draws = [sample(states) for _ in range(20)]
    assert all(len(set(draw.tolist())) == TOKENS_PER_IMAGE and draw[0] == 0 for draw in draws)
    assert len(set(torch.cat(draws).tolist())) == 101
    assert sorted(TokenSample()(torch.zeros(2, 5, 8)).tolist()) == [0, 1, 2, 3, 4]


def test_the_ridge_pulls_towards_its_prior_as_rows_that_say_so_would():
    generator = np.random.default_rng(1)
    features, targets, prior = generator.normal(size=(9, 4)), generator.normal(size=(9, 2)), np.ones((4, 2))
    strength = 0.5 * (features**2).sum(0).mean()
    rows, values = np.r_[features, np.sqrt(strength) * np.eye(4)], np.r_[targets, np.sqrt(strength) * prior]
    expected = np.linalg.lstsq(rows, values, rcond=None)[0]
    gram, cross = torch.tensor(features.T @ features), torch.tensor(features.T @ targets)
    np.testing.assert_allclose(solve_ridge(gram, cross, torch.tensor(prior), 0.5), expected, atol=1e-10)


@pytest.mark.parametrize("conditioning", ["none", "low_rank"])
@pytest.mark.parametrize("family", ["vit", "siglip_vision_model", "clip_vision_model"])
def test_a_fit_of_untied_blocks_leaves_the_teacher_as_it_is(family, conditioning):
    teacher = Teacher(tiny_vit(family))
    fields = {"branch_shifts": True} if conditioning == "low_rank" else {}
    student = student_from_teacher(teacher, (1,) * 4, init="middle", depth_conditioning=conditioning, **fields)
    fit_to_teacher(teacher, student, [IMAGES])
    torch.testing.assert_close(states_of(student, IMAGES), teacher.trajectory(IMAGES), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("conditioning", ["none", "scale", "embedding", "low_rank"])
def test_a_fitted_student_is_nearer_to_its_teacher_than_its_middle_layers(conditioning, swiglu):
    teacher = Teacher(tiny_dinov2(use_swiglu_ffn=swiglu))
    size = teacher.image_size
    images = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(5))
    fields = {"branch_shifts": True} if conditioning == "low_rank" else {}
    options = {"init": "middle", "seed": 0, "depth_conditioning": conditioning} | fields
    student = student_from_teacher(teacher, (3, 1), **options).train()
    before = normalised_loss(teacher, student.eval(), images)
    fit_to_teacher(teacher, student.train(), images.split(8))
    assert student.training
    assert normalised_loss(teacher, student.eval(), images) < 0.7 * before


def test_the_blocks_of_a_fragmented_partition_are_fitted_too():
    teacher = Teacher(tiny_dinov2())
    size = teacher.image_size
    images = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(6))
    options = {"init": "middle", "depth_conditioning": "low_rank", "branch_shifts": True}
    student = student_from_teacher(teacher, (2, 2), block_schedule=(0, 1, 0, 1), **options)
    before = normalised_loss(teacher, student, images)
    fit_to_teacher(teacher, student, images.split(8))
    assert normalised_loss(teacher, student, images) < before


def test_compiled_blocks_are_fitted_as_others():
    teacher, fitted = Teacher(tiny_dinov2()), []
    settings = {"teacher": "teacher", "dataset": "images", "output_dir": "run", "block_repeats": [3, 1]}
    settings = DistillSettings(**settings, batch_size=6, fit_images=6)
    loader = functools.partial(lambda **options: [{"pixel_values": IMAGES}])
    for is_compiled in (False, True):
        student = student_from_teacher(teacher, (3, 1), init="middle", depth_conditioning="low_rank").eval()
        blocks = student.base_model.encoder.blocks
        if is_compiled:
            for block in blocks:
                block.compile(backend="eager")
        fit_student(teacher, student, loader, settings, Accelerator(cpu=True))
        fitted.append(states_of(student, IMAGES))
    torch.testing.assert_close(*fitted)


def test_shifts_of_branches_and_gains_of_units_survive_the_way_to_dinov2():
    teacher = tiny_dinov2()
    options = {"depth_conditioning": "low_rank", "branch_shifts": True, "unit_gains": True}
    student = student_from_teacher(teacher, (3, 1), init="middle", **options)
    randomize(student, seed=3)
    with torch.no_grad():
        student.base_model.encoder.blocks[0].layer_scale1.lambda1[0] = 0.0
    size = student.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = student.eval()(images, output_hidden_states=True).hidden_states[-1]
        got = to_dinov2(student)(images, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_no_images_are_refused():
    teacher = Teacher(tiny_dinov2())
    with pytest.raises(ValueError, match="batches is empty"):
        fit_to_teacher(teacher, student_from_teacher(teacher, (3, 1), init="middle"), [])


def test_the_start_on_digits_is_better_than_predicting_the_mean():
    from raptor_hf.data.images import load_image_processor, open_images

    folder = str(ROOT / "model_cards" / "digits-teacher")
    teacher, processor = load_teacher(folder), load_image_processor(folder)
    digits = open_images("digits", "train[:300]")
    images = [digits.decode(index)[0] for index in range(300)]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    student = student_from_teacher(teacher, (2, 3, 7), init="middle", depth_conditioning="low_rank", branch_shifts=True)
    fit_to_teacher(teacher, student, pixel_values[:192].split(64))
    # .16 on test images when this was written
    assert normalised_loss(teacher, student, pixel_values[192:]) < 0.3
