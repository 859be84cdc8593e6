"""Measures in how many directions each layer moves its tokens: stable rank, effective rank and spectrum.

    spectra = SpectrumAccumulator(num_layers=12, hidden_size=768)
    for states in trajectories:                        # (B, L + 1, T, D)
        spectra.update(states)
    spectra.compute().effective_rank["angular"].mean   # (L,)

For a matrix U of updates (tokens times features) with singular values s_i, the stable rank is ||U||_F^2 / ||U||_2^2 =
sum s_i^2 / max s_i^2, and the effective rank is exp of the entropy of s_i / sum s (Roy & Vetterli, 2007). Both come
from the eigenvalues s_i^2 of the smaller Gram matrix, U U^T or U^T U.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..accumulators import Curve, MatrixAccumulator, MomentAccumulator, in_float64
from ..tokens import TokenLayout
from .motion import Result, directions, layer_first_chunks

KINDS = ("raw", "angular")


@dataclass(frozen=True, eq=False)
class Spectra(Result):
    """Ranks of the updates of layers 1 .. L, "raw" (x_l - x_(l-1)) and "angular" (of x / ||x||).

    Attributes:
        stable_rank: per image, of the matrix of its tokens' updates; curves (L,).
        effective_rank: likewise.
        pooled_stable_rank: of the updates of all tokens of all images used, together, (L,).
        pooled_effective_rank: likewise.
        spectrum: singular values of the pooled updates over their sum, descending, (L, D).
    """

    stable_rank: dict[str, Curve]
    effective_rank: dict[str, Curve]
    pooled_stable_rank: dict[str, Tensor]
    pooled_effective_rank: dict[str, Tensor]
    spectrum: dict[str, Tensor]


class SpectrumAccumulator(MatrixAccumulator):
    """Streams trajectories into `Spectra`; keeps 2 L matrices (D, D) whatever the number of images.

    Args:
        num_layers: L.
        hidden_size: D.
        image_stride: one of so many images is used, because eigenvalues are slow, above all on GPUs.

    Raises:
        ValueError: if `image_stride` is not positive.
    """

    def __init__(self, num_layers: int, hidden_size: int, image_stride: int = 1):
        if image_stride < 1:
            raise ValueError(f"image_stride is {image_stride}; it must be at least 1")
        self.num_layers, self.hidden_size, self.image_stride = num_layers, hidden_size, image_stride
        ranks = {f"{rank}.{kind}": (num_layers,) for rank in ("stable", "effective") for kind in KINDS}
        self._ranks = MomentAccumulator(ranks)
        self._num_seen = 0
        super().__init__((len(KINDS), num_layers, hidden_size, hidden_size))

    def sums(self) -> Tensor:
        """Returns a copy of the state, to be summed over processes; see `Accumulator.sums`."""
        return torch.cat([self._ranks.sums(), super().sums()])

    def load_sums(self, sums: Tensor) -> None:
        """Replaces the state; see `Accumulator.load_sums`."""
        num_ranks = len(self._ranks.sums())
        super().load_sums(sums[num_ranks:])
        self._ranks.load_sums(sums[:num_ranks])

    @torch.no_grad()
    def update(self, states: Tensor) -> None:
        """Adds a batch of trajectories.

        Args:
            states: (B, L + 1, T, D), before the final norm.

        Raises:
            ValueError: if the shape does not fit this accumulator.
        """
        # the kind of a token makes no difference here: all count as patches
        TokenLayout(has_cls=False).check_states(states, self.num_layers)
        if states.shape[3] != self.hidden_size:
            raise ValueError(f"states has {states.shape[3]} features, but hidden_size is {self.hidden_size}")
        pooled = self._matrices(states.device)
        first = -self._num_seen % self.image_stride
        self._num_seen += len(states)
        for x in layer_first_chunks(states[first :: self.image_stride]):
            for index, kind in enumerate(KINDS):
                if kind == "angular":
                    x = directions(x)
                update = in_float64(x[1:] - x[:-1])
                flat = update.flatten(1, 2)
                pooled[index] += flat.mT @ flat
                self._add_ranks(kind, update)

    def _add_ranks(self, kind: str, update: Tensor) -> None:
        """Takes the ranks of every image's updates, (L, b, T, D)."""
        gram = update @ update.mT if update.shape[2] <= update.shape[3] else update.mT @ update
        singular = singular_values(gram, max(update.shape[2:]))
        self._ranks.add(f"stable.{kind}", stable_rank(singular).T)
        self._ranks.add(f"effective.{kind}", effective_rank(singular).T)

    def compute(self) -> Spectra:
        """Returns the ranks over all images seen, in float64 on the CPU.

        Raises:
            ValueError: if no image was seen.
        """
        curves = {
            rank: {kind: self._ranks.curve(f"{rank}.{kind}") for kind in KINDS} for rank in ("stable", "effective")
        }
        singular = dict(zip(KINDS, singular_values(self._matrices(), self.hidden_size), strict=True))
        return Spectra(
            stable_rank=curves["stable"],
            effective_rank=curves["effective"],
            pooled_stable_rank={kind: stable_rank(values) for kind, values in singular.items()},
            pooled_effective_rank={kind: effective_rank(values) for kind, values in singular.items()},
            spectrum={kind: _shares(values) for kind, values in singular.items()},
        )


def singular_values(gram: Tensor, size: int) -> Tensor:
    """Returns the singular values of matrices from their Gram matrices, descending.

    Args:
        gram: (..., n, n), symmetric, positive semi-definite; best in float64, see `in_float64`.
        size: larger side of the matrices; as in a numerical rank, an eigenvalue below `size` times the rounding error
            of the largest is rounding, and counts as 0.
    """
    eigenvalues = torch.linalg.eigvalsh(gram).flip(-1)
    floor = size * torch.finfo(gram.dtype).eps * eigenvalues[..., :1].clamp(min=0)
    return torch.where(eigenvalues > floor, eigenvalues, 0.0).clamp(min=0).sqrt()


def stable_rank(singular: Tensor) -> Tensor:
    """sum s^2 / max s^2 of singular values (..., n), (...); 0 where all are 0."""
    squares = singular.square()
    largest = squares.amax(-1)
    return squares.sum(-1) / torch.where(largest > 0, largest, 1.0)


def effective_rank(singular: Tensor) -> Tensor:
    """exp of the entropy of s / sum s of singular values (..., n), (...); 0 where all are 0."""
    shares = _shares(singular)
    return torch.where(singular.sum(-1) > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def _shares(singular: Tensor) -> Tensor:
    total = singular.sum(-1, keepdim=True)
    return singular / torch.where(total > 0, total, 1.0)
