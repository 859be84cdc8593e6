"""Chooses the image size of each training step, and with it the image processor and the number of images.

    sizes = draw_sizes(num_steps, [112, 224], shares=[0.8, 0.2], final=448, num_final=100, seed=0)
    steps = SizedSteps(sizes, {size: View(processor, batch_size) for size, ...})
    train_loader(images, processor, sized=steps, ...)

The choice follows from a seed and the number of the step alone, so all processes make the same one, and so does a
resumed run. Where a batch must divide among more processes, it may have fewer images.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class View:
    """The image processor, batch size and augmentation of the steps of one size.

    Args:
        processor: that gives them their size.
        batch_size: images per step, of all processes together.
        augment: as in `train_loader`.
    """

    processor: BaseImageProcessor
    batch_size: int
    augment: Any = None


@dataclass(frozen=True)
class SizedSteps:
    """Steps that differ in the size and number of their images.

    Args:
        sizes: of the images of every step of the run, each a key of `views`.
        views: by size.
    """

    sizes: Sequence[int]
    views: Mapping[int, View]

    def num_images(self, step: int) -> int:
        """Images of one step, of all processes together."""
        return self.views[self.sizes[step]].batch_size

    def positions(self, step: int, process_index: int, num_processes: int) -> range:
        """Positions in the endless sequence of epochs that one process takes in a step; steps follow each other."""
        share = self.num_images(step) // num_processes
        first = int(self._firsts[step]) + process_index * share
        return range(first, first + share)

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *(self.views[size].batch_size for size in self.sizes)])


def draw_sizes(
    num_steps: int,
    sizes: Sequence[int],
    *,
    shares: Sequence[float] | None = None,
    final: int | None = None,
    num_final: int = 0,
    seed: int = 0,
) -> list[int]:
    """The image size of every step, drawn independently.

    Args:
        num_steps: of the run.
        sizes: to draw from, in pixels.
        shares: probability of each, up to a common factor; None for equal ones.
        final: size of the last steps, whatever was drawn for them; None for no such steps.
        num_final: how many these are.
        seed: of the draws; a longer run begins with those of a shorter one.
    """
    probabilities = np.full(len(sizes), 1.0) if shares is None else np.asarray(shares, dtype=float)
    drawn = np.random.default_rng(seed).choice(len(sizes), num_steps, p=probabilities / probabilities.sum())
    num_drawn = num_steps if final is None else num_steps - num_final
    return [sizes[index] for index in drawn[:num_drawn]] + [final] * (num_steps - num_drawn)


def batch_size_at(batch_size: int, num_tokens: int, own_tokens: int, multiple: int) -> int:
    """Number of images with as many tokens as a batch of another size, rounded down to a multiple, but not to 0.

    Args:
        batch_size: images of the other size.
        num_tokens: of an image.
        own_tokens: of an image of the other size.
        multiple: of images, such as the number of processes.
    """
    return max(1, batch_size * own_tokens // (num_tokens * multiple)) * multiple
