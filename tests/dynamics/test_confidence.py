"""Scores of paths: against definitions, and on paths made so that the answer is known."""

import pytest
import torch

from raptor_hf.dynamics.confidence import PathScores, area_under_risk, gather_paths, nearest_similarity, path_of
from raptor_hf.dynamics.lens import readings
from raptor_hf.dynamics.motion import DynamicsAccumulator
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import DIM, NUM_LAYERS, images, tiny_dinov2

CLASSES = 3


def made(count: int, seed: int, spread: float = 0.1) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Paths whose classes have directions of their own, and a classifier that is wrong where the path turns late."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    late = torch.rand(count, generator=generator) < 0.3
    centres = torch.eye(DIM)[:CLASSES]
    directions = centres[labels][:, None, None] + spread * torch.randn(count, 5, 2, DIM, generator=generator)
    speed = torch.rand(count, 4, 3, generator=generator) + late[:, None, None]
    answers = torch.where(late, (labels + 1) % CLASSES, labels)
    scores = torch.nn.functional.one_hot(answers, CLASSES).float()[:, None].expand(-1, 5, -1)
    paths = {
        "speed": speed,
        "bend": torch.rand(count, 3, 3, generator=generator),
        "convergence": torch.rand(count, 4, 3, generator=generator),
        "directions": torch.nn.functional.normalize(directions, dim=-1).half(),
    }
    return paths, scores, labels


def test_a_path_holds_the_motion_of_its_states_and_what_the_head_reads():
    teacher = Teacher(tiny_dinov2(num_labels=CLASSES))
    states = teacher.trajectory(images(batch=4))
    path = gather_paths([path_of(teacher, part) for part in states.split([3, 1])])
    accumulator = DynamicsAccumulator(NUM_LAYERS, teacher.tokens)
    accumulator.update(states)
    dynamics = accumulator.compute()
    for index, group in enumerate(teacher.tokens.slices):
        for name, curve in (("speed", dynamics.angular_speed), ("bend", dynamics.angular_second_difference)):
            torch.testing.assert_close(path[name][..., index].double().mean(0), curve[group].mean, rtol=1e-4, atol=1e-4)
    read = teacher.classifier(path["features"].float())
    torch.testing.assert_close(read, readings(teacher, states), rtol=1e-2, atol=1e-2)


def test_wrong_predictions_are_told_by_the_path_that_gives_them_away():
    paths, answers, labels = made(400, seed=0)
    scores = PathScores(paths, answers, labels)
    paths, answers, labels = made(300, seed=1)
    confidence, is_right = scores.correctness(paths, answers), answers[:, -1].argmax(1) == labels
    # how often a right prediction is above a wrong one, by counting
    assert (confidence[is_right][:, None] > confidence[~is_right]).double().mean() > 0.95


def test_foreign_paths_are_less_familiar_and_usual_ones_are_about_zero():
    paths, answers, labels = made(400, seed=0)
    scores = PathScores(paths, answers, labels)
    known = scores.familiarity(made(300, seed=1)[0])
    foreign = scores.familiarity(made(300, seed=2, spread=0.3)[0])
    assert abs(scores.familiarity(paths).mean()) < 1e-6 and abs(known.mean()) < 1
    assert (known[:, None] > foreign).double().mean() > 0.95


def test_a_fit_without_a_wrong_prediction_is_refused():
    paths, _, labels = made(20, seed=0)
    right = torch.nn.functional.one_hot(labels, CLASSES).float()[:, None].expand(-1, 5, -1)
    with pytest.raises(ValueError, match="class_scores has 20 right predictions of 20; it must have right and wrong"):
        PathScores(paths, right, labels)


def test_the_area_under_risk_is_the_mean_of_the_risks():
    confidence, is_right = torch.tensor([0.9, 0.1, 0.5, 0.7]), torch.tensor([True, False, True, False])
    # kept: .9 right; .7 wrong; .5 right; .1 wrong
    assert area_under_risk(confidence, is_right) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)


def test_the_similarity_to_neighbours_is_the_sorted_cosine():
    generator = torch.Generator().manual_seed(0)
    features, bank = torch.randn(5, 8, generator=generator), torch.randn(20, 8, generator=generator)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], bank[None], dim=-1)
    expected = cosines.sort(1, descending=True).values[:, [0, 6]]
    torch.testing.assert_close(nearest_similarity(features, bank, [1, 7]), expected)
