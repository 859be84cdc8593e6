"""Finds the files, splits and columns of a data set by its name, and holds out images to test on.

    train, test = open_splits(lambda split: open_images("photos", split), "train", None)

`images` and `dense` open data sets with these functions; nothing here reads an image.
"""

import glob
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, ReadInstruction, Value, concatenate_datasets, load_dataset

HELD_OUT = "held_out"  # the test split that a data set without one gets
HELD_OUT_FRACTION, MAX_HELD_OUT = 10, 5000  # every tenth image

_SPLIT_FOLDERS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
_TEST_SPLITS = ("validation", "test")

AnySet = TypeVar("AnySet")  # ImageSet or DenseSet


class MissingSplitError(FileNotFoundError, ValueError):
    """A data set does not have the split; the message says which it has."""


def open_splits(
    open_split: Callable[[str], AnySet], train_split: str, test_split: str | None = None
) -> tuple[AnySet, AnySet]:
    """Opens training and test images; holds out some of the training images where there are no test images.

    Args:
        open_split: opens one split, as `open_images` or `open_dense`.
        train_split: as `open_images` takes it.
        test_split: as `open_images` takes it; or "held_out" for 10 % of the images of `train_split`, at most 5,000,
            always the same ones, which are then not trained on. None takes "validation", else "test", else "held_out",
            the first that there is.

    Returns:
        Training images and test images; the attribute `split` of the latter says which split they are.

    Raises:
        MissingSplitError: if a split is not there.
        ValueError: as `open_split` does; if images are to be held out of a stream or of a single image.
    """
    train = _open_named(open_split, "train_split", train_split)
    for split in (test_split,) if test_split else _TEST_SPLITS:
        if split == HELD_OUT:
            break
        try:
            return train, _open_named(open_split, "test_split", split)
        except MissingSplitError:
            if test_split:
                raise
    if train.streaming:
        raise ValueError(f"{train.title} is a stream, of which nothing can be held out; give test_split")
    if train.num_images < 2:
        raise ValueError(f"{train.title} has one image only, of which none can be held out; give test_split")
    num_held_out = min(MAX_HELD_OUT, max(1, train.num_images // HELD_OUT_FRACTION))
    order = np.random.default_rng(0).permutation(train.num_images)
    held_out, kept = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    return (
        train.select(kept, train_split, f"{train.title} (without {num_held_out:,} held out)"),
        train.select(held_out, HELD_OUT, f"{train.title} ({num_held_out:,} held out)"),
    )


def _open_named(open_split: Callable[[str], AnySet], setting: str, split: str) -> AnySet:
    try:
        return open_split(split)
    except ValueError as error:
        if not str(error).startswith("Unrecognized instruction"):
            raise
        raise ValueError(f"{setting} is {split!r}; it must be a split or a part of one, such as train[:80%]") from error


def locate_source(dataset: str, split_names: list[str], **hub_options: str | None) -> dict[str, Any]:
    """Turns the name of a data set into the arguments of `load_dataset`.

    Args:
        dataset: folder, file, pattern of files or name on the Hub; what exists is never taken for a pattern.
        split_names: whose files are wanted, where `dataset` has `{split}` in it.
        **hub_options: `config_name` and `revision`.

    Raises:
        MissingSplitError: if a split has no file.
        FileNotFoundError: if there is no such folder or file.
        ValueError: for files that are not parquet, and for an option that does not go with `dataset`.
    """
    path = os.path.expanduser(dataset)
    if os.path.isdir(path):
        refuse_options(dataset, revision=hub_options["revision"])
        folder = os.path.abspath(path)
        if glob.escape(folder) == folder:
            return {"path": folder, "name": hub_options["config_name"]}
        # `load_dataset` would take the brackets and stars of its name for a pattern, and has no other way to it
        names = (name for _, _, names in os.walk(folder) for name in names)
        kind = "parquet" if any(name.endswith(".parquet") for name in names) else "imagefolder"
        return {"path": kind, "name": hub_options["config_name"], "data_dir": glob.escape(folder)}
    if path.endswith(".parquet") or any(character in path for character in "{*?["):
        refuse_options(dataset, **hub_options)
        pattern = _escape_what_exists(path)
        patterns = {name: pattern.replace("{split}", glob.escape(name)) for name in split_names}
        patterns = patterns if "{split}" in pattern else {"train": pattern}
        files = {name: sorted(glob.glob(pattern, recursive=True)) for name, pattern in patterns.items()}
        for name in files:
            if not files[name]:
                there = sorted(os.path.basename(file) for file in glob.glob(pattern.replace("{split}", "*")))
                wanted = path.replace("{split}", name)
                raise MissingSplitError(f"no file {wanted!r} for split {name!r}; there are {there or 'none'} like it")
            foreign = [file for file in files[name] if not file.endswith(".parquet")]
            if foreign:
                raise ValueError(f"dataset={dataset!r} matches {foreign[0]!r}, which is not parquet; give a folder")
        escaped = {name: [glob.escape(os.path.abspath(file)) for file in found] for name, found in files.items()}
        return {"path": "parquet", "data_files": escaped}
    if os.path.exists(path):
        raise ValueError(
            f"dataset is {dataset!r}; it must be a folder, parquet files or the name of a data set on the Hub"
        )
    if path.startswith((os.sep, ".")) or path.count("/") > 1:  # a Hub name is "name" or "owner/name"
        raise FileNotFoundError(f"dataset={dataset!r}: no such folder or file, seen from {os.getcwd()}")
    return {"path": dataset, "name": hub_options["config_name"], "revision": hub_options["revision"]}


def _escape_what_exists(path: str) -> str:
    """A pattern of files, in which the part that exists as it is spelled stands for itself."""
    if os.path.exists(path):
        return glob.escape(path)
    head, tail = os.path.split(path)
    return os.path.join(_escape_what_exists(head), tail) if head and head != path else path


def folder_of(source: Mapping[str, Any]) -> str | None:
    """The local folder that relative paths in a data set start from; None for one on the Hub."""
    if "data_files" in source:
        first = next(iter(source["data_files"].values()))[0]
        return os.path.dirname(re.sub(r"\[([*?[])\]", r"\1", first))
    if "data_dir" in source:
        return re.sub(r"\[([*?[])\]", r"\1", source["data_dir"])
    return source["path"] if os.path.isdir(source["path"]) else None


def refuse_options(dataset: str, **options: str | None) -> None:
    """Raises a ValueError for options, other than None, that only a data set on the Hub has."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option}={value!r} means nothing for the local dataset={dataset!r}; leave it out")


def load_source(dataset: str, **arguments: Any) -> Any:
    """Calls `load_dataset`; raises its errors as FileNotFoundError or ValueError that name the data set."""
    try:
        return load_dataset(**arguments)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"dataset={dataset!r} is no folder or file with images here, and the Hub does not give it: {error}"
        ) from error
    except ValueError as error:  # an unknown configuration, a split without a row
        raise ValueError(f"dataset={dataset!r}: {error}") from error


def select_split(splits: Mapping[str, Dataset], split: str) -> Dataset:
    """Applies the slicing syntax of `datasets` to splits in memory."""
    parts = ReadInstruction.from_spec(split).to_absolute({name: rows.num_rows for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def find_image_column(features: Features, wanted: str | None, title: str) -> str:
    """Returns the wanted column if it holds images, or the only one that does; else raises a ValueError."""

    def holds_bytes(feature: Any) -> bool:
        dtype = feature.dtype if isinstance(feature, Value) else None
        return dtype in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature)

    if wanted is not None:
        check_column("image_column", wanted, features, title)
        feature = features[wanted]
        if not (isinstance(feature, Image) or holds_bytes(feature) or is_text(feature)):
            raise ValueError(f"image_column={wanted!r} of {title} holds no images but {feature}")
        return wanted
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    found = found or [name for name, feature in features.items() if holds_bytes(feature)]
    if len(found) != 1:
        what = f"several columns of images, {found}" if found else "no column of images"
        raise ValueError(f"{title} has {what}; name one with image_column. Its columns are {list(features)}")
    return found[0]


def find_label_column(features: Features, wanted: str | None, title: str) -> str | None:
    """Returns the wanted column of class labels, numbers or names, or the only possible one; None if there is none."""
    integers = [
        name
        for name, feature in features.items()
        if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and feature.dtype.startswith(("int", "uint")))
    ]
    if wanted is not None:
        check_column("label_column", wanted, features, title)
        if wanted not in integers and not is_text(features[wanted]):
            raise ValueError(f"label_column={wanted!r} of {title} holds no class labels but {features[wanted]}")
        return wanted
    named = [name for name in ("label", "labels") if name in features]
    found = [name for name in named if name in integers] or [name for name in named if is_text(features[name])]
    found = found[:1] or [name for name in integers if isinstance(features[name], ClassLabel)]
    if len(found) > 1:
        raise ValueError(f"{title} has several columns of class labels, {found}; name one with label_column")
    # `imagefolder` takes the folders train/ and test/ for classes when there are no folders of classes in them.
    if not found or set(getattr(features[found[0]], "names", [""])) <= _SPLIT_FOLDERS:
        return None
    return found[0]


def is_text(feature: Any) -> bool:
    """Whether a column holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def check_column(argument: str, column: str, features: Features, title: str) -> None:
    """Raises a ValueError for a column that is not there, saying which are."""
    if column not in features:
        raise ValueError(f"{argument}={column!r} is no column of {title}; its columns are {list(features)}")
