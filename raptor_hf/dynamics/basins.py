"""Measures angular basins: whether images of a class end in one direction, and images of other classes in others.

    reservoir = Reservoir(num_images=300)
    for batch in loader:
        states = teacher.trajectory(batch["pixel_values"])
        reservoir.update(batch["names"], teacher.tokens.summaries(states), batch["labels"])
    class_angles(reservoir.vectors, reservoir.labels).silhouette.mean

Angles need pairs of images, so they are measured on a fixed number of images.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..accumulators import Curve
from .motion import Result

if TYPE_CHECKING:
    from accelerate import Accelerator


def image_key(name: str, seed: int = 0) -> float:
    """Returns a number in [0, 1) that is fixed by name and seed and otherwise random, to choose images by."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class Reservoir:
    """A uniform sample of a stream of images, of fixed size: those with the smallest keys.

    As the keys come from the names, the sample is the same for every model, batch size and number of processes.

    Args:
        num_images: how many to keep.
        seed: of the keys.

    Raises:
        ValueError: if `num_images` is not positive.
    """

    def __init__(self, num_images: int, seed: int = 0):
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; it must be at least 1")
        self.num_images, self.seed = num_images, seed
        self._kept: list[tuple[float, Tensor, int | None]] = []

    @torch.no_grad()
    def update(self, names: Sequence[str], vectors: Tensor, labels: Tensor | None = None) -> None:
        """Offers a batch.

        Args:
            names: of the images, B different ones.
            vectors: what is kept of each, (B, ...).
            labels: class of each, (B,), or None.
        """
        keys = [image_key(name, self.seed) for name in names]
        limit = self._kept[-1][0] if len(self._kept) == self.num_images else 1.0
        for index, key in enumerate(keys):
            if key < limit:
                label = None if labels is None else int(labels[index])
                self._kept.append((key, vectors[index].cpu().clone(), label))
        self._trim()

    def merge(self, accelerator: "Accelerator") -> None:
        """Makes the sample one of the images of all processes; a collective operation."""
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object  # not among the base dependencies

            self._kept = gather_object(self._kept)
            self._trim()

    def _trim(self) -> None:
        self._kept = sorted(self._kept, key=lambda entry: entry[0])[: self.num_images]

    @property
    def vectors(self) -> Tensor:
        """What was kept, (N, ...).

        Raises:
            ValueError: if no image was seen.
        """
        if not self._kept:
            raise ValueError("Reservoir has seen no images: call update first")
        return torch.stack([vector for _, vector, _ in self._kept])

    @property
    def labels(self) -> Tensor | None:
        """Class of each, (N,), or None without labels."""
        labels = [label for _, _, label in self._kept]
        return None if None in labels or not labels else torch.tensor(labels)


@dataclass(frozen=True, eq=False)
class ClassAngles(Result):
    """Angles between images of one class and between images of different classes, over depth.

    Attributes:
        within: mean angle of an image to the others of its class, in radians; curve over images of shape (L + 1, S).
        between: mean angle of an image to the images of other classes, likewise.
        silhouette: (b - a) / max(a, b) of an image, where a is `within` and b its mean angle to the nearest other class
            (Rousseeuw, 1987); 1 is a tight and lone basin, 0 none.
    """

    within: Curve
    between: Curve
    silhouette: Curve


def has_class_pairs(labels: Tensor | None) -> bool:
    """Whether there are labels, (N,), and at least two of their classes have two or more images, as angles need."""
    return labels is not None and int((labels.unique(return_counts=True)[1] > 1).sum()) >= 2


@torch.no_grad()
def class_angles(vectors: Tensor, labels: Tensor) -> ClassAngles:
    """Computes angles within and between classes, and the silhouette, at every layer.

    Args:
        vectors: (N, L + 1, S, D), as `TokenLayout.summaries` gives them.
        labels: class of each image, (N,). Images that are alone in their class are left out.

    Raises:
        ValueError: with fewer than two classes of at least two images.
    """
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    keep = counts[index] > 1
    classes, index, counts = labels[keep].unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"labels has {len(classes)} classes with two or more images; angles need at least 2 classes")
    units = torch.nn.functional.normalize(vectors[keep].double(), dim=-1).movedim(0, -2)  # (L + 1, S, N, D)
    angles = _angles(units)
    members = torch.nn.functional.one_hot(index).to(angles.dtype)
    sums = angles @ members  # of every image to every class, (L + 1, S, N, C)
    own = members.bool().expand_as(sums)
    own_count = counts[index].to(angles.dtype)
    own_sum = sums.masked_select(own).view(sums.shape[:-1])
    within = own_sum / (own_count - 1)
    between = (sums.sum(-1) - own_sum) / (len(index) - own_count)
    nearest = (sums / counts).masked_fill(own, torch.inf).amin(-1)
    larger = torch.maximum(within, nearest)
    silhouette = torch.where(larger > 0, (nearest - within) / torch.where(larger > 0, larger, 1.0), 0.0)
    return ClassAngles(*(_curve(values.movedim(-1, 0)) for values in (within, between, silhouette)))


@dataclass(frozen=True, eq=False)
class Projection(Result):
    """The plane in which the directions of a sample vary most, over all layers.

    Attributes:
        axes: orthonormal, (2, D).
        explained: share of the variance about the mean that the plane holds.
        mean: of the directions, (D,).
    """

    axes: Tensor
    explained: float
    mean: Tensor

    def apply(self, vectors: Tensor) -> Tensor:
        """Projects the directions of vectors (..., D) to coordinates (..., 2), without unit."""
        units = torch.nn.functional.normalize(vectors.double(), dim=-1)
        return (units - self.mean) @ self.axes.T


@torch.no_grad()
def principal_plane(vectors: Tensor) -> Projection:
    """Finds the plane of largest variance of directions.

    Args:
        vectors: (..., D), at least two of them.
    """
    units = torch.nn.functional.normalize(vectors.double(), dim=-1).flatten(0, -2)
    mean = units.mean(0)
    centred = units - mean
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred)
    axes = eigenvectors[:, -2:].flip(1).T
    # the sign of an eigenvector is arbitrary: fixed, the same figure comes out everywhere
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return Projection(axes, float(eigenvalues[-2:].sum() / eigenvalues.sum().clamp(min=1e-30)), mean)


def _angles(units: Tensor) -> Tensor:
    """(..., N, D) to the angles between all, (..., N, N), exactly 0 on the diagonal."""
    angles = (units @ units.mT).clamp(-1, 1).acos()
    diagonal = torch.eye(units.shape[-2], dtype=torch.bool, device=units.device)
    return angles.masked_fill(diagonal, 0.0)


def _curve(values: Tensor) -> Curve:
    return Curve(values.mean(0), values.std(0), len(values))
