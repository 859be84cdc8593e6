"""Running sums that batches and processes add to; metrics, similarities and dynamics are built on them.

    accumulator = TopKAccuracy()                       # any subclass of Accumulator
    for batch in loader:
        accumulator.update(...)
    accumulator.merge(accelerator)                     # the sums of all processes; one all-reduce
    accumulator.compute()                              # the same on every process

All sums are float64 whatever the precision of the batches. A device without float64 (Apple's GPUs) never sees them:
what must be summed in float64 moves to the CPU first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def has_float64(device: torch.device | str) -> bool:
    """Whether a device computes in float64; Apple's GPUs do not."""
    return torch.device(device).type != "mps"


def in_float64(x: Tensor) -> Tensor:
    """Returns the same values in float64, on the CPU where the device has no float64.

    Gram matrices need it. Their eigenvalues are squares, so the rounding error of float32 on a few large directions
    is as large as the eigenvalues of hundreds of small ones.
    """
    return (x if has_float64(x.device) else x.cpu()).to(torch.float64)


def cpu_float64(sums: Tensor) -> Tensor:
    """Returns the same values in float64 on the CPU; moved first, because not every device has float64."""
    return sums.detach().cpu().to(torch.float64)


class Accumulator:
    """A tensor of float64 sums on the CPU, of a size that does not depend on the number of images.

    Args:
        shape: of the sums; a number for a vector.
    """

    def __init__(self, shape: int | tuple[int, ...]):
        self._sums = torch.zeros(shape, dtype=torch.float64)

    def sums(self) -> Tensor:
        """Returns a copy of the state, to be summed over processes.

        Returns:
            float64 on the CPU; element-wise addition of two of them merges what they have seen.
        """
        return self._sums.clone()

    def load_sums(self, sums: Tensor) -> None:
        """Replaces the state.

        Args:
            sums: what `sums` returned here, in another process, or the sum of several such tensors; any device.

        Raises:
            ValueError: if the tensor has another shape than this accumulator's.
        """
        if sums.shape != self._sums.shape:
            raise ValueError(
                f"sums has shape {tuple(sums.shape)}, but this {type(self).__name__} keeps "
                f"{' x '.join(map(str, self._sums.shape))} sums: load only what an accumulator built with the same "
                "arguments returned"
            )
        self._sums = cpu_float64(sums).clone()

    def merge(self, accelerator: "Accelerator") -> None:
        """Makes the state that of all processes together; a collective operation.

        One process keeps what it has, so nothing in float64 reaches a device that lacks it. (Several processes on such
        devices do not exist: torch has no collectives for them.)
        """
        if accelerator.num_processes > 1:
            self.load_sums(accelerator.reduce(self.sums().to(accelerator.device), reduction="sum"))

    def _add(self, batch_sums: Tensor) -> None:
        self._sums += cpu_float64(batch_sums)

    def _require_any(self, count: Tensor, what: str) -> None:
        if count == 0:
            raise ValueError(f"{type(self).__name__} has seen no {what}: call update before compute")


@dataclass(frozen=True, eq=False)
class Curve:
    """A quantity over images.

    Attributes:
        mean: over images, of any shape.
        std: sample standard deviation over images, same shape; 0 for a single image.
        num_images: how many.
    """

    mean: Tensor
    std: Tensor
    num_images: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the same in lists of floats, which JSON can hold."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), "num_images": self.num_images}


class MomentAccumulator(Accumulator):
    """Mean and standard deviation over images of several quantities, from float64 sums and sums of squares.

    Args:
        shapes: of every quantity, for one image.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._slices, end = {}, 0
        for name, shape in self._shapes.items():
            begin, end = end, end + 1 + 2 * math.prod(shape)
            self._slices[name] = slice(begin, end)
        super().__init__(end)

    @torch.no_grad()
    def add(self, name: str, values: Tensor) -> None:
        """Adds the values of some images.

        Args:
            name: of the quantity.
            values: one per image, (B, *shape).

        Raises:
            ValueError: if the shape is not that of the quantity.
        """
        if tuple(values.shape[1:]) != self._shapes[name]:
            raise ValueError(f"{name} must be (B, {self._shapes[name]}), but is {tuple(values.shape)}")
        flat = cpu_float64(values).reshape(len(values), math.prod(self._shapes[name]))
        count = torch.full((1,), len(flat), dtype=torch.float64)
        self._sums[self._slices[name]] += torch.cat([count, flat.sum(0), flat.square().sum(0)])

    def has_seen(self, name: str) -> bool:
        """Whether there is such a quantity and any image had it."""
        return name in self._shapes and bool(self._sums[self._slices[name]][0] > 0)

    def curve(self, name: str) -> Curve:
        """Returns mean and standard deviation of one quantity over all images.

        Raises:
            ValueError: if no image was seen.
        """
        sums = self._sums[self._slices[name]]
        count = sums[0]
        self._require_any(count, "images")
        total, squares = sums[1:].reshape(2, *self._shapes[name])
        mean = total / count
        variance = (squares - count * mean.square()).clamp(min=0) / max(count.item() - 1, 1)
        return Curve(mean, variance.sqrt(), int(count))


class MatrixAccumulator(Accumulator):
    """Sums of matrices, kept where the states are: moving them for every batch would cost more than the products.

    Args:
        shape: of all matrices together.
    """

    def __init__(self, shape: tuple[int, ...]):
        self._shape = shape
        super().__init__(math.prod(shape))

    def sums(self) -> Tensor:
        """Returns a copy of the state, to be summed over processes; see `Accumulator.sums`."""
        return super().sums().cpu()

    def _matrices(self, device: torch.device | str = "cpu") -> Tensor:
        """The matrices themselves, float64, on a device, or on the CPU where that has no float64."""
        self._sums = self._sums.to(device if has_float64(device) else "cpu")
        return self._sums.view(self._shape)
