"""Quality of patches without labels: against loops over patches, and where its ends are known."""

import numpy as np
import pytest
import torch

from raptor_hf.patch_metrics import GROUP_SIZE, PatchQualityAccumulator, shifted

GRID = (3, 4)


def patches(seed: int, num_images: int = 5) -> torch.Tensor:
    return torch.randn(num_images, GRID[0] * GRID[1], 6, generator=torch.Generator().manual_seed(seed))


def quality(*tensors: torch.Tensor, batch_size: int = 100, grid: tuple[int, int] = GRID) -> dict[str, float | None]:
    accumulator = PatchQualityAccumulator()
    for batch in zip(*(tensor.split(batch_size) for tensor in tensors), strict=True):
        accumulator.update(*batch, grid=grid)
    return accumulator.compute().to_dict()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_quality_is_that_of_loops_over_patches():
    tensors = [patches(seed) for seed in range(4)]
    teacher, student, moved_teacher, moved_student = (tensor.double().numpy() for tensor in tensors)
    places = [(i, p) for i in range(5) for p in range(12)]

    def neighbours(own: np.ndarray, i: int, p: int) -> set[tuple[int, int]]:
        others = [place for place in places if place[0] != i]
        return set(sorted(others, key=lambda place: -cosine(own[i, p], own[place]))[:5])

    def stability(own: np.ndarray, moved: np.ndarray) -> float:
        pairs = [(r * 4 + c + 1, r * 4 + c) for r in range(3) for c in range(3)]
        return float(np.mean([cosine(own[i, before], moved[i, after]) for i in range(5) for before, after in pairs]))

    assert quality(*tensors) == pytest.approx(
        {
            "cosine": np.mean([cosine(teacher[place], student[place]) for place in places]),
            "neighbours": np.mean([len(neighbours(teacher, *p) & neighbours(student, *p)) / 5 for p in places]),
            "teacher_stability": stability(teacher, moved_teacher),
            "student_stability": stability(student, moved_student),
        },
        abs=1e-6,
    )


def test_a_student_that_is_its_teacher_turned_keeps_neighbours_and_stability_but_not_the_cosine():
    teacher, moved = patches(0), patches(1)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    found = quality(teacher, teacher @ rotation, moved, moved @ rotation)
    assert found["neighbours"] == 1 and found["student_stability"] == pytest.approx(
        found["teacher_stability"], abs=1e-6
    )
    assert found["cosine"] < 0.9
    assert quality(teacher, teacher, moved, moved)["cosine"] == pytest.approx(1)


def test_features_that_move_with_the_picture_are_stable():
    pixels = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    own, moved = (
        images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(2, 12, 12)
        for images in (pixels, shifted(pixels, 2))
    )
    found = quality(own, own, moved, own)
    assert found["teacher_stability"] == pytest.approx(1)
    assert abs(found["student_stability"]) < 0.5  # it looks at the same place, not at the same piece


def test_batches_of_whole_groups_give_what_one_batch_gives():
    tensors = [patches(seed, 2 * GROUP_SIZE) for seed in range(4)]
    assert quality(*tensors, batch_size=GROUP_SIZE) == pytest.approx(quality(*tensors), rel=1e-6)


def test_patches_of_large_images_take_part_at_even_distances(monkeypatch):
    tensors = [patches(seed) for seed in range(4)]
    monkeypatch.setattr("raptor_hf.patch_metrics.MAX_PATCHES", 6)
    few = [tensor[:, ::2] for tensor in tensors]
    assert quality(*tensors)["neighbours"] == quality(*few, grid=(3, 2))["neighbours"]


def test_one_image_has_no_neighbours_and_one_column_no_shift():
    one = [patches(seed, 1) for seed in range(4)]
    assert quality(*one)["neighbours"] is None and quality(*one)["teacher_stability"] is not None
    narrow = quality(*one, grid=(12, 1))
    assert narrow["teacher_stability"] is narrow["student_stability"] is None


def test_what_does_not_fit_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"patches are \[\(5, 12, 6\)\]; they must all be \(B, 3 \* 5, D\)"):
        quality(*[patches(0)] * 4, grid=(3, 5))
    with pytest.raises(ValueError, match="has seen no images"):
        PatchQualityAccumulator().compute()
