"""Augments an image together with its label or map, and makes batches of images and maps for probes.

    augment = Augmentations((CropFlip(224), ColorJitter(0.2, 0.2, 0.2, 0.1)))
    image, label = augment(image, label, np.random.default_rng((seed, position)))
    collate = SegmentationCollate(processor, 518)
    collate(images, masks)["labels"]                   # (b, 518, 518)

A target that is an array (H, W), a mask or a depth map, goes through the geometry of its image, to the nearest
neighbour, so that no class or depth arises that was not there. A target of another kind, a class label or None, stays
as it is.

Where the published protocols name torchvision's transforms, these follow what torchvision does with PIL images: the
draws of `RandomResizedCrop.get_params`, Pillow's filters, which look at all pixels under a new one (tensors need
`antialias=True` for that), Pillow's nearest pixel, and the four changes of `ColorJitter` in a random order. The random
numbers are NumPy's, so a crop has the published distribution, not the published bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL import ImageEnhance
from PIL.Image import Resampling
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class CropFlip:
    """A random part of the image resized to one size, then mirrored with probability 1/2; with its map if it has one.

    The defaults are those of the published probe on ImageNet-1k.

    Args:
        size: side of the resulting square, or (height, width), in pixels.
        scale: smallest and largest area of the part, as a fraction of the image's; what is larger than the image is
            drawn again.
        ratio: smallest and largest width / height of the part.
        interpolation: Pillow's filter for the image.
        flip_probability: of mirroring left and right.

    Raises:
        ValueError: if a range or the probability is none.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Resampling = Resampling.BICUBIC
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        _as_size(self.size)
        if not (0 < self.scale[0] <= self.scale[1] and self.scale[0] <= 1):
            raise ValueError(
                f"scale is {self.scale}; it must be (smallest, largest) with 0 < smallest <= largest, smallest <= 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}; it must be (smallest, largest) with 0 < smallest <= largest")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability is {self.flip_probability}; it must be between 0 and 1")

    def __call__(
        self, image: PIL.Image.Image, target: Any, generator: np.random.Generator
    ) -> tuple[PIL.Image.Image, Any]:
        """Augments one image.

        Args:
            image: of any size.
            target: mask or depth map (H, W) of the image's size, class label, or None.
            generator: the only source of randomness.

        Returns:
            Image and target.
        """
        image, target = random_resized_crop(
            image,
            target,
            generator,
            size=self.size,
            scale=self.scale,
            ratio=self.ratio,
            interpolation=self.interpolation,
        )
        if generator.random() < self.flip_probability:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
            target = target[:, ::-1].copy() if isinstance(target, np.ndarray) else target
        return image, target


@dataclass(frozen=True)
class ColorJitter:
    """Random changes of an image's colours, in a random order; its target stays (torchvision's transform of this name).

    Args:
        brightness: b; colours are multiplied by a factor uniform in [1 - b, 1 + b], at least 0.
        contrast: the same of the distance from the image's mean gray.
        saturation: the same of the distance from each pixel's gray.
        hue: h; hues turn by an angle uniform in [-h, h], in turns, at most 0.5.

    Raises:
        ValueError: if a number is negative or `hue` is above 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation, self.hue) < 0 or self.hue > 0.5:
            raise ValueError(f"{self} must have no negative number, and hue at most 0.5")

    def __call__(
        self, image: PIL.Image.Image, target: Any, generator: np.random.Generator
    ) -> tuple[PIL.Image.Image, Any]:
        """Changes one image.

        Args:
            image: RGB.
            target: anything.
            generator: the only source of randomness: the order, then one factor for each change.

        Returns:
            Image and target.
        """
        order = generator.permutation(4)
        limits = (self.brightness, self.contrast, self.saturation)
        factors = [generator.uniform(max(0.0, 1 - limit), 1 + limit) for limit in limits]
        turn = generator.uniform(-self.hue, self.hue)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for change in order:
            if change == 3:
                image = turn_hue(image, turn) if self.hue else image
            elif limits[change]:
                image = enhancers[change](image).enhance(factors[change])
        return image, target


def turn_hue(image: PIL.Image.Image, turn: float) -> PIL.Image.Image:
    """Turns all hues of an RGB image by so many turns, to 1/256 of one."""
    hue, saturation, value = image.convert("HSV").split()
    hue = PIL.Image.fromarray(np.asarray(hue) + np.uint8(int(turn * 255) % 256))  # bytes overflow as hues do
    return PIL.Image.merge("HSV", (hue, saturation, value)).convert("RGB")


@dataclass(frozen=True)
class Augmentations:
    """Several augmentations, one after the other, with one generator.

    Args:
        steps: such as `CropFlip` and `ColorJitter`.
    """

    steps: tuple[CropFlip | ColorJitter, ...]

    def __call__(
        self, image: PIL.Image.Image, target: Any, generator: np.random.Generator
    ) -> tuple[PIL.Image.Image, Any]:
        """Augments one image, as each of the steps does."""
        for step in self.steps:
            image, target = step(image, target, generator)
        return image, target


def random_resized_crop(
    image: PIL.Image.Image,
    target: Any,
    generator: np.random.Generator,
    *,
    size: int | tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: Resampling = Resampling.BICUBIC,
) -> tuple[PIL.Image.Image, Any]:
    """Resizes a random rectangle of the image ("Inception" crop, arXiv 1409.4842, as torchvision draws it).

    The area is uniform in `scale`, the logarithm of width / height uniform in that of `ratio`, the place uniform. After
    ten rectangles that do not fit, it is the largest one in the centre whose ratio is in range.

    Args:
        image: of any size.
        target: mask or depth map (H, W) of the image's size, class label, or None.
        generator: the only source of randomness.
        size: side of the resulting square, or (height, width), in pixels.
        scale: smallest and largest area, as a fraction of the image's.
        ratio: smallest and largest width / height.
        interpolation: Pillow's filter for the image.

    Returns:
        Image and target.

    Raises:
        ValueError: if the target is a map of another size than the image.
    """
    _check_map(image, target)
    height, width = _as_size(size)
    left, top, crop_width, crop_height = _draw_rectangle(image.size, generator, scale, ratio)
    image = image.crop((left, top, left + crop_width, top + crop_height)).resize((width, height), interpolation)
    if isinstance(target, np.ndarray):
        target = resize_nearest(target[top : top + crop_height, left : left + crop_width], (height, width))
    return image, target


def resize_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a map to the nearest neighbour: the value under the centre of the new pixel.

    Args:
        values: (H, W), integers of up to 32 bits or float32 depth.
        size: height and width to get, in pixels.

    Returns:
        (height, width), of the same type.
    """
    # the types that Pillow has for single numbers; it, not NumPy, so that ties go as they go for images
    stored = values.astype(np.float32 if np.issubdtype(values.dtype, np.floating) else np.int32)
    return np.asarray(PIL.Image.fromarray(stored).resize(size[::-1], Resampling.NEAREST)).astype(values.dtype)


def center_pad(values: Tensor, multiple: int, value: float = 0.0) -> Tensor:
    """Pads images or maps on all sides to the next multiples, as DINOv2's depth estimators do.

    Args:
        values: (..., H, W).
        multiple: what height and width are to be multiples of; 14 makes 490 x 644 of 480 x 640.
        value: of the new pixels.

    Returns:
        The padded values; where the padding is odd, right and bottom get one pixel more.
    """
    padding = []
    for side in (values.shape[-1], values.shape[-2]):
        missing = -side % multiple
        padding += [missing // 2, missing - missing // 2]
    return F.pad(values, padding, value=value)


@dataclass(frozen=True)
class SegmentationCollate:
    """Batches of images and masks, squashed to one size: images by a filter, masks to the nearest neighbour.

    Args:
        processor: of the model; it rescales and normalises, without its own resizing and cropping.
        size: side of the square, or (height, width), in pixels, both multiples of the patch size; 518 is published.
        interpolation: Pillow's filter for the images; bilinear is published.
    """

    processor: BaseImageProcessor
    size: int | tuple[int, int]
    interpolation: Resampling = Resampling.BILINEAR

    def __post_init__(self) -> None:
        _as_size(self.size)

    def __call__(self, images: Sequence[PIL.Image.Image], targets: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            images: B of them, RGB, of any sizes.
            targets: their masks, (H, W), integers.

        Returns:
            `pixel_values`, (B, 3, height, width), float32, and `labels`, (B, height, width), int64.

        Raises:
            ValueError: if a mask is not of its image's size.
        """
        height, width = _as_size(self.size)
        for image, target in zip(images, targets, strict=True):
            _check_map(image, target)
        resized = [image.resize((width, height), self.interpolation) for image in images]
        labels = np.stack([resize_nearest(target, (height, width)).astype(np.int64) for target in targets])
        return {"pixel_values": _normalize(self.processor, resized), "labels": torch.from_numpy(labels)}


@dataclass(frozen=True)
class DepthCollate:
    """Batches of images and depth maps of one size, padded on all sides to whole patches.

    The padding is zero, after normalisation the mean colour; its depth is 0, invalid, so it neither trains nor counts.

    Args:
        processor: of the model; it rescales and normalises, without its own resizing and cropping.
        patch_size: side of the model's square patches, in pixels.
    """

    processor: BaseImageProcessor
    patch_size: int

    def __call__(self, images: Sequence[PIL.Image.Image], targets: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            images: B of them, RGB, of one size.
            targets: their depth maps, (H, W), in metres.

        Returns:
            `pixel_values`, (B, 3, height, width), and `labels`, (B, height, width), both float32.

        Raises:
            ValueError: if the images are not of one size, or a map is not of its image's size.
        """
        for image, target in zip(images, targets, strict=True):
            _check_map(image, target)
        if len(sizes := {image.size for image in images}) > 1:
            listed = " and ".join(f"{height} x {width}" for width, height in sorted(sizes)[:2])
            raise ValueError(f"images of {listed} pixels cannot share a batch of depth maps; give images of one size")
        labels = torch.from_numpy(np.stack(targets).astype(np.float32))
        pixel_values = _normalize(self.processor, images)
        return {
            "pixel_values": center_pad(pixel_values, self.patch_size),
            "labels": center_pad(labels, self.patch_size),
        }


def _normalize(processor: BaseImageProcessor, images: Sequence[PIL.Image.Image]) -> Tensor:
    """Rescaled and normalised images of one size, (B, 3, H, W)."""
    arguments = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    return processor(images=list(images), **arguments)["pixel_values"]


def _draw_rectangle(
    size: tuple[int, int], generator: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, width and height of the rectangle of `random_resized_crop` in an image of (width, height)."""
    width, height = size
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(width - crop_width + 1))
            top = int(generator.integers(height - crop_height + 1))
            return left, top, crop_width, crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width = max(1, min(width, round(height * aspect)))
    crop_height = max(1, min(height, round(width / aspect)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def _as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size is {size}; it must be positive, a side or (height, width) in pixels")
    return height, width


def _check_map(image: PIL.Image.Image, target: Any) -> None:
    if isinstance(target, np.ndarray) and target.shape != (image.height, image.width):
        raise ValueError(
            f"the target has the shape {target.shape}, its image {image.height} x {image.width} pixels; both must agree"
        )
