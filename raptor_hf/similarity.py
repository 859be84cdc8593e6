"""Measures how alike the layers of a trajectory are: one distance between every two, streamed over images.

accumulator = SimilarityAccumulator(num_layers=12, tokens=teacher.tokens)
for states in trajectories:                        # (B, L + 1, T, D)
    accumulator.update(states)
distance = accumulator.compute()                   # (L, L), for raptor_hf.phases.find_phases
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from .accumulators import Accumulator, in_float64
from .tokens import TokenLayout

Kind = Literal["cosine", "mse", "cka"]


class SimilarityAccumulator(Accumulator):
    """Streams trajectories into one distance between every two layers, in memory independent of the number of images.

    Every layer of every image is summarised by its cls token and the mean of its patch tokens; registers are left out.

    - `"cosine"`: `1 - cos`, averaged over the two summaries and over images (section 2 of the paper).
    - `"mse"`: squared difference of the full states, averaged over images, all tokens and features.
    - `"cka"`: 1 - linear CKA of the two summaries, concatenated. HSIC is estimated without bias in every call of
      `update` and averaged over the calls, weighted by their images (Nguyen et al., 2021, arXiv 2010.15327): exact
      streaming would need the L^2 cross-covariances of all features.

    All sums are float64 whatever the precision of the states.

    Args:
        num_layers: L, layers of the teacher.
        tokens: which tokens are cls, registers, patches; without a cls the patch mean is the only summary.
        kind: the distance, one of the three above.
        num_bootstraps: replicas of an online bootstrap over images, not for `"cka"`, which is no mean over images.
            Each replica counts each image Poisson(1) times, which resamples without storing anything per image (Hanley
            & MacGibbon, 2006).
        seed: of the bootstrap; processes that share the images must each have their own.

    Raises:
        ValueError: for an unknown kind, a count out of range, or a bootstrap of `"cka"`.
    """

    def __init__(
        self,
        num_layers: int,
        tokens: TokenLayout,
        kind: Kind = "cosine",
        num_bootstraps: int = 0,
        seed: int = 0,
    ) -> None:
        check_choice("kind", kind, get_args(Kind))
        check_at_least("num_layers", num_layers, 1)
        check_at_least("num_bootstraps", num_bootstraps, 0)
        if num_bootstraps and kind == "cka":
            raise ValueError(f"num_bootstraps is {num_bootstraps}; it must be 0 for kind='cka', no mean over images")
        self.num_layers = num_layers
        self.tokens = tokens
        self.kind = kind
        self.num_bootstraps = num_bootstraps
        self._generator = np.random.default_rng(seed)
        # Row 0 counts every image once, the others are the replicas: the sum of weights, then that of the matrices.
        super().__init__((1 + num_bootstraps, 1 + num_layers**2))

    @property
    def num_images(self) -> int:
        """Images seen so far."""
        return int(self._sums[0, 0])

    @torch.no_grad()
    def update(self, states: torch.Tensor) -> None:
        """Adds a batch of trajectories.

        Args:
            states: (B, L + 1, T, D), tokens in the order cls, registers, patches; layer 0, the embedding, is not used.

        Raises:
            ValueError: if the shape does not fit, or if `"cka"` gets fewer than 4 images, too few for its estimate.
        """
        self.tokens.check_states(states, self.num_layers)
        num_images = states.shape[0]
        states = states[:, 1:]
        if self.kind == "cka":
            if num_images < 4:
                raise ValueError(
                    f"states holds {num_images} images; kind='cka' needs at least 4 per update (drop the last batch)"
                )
            hsic = _unbiased_hsic(self.tokens.summaries(states))
            self._add_weighted(np.full((1, 1), num_images), hsic[None])
        else:
            is_mse = self.kind == "mse"
            matrices = _state_grams(states) if is_mse else _cosine_distances(self.tokens.summaries(states))
            # Drawn image by image, so that the replicas do not depend on how the images are batched.
            draws = self._generator.poisson(1.0, (num_images, self.num_bootstraps))
            self._add_weighted(np.hstack([np.ones((num_images, 1)), draws]), matrices)

    def _add_weighted(self, weights: np.ndarray, matrices: torch.Tensor) -> None:
        """Adds N matrices (N, L, L) with their weights (N, 1 + num_bootstraps)."""
        rows = torch.from_numpy(weights).to(torch.float64).T
        self._add(torch.cat([rows.sum(1, keepdim=True), rows @ matrices.flatten(1).cpu()], 1))

    def compute(self) -> np.ndarray:
        """Returns the distances (L, L) float64 over all images: symmetric, not negative, zero on the diagonal.

        Raises:
            ValueError: before any image was added, or if the states held NaN or infinite values.
        """
        return self._distances(self._sums[:1])[0]

    def bootstrap(self) -> np.ndarray:
        """Returns the distances of every replica, (num_bootstraps, L, L) float64.

        Raises:
            ValueError: without replicas, or with so few images that a replica drew none.
        """
        if self.num_bootstraps == 0:
            raise ValueError("num_bootstraps=0: build the accumulator with num_bootstraps > 0")
        return self._distances(self._sums[1:])

    def _distances(self, sums: torch.Tensor) -> np.ndarray:
        sums = sums.numpy()
        if (sums[:, 0] == 0).any():
            raise ValueError(f"num_images={self.num_images} is too few: no image was counted; call update() with more")
        mean = (sums[:, 1:] / sums[:, :1]).reshape(-1, self.num_layers, self.num_layers)
        norms = np.diagonal(mean, axis1=1, axis2=2)
        if self.kind == "mse":
            mean = norms[:, :, None] + norms[:, None, :] - 2 * mean
        elif self.kind == "cka":
            if (norms <= 0).any():
                raise ValueError("states do not vary over images in some layer: kind='cka' is undefined there")
            mean = 1 - mean / np.sqrt(norms[:, :, None] * norms[:, None, :])
        if not np.isfinite(mean).all():
            raise ValueError("states held NaN or infinite values: no distance can be computed")
        distances = np.maximum((mean + mean.transpose(0, 2, 1)) / 2, 0.0)
        distances[:, np.arange(self.num_layers), np.arange(self.num_layers)] = 0.0
        return distances


def _cosine_distances(summaries: torch.Tensor) -> torch.Tensor:
    """(B, L, S, D) -> (B, L, L), 1 - cos averaged over the S summaries.

    In float64 because it is cheap and neither TF32 nor autocast touches it; both would cost more than the smallest
    distances.
    """
    unit = F.normalize(in_float64(summaries), dim=-1).transpose(1, 2)
    return 1 - (unit @ unit.transpose(2, 3)).mean(1)


def _state_grams(states: torch.Tensor) -> torch.Tensor:
    """(B, L, T, D) -> (B, L, L), inner products of full states, per token and feature."""
    # One image at a time: float64 copies of a whole batch of states would not fit beside a teacher.
    flat = (in_float64(image.flatten(1)) for image in states)
    return torch.stack([layers @ layers.T / layers.shape[1] for layers in flat])


def _unbiased_hsic(summaries: torch.Tensor) -> torch.Tensor:
    """(N, L, S, D) -> (L, L), unbiased HSIC over N >= 4 images with linear kernels (Song et al., 2012).

    Computed as the inner product of U-centred kernels (Székely & Rizzo, 2014), which is the same number.
    """
    features = in_float64(summaries).flatten(2).transpose(0, 1)
    features = features - features.mean(1, keepdim=True)  # changes nothing but the rounding
    n = features.shape[1]
    kernels = features @ features.transpose(1, 2)
    diagonal = torch.eye(n, dtype=torch.bool, device=kernels.device)
    kernels = kernels.masked_fill(diagonal, 0.0)
    rows = kernels.sum(2, keepdim=True) / (n - 2)
    total = kernels.sum((1, 2), keepdim=True) / ((n - 1) * (n - 2))
    centred = (kernels - rows - rows.transpose(1, 2) + total).masked_fill(diagonal, 0.0).flatten(1)
    return centred @ centred.T / (n * (n - 3))


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuses an argument below its least value."""
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuses an argument that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
