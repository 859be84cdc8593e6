"""The cache of trajectories, against the teacher itself."""

import logging
from types import SimpleNamespace

import pytest
import torch
from raptor_settings.distill import DistillSettings
from safetensors import SafetensorError

from raptor_hf.distillation import trajectory_cache
from raptor_hf.distillation.trajectory_cache import TrajectoryCache, cached_trajectory
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


def test_a_folder_gives_later_runs_what_earlier_ones_computed(teacher, tmp_path):
    counted, pictures = Counted(teacher), images(batch=6)
    first = TrajectoryCache(counted, 1e9, torch.bfloat16, tmp_path / "kept")
    beside = TrajectoryCache(counted, 1e9, torch.bfloat16, tmp_path / "kept")
    expected = first(pictures[:3])
    assert torch.equal(first(pictures[:3]), expected) and counted.num_images == 3
    beside(pictures[2:4])  # it was opened before there was anything
    later = TrajectoryCache(counted, 1e9, torch.bfloat16, tmp_path / "kept")
    assert len(later) == 4 and later.num_bytes == 4 * expected[0].nbytes
    assert torch.equal(later(pictures[:3]), expected) and counted.num_images == 5
    later(pictures)
    assert counted.num_images == 7
    each = expected[0].nbytes
    assert len(TrajectoryCache(counted, 2 * each, torch.bfloat16, tmp_path / "kept")) == 6  # what is there is used
    assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {".safetensors"}


def test_each_teacher_precision_and_choice_of_layers_has_a_folder_of_its_own(teacher, tmp_path):
    shallow = Teacher(tiny_dinov2(), layers=(2, 4))
    folders = set()
    for model, target_layers in ((teacher, None), (shallow, [2, 4])):
        for fingerprint in ("aaaa", "bbbb"):
            for precision in ("no", "bf16"):
                settings = DistillSettings(
                    **{"teacher": "t", "dataset": "d", "output_dir": "o", "block_repeats": [2]},
                    **{"target_layers": target_layers, "trajectory_cache_gb": 1.0},
                    trajectory_cache_dir=str(tmp_path),
                )
                accelerator = SimpleNamespace(mixed_precision=precision, num_processes=1)
                cache = cached_trajectory(model, settings, accelerator, fingerprint)
                assert cache.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
                folders.add(cache.folder)
    assert len(folders) == 8 and all(folder.parent == tmp_path for folder in folders)


def test_a_damaged_file_is_named(teacher, tmp_path):
    TrajectoryCache(teacher.trajectory, 1e9, torch.float32, tmp_path)(images())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        TrajectoryCache(teacher.trajectory, 1e9, torch.float32, tmp_path)


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


def test_the_same_pixels_in_another_arrangement_are_another_image(teacher):
    cache = TrajectoryCache(teacher.trajectory, 1e9, torch.float32)
    for size in ((28, 56), (56, 28)):
        even = torch.full((1, 3, *size), 0.5)
        torch.testing.assert_close(cache(even), teacher.trajectory(even))


def test_writers_of_one_folder_share_its_room(teacher, tmp_path):
    pictures = images(batch=8)
    each = teacher.trajectory(pictures)[0].nbytes
    TrajectoryCache(teacher.trajectory, 2 * each, torch.float32, tmp_path)(pictures)
    writers = [TrajectoryCache(teacher.trajectory, 6 * each, torch.float32, tmp_path, num_writers=2) for _ in range(2)]
    for writer, part in zip(writers, pictures.split(4), strict=True):
        writer(part)
    assert len(TrajectoryCache(teacher.trajectory, 1e9, torch.float32, tmp_path)) == 6
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 7 * each


def test_a_full_disk_ends_the_keeping_and_not_the_run(teacher, tmp_path, caplog, monkeypatch):
    cache, pictures = TrajectoryCache(teacher.trajectory, 1e9, torch.float32, tmp_path), images(batch=4)
    cache(pictures[:2])

    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(trajectory_cache, "save_file", full)
    for _ in range(2):
        torch.testing.assert_close(cache(pictures), teacher.trajectory(pictures))
    assert len(cache) == 2 and len(list(tmp_path.iterdir())) == 1
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"trajectory_cache_dir takes no more, with 2 images in {tmp_path} (I/O error")
