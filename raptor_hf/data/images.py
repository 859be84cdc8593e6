"""Images for the recipes: a Hub data set, a local folder, parquet files or small digits, all as one `ImageSet`.

    images = open_images("uoft-cs/cifar10", "train[:10%]")
    image, label = images.decode(0)                    # a PIL image in RGB, 6
    processor = load_image_processor("facebook/dinov2-with-registers-base")
    height, width = check_image_size(processor, patch_size=14)

Images stay the bytes or paths they are stored as until one is read, so that the workers of a loader
(`raptor_hf.data.loaders`) share the decoding and a damaged file costs one image instead of the run.
"""

import glob
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
)
from raptor_settings.resources import find_model
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

# The top-level name raises ImportError without torchvision in transformers 5.17; this one works everywhere.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..image_processing_raptor import ImageError, viewed_image

_SPLIT_FOLDERS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}


class ImageDecodeError(Exception):
    """An image that cannot be read: damaged, not an image, not there, or without its label.

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
        label_column: name of the column of integer class labels, None without labels.
        class_names: names of the classes in the order of their labels, None if the data set does not tell them.
    """

    dataset: Dataset | IterableDataset
    title: str
    image_column: str
    label_column: str | None = None
    class_names: list[str] | None = None

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

    def name(self, index: int) -> str:
        """Returns the file path of an image, or its row where the data set holds the bytes."""
        return self._row_name(self.dataset[index], index)

    def decode(self, index: int) -> tuple[PIL.Image.Image, int | None]:
        """Reads one image of a set that is no stream.

        Args:
            index: row of the image.

        Returns:
            The image in RGB and upright as its EXIF orientation says, and its class label (None without labels).

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
            Name, RGB image and label (None without labels).

        Raises:
            ImageDecodeError: if it cannot be read, with its name.
        """
        name = self._row_name(row, index)
        stored = row[self.image_column]
        if stored is None:
            raise ImageDecodeError(name, "the row holds no image")
        try:
            image = viewed_image(Image().decode_example(stored)).convert("RGB")
        except ImageError as error:
            raise ImageDecodeError(name, str(error)) from error
        except Exception as error:
            # Pillow's format plugins raise nearly anything on damaged bytes: OSError, SyntaxError, ValueError,
            # struct.error, IndexError, DecompressionBombError, ...
            raise ImageDecodeError(name, f"{type(error).__name__}: {error}") from error
        if self.label_column is None:
            return name, image, None
        if row[self.label_column] is None:
            raise ImageDecodeError(name, f"the row holds no {self.label_column!r}")
        return name, image, row[self.label_column]

    def _row_name(self, row: Mapping[str, Any], index: int | None) -> str:
        stored = row[self.image_column] or {}
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
        config_name: which configuration of a Hub data set or of a folder, if it has several.
        revision: branch, tag or commit of a Hub data set.
        image_column: column of images, bytes or paths; found by its type if None.
        label_column: integer column of class labels; if None, "label", "labels" or the only column of class labels.
        streaming: read on the fly instead of downloading and preparing the whole data set first.

    Returns:
        The images of the split.

    Raises:
        FileNotFoundError: if there is no such data set, or no file for the split.
        ValueError: if the split, a column or an image is not there, saying what is; for an option that does not go with
            `dataset`.
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
        raise ValueError(f"split={split!r} of {dataset!r} does not exist; its splits are {sorted(splits)}")
    if streaming and split not in splits:
        raise ValueError(f"split={split!r}: streaming=True reads one whole split, one of {sorted(splits)}")
    features = splits[split_names[0]].features
    title = f"{dataset} {split}"
    if features is None:  # of formats that hold no images, such as CSV
        columns = list(next(iter(splits[split_names[0]]), {}))
        raise ValueError(f"{title} has no column of images. Its columns are {columns}")
    image_column = find_image_column(features, image_column, title)
    label_column = _find_label_column(features, label_column, title)

    if source is None:
        rows = splits[split].to_iterable_dataset() if streaming else select_split(splits, split)
    else:
        rows = splits[split] if streaming else load_source(dataset, **source, split=split)
    if not streaming and rows.num_rows == 0:
        raise ValueError(f"{title} holds no images")
    rows = rows.select_columns([column for column in (image_column, label_column) if column])
    names = getattr(features[label_column], "names", None) if label_column else None
    return ImageSet(
        dataset=rows.cast_column(image_column, Image(decode=False)),
        title=title,
        image_column=image_column,
        label_column=label_column,
        class_names=names,
    )


def check_labels(images: ImageSet, num_classes: int) -> None:
    """Checks that every class label of a set that is no stream is a class; an image without one counts as unreadable.

    Args:
        images: with labels.
        num_classes: C.

    Raises:
        ValueError: if a label is not in 0 .. C - 1, naming the image and the value.
    """
    column = np.array([-1 if label is None else label for label in images.dataset[images.label_column]])
    known = np.array([label is not None for label in images.dataset[images.label_column]])
    wrong = np.flatnonzero(known & ((column < 0) | (column >= num_classes)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{images.name(row)} has the label {column[row]}, but there are {num_classes} classes, counted from 0 "
            f"({len(wrong)} such images in {images.title}); choose another split or label_column"
        )


def load_image_processor(name_or_folder: str, revision: str | None = None) -> BaseImageProcessor:
    """Loads the image processor of a model.

    Args:
        name_or_folder: model on the Hub or local folder, with a `preprocessor_config.json`.
        revision: branch, tag or commit on the Hub.

    Returns:
        The processor; `processor(images=[...], return_tensors="pt")["pixel_values"]` is a (B, 3, H, W) float32 tensor.

    Raises:
        FileNotFoundError: if there is none at that place.
    """
    try:
        return AutoImageProcessor.from_pretrained(find_model(name_or_folder), revision=revision)
    except OSError as error:
        raise FileNotFoundError(
            f"no image processor at {name_or_folder!r}: a local folder needs preprocessor_config.json (written by "
            f"processor.save_pretrained), any other name must exist on the Hub; {error}"
        ) from error


def check_image_size(processor: BaseImageProcessor, patch_size: int) -> tuple[int, int]:
    """Checks that the images a processor puts out divide into whole patches.

    Args:
        processor: image processor; it is tried on two blank images of different shapes.
        patch_size: side of the model's square patches, in pixels.

    Returns:
        Height and width of the processed images, in pixels.

    Raises:
        ValueError: if images of different shapes keep different shapes, or a side is no multiple of `patch_size`.
    """
    blanks = [PIL.Image.new("RGB", size) for size in ((80, 64), (64, 80))]
    shapes = [tuple(processor(images=[blank], return_tensors="pt")["pixel_values"].shape[-2:]) for blank in blanks]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "the image processor's output varies with the shape of its input, such images cannot share a batch; "
            "crop (do_center_crop) or resize to a fixed height and width"
        )
    for side in shapes[0]:
        if side % patch_size:
            below = side // patch_size * patch_size
            nearest = " or ".join(str(size) for size in (below, below + patch_size) if size)
            raise ValueError(
                f"the image processor's output of {shapes[0][0]} x {shapes[0][1]} pixels does not divide into patches "
                f"of patch_size={patch_size}; use {nearest} in place of {side}"
            )
    return shapes[0]


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
        raise ValueError(f"scale={scale} must be (smallest, largest) with 0 < smallest <= largest")
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


def locate_source(dataset: str, split_names: list[str], **hub_options: str | None) -> dict[str, Any]:
    """Turns the word for a data set into the arguments of `load_dataset`."""
    path = os.path.expanduser(dataset)
    if path.endswith(".parquet") or any(character in path for character in "{*?["):
        refuse_options(dataset, **hub_options)
        patterns = {name: path.replace("{split}", name) for name in split_names if "{split}" in path} or {"train": path}
        files = {name: sorted(glob.glob(pattern, recursive=True)) for name, pattern in patterns.items()}
        for name, pattern in patterns.items():
            if not files[name]:
                there = sorted(os.path.basename(file) for file in glob.glob(path.replace("{split}", "*")))
                raise FileNotFoundError(f"no file {pattern!r} for split {name!r}; there are {there or 'none'} like it")
            foreign = [file for file in files[name] if not file.endswith(".parquet")]
            if foreign:
                raise ValueError(f"dataset={dataset!r} matches {foreign[0]!r}, which is not parquet; give a folder")
        return {"path": "parquet", "data_files": files}
    if os.path.isdir(path):
        refuse_options(dataset, revision=hub_options["revision"])
        return {"path": os.path.abspath(path), "name": hub_options["config_name"]}
    if os.path.exists(path):
        raise ValueError(f"dataset={dataset!r} must be a folder, parquet files or the name of a data set on the Hub")
    if path.startswith((os.sep, ".")) or path.count("/") > 1:  # a Hub name is "name" or "owner/name"
        raise FileNotFoundError(f"dataset={dataset!r}: no such folder or file")
    return {"path": dataset, "name": hub_options["config_name"], "revision": hub_options["revision"]}


def refuse_options(dataset: str, **options: str | None) -> None:
    """Raises a ValueError for options, other than None, that only a data set on the Hub has."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option}={value!r} means nothing for the local dataset={dataset!r}; leave it out")


def load_source(dataset: str, **arguments: Any) -> Any:
    """Calls `load_dataset`; its errors name the word for the data set, as FileNotFoundError or ValueError."""
    try:
        return load_dataset(**arguments)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"dataset={dataset!r} is no folder or file with images here, and cannot be had from the Hub: {error}"
        ) from error
    except ValueError as error:  # an unknown configuration, a split without a row
        raise ValueError(f"dataset={dataset!r}: {error}") from error


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


def select_split(splits: Mapping[str, Dataset], split: str) -> Dataset:
    """Applies the slicing syntax of `datasets` to splits in memory."""
    parts = ReadInstruction.from_spec(split).to_absolute({name: rows.num_rows for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def find_image_column(features: Features, wanted: str | None, title: str) -> str:
    """The wanted column of images if it is one, or the only one there is; otherwise a ValueError."""

    def holds_bytes(feature: Any) -> bool:
        dtype = feature.dtype if isinstance(feature, Value) else None
        return dtype in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature)

    if wanted is not None:
        check_column("image_column", wanted, features, title)
        feature = features[wanted]
        is_path = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
        if not (isinstance(feature, Image) or holds_bytes(feature) or is_path):
            raise ValueError(f"image_column={wanted!r} of {title} holds no images but {feature}")
        return wanted
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    found = found or [name for name, feature in features.items() if holds_bytes(feature)]
    if len(found) != 1:
        what = f"several columns of images, {found}" if found else "no column of images"
        raise ValueError(f"{title} has {what}; name one with image_column. Its columns are {list(features)}")
    return found[0]


def _find_label_column(features: Features, wanted: str | None, title: str) -> str | None:
    integers = [
        name
        for name, feature in features.items()
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and feature.dtype.startswith(("int", "uint")))
    ]
    if wanted is not None:
        check_column("label_column", wanted, features, title)
        if wanted not in integers:
            raise ValueError(f"label_column={wanted!r} of {title} holds no class labels but {features[wanted]}")
        return wanted
    found = [name for name in ("label", "labels") if name in integers]
    found = found[:1] or [name for name in integers if isinstance(features[name], ClassLabel)]
    if len(found) > 1:
        raise ValueError(f"{title} has several columns of class labels, {found}; name one with label_column")
    # `imagefolder` takes the folders train/ and test/ for classes when there are no folders of classes in them.
    if not found or set(getattr(features[found[0]], "names", [""])) <= _SPLIT_FOLDERS:
        return None
    return found[0]


def check_column(argument: str, column: str, features: Features, title: str) -> None:
    """Raises a ValueError for a column that is not there, saying which are."""
    if column not in features:
        raise ValueError(f"{argument}={column!r} is no column of {title}; its columns are {list(features)}")
