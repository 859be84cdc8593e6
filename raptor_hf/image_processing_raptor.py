"""Image processor of the Raptor model family: DINOv2's preprocessing, and post-processing of masks and depth.

Pillow and NumPy only. Reading images, colour conversion, resizing and cropping are transformers' own, so that a student
sees exactly the pixels that its teacher sees; what is added is label maps, post-processing and a faster last step.
"""

import copy
import warnings
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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


class RaptorImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings of [`RaptorImageProcessor`], each also an argument of a single call.

    Args:
        do_reduce_labels: lower every label by 1 and turn 0 into 255, as ADE20k needs, where 0 is no class.
    """

    do_reduce_labels: bool | None


class RaptorImageProcessor(PilBackend):
    """Prepares images as DINOv2 does, and turns predicted logits and depth into maps of the images' size.

    The defaults are those of `facebook/dinov2-with-registers-base`: RGB, shortest edge to 256 pixels (bicubic), centre
    crop of 224, to [0, 1], ImageNet mean and standard deviation. As everywhere in transformers, a PIL image is taken as
    stored: its EXIF orientation is applied by the pipelines and by `transformers.image_utils.load_image`, not here.

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
        ValueError: `do_pad` is true; this processor does not pad.

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
        return super()._standardize_kwargs(**kwargs)

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
                "segmentation_maps", segmentation_maps, expected_ndims=2, input_data_format=ChannelDimension.FIRST
            )
            _check_maps(segmentation_maps, images)
        return self._preprocess(images, segmentation_maps, **kwargs)

    def _read(self, argument: str, images: ImageInput, **kwargs: Any) -> list[np.ndarray]:
        """Reads images into channels-first arrays, naming the argument if that fails."""
        try:
            arrays = self._prepare_image_like_inputs(images, **kwargs)
        except (TypeError, ValueError) as error:
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
