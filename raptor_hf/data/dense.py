"""Opens images with a truth for every pixel, masks of classes or maps of depth, as a `DenseSet`.

    images = open_dense("semantic-segmentation", "ADEChallengeData2016", "training")
    image, mask = images.decode(0)                     # a PIL image in RGB, and (H, W) int64 with 255 ignored
    images = open_dense("depth-estimation", "nyu_depth_v2", "test", depth_unit=0.001)
    image, depth = images.decode(0)                    # a PIL image in RGB, and (H, W) float32 in metres, 0 invalid
    images.check()

As in `images`, a file stays undecoded until it is read, and a damaged one costs one image. In training so does a wrong
truth, such as a label that is no class; in an evaluation it is an error. `check` looks for them before any work starts.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image, IterableDataset, ReadInstruction, Value

from ..image_processing_raptor import IGNORE_INDEX
from .images import ImageDecodeError, ImageSet
from .scenes import CLASS_NAMES, SPLIT_SIZES, load_scenes
from .sources import (
    MissingSplitError,
    check_column,
    find_image_column,
    load_source,
    locate_source,
    refuse_options,
    select_split,
)

DenseTask = Literal["semantic-segmentation", "depth-estimation"]

# Names that columns of masks and depth have in data sets, in the order in which they are taken.
_TARGET_COLUMNS = {
    "semantic-segmentation": ("mask", "annotation", "segmentation", "segmentation_mask", "target", "label", "labels"),
    "depth-estimation": ("depth", "depth_map", "target", "label", "labels"),
}


class TargetError(ImageDecodeError):
    """A mask or depth map can be read but is wrong; arguments as in `ImageDecodeError`."""


@dataclass(frozen=True)
class DenseSet:
    """One split of a data set of images with masks or depth maps, undecoded; loaders take it like an `ImageSet`.

    Attributes:
        images: the rows, without labels.
        task: "semantic-segmentation" or "depth-estimation".
        target_column: of masks or depth maps, as `datasets.Image(decode=False)`.
        class_names: of the classes in the order of their labels; None for depth.
        ignore_label: value of the pixels of a stored mask that have no class. If it is 0, the stored classes count from
            1, as in ADE20k.
        depth_unit: metres per unit of a stored depth map; None says that it holds metres, in floating point.
    """

    images: ImageSet
    task: DenseTask
    target_column: str
    class_names: list[str] | None = None
    ignore_label: int = IGNORE_INDEX
    depth_unit: float | None = None

    @property
    def dataset(self) -> Dataset | IterableDataset:
        """The rows of images and targets."""
        return self.images.dataset

    @property
    def title(self) -> str:
        """Data set and split, for messages."""
        return self.images.title

    @property
    def streaming(self) -> bool:
        """Whether the images come as a stream, without a count and without access by index."""
        return self.images.streaming

    @property
    def num_images(self) -> int | None:
        """Number of images, None for a stream."""
        return self.images.num_images

    @property
    def has_labels(self) -> bool:
        """Always true: every image comes with a target."""
        return True

    @property
    def split(self) -> str:
        """Name of the split."""
        return self.images.split

    def select(self, rows: Sequence[int], split: str, title: str) -> "DenseSet":
        """Returns the set of some of its rows, as `ImageSet.select`."""
        return replace(self, images=self.images.select(rows, split, title))

    def name(self, index: int) -> str:
        """Returns the file path of an image, or its row where the data set holds the bytes."""
        return self.images.name(index)

    def decode(self, index: int) -> tuple[PIL.Image.Image, np.ndarray]:
        """Reads one image of a set that is no stream.

        Args:
            index: row of the image.

        Returns:
            Image and target, as `read_row`.

        Raises:
            ImageDecodeError: if one of them cannot be read or cannot be right.
        """
        _, image, target = self.read_row(self.dataset[index], index)
        return image, target

    def read_row(self, row: Mapping[str, Any], index: int | None = None) -> tuple[str, PIL.Image.Image, np.ndarray]:
        """Reads the image and the target of a row of `dataset`.

        Args:
            row: as iterating over or indexing `dataset` gives it.
            index: of the row, None in a stream.

        Returns:
            Name; RGB image; and for segmentation its classes, (H, W), int64, from 0, with 255 where there is none, or
            its depth, (H, W), float32, in metres, with 0 where it is not known.

        Raises:
            ImageDecodeError: if image or target cannot be read.
            TargetError: if the target has another size than the image, holds a label that is no class or no valid
                depth, or is of the wrong kind.
        """
        name, image, _ = self.images.read_row(row, index)
        stored = row[self.target_column]
        if stored is None:
            raise ImageDecodeError(name, f"the row holds no {self.target_column!r}")
        kind = "mask" if self.task == "semantic-segmentation" else "depth map"
        what = f"its {kind} {stored['path']}" if stored.get("path") else f"its {kind}"
        try:
            values = np.asarray(Image().decode_example(stored))
        except Exception as error:
            # as for images, Pillow's plugins raise nearly anything on damaged bytes
            raise ImageDecodeError(name, f"{what}: {type(error).__name__}: {error}") from error
        try:
            if values.ndim != 2:
                raise ValueError(f"has {values.shape[2]} channels; one number per pixel is needed")
            if values.shape != (image.height, image.width):
                raise ValueError(
                    f"is {values.shape[0]} x {values.shape[1]} pixels large, the image {image.height} x {image.width}; "
                    "both must agree"
                )
            return name, image, self._classes(values) if kind == "mask" else self._metres(values)
        except ValueError as error:
            raise TargetError(name, f"{what} {error}") from error

    def check(self, limit: int = 100, depth_range: tuple[float, float] | None = None) -> None:
        """Reads a sample of the set, evenly spaced or the first of a stream, to find what cannot be right.

        A single file that cannot be read passes, as it would while training.

        Args:
            limit: number of images to read.
            depth_range: nearest and farthest valid depth in metres; None takes every positive depth for valid.

        Raises:
            ValueError: if a target is of another size than its image, of the wrong kind, holds a label that is no class
                or no valid depth, naming the image and the value; or if no image of the sample can be read.
        """
        if limit < 1:
            raise ValueError(f"limit is {limit}; it must be positive")
        num_read, unreadable = 0, None
        for row, index in self._sample(limit):
            try:
                name, _, target = self.read_row(row, index)
            except TargetError as error:
                raise ValueError(f"{error.name} of {self.title}: {error.reason}") from error
            except ImageDecodeError as error:
                unreadable = error
                continue
            num_read += 1
            if depth_range is not None and not ((target >= depth_range[0]) & (target <= depth_range[1])).any():
                found = target[target > 0]
                raise ValueError(
                    f"{name} of {self.title}: no depth is valid, between {depth_range[0]} and {depth_range[1]} m; they "
                    f"are {found.min():.4g} to {found.max():.4g} m with depth_unit={self.depth_unit}"
                )
        if num_read == 0:
            raise ValueError(f"none of the images of {self.title} that were tried can be read, such as: {unreadable}")

    def _sample(self, limit: int) -> Iterator[tuple[dict[str, Any], int | None]]:
        if self.streaming:
            return ((row, None) for row in itertools.islice(self.dataset, limit))
        indices = np.unique(np.linspace(0, self.num_images - 1, min(limit, self.num_images)).astype(np.int64)).tolist()
        return ((self.dataset[index], index) for index in indices)

    def _classes(self, values: np.ndarray) -> np.ndarray:
        if np.issubdtype(values.dtype, np.floating):
            raise ValueError(f"holds {values.dtype}; labels must be integers")
        stored = values.astype(np.int64)
        ignored = stored == self.ignore_label
        first = 1 if self.ignore_label == 0 else 0
        num_classes = len(self.class_names)
        wrong = ~ignored & ((stored < first) | (stored >= first + num_classes))
        if wrong.any():
            row, column = (int(place) for place in np.argwhere(wrong)[0])
            raise ValueError(
                f"holds the label {stored[row, column]} at row {row}, column {column}; the {num_classes} classes are "
                f"{first} to {first + num_classes - 1}, and {self.ignore_label} is ignored"
            )
        return np.where(ignored, IGNORE_INDEX, stored - first)

    def _metres(self, values: np.ndarray) -> np.ndarray:
        if self.depth_unit is None and not np.issubdtype(values.dtype, np.floating):
            raise ValueError(
                f"holds integers, 0 to {values.max()}, whose unit it does not tell; give depth_unit, metres per step, "
                "such as 0.001 for millimetres, as in NYUv2"
            )
        # in double precision, so that the largest depth of bytes, 255 * (10 / 255), is not beyond 10 m
        depth = (values * np.float64(1.0 if self.depth_unit is None else self.depth_unit)).astype(np.float32)
        depth = np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))
        if not depth.any():
            raise ValueError("holds no valid depth, which is finite and above 0")
        return depth


def open_dense(
    task: DenseTask,
    dataset: str,
    split: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    target_column: str | None = None,
    depth_unit: float | None = None,
    num_classes: int | None = None,
    ignore_label: int | None = None,
    streaming: bool = False,
) -> DenseSet:
    """Opens one split of a data set of images with masks or depth maps; no image is read.

    Args:
        task: "semantic-segmentation" or "depth-estimation".
        dataset: one of
            - `"scenes"`: the embedded stand-in, see `raptor_hf.data.scenes`;
            - a local folder as ADE20k's ADEChallengeData2016: `images/SPLIT/NAME.jpg` and `annotations/SPLIT/NAME.png`,
              with the splits "training" and "validation", and `objectInfo150.txt` for the names of the classes;
            - a local folder as NYUv2 is at Kaggle: the lists of pairs `data/nyu2_SPLIT.csv` with the splits "train" and
              "test", whose depth is in bytes (255 is 10 m) and in 16-bit millimetres;
            - a local folder as NYUv2 is laid out for depth networks: `official_splits/SPLIT/SCENE/rgb_N.jpg` and
              `sync_depth_N.png`, with the splits "train" and "test". A list of pairs beside it,
              `nyudepthv2_SPLIT_files_with_gt.txt` of BTS or `nyu_SPLIT.txt` of the Monocular Depth Toolbox, takes
              precedence; its paths start in the folder, in `sync` (training only), `official_splits/SPLIT` or `SPLIT`;
            - parquet files, any other folder or a data set on the Hub, as `open_images` finds them, with
              a column of images and one of masks or depth maps.
        split: name of a split; slices and sums in the syntax of `datasets` work too ("train[:1%]"), except in a stream.
        config_name: which configuration of a Hub data set or of a folder; of the scenes, such as "depth-64".
        revision: branch, tag or commit of a Hub data set.
        image_column: column of images, bytes or paths; found by its type if None.
        target_column: column of masks or depth maps, images too; found by its name if None.
        depth_unit: metres per unit of the stored depth; required where it is stored in integers, 0.001 for NYUv2's
            millimetres, 10 / 255 for Kaggle's bytes. None takes floating point for metres.
        num_classes: C, at most 255. None is what the data set tells: 150 for ADE20k; other files do not tell.
        ignore_label: stored label of the pixels without a class; if it is 0, classes are stored as 1 .. C. None is 0
            for ADE20k and 255 for everything else.
        streaming: read on the fly instead of downloading and preparing the whole data set first.

    Returns:
        The images of the split.

    Raises:
        FileNotFoundError: if there is no such data set, no file for the split, or an image without a target.
        ValueError: if the split or a column is not there, saying what is; for an option that does not go with the task
            or the data set, and for masks whose number of classes is not known.
    """
    _check_options(task, depth_unit=depth_unit, num_classes=num_classes, ignore_label=ignore_label)
    ReadInstruction.from_spec(split)  # raises for a malformed slice
    folder = Path(dataset).expanduser()
    columns = {"image_column": image_column, "target_column": target_column}
    is_mask, class_names = task == "semantic-segmentation", None
    if dataset == "scenes":
        refuse_options(dataset, revision=revision, **columns)
        _check_splits(dataset, split, SPLIT_SIZES)
        rows = _take(lambda name: load_scenes(task, name, config_name), split, streaming)
        image_column, target_column = rows.column_names
        class_names = CLASS_NAMES
    elif is_mask and (folder / "annotations").is_dir() and (folder / "images").is_dir():
        refuse_options(dataset, config_name=config_name, revision=revision, **columns)
        _check_splits(dataset, split, _subfolders(folder / "images"))
        rows = _take(lambda name: _paths(_ade_pairs(folder, name)), split, streaming)
        image_column, target_column = rows.column_names
        class_names = _ade_class_names(folder)
        ignore_label = 0 if ignore_label is None else ignore_label
    elif not is_mask and (nyu_splits := _nyu_splits(folder)):
        refuse_options(dataset, config_name=config_name, revision=revision, **columns)
        _check_splits(dataset, split, nyu_splits)
        rows = _take(lambda name: _paths(_nyu_pairs(folder, name)), split, streaming)
        image_column, target_column = rows.column_names
    else:
        rows, image_column, target_column = _open_columns(
            task, dataset, split, config_name, revision, image_column, target_column, streaming
        )
    title = f"{dataset} {split}"
    if not streaming and rows.num_rows == 0:
        raise ValueError(f"{title} holds no images")
    for column in (image_column, target_column):
        rows = rows.cast_column(column, Image(decode=False))
    return DenseSet(
        images=ImageSet(rows, title, image_column, split=split),
        task=task,
        target_column=target_column,
        class_names=_name_classes(class_names, num_classes, title) if is_mask else None,
        ignore_label=IGNORE_INDEX if ignore_label is None else ignore_label,
        depth_unit=depth_unit,
    )


def _check_options(task: str, **options: float | None) -> None:
    of_task = {"semantic-segmentation": ("num_classes", "ignore_label"), "depth-estimation": ("depth_unit",)}
    if task not in of_task:
        raise ValueError(f"task is {task!r}; it must be one of {list(of_task)}")
    for name, value in options.items():
        if value is not None and name not in of_task[task]:
            raise ValueError(f"{name}={value} means nothing for task={task!r}; leave it out")
    if (unit := options["depth_unit"]) is not None and not 0 < unit < float("inf"):
        raise ValueError(f"depth_unit is {unit}; it must be a positive number of metres")
    if (count := options["num_classes"]) is not None and not 1 <= count <= IGNORE_INDEX:
        raise ValueError(f"num_classes is {count}; it must be between 1 and {IGNORE_INDEX}, which stands for no class")


def _check_splits(dataset: str, split: str, there: Collection[str]) -> None:
    names = [part.split("[")[0].strip() for part in split.split("+")]
    if any(name not in there for name in names):
        raise MissingSplitError(f"split={split!r} of {dataset!r} does not exist; its splits are {sorted(there)}")


def _take(load: Callable[[str], Dataset], split: str, streaming: bool) -> Dataset | IterableDataset:
    """Loads the splits that are named in `split`, and of them what it says."""
    names = {part.split("[")[0].strip() for part in split.split("+")}
    if streaming and names != {split}:
        raise ValueError(f"split={split!r}: streaming=True reads one whole split, such as {sorted(names)[0]!r}")
    splits = {name: load(name) for name in names}
    return splits[split].to_iterable_dataset() if streaming else select_split(splits, split)


def _paths(pairs: list[tuple[Path, Path]]) -> Dataset:
    features = Features({"image": Image(decode=False), "target": Image(decode=False)})
    images, targets = ([str(path.absolute()) for path in paths] for paths in zip(*pairs, strict=True))
    return Dataset.from_dict({"image": images, "target": targets}, features=features)


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _ade_pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    images = sorted((folder / "images" / split).glob("*.jpg"))
    there = {path.name for path in (folder / "annotations" / split).glob("*.png")}
    pairs = [(image, folder / "annotations" / split / f"{image.stem}.png") for image in images]
    return _all_there(pairs, [target for _, target in pairs if target.name not in there], folder, split)


def _ade_class_names(folder: Path) -> list[str]:
    """The last column of the table of classes, or numbers."""
    table = folder / "objectInfo150.txt"
    if not table.is_file():
        return [str(label) for label in range(150)]
    lines = table.read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t")[-1].strip() for line in lines if line.strip()]


def _nyu_lists(folder: Path, split: str) -> list[Path]:
    names = (f"nyudepthv2_{split}_files_with_gt.txt", f"nyu_{split}.txt", f"data/nyu2_{split}.csv", f"nyu2_{split}.csv")
    return [folder / name for name in names if (folder / name).is_file()]


def _nyu_splits(folder: Path) -> list[str]:
    listed = {split for split in ("train", "test") if _nyu_lists(folder, split)}
    return sorted(listed | set(_subfolders(folder / "official_splits")))


def _nyu_pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    lists = _nyu_lists(folder, split)
    if not lists:
        images = sorted((folder / "official_splits" / split).glob("*/rgb_*.jpg"))
        pairs = [(path, path.with_name(f"sync_depth_{path.stem.removeprefix('rgb_')}.png")) for path in images]
        return _all_there(pairs, [target for _, target in pairs if not target.is_file()], folder, split)
    separator = "," if lists[0].suffix == ".csv" else None
    lines = lists[0].read_text(encoding="utf-8-sig").splitlines()
    lines = [[field.strip() for field in line.split(separator)] for line in lines if line.strip()]
    for number, fields in enumerate(lines, start=1):
        if len(fields) < 2:
            raise ValueError(f"line {number} of {lists[0]} must be an image and its depth map: {fields}")
    pairs = [(fields[0].lstrip("/"), fields[1].lstrip("/")) for fields in lines]
    # `sync` holds training images only, but scenes of the same names as the test images
    bases = [folder, *[folder / "sync"] * (split == "train"), folder / "official_splits" / split, folder / split]
    bases += [folder.parent] if separator else []  # Kaggle's paths begin with data/, also for who opens data/ itself
    base = next((base for base in bases if any((base / image).is_file() for image, _ in pairs[:100])), None)
    if base is None:
        raise FileNotFoundError(
            f"the images that {lists[0]} lists, such as {pairs[0][0] if pairs else 'none'}, are in none of "
            f"{[str(base) for base in bases]}"
        )
    # Tens of thousands of files: one that is missing costs an image when it is read, as a damaged one does.
    return [(base / image, base / target) for image, target in pairs]


def _all_there(
    pairs: list[tuple[Path, Path]], missing: list[Path], folder: Path, split: str
) -> list[tuple[Path, Path]]:
    if not pairs:
        raise FileNotFoundError(f"split {split!r} of {folder} holds no images (.jpg)")
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(pairs)} images have no target, the first is {missing[0]}")
    return pairs


def _open_columns(
    task: str,
    dataset: str,
    split: str,
    config_name: str | None,
    revision: str | None,
    image_column: str | None,
    target_column: str | None,
    streaming: bool,
) -> tuple[Dataset | IterableDataset, str, str]:
    """Rows of a data set with two columns of images, and the names of these."""
    split_names = [part.split("[")[0].strip() for part in split.split("+")]
    source = locate_source(dataset, split_names, config_name=config_name, revision=revision)
    splits = load_source(dataset, **source, streaming=True)  # lists files and columns, reads no image
    _check_splits(dataset, split, splits)
    if streaming and split not in splits:
        raise ValueError(f"split={split!r}: streaming=True reads one whole split, one of {sorted(splits)}")
    features, title = splits[split_names[0]].features or Features(), f"{dataset} {split}"
    target_column = _find_target_column(features, target_column, task, title)
    others = Features({name: feature for name, feature in features.items() if name != target_column})
    image_column = find_image_column(others, image_column, title)
    rows = splits[split] if streaming else load_source(dataset, **source, split=split)
    return rows.select_columns([image_column, target_column]), image_column, target_column


def _find_target_column(features: Features, wanted: str | None, task: str, title: str) -> str:
    def is_number(feature: Any) -> bool:
        return isinstance(feature, Value) and not feature.dtype.endswith(("binary", "string"))

    if wanted is None:
        found = [name for name in _TARGET_COLUMNS[task] if name in features and not is_number(features[name])]
        if not found:
            raise ValueError(
                f"{title} has none of the columns {_TARGET_COLUMNS[task]}; name that of the masks or depth maps with "
                f"target_column. Its columns are {list(features)}"
            )
        return found[0]
    check_column("target_column", wanted, features, title)
    if is_number(features[wanted]):
        raise ValueError(f"target_column={wanted!r} of {title} holds no images but {features[wanted]}")
    return wanted


def _name_classes(names: list[str] | None, num_classes: int | None, title: str) -> list[str]:
    if names is None and num_classes is None:
        raise ValueError(f"{title} does not tell how many classes its masks have; give num_classes")
    if names is not None and num_classes not in (None, len(names)):
        raise ValueError(f"num_classes={num_classes}, but {title} has {len(names)} classes; leave it out")
    return [str(label) for label in range(num_classes)] if names is None else list(names)
