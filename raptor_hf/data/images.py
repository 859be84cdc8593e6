"""Opens images for the recipes, of a Hub data set, a local folder, parquet files or the digits, as an `ImageSet`.

    images = open_images("uoft-cs/cifar10", "train[:10%]")
    image, label = images.decode(0)                    # a PIL image in RGB, 6
    processor = load_image_processor("facebook/dinov2-with-registers-base")
    height, width = check_image_size(processor, patch_size=14)

Images stay the bytes or paths they are stored as until one is read, so that the workers of a loader
(`raptor_hf.data.loaders`) share the decoding and a damaged file costs one image instead of the run.
"""

import copy
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, ReadInstruction
from raptor_settings.resources import find_model
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

# The top-level name raises ImportError without torchvision in transformers 5.17; this one works everywhere.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from ..configuration_raptor import as_pair
from ..image_processing_raptor import ImageError, RaptorImageProcessor, viewed_image
from .sources import (
    MissingSplitError,
    find_image_column,
    find_label_column,
    folder_of,
    is_text,
    load_source,
    locate_source,
    refuse_options,
    select_split,
)

# Image processors that transformers has with torchvision only, and their settings where a file does not say them.
_SQUASHED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": PILImageResampling.BILINEAR,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "image_mean": IMAGENET_DEFAULT_MEAN,
    "image_std": IMAGENET_DEFAULT_STD,
}
TORCHVISION_PROCESSORS = {
    "DINOv3ViTImageProcessor": _SQUASHED | {"size": {"height": 224, "width": 224}, "do_normalize": True},
    "Tipsv2ImageProcessor": _SQUASHED | {"size": {"height": 448, "width": 448}, "do_normalize": False},
}
NO_LABEL = -1  # as the test splits of many data sets have it


class ImageDecodeError(Exception):
    """An image cannot be read: it is damaged, no image, not there, too long and thin, or of an unknown mode.

    Args:
        name: of the image, as `ImageSet.name` gives it.
        reason: what went wrong.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read {self.name}: {self.reason}"


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set of images, undecoded.

    Attributes:
        dataset: rows of the image column, as `datasets.Image(decode=False)`, and of the label column if there is one.
        title: data set and split, for messages.
        image_column: name of the column of images.
        label_column: name of the column of class labels, integers or names, None without labels.
        class_names: names of the classes in the order of their labels, None if the data set does not tell them.
        split: name of the split.
        folder: where relative paths of images start, None for the working directory.
    """

    dataset: Dataset | IterableDataset
    title: str
    image_column: str
    label_column: str | None = None
    class_names: list[str] | None = None
    split: str = ""
    folder: str | None = None

    @property
    def streaming(self) -> bool:
        """Whether the images come as a stream, without a count and without access by index."""
        return isinstance(self.dataset, IterableDataset)

    @property
    def num_images(self) -> int | None:
        """Number of images, None for a stream."""
        return None if self.streaming else self.dataset.num_rows

    @property
    def has_labels(self) -> bool:
        """Whether every image comes with a class label."""
        return self.label_column is not None

    def select(self, rows: Sequence[int], split: str, title: str) -> "ImageSet":
        """Returns the set of some of its rows, in their order, with another split and title; not for a stream."""
        return replace(self, dataset=self.dataset.select(rows), split=split, title=title)

    def labels(self) -> np.ndarray:
        """Returns all class labels of a set that is no stream, (N,), int64, as `decode` gives them."""
        return np.array([self._label(value) for value in self.dataset[self.label_column]], dtype=np.int64)

    def name(self, index: int) -> str:
        """Returns the file path of an image, or its row where the data set holds the bytes."""
        return self._row_name(self.dataset[index], index)

    def decode(self, index: int) -> tuple[PIL.Image.Image, int | None]:
        """Reads one image of a set that is no stream.

        Args:
            index: row of the image.

        Returns:
            The image in RGB and upright as its EXIF orientation says, as a viewer shows it and as the image loader of
            transformers turns it in front of a processor; and its class label: -1 if it has none, None in a set
            without labels.

        Raises:
            ImageDecodeError: if it cannot be read, with its name.
        """
        _, image, label = self.read_row(self.dataset[index], index)
        return image, label

    def read_row(self, row: Mapping[str, Any], index: int | None = None) -> tuple[str, PIL.Image.Image, int | None]:
        """Reads the image of a row of `dataset`.

        Args:
            row: as iterating over or indexing `dataset` gives it.
            index: of the row, None in a stream.

        Returns:
            Name, RGB image and label, as `decode`.

        Raises:
            ImageDecodeError: if it cannot be read, with its name.
        """
        name = self._row_name(row, index)
        stored = row[self.image_column]
        if stored is None:
            raise ImageDecodeError(name, "the row holds no image")
        try:
            image = viewed_image(Image().decode_example(self._located(stored))).convert("RGB")
        except ImageError as error:
            raise ImageDecodeError(name, str(error)) from error
        except Exception as error:
            # Pillow's format plugins raise nearly anything on damaged bytes: OSError, SyntaxError, ValueError,
            # struct.error, IndexError, DecompressionBombError, MemoryError, ...
            raise ImageDecodeError(name, f"{type(error).__name__}: {error}") from error
        return name, image, None if self.label_column is None else self._label(row[self.label_column])

    def _located(self, stored: Mapping[str, Any]) -> Mapping[str, Any]:
        """The stored image, its path made absolute if it starts in the folder of the data set."""
        path = stored.get("path")
        if self.folder is None or stored.get("bytes") is not None or not path or "://" in path or os.path.isabs(path):
            return stored
        return {"bytes": None, "path": os.path.join(self.folder, path)}

    @cached_property
    def _number_of(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.class_names or ())}

    def _label(self, value: int | str | None) -> int:
        if value is None:
            return NO_LABEL
        return self._number_of[value] if isinstance(value, str) else value

    def _row_name(self, row: Mapping[str, Any], index: int | None) -> str:
        stored = self._located(row[self.image_column] or {})
        path, content = stored.get("path"), stored.get("bytes")
        if path and content is None:
            return path
        if index is not None:
            return f"row {index} of {self.title}"
        # The row number within a shuffled stream differs from epoch to epoch; a name must not.
        return f"{path or 'SHA-1 ' + hashlib.sha1(content or b'').hexdigest()} of {self.title}"


def open_images(
    dataset: str,
    split: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
) -> ImageSet:
    """Opens one split of a data set of images; names of splits and columns are checked before anything is downloaded.

    Args:
        dataset: one of
            - `"digits"`: scikit-learn's 1,797 handwritten digits as 8x8 gray images, built without a network; the split
              "test" holds 500 of them, stratified;
            - a local folder, with or without a sub-folder per split: one folder of images per class (`imagefolder`), or
              parquet files, or a clone of a Hub data set;
            - a parquet file or a glob of parquet files. `{split}` in it stands for the name of the split, as in
              `"data/cifar10-{split}.parquet"`; without it all rows are the split "train";
            - the name of a data set on the Hub.
        split: name of a split; slices and sums in the syntax of `datasets` work too ("train[:1%]"), except in a stream.
            `raptor_hf.data.sources.open_splits` opens two and holds images out where there are none to test on.
        config_name: which configuration of a Hub data set or of a folder, if it has several.
        revision: branch, tag or commit of a Hub data set.
        image_column: column of images, bytes or paths; found by its type if None.
        label_column: column of class labels, integers, or names, which are then numbered in the order of the alphabet;
            if None, "label", "labels" or the only column of class labels.
        streaming: read on the fly instead of downloading and preparing the whole data set first.

    Returns:
        The images of the split.

    Raises:
        MissingSplitError: if the split or its file is not there, saying what is.
        FileNotFoundError: if there is no such data set.
        ValueError: if a column or an image is not there, saying what is; for an option that does not go with `dataset`.
    """
    ReadInstruction.from_spec(split)  # raises for a malformed slice
    split_names = [part.split("[")[0].strip() for part in split.split("+")]
    if dataset == "digits":
        refuse_options(dataset, config_name=config_name, revision=revision)
        source, splits = None, _load_digits()
    else:
        source = locate_source(dataset, split_names, config_name=config_name, revision=revision)
        splits = load_source(dataset, **source, streaming=True)  # lists files and columns, reads no image

    missing = [name for name in split_names if name not in splits]
    if missing:
        raise MissingSplitError(f"split={split!r} of {dataset!r} does not exist; its splits are {sorted(splits)}")
    if streaming and split not in splits:
        raise ValueError(f"split={split!r}: streaming=True reads one whole split, one of {sorted(splits)}")
    features = splits[split_names[0]].features
    title = f"{dataset} {split}"
    if features is None:  # of formats that hold no images, such as CSV
        columns = list(next(iter(splits[split_names[0]]), {}))
        raise ValueError(f"{title} has no column of images. Its columns are {columns}")
    image_column = find_image_column(features, image_column, title)
    label_column = find_label_column(features, label_column, title)

    if source is None:
        rows = splits[split].to_iterable_dataset() if streaming else select_split(splits, split)
    else:
        rows = splits[split] if streaming else load_source(dataset, **source, split=split)
    if not streaming and rows.num_rows == 0:
        raise ValueError(f"{title} holds no images")
    names = getattr(features[label_column], "names", None) if label_column else None
    if label_column and is_text(features[label_column]):
        if streaming:
            raise ValueError(f"label_column={label_column!r} of {title} holds names, which a stream cannot number")
        names = _names_in(label_column, splits if source is None else load_source(dataset, **source))
    rows = rows.select_columns([column for column in (image_column, label_column) if column])
    return ImageSet(
        dataset=rows.cast_column(image_column, Image(decode=False)),
        title=title,
        image_column=image_column,
        label_column=label_column,
        class_names=names,
        split=split,
        folder=folder_of(source) if source else None,
    )


def _names_in(column: str, splits: Mapping[str, Dataset]) -> list[str]:
    """The names in a column of all splits, so that a class has one number in all of them."""
    found = {name for rows in splits.values() if column in rows.column_names for name in rows.unique(column)}
    return sorted(found - {None})


def load_image_processor(name_or_folder: str, revision: str | None = None) -> BaseImageProcessor:
    """Loads the image processor of a model.

    Args:
        name_or_folder: model on the Hub or local folder, with a `preprocessor_config.json`.
        revision: branch, tag or commit on the Hub.

    Returns:
        The processor; `processor(images=[...], return_tensors="pt")["pixel_values"]` is a (B, 3, H, W) float32 tensor.
        Without torchvision, a `RaptorImageProcessor` stands for those that need it (`TORCHVISION_PROCESSORS`): it
        resizes bytes with Pillow, they resize floats, which is the same up to a byte's rounding.

    Raises:
        FileNotFoundError: if there is none at that place.
    """
    source = find_model(name_or_folder)
    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(source, revision=revision)
        own = TORCHVISION_PROCESSORS.get(str(settings.get("image_processor_type")).removesuffix("Fast"))
        if own is not None and not is_torchvision_available():
            return RaptorImageProcessor(**own | {name: settings[name] for name in own.keys() & settings.keys()})
        return AutoImageProcessor.from_pretrained(source, revision=revision)
    except OSError as error:
        raise FileNotFoundError(
            f"no image processor at {name_or_folder!r}: a local folder needs preprocessor_config.json (written by "
            f"processor.save_pretrained), any other name must exist on the Hub; {error}"
        ) from error


def check_image_size(
    processor: BaseImageProcessor, patch_size: int | Sequence[int], num_channels: int = 3
) -> tuple[int, int]:
    """Checks that the images a processor puts out fit a model: RGB, of one size, in whole patches.

    Args:
        processor: image processor; it is tried on two blank images of different shapes.
        patch_size: side of the model's square patches, in pixels, or their height and width.
        num_channels: that the model takes.

    Returns:
        Height and width of the processed images, in pixels.

    Raises:
        ValueError: if model or processor take other than 3 channels, images of different shapes keep different shapes,
            or a side is no multiple of `patch_size`.
    """
    mean = getattr(processor, "image_mean", None)
    means = len(mean) if isinstance(mean, Sequence) else 3
    for owner, channels in (("the model", num_channels), ("its image processor", means)):
        if channels != 3:
            raise ValueError(f"{owner} takes images of {channels} channel(s); it must take 3, as images are RGB")
    blanks = [PIL.Image.new("RGB", size) for size in ((80, 64), (64, 80))]
    shapes = [tuple(processor(images=[blank], return_tensors="pt")["pixel_values"].shape[-2:]) for blank in blanks]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "the image processor's output varies with the shape of its input, such images cannot share a batch; "
            "crop (do_center_crop) or resize to a fixed height and width"
        )
    for side, patch in zip(shapes[0], as_pair(patch_size), strict=True):
        if side % patch:
            raise ValueError(
                f"the image processor's output of {shapes[0][0]} x {shapes[0][1]} pixels does not divide into patches "
                f"of patch_size={patch_size}; use {multiples_near(side, patch)} in place of {side}"
            )
    return shapes[0]


def multiples_near(side: int, patch: int) -> str:
    """The multiples of the patch below and above a side, in pixels, for messages: "14 or 28"."""
    below = side // patch * patch
    return " or ".join(str(size) for size in (below, below + patch) if size)


def resized_processor(processor: BaseImageProcessor, side: int, patch_size: int | Sequence[int]) -> BaseImageProcessor:
    """Copies an image processor and changes the size of its images; it resizes and crops in the same proportion.

    Args:
        processor: with images of one size.
        side: the shorter side of the new images, in pixels.
        patch_size: side of the model's square patches, in pixels, or their height and width.

    Raises:
        ValueError: the side is no multiple of the patch, or the processor takes images as they are.
    """
    own = check_image_size(processor, patch_size)
    resized = copy.deepcopy(processor)
    for name in ("size", "crop_size"):
        if sides := getattr(processor, name, None):
            setattr(resized, name, {key: round(value * side / min(own)) for key, value in dict(sides).items() if value})
    found = check_image_size(resized, patch_size)
    if min(found) != side:
        raise ValueError(f"the image processor gives images of {found[0]} x {found[1]} pixels where {side} are wanted")
    return resized


def augment(
    pixel_values: Tensor,
    generator: torch.Generator,
    *,
    rotation_degrees: float = 0.0,
    translation: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    horizontal_flip: bool = False,
) -> Tensor:
    """Applies a random affine map to each image, bilinear, with the border pixels continued outwards.

    Args:
        pixel_values: images, (B, C, H, W), floating point.
        generator: the only source of randomness; always gives five numbers per image.
        rotation_degrees: largest angle, either way.
        translation: largest shift of what is sampled, along each axis, as a fraction of the side.
        scale: smallest and largest magnification.
        horizontal_flip: whether to mirror every image with probability 1/2.

    Returns:
        The images, in the shape and type they came in.

    Raises:
        ValueError: if the input is no batch of floating-point images or `scale` is no range of positive numbers.
    """
    if pixel_values.ndim != 4 or not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be (B, C, H, W) floating point, not {tuple(pixel_values.shape)} {pixel_values.dtype}"
        )
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale is {scale}; it must be (smallest, largest) with 0 < smallest <= largest")
    batch, _, height, width = pixel_values.shape
    draws = torch.rand(5, batch, generator=generator, device=generator.device).to(pixel_values.device)
    angle = math.radians(rotation_degrees) * (2 * draws[0] - 1)
    zoom = scale[0] + (scale[1] - scale[0]) * draws[1]
    shift = 2 * translation * (2 * draws[2:4] - 1)  # a side spans -1..1
    mirror = 1 - 2 * ((draws[4] < 0.5) & horizontal_flip).float()
    # From output to input coordinates. Both sides span -1..1 there, so rotating pixels takes the ratio of the sides.
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    rows = [[cos * mirror, -sin * height / width, shift[0]], [sin * mirror * width / height, cos, shift[1]]]
    theta = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    grid = F.affine_grid(theta, list(pixel_values.shape), align_corners=False)
    # Coordinates in half precision would be off by whole pixels.
    found = F.grid_sample(pixel_values.float(), grid, padding_mode="border", align_corners=False)
    return found.to(pixel_values.dtype)


def _load_digits() -> dict[str, Dataset]:
    # scikit-learn takes longer to import than everything else here, for this one data set.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    train, test = train_test_split(np.arange(len(gray)), test_size=500, stratify=digits.target, random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    return {
        name: Dataset.from_dict(
            {"image": [PIL.Image.fromarray(gray[i]) for i in indices], "label": digits.target[indices]},
            features=features,
        )
        for name, indices in (("train", train), ("test", test))
    }
