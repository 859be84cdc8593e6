"""Measures how good a student's patches are for dense tasks, compared with its teacher's, without labels.

    quality = PatchQualityAccumulator()
    quality.update(teacher, student, shifted_teacher, shifted_student, grid=(16, 16))   # patches after the final norm
    quality.merge(accelerator)
    quality.compute()                                  # cosine, neighbours and both stabilities, in [-1, 1]

R^2 and cosine of a trajectory weigh every direction by its variance. A dense head needs something else: that patches of
like things are alike, and that a piece of a picture looks the same wherever it lies. These numbers measure that.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .accumulators import Accumulator

NUM_NEIGHBOURS = 5
# images among which the neighbours of a patch are looked for, and patches of each, evenly spaced, that take part
GROUP_SIZE, MAX_PATCHES = 8, 256


@dataclass(frozen=True)
class PatchQuality:
    """Patches after the final norm, of a student beside its teacher.

    Attributes:
        cosine: mean over patches of cos(student, teacher).
        neighbours: share of the `NUM_NEIGHBOURS` patches of other images which are nearest to a patch by cosine that
            student and teacher have in common; None without other images.
        teacher_stability: mean cosine of a patch and the same piece of the picture, shifted by a patch, in the teacher;
            None where pictures are one patch wide.
        student_stability: the same in the student.
    """

    cosine: float
    neighbours: float | None
    teacher_stability: float | None
    student_stability: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Returns the same as a dict."""
        return asdict(self)


class PatchQualityAccumulator(Accumulator):
    """Streams patches of student and teacher into a `PatchQuality`."""

    def __init__(self) -> None:
        # each count before what is summed over it
        super().__init__(7)

    @torch.no_grad()
    def update(
        self,
        teacher: Tensor,
        student: Tensor,
        shifted_teacher: Tensor,
        shifted_student: Tensor,
        grid: tuple[int, int],
    ) -> None:
        """Adds a batch. Neighbours are looked for among groups of `GROUP_SIZE` images, in their order.

        Args:
            teacher: patches after the final norm, row by row, (B, P, D).
            student: the same of the student.
            shifted_teacher: the teacher's on `shifted` pictures.
            shifted_student: the student's on them.
            grid: rows and columns of patches, whose product is P.

        Raises:
            ValueError: if the shapes differ, or do not fit the grid.
        """
        shapes = {tuple(patches.shape) for patches in (teacher, student, shifted_teacher, shifted_student)}
        if len(shapes) > 1 or teacher.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"patches are {sorted(shapes)}; they must all be (B, {grid[0]} * {grid[1]}, D)")
        if len(teacher) == 0:
            return
        cosine = F.cosine_similarity(teacher.float(), student.float(), dim=-1)
        kept = [_kept_in_place(*pair, grid) for pair in ((teacher, shifted_teacher), (student, shifted_student))]
        sums = [cosine.new_tensor(cosine.numel()), cosine.sum()]
        sums += [cosine.new_tensor(kept[0].numel()), *(own.sum() for own in kept)]
        groups = zip(teacher.split(GROUP_SIZE), student.split(GROUP_SIZE), strict=True)
        common = torch.cat([_common_neighbours(*group) for group in groups])
        sums += [cosine.new_tensor(common.numel()), common.sum()]
        self._add(torch.stack(sums))

    def compute(self) -> PatchQuality:
        """Returns the quality over all images seen.

        Raises:
            ValueError: if no image was seen.
        """
        num_patches, cosine, num_shifted, teacher, student, num_neighbours, common = self._sums.tolist()
        self._require_any(self._sums[0], "images")
        return PatchQuality(
            cosine=cosine / num_patches,
            neighbours=common / num_neighbours if num_neighbours else None,
            teacher_stability=teacher / num_shifted if num_shifted else None,
            student_stability=student / num_shifted if num_shifted else None,
        )


def shifted(pixel_values: Tensor, patch_width: int) -> Tensor:
    """Returns pictures, (B, C, H, W), shifted to the left by one patch; what leaves comes in on the right."""
    return pixel_values.roll(-patch_width, dims=-1)


def _kept_in_place(patches: Tensor, moved: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine of patches, (B, P, D), and of the same pieces in `shifted` pictures, (B, rows, columns - 1)."""
    before, after = (own.float().unflatten(1, grid) for own in (patches, moved))
    return F.cosine_similarity(before[:, :, 1:], after[:, :, :-1], dim=-1)


def _common_neighbours(teacher: Tensor, student: Tensor) -> Tensor:
    """Share of the nearest patches of other images that both have in common, of every patch, (B, P, D) -> (B * P,)."""
    stride = -(-teacher.shape[1] // MAX_PATCHES)
    image = torch.arange(len(teacher), device=teacher.device).repeat_interleave(len(range(0, teacher.shape[1], stride)))
    num_neighbours = min(NUM_NEIGHBOURS, int((image > 0).sum()))
    if num_neighbours == 0:
        return teacher.new_empty(0, dtype=torch.float32)
    nearest = []
    for patches in (teacher, student):
        vectors = F.normalize(patches[:, ::stride].float().flatten(0, 1), dim=-1)
        similarity = (vectors @ vectors.T).masked_fill_(image[:, None] == image, -2)
        nearest.append(similarity.topk(num_neighbours).indices)
    return (nearest[0][:, :, None] == nearest[1][:, None]).any(2).float().mean(1)
