"""Keeps a teacher's trajectories of images that come again unchanged, in memory or in files that runs share.

trajectory = TrajectoryCache(teacher.trajectory, 4e9, torch.bfloat16)
trajectory(pixel_values)                           # as teacher.trajectory(pixel_values), but in bfloat16
"""

import hashlib
import logging
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from raptor_settings.distill import DistillSettings
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..teacher import Teacher

logger = logging.getLogger(__name__)

Trajectory = Callable[[Tensor], Tensor]


class TrajectoryCache:
    """Gives a teacher's trajectories, and computes that of an image only once as long as there is room.

    An image is known by its pixels, so that nothing that changes them, such as a crop, brings back a wrong trajectory.

    Args:
        trajectory: of the teacher: pixel values, (B, C, H, W), to states, (B, L + 1, T, D).
        max_bytes: that the kept states may take; what does not fit is computed anew each time. So is what no longer
            can be written into the folder.
        dtype: that states are kept in, and given in whether they were kept or not.
        folder: where states are kept, for later runs as well, instead of in memory: files that are mapped into it, one
            for the new images of a batch. It may have states already; it must be of this teacher.
        num_writers: caches that fill the folder together; each takes as much of the room that is left. An image that
            comes to several of them is kept as often.

    Raises:
        ValueError: a file in the folder is damaged.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        max_bytes: float,
        dtype: torch.dtype,
        folder: Path | None = None,
        num_writers: int = 1,
    ) -> None:
        self.trajectory, self.dtype, self.folder = trajectory, dtype, folder
        self._kept: dict[str, Tensor] = {}
        self._is_full = False
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.safetensors")):
                try:
                    self._kept |= load_file(path)
                except SafetensorError as error:
                    raise ValueError(f"{path} is damaged ({error}); remove it") from error
        self.num_bytes = sum(states.nbytes for states in self._kept.values())
        self.max_bytes = self.num_bytes + max(0.0, max_bytes - self.num_bytes) / num_writers

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """
        Args:
            pixel_values: normalised images, (B, C, H, W), on the teacher's device.

        Returns:
            States before the final norm, (B, L + 1, T, D), in `dtype`, on the same device.
        """
        keys = [_key(image) for image in pixel_values.cpu()]
        missing = [index for index, key in enumerate(keys) if key not in self._kept]
        found: dict[str, Tensor] = {}
        if missing:
            computed = self.trajectory(pixel_values[missing]).to(self.dtype)
            found = {keys[index]: states for index, states in zip(missing, computed, strict=True)}
        together = [found[key] if key in found else self._kept[key].to(pixel_values.device) for key in keys]
        self._keep(found)
        # layer by layer in memory, as they are read
        return torch.stack(together, dim=1).transpose(0, 1)

    def _keep(self, found: dict[str, Tensor]) -> None:
        kept = {}
        for key, states in found.items():
            if self.num_bytes + states.nbytes <= self.max_bytes:
                kept[key] = states.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                self.num_bytes += states.nbytes
        if kept and self.folder is not None:
            try:
                kept = self._written(kept)
            except (OSError, SafetensorError) as error:
                logger.warning(
                    "trajectory_cache_dir takes no more, with %d images in %s (%s); the teacher runs on all others "
                    "every time",
                    len(self),
                    self.folder,
                    error,
                )
                self.max_bytes, self._is_full, kept = 0, True, {}
        self._kept |= kept
        if len(kept) < len(found) and not self._is_full:
            self._is_full = True
            logger.info(
                "the trajectory cache is full, with %d images in %.3g GB; the teacher runs on all others every time",
                len(self),
                self.num_bytes / 1e9,
            )

    def _written(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same states, mapped from a new file, which no reader ever sees in part."""
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        temporary = path.with_suffix(".writing")
        try:
            save_file(states, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return load_file(path)


def _key(image: Tensor) -> str:
    """Names an image by its pixels and their arrangement."""
    shape = repr(tuple(image.shape)).encode()
    return hashlib.sha256(shape + image.contiguous().numpy().tobytes()).hexdigest()


def cached_trajectory(
    teacher: Teacher, settings: DistillSettings, accelerator: Accelerator, fingerprint: str
) -> Trajectory:
    """Returns the function that gives the teacher's trajectories, through a cache if the settings ask for one.

    Args:
        teacher: on the device.
        settings: of the run.
        accelerator: whose arithmetic says how precisely states are kept.
        fingerprint: of the teacher.
    """
    if not settings.trajectory_cache_gb:
        return teacher.trajectory
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else teacher.model.dtype
    folder = None
    if settings.trajectory_cache_dir is not None:
        layers = "-".join(map(str, teacher.layers)) if settings.target_layers else "all"
        precision = f"{str(dtype).removeprefix('torch.')}-{accelerator.mixed_precision}"
        folder = Path(settings.trajectory_cache_dir) / f"{fingerprint}-{precision}-{layers}"
    max_bytes, num_writers = settings.trajectory_cache_gb * 1e9, accelerator.num_processes if folder else 1
    return TrajectoryCache(teacher.trajectory, max_bytes, dtype, folder, num_writers)
