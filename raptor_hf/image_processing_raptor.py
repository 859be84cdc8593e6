"""Image processor of the Raptor model family: DINOv2's preprocessing, and post-processing of masks and depth.

Pillow and NumPy only. Reading images, colour conversion, resizing and cropping are transformers' own, so that a student
sees exactly the pixels that its teacher sees; what is added is label maps, post-processing and a faster last step.
"""

import copy
import math
import warnings
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.modeling_outputs import DepthEstimatorOutput, SemanticSegmenterOutput
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

# Label of the pixels without a class: ADE20k's background after do_reduce_labels, and what a crop adds around a map.
IGNORE_INDEX = 255
# 8192 x 8192, of an image once resized: in float32 its three channels take 0.8 GB
MAX_PIXELS = 2**26
# of the longer side to the shorter; photographs end at 20, and resizing the shorter side makes the longer one huge
MAX_ASPECT = 200
_EXIF_ORIENTATION = 0x0112


class ImageError(ValueError):
    """An image that can be read but not be prepared; the message says what is wrong with it."""


def viewed_image(image: Image.Image) -> Image.Image:
    """Turns a decoded image into what a viewer of images shows: upright, and with 8 bits per channel.

    The orientation in its EXIF data is applied (once: it is taken out of the result). Grey images of 16 bits are scaled
    by their range, 65535 to 255. Everything else stays as it is, palettes and transparency too.

    Args:
        image: of any mode and size.

    Returns:
        The image itself where nothing was to be done, else a new one.

    Raises:
        ImageError: the mode has no range that could be scaled to 8 bits (32-bit integers, floats), or one side is more
            than 200 times the other.
    """
    name = f"image {image.filename!r}" if getattr(image, "filename", "") else "image"
    _check_aspect(name, image.height, image.width)
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    # Pillow opens 16-bit PGM files in mode I, and before version 11 PNG files too
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ImageError(
            f"{name} has mode {image.mode!r}, {kind} whose range is not known; it must have 8 bits per channel or 16 "
            "bits of grey: scale and convert it first"
        )
    return image


def _check_aspect(name: str, height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(
            f"{name} is {height} x {width} pixels large; its longer side must be at most {MAX_ASPECT} times the shorter"
        )


class RaptorImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings of [`RaptorImageProcessor`], each also an argument of a single call.

    Args:
        do_reduce_labels: lower every label by 1 and turn 0 into 255, as ADE20k needs, where 0 is no class.
    """

    do_reduce_labels: bool | None


class RaptorImageProcessor(PilBackend):
    """Prepares images as DINOv2 does, and turns predicted logits and depth into maps of the images' size.

    The defaults are those of `facebook/dinov2-with-registers-base`: RGB, shortest edge to 256 pixels (bicubic), centre
    crop of 224, to [0, 1], ImageNet mean and standard deviation.

    Two things differ from transformers' own processors, DINOv2's among them. They turn images that they open themselves
    as the EXIF orientation says, from a path or URL, but take a PIL image as stored: here both come out upright, as a
    viewer shows them. And they cut grey images of 16 bits off at 255: here they are scaled by their range; PIL images
    of 32-bit integers or floats have no range to scale by and are refused. See `viewed_image`.

    The centre crop suits classification. A map predicted from it covers the crop only, so dense tasks want
    `do_center_crop=False` and, to batch images, a fixed `size={"height": ..., "width": ...}`.

    Args:
        do_convert_rgb: convert to RGB. How transparency is treated is decided by the installed transformers.
        do_resize: resize to `size`.
        size: `{"shortest_edge": s}`, `{"height": h, "width": w}` or another size dictionary, in pixels. An int is the
            shortest edge.
        resample: Pillow's filter for images. Label maps always use the nearest neighbour.
        do_center_crop: crop the centre, padding with zeros where the image is smaller.
        crop_size: `{"height": h, "width": w}` or an int, in pixels.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 maps a byte to [0, 1].
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: per channel, after rescaling.
        image_std: per channel, after rescaling.
        do_reduce_labels: for label maps, 0 becomes 255 (ignored) and every other label is lowered by 1.

    Raises:
        ValueError: `do_pad` is true; this processor does not pad. A size, a mean, a standard deviation or the factor is
            impossible.

    Example:
        >>> processor = RaptorImageProcessor()
        >>> inputs = processor(image, return_tensors="pt")  # pixel_values: (1, 3, 224, 224)
    """

    valid_kwargs = RaptorImageProcessorKwargs

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 256}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_reduce_labels = False

    def __init__(self, **kwargs: Unpack[RaptorImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_teacher(cls, teacher: BaseImageProcessor) -> Self:
        """Builds the processor that prepares images exactly as a teacher's does.

        Copies the teacher's settings, then compares both on an image: settings alone do not tell that, say, LeViT's
        processor reads `size` in a way of its own.

        Args:
            teacher: image processor of the teacher, such as `BitImageProcessor`, `ViTImageProcessor` or
                `DPTImageProcessor`. Where it resizes with torchvision, this processor does so with Pillow, which
                rounds differently.

        Returns:
            A processor with the teacher's settings.

        Raises:
            TypeError: `teacher` is not an image processor.
            ValueError: the teacher takes a step that this processor lacks; the message names it.
        """
        if not isinstance(teacher, BaseImageProcessor):
            raise TypeError(
                f"teacher must be an image processor, got {type(teacher).__name__}; of a multimodal processor pass its "
                "image_processor, of a checkpoint the result of AutoImageProcessor.from_pretrained"
            )
        # None is copied too: a step that the teacher does not mention is off, and not at this class's default.
        student = cls(
            **{name: copy.deepcopy(getattr(teacher, name, None)) for name in cls.valid_kwargs.__annotations__}
        )

        noise = np.random.default_rng(0).integers(0, 256, size=(300, 400, 3), dtype=np.uint8)
        expected, actual = (
            np.asarray(processor(Image.fromarray(noise), return_tensors="np")["pixel_values"])
            for processor in (teacher, student)
        )
        # Another geometry or range changes noise altogether; another resampling library changes it by rounding.
        if expected.shape != actual.shape or np.abs(expected - actual).mean() > 0.05 * expected.std():
            extra = {k: v for k, v in teacher.to_dict().items() if not hasattr(student, k) and v not in (None, False)}
            extra.pop("image_processor_type", None)
            raise ValueError(
                f"{type(teacher).__name__} prepares images in a way that {cls.__name__} cannot: "
                + (f"it has the settings {extra}" if extra else "it overrides how its settings are applied")
                + f"; pixel_values of a 300 x 400 image are {expected.shape} there and {actual.shape} here"
            )
        return student

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[RaptorImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepares images, and label maps along with them.

        Args:
            images: one or several PIL images, paths, URLs, arrays or tensors. Arrays and tensors are (C, H, W) or
                (H, W, C), batches of them (B, C, H, W) or (B, H, W, C), with values in 0..255 unless
                `do_rescale=False`.
            segmentation_maps: one map per image, of its height and width, an integer label per pixel. Palette images
                count as their indices. Resized to the nearest neighbour and cropped with the image; where the crop is
                larger than the map, 255 is added.
            **kwargs: settings for this call, see the class; `return_tensors="pt"` or `"np"` stacks the results, which
                must then have one shape.

        Returns:
            `pixel_values`, (B, C, height, width), float32, and with `segmentation_maps` `labels`, (B, height, width),
            int64. Lists of arrays without `return_tensors`.

        Raises:
            TypeError: something is not an image.
            ImageError: an image is of a mode without a range, or too long for its width, or would be too large once
                resized; the message names its file, if it is known.
            ValueError: an image or map cannot be read, there are none, or maps and images do not match.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def post_process_semantic_segmentation(
        self,
        outputs: SemanticSegmenterOutput,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Turns the logits of a semantic segmentation model into maps of class indices.

        Args:
            outputs: with `logits`, (B, num_labels, height, width).
            target_sizes: height and width of every map, in pixels; a list of B pairs or (B, 2). Logits are
                interpolated bilinearly, then compared. `None` keeps the size of the logits.

        Returns:
            B maps, (height, width), int64.

        Raises:
            ValueError: `target_sizes` has not one entry per image.
        """
        sizes = self._check_target_sizes(target_sizes, len(outputs.logits))
        return [_interpolate(logits, size).argmax(dim=0) for logits, size in zip(outputs.logits, sizes, strict=True)]

    def post_process_depth_estimation(
        self,
        outputs: DepthEstimatorOutput,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Resizes predicted depth to the size of the images.

        The interpolation is bilinear, where DPT's is bicubic: it cannot leave the range of the predicted depths, so no
        distance comes out negative at an edge.

        Args:
            outputs: with `predicted_depth`, (B, height, width), in metres.
            target_sizes: height and width of every map, in pixels; a list of B pairs or (B, 2). `None` keeps the size
                of the prediction.

        Returns:
            B dictionaries with `predicted_depth`, (height, width), float32, in metres.

        Raises:
            ValueError: `target_sizes` has not one entry per image.
        """
        sizes = self._check_target_sizes(target_sizes, len(outputs.predicted_depth))
        return [
            {"predicted_depth": _interpolate(depth[None], size)[0]}
            for depth, size in zip(outputs.predicted_depth, sizes, strict=True)
        ]

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        # Called for the settings of a processor and again for those of a call.
        if kwargs.get("do_pad"):
            raise ValueError("do_pad=True: this processor resizes and crops but does not pad; only do_pad=False works")
        kwargs = super()._standardize_kwargs(**kwargs)
        _check_settings(kwargs)
        return kwargs

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """[`BaseImageProcessor.fetch_images`]; local files are opened as they are, where it converts them to RGB."""
        if isinstance(image_url_or_urls, str) and Path(image_url_or_urls).is_file():
            return Image.open(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: ImageInput, *args: Any, is_map: bool = False, **kwargs: Any) -> np.ndarray:
        """[`PilBackend.process_image`] of what a viewer would show; label maps (`is_map`) keep their numbers."""
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image) if is_map else viewed_image(image)
        return super().process_image(image, *args, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool | None,
        input_data_format: str | ChannelDimension | None,
        **kwargs: Any,
    ) -> BatchFeature:
        images = self._read("images", images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format)
        if segmentation_maps is not None:
            segmentation_maps = self._read(
                "segmentation_maps",
                segmentation_maps,
                expected_ndims=2,
                input_data_format=ChannelDimension.FIRST,
                is_map=True,
            )
            _check_maps(segmentation_maps, images)
        if kwargs["do_resize"]:
            for index, image in enumerate(images):
                _check_resized(f"images[{index}]", *image.shape[-2:], kwargs["size"])
        return self._preprocess(images, segmentation_maps, **kwargs)

    def _read(self, argument: str, images: ImageInput, **kwargs: Any) -> list[np.ndarray]:
        """Reads images into channels-first arrays, naming the argument if that fails."""
        try:
            arrays = self._prepare_image_like_inputs(images, **kwargs)
        except ImageError:
            raise
        except (TypeError, ValueError, OSError) as error:
            got = f"an array of shape {tuple(images.shape)}" if hasattr(images, "shape") else repr(images)[:200]
            # Not type(error): subclasses such as UnicodeDecodeError cannot be built from a message.
            raise (TypeError if isinstance(error, TypeError) else ValueError)(
                f"{argument} cannot be read, got {got}; pass a PIL image, a path, a URL, an array or tensor "
                f"({'(H, W)' if argument == 'segmentation_maps' else '(C, H, W) or (H, W, C)'}), or a list of them"
            ) from error
        if not arrays:
            raise ValueError(f"{argument} is empty: pass at least one")
        return arrays

    def _preprocess(
        self,
        images: list[np.ndarray],
        segmentation_maps: list[np.ndarray] | None,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_reduce_labels: bool,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        if do_resize:
            images = [image if _has_size(image, size) else self.resize(image, size, resample) for image in images]
        data = {}
        if segmentation_maps is not None:
            labels = [
                _resize_labels(_reduce_labels(labels) if do_reduce_labels else labels, image.shape[-2:])
                for labels, image in zip(segmentation_maps, images, strict=True)
            ]
            if do_center_crop:
                # The crop pads with zeros, which are a class: let 0 stand for the ignored label meanwhile.
                labels = [self.center_crop(labels - IGNORE_INDEX, crop_size) + IGNORE_INDEX for labels in labels]
            data["labels"] = [labels[0].astype(np.int64) for labels in labels]
        if do_center_crop:
            images = [self.center_crop(image, crop_size) for image in images]
        pixel_values = self._rescale_and_normalize(images, **kwargs)
        data["pixel_values"] = list(pixel_values) if return_tensors is None else pixel_values
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _rescale_and_normalize(
        self,
        images: list[np.ndarray],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...] | None,
        image_std: float | tuple[float, ...] | None,
        **kwargs: Any,
    ) -> list[np.ndarray] | np.ndarray:
        """Applies both steps to images (C, H, W); gives one array (B, C, H, W) if they are bytes of one shape."""

        def apply(values: np.ndarray) -> np.ndarray:
            if do_rescale:
                values = self.rescale(values, rescale_factor)
            if do_normalize:
                values = self.normalize(values, image_mean, image_std)
            return values

        if not (do_rescale or do_normalize):
            return [image.copy() for image in images]  # without resizing they may be the caller's own arrays
        shape = images[0].shape
        if any(image.dtype != np.uint8 or image.shape != shape for image in images):
            return [apply(image) for image in images]

        # A byte has 256 values: do the arithmetic for these and look the pixels up, straight into the batch. The result
        # has the same bits, and no copy of the batch in double precision is made.
        num_channels = shape[0]
        table = apply(np.broadcast_to(np.arange(256, dtype=np.uint8), (num_channels, 1, 256)))[:, 0]
        batch = np.empty((len(images), *shape), dtype=table.dtype)
        for image, row in zip(images, batch, strict=True):
            for channel in range(num_channels):
                # Every index is in range; mode="clip" only spares the buffer that mode="raise" needs.
                np.take(table[channel], image[channel], out=row[channel], mode="clip")
        return batch

    def _check_target_sizes(
        self, target_sizes: list[tuple[int, int]] | torch.Tensor | None, batch_size: int
    ) -> list[tuple[int, int] | None]:
        """Gives one (height, width) or `None` per image."""
        if target_sizes is None:
            return [None] * batch_size
        if len(target_sizes) != batch_size:
            raise ValueError(
                f"target_sizes has {len(target_sizes)} entries for a batch of {batch_size}: pass one (height, width) "
                "per image"
            )
        if self.do_center_crop:
            warnings.warn(
                "do_center_crop=True: the model saw the centre of each image, and its prediction is now stretched over "
                "the whole target size; prepare images with do_center_crop=False for maps that lie on the image",
                stacklevel=3,
            )
        return [(int(height), int(width)) for height, width in target_sizes]


def _check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError for settings that no image could be prepared with; None and what is not there are right."""
    for name in ("size", "crop_size"):
        size = settings.get(name) or {}
        sides = {key: size[key] for key in ("height", "width", "shortest_edge", "longest_edge") if size.get(key)}
        area = sides.get("height", 1) * sides.get("width", 1)
        if any(not 0 < side <= math.isqrt(MAX_PIXELS) for side in sides.values()) or area > MAX_PIXELS:
            raise ValueError(f"{name} is {sides}; each side must be from 1 to {math.isqrt(MAX_PIXELS)} pixels")
    for name in ("rescale_factor", "image_mean", "image_std"):
        value = settings.get(name)
        numbers = [] if value is None else [value] if isinstance(value, (int, float)) else list(value)
        positive = name != "image_mean"
        if any(not math.isfinite(number) or (positive and number <= 0) for number in numbers):
            raise ValueError(f"{name} is {value}; it must be {'above 0 and ' if positive else ''}finite")


def _check_resized(name: str, height: int, width: int, size: SizeDict) -> None:
    """Raises ImageError if an image of this height and width is too long, or would be too large once resized."""
    _check_aspect(name, height, width)
    shorter, longer = sorted((height, width))
    if size.shortest_edge and not size.longest_edge:
        resized = size.shortest_edge, size.shortest_edge * longer // shorter
        if math.prod(resized) > MAX_PIXELS:
            raise ImageError(
                f"{name} is {height} x {width} pixels large and would be {resized[0]} x {resized[1]} with its shortest "
                f"edge resized; that must be at most {MAX_PIXELS} pixels: crop it first, or choose a smaller size"
            )


def _check_maps(segmentation_maps: list[np.ndarray], images: list[np.ndarray]) -> None:
    """Raises ValueError unless every image (C, H, W) has a map (1, H, W) of integers."""
    if len(segmentation_maps) != len(images):
        raise ValueError(f"{len(segmentation_maps)} segmentation_maps for {len(images)} images: pass one map per image")
    for index, (labels, image) in enumerate(zip(segmentation_maps, images, strict=True)):
        if labels.shape != (1, *image.shape[-2:]):
            raise ValueError(
                f"segmentation_maps[{index}] has shape {labels.shape}, its image {image.shape} (channels first): pass "
                "one label per pixel, (H, W)"
            )
        if np.issubdtype(labels.dtype, np.floating):
            raise ValueError(f"segmentation_maps[{index}] has dtype {labels.dtype}: labels must be integers")


def _has_size(image: np.ndarray, size: SizeDict) -> bool:
    """Whether resizing an image (C, H, W) would give the same bits: Pillow copies bytes that have the size already."""
    if image.dtype != np.uint8:
        return False  # Pillow gets other types as bytes, which changes them
    height, width = image.shape[-2:]
    if size.shortest_edge:
        return min(height, width) == size.shortest_edge and not size.longest_edge
    return (height, width) == (size.height, size.width)


def _reduce_labels(labels: np.ndarray) -> np.ndarray:
    """Lowers labels by 1; 0 and 255 become 255."""
    labels = labels.astype(np.int32)
    return np.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - 1)


def _resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes labels (1, H, W) to the nearest neighbour, (1, height, width), int32: bytes would end at 255 classes."""
    height, width = size
    resized = Image.fromarray(labels[0].astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized)[None]


def _interpolate(maps: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """Resizes maps (C, H, W) bilinearly to (C, *size), in float32; `None` keeps the size."""
    maps = maps.float()
    return maps if size is None else F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
