"""The cache of trajectories, against the teacher itself."""

import logging

import pytest
import torch

from raptor_hf.distillation.trajectory_cache import TrajectoryCache
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import images, tiny_dinov2


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(tiny_dinov2())


class Counted:
    """The teacher's trajectories, and how many images it has run on."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.num_images = teacher, 0

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.num_images += len(pixel_values)
        return self.teacher.trajectory(pixel_values)


def test_cached_trajectories_are_the_teacher_s_and_each_is_computed_once(teacher):
    counted, pictures = Counted(teacher), images(batch=6)
    cache = TrajectoryCache(counted, 1e9, torch.float32)
    for indices in ([0, 1, 2], [2, 3, 0], [5, 5, 4], [4, 1, 3], [0, 1, 2]):
        torch.testing.assert_close(cache(pictures[indices]), teacher.trajectory(pictures[indices]))
    assert len(cache) == 6 and counted.num_images == 7  # that which a batch holds twice is computed twice
    shifted = pictures + 1e-6
    torch.testing.assert_close(cache(shifted), teacher.trajectory(shifted), rtol=0, atol=1e-6)
    assert counted.num_images == 13


def test_a_kept_trajectory_does_not_change_with_what_was_given(teacher):
    cache, pictures = TrajectoryCache(teacher.trajectory, 1e9, torch.float32), images()
    for _ in range(3):
        states = cache(pictures)
        torch.testing.assert_close(states, teacher.trajectory(pictures))
        states.zero_()


def test_states_are_rounded_alike_before_and_after_they_are_kept(teacher):
    cache, pictures = TrajectoryCache(teacher.trajectory, 1e9, torch.bfloat16), images()
    first, again = cache(pictures), cache(pictures)
    assert first.dtype == torch.bfloat16 and torch.equal(first, again)
    assert torch.equal(first, teacher.trajectory(pictures).bfloat16())


def test_images_of_two_sizes_are_kept_side_by_side(teacher):
    cache = TrajectoryCache(teacher.trajectory, 1e9, torch.float32)
    for size in ((28, 28), (42, 42), (28, 28), (42, 42)):
        torch.testing.assert_close(cache(images(size)), teacher.trajectory(images(size)))
    assert len(cache) == 4


def test_what_does_not_fit_is_computed_each_time_and_said_once(teacher, caplog):
    counted, pictures = Counted(teacher), images(batch=4)
    each = teacher.trajectory(pictures)[0].nbytes
    cache = TrajectoryCache(counted, 2.5 * each, torch.float32)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            torch.testing.assert_close(cache(pictures), teacher.trajectory(pictures))
    assert len(cache) == 2 and cache.num_bytes == 2 * each and counted.num_images == 4 + 2 + 2
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"the trajectory cache is full, with 2 images in {2 * each / 1e9:.3g} GB; the teacher")
