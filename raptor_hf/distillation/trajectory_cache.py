"""A teacher's trajectories kept in memory, for images that training sees again unchanged."""

import hashlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class TrajectoryCache:
    """Gives the trajectories that a teacher gives, computing those of an image once as long as there is room.

    An image is known by its pixels, so that nothing that changes them, such as a crop, brings back a wrong trajectory.

    Args:
        trajectory: of the teacher: pixel values, (B, C, H, W), to states, (B, L + 1, T, D).
        max_bytes: that the kept states may take; what does not fit is computed anew each time.
        dtype: that states are kept in, and given in whether they were kept or not.
    """

    def __init__(self, trajectory: Callable[[Tensor], Tensor], max_bytes: float, dtype: torch.dtype) -> None:
        self.trajectory, self.max_bytes, self.dtype = trajectory, max_bytes, dtype
        self.num_bytes = 0
        self._kept: dict[bytes, Tensor] = {}
        self._is_full = False

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """
        Args:
            pixel_values: normalised images, (B, C, H, W), on the teacher's device.

        Returns:
            States before the final norm, (B, L + 1, T, D), in `dtype`, on the same device.
        """
        keys = [hashlib.sha256(image.contiguous().numpy()).digest() for image in pixel_values.cpu()]
        missing = [index for index, key in enumerate(keys) if key not in self._kept]
        found: dict[bytes, Tensor] = {}
        if missing:
            computed = self.trajectory(pixel_values[missing]).to(self.dtype)
            found = {keys[index]: states for index, states in zip(missing, computed, strict=True)}
        together = [found[key] if key in found else self._kept[key].to(pixel_values.device) for key in keys]
        for key, states in found.items():
            self._keep(key, states)
        # layer by layer in memory, as they are read
        return torch.stack(together, dim=1).transpose(0, 1)

    def _keep(self, key: bytes, states: Tensor) -> None:
        if self.num_bytes + states.nbytes <= self.max_bytes:
            self._kept[key] = states.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            self.num_bytes += states.nbytes
        elif not self._is_full:
            self._is_full = True
            logger.info(
                "the trajectory cache is full, with %d images in %.3g GB; the teacher runs on all others every time",
                len(self),
                self.num_bytes / 1e9,
            )
