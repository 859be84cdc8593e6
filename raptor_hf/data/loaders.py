"""Makes batches for the recipes: worker processes read the images, in an order that a resumed run repeats.

    loader = train_loader(images, processor, batch_size=64, seed=0, start_step=step, num_steps=312_500)
    for batch in loader:
        batch["pixel_values"]                          # (64, 3, H, W)

Training sees one endless sequence of positions: epoch after epoch, each a permutation drawn from (seed, epoch). Step t
takes the positions t B to (t + 1) B - 1, and process r of n takes the r-th of n equal parts of them. Nothing else
decides what is in a batch, so a run that stops and goes on, or goes on with another number of processes or workers,
sees the images it would have seen. Damaged images and augmentation do not change this: an image that cannot be read is
replaced by the next one of the same sequence, and each image is augmented by a generator of its own, seeded from (seed,
place in the sequence).
"""

import functools
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import PIL.Image
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from transformers.image_processing_utils import BaseImageProcessor

from .dense import DenseSet, TargetError
from .images import ImageDecodeError, ImageSet
from .sizes import SizedSteps

logger = logging.getLogger(__name__)

# Image, its label or map, and the generator of its place in the sequence -> image and label or map.
Augment = Callable[[PIL.Image.Image, Any, np.random.Generator], tuple[PIL.Image.Image, Any]]
LastBatch = Literal["join", "drop", "keep"]
# Images and their labels or maps -> the tensors of a batch.
Collate = Callable[[list[PIL.Image.Image], list[Any]], dict[str, Tensor]]


class Batch(TypedDict):
    """The batch that a loader yields.

    Attributes:
        pixel_values: processed images, (b, 3, H, W), float32.
        names: of the images, b of them; a loader passes on no batch without images.
        failures: name to reason, for the images that could not be read while making this batch.
        labels: class labels, (b,), int64, -1 where an image has none, or maps, (b, H, W), as the collation makes them;
            only if there are labels.
        error: why no batch could be made; the loader raises it.
    """

    pixel_values: Tensor
    names: list[str]
    failures: dict[str, str]
    labels: NotRequired[Tensor]
    error: NotRequired[Exception]


class TooManyFailuresError(RuntimeError):
    """More images than allowed cannot be read."""


class FailureLimit:
    """Counts the images that cannot be read, each once, and gives up past a limit.

    Args:
        max_failures: number of unreadable images that are tolerated.

    Attributes:
        reasons: name to reason, for every image that failed so far.

    Raises:
        ValueError: if `max_failures` is negative.
    """

    def __init__(self, max_failures: int) -> None:
        if max_failures < 0:
            raise ValueError(f"max_failures is {max_failures}; it must not be negative")
        self.max_failures = max_failures
        self.reasons: dict[str, str] = {}

    def record(self, failures: Mapping[str, str]) -> None:
        """Counts and logs the failures that are new.

        Args:
            failures: name to reason, as in a batch.

        Raises:
            TooManyFailuresError: if there are now more than `max_failures`, naming the last ones.
        """
        for name, reason in failures.items():
            if name not in self.reasons:
                self.reasons[name] = reason
                logger.warning("cannot read %s: %s (%d unreadable so far)", name, reason, len(self.reasons))
        if len(self.reasons) > self.max_failures:
            raise _too_many(f"{len(self.reasons)} images", self.max_failures, self.reasons)


class ImageLoader:
    """Yields batches and counts this process's unreadable images; `train_loader` and `eval_loader` make it.

    Attributes:
        failures: the count; `failures.reasons` names the images.

    Raises:
        TooManyFailuresError: while iterating, if more images than allowed cannot be read, or all of them.
        TargetError: while iterating, for a mask or depth map that is wrong.
    """

    def __init__(self, loader: DataLoader, max_failures: int) -> None:
        self.failures = FailureLimit(max_failures)
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        any_read = False
        for batch in self._loader:
            if "error" in batch:  # of a worker, which could raise it only as text with the stack of another process
                raise batch["error"]
            self.failures.record(batch["failures"])
            if batch["names"]:
                any_read = True
                yield batch
        if self.failures.reasons and not any_read:
            raise _too_many(
                f"all {len(self.failures.reasons)} images", self.failures.max_failures, self.failures.reasons
            )


def train_loader(
    images: ImageSet | DenseSet,
    processor: BaseImageProcessor,
    *,
    batch_size: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    shuffle: bool = True,
    shuffle_buffer: int = 1000,
    max_failures: int = 100,
    augment: Augment | None = None,
    collate: Collate | None = None,
    pin_memory: bool = False,
    last_batch: LastBatch = "join",
    sized: SizedSteps | None = None,
) -> ImageLoader:
    """Makes the batches of a training run, or of the rest of one.

    A stream has no random access, which weakens two promises of this module: images are shuffled within a buffer only,
    and a run goes on exactly where it stopped only with the same numbers of processes and workers, after reading (not
    decoding) all that went before. Each worker of each process streams files of its own if there are enough of them;
    else each reads all files and skips the images of the others.

    Args:
        images: what to train on.
        processor: turns a list of RGB images into `pixel_values`; not used where there is a `collate`.
        batch_size: B, images per step in all processes together.
        seed: of the order, not negative.
        num_steps: steps of the whole run; the loader yields those from `start_step` on.
        start_step: steps already done.
        process_index: r, of this process.
        num_processes: n; every process gets B / n images per step.
        num_workers: worker processes of this process, 0 to read in the process itself; of a set that is no stream
            no more than there are cores, which changes no batch.
        shuffle: whether to permute every epoch; otherwise each runs in the order of the set.
        shuffle_buffer: undecoded images that each worker holds to shuffle a stream.
        max_failures: unreadable images that each process tolerates before it stops.
        augment: changes an image and its label or map; all its randomness must come from the generator it is given,
            and `num_workers` other than 0 may need it to be picklable.
        collate: makes tensors of the images and labels or maps of a batch, as those of `transforms` do; None
            is the processor, and class labels as they are.
        pin_memory: whether batches come in page-locked memory, which a GPU reads faster; of no effect without CUDA.
        last_batch: as in `Steps`; with another value than "join", batches may be smaller and epochs shorter.
        sized: the size and number of the images of each step, in place of `batch_size`, `processor` and `augment`.

    Returns:
        The loader, with `num_steps - start_step` batches of B / n images.

    Raises:
        ValueError: if the batch does not divide among the processes, a number is out of range, maps come without a
            `collate`, or `sized` with a stream or a `collate`.
    """
    size = _local_size(batch_size, process_index, num_processes)
    if not 0 <= start_step <= num_steps:
        raise ValueError(f"start_step is {start_step}; it must be between 0 and num_steps={num_steps}")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    reader = _Reader(images, _collation(images, processor, collate), max_failures, augment, seed)
    # The loader seeds its workers; by a generator of its own it leaves torch's global one, the run's, alone.
    generator = torch.Generator().manual_seed(seed)
    options = {"num_workers": num_workers, "generator": generator, "pin_memory": pin_memory}
    if sized is not None:
        if images.streaming or collate is not None:
            raise ValueError("sized is given; it goes neither with a stream nor with a collate")
        order = EpochOrder(images.num_images, seed if shuffle else None)
        readers = {
            side: _Reader(images, _collation(images, view.processor, None), max_failures, view.augment, seed)
            for side, view in sized.views.items()
        }
        steps = range(start_step, num_steps)
        items = [(sized.sizes[step], sized.positions(step, process_index, num_processes)) for step in steps]
        batches = _SizedBatches({side: _Batches(reader, order) for side, reader in readers.items()})
        return _image_loader(batches, max_failures, sampler=items, **options)
    if images.streaming:
        if last_batch != "join":
            raise ValueError(f"last_batch={last_batch!r}: a stream does not tell where an epoch ends")
        rows = _Stream(images.dataset, seed if shuffle else None, shuffle_buffer)
        stream = _StreamedSteps(reader, rows, size, start_step, num_steps, process_index, num_processes)
        return _image_loader(stream, max_failures, **options)
    steps = Steps(images.num_images, batch_size, last_batch, num_processes)
    positions = [steps.positions(step, process_index) for step in range(start_step, num_steps)]
    order = EpochOrder(images.num_images, seed if shuffle else None)
    return _image_loader(_Batches(reader, order), max_failures, sampler=positions, **options)


def eval_loader(
    images: ImageSet | DenseSet,
    processor: BaseImageProcessor,
    *,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    limit: int | None = None,
    max_failures: int = 100,
    collate: Collate | None = None,
    pin_memory: bool = False,
) -> ImageLoader:
    """Makes batches of every image once, in the order of the set; those that cannot be read are left out.

    The processes share the images in contiguous parts, one image more or less; their numbers of batches may differ by
    one, so gather results after the loop. The last batch may be short. A stream is dealt out by file or by image, and
    keeps its order only within a worker. The workers stay alive between iterations.

    Args:
        images: what to evaluate on.
        processor: turns a list of RGB images into `pixel_values`; not used where there is a `collate`.
        batch_size: images per batch in all processes together.
        process_index: of this process.
        num_processes: among which the images are shared.
        num_workers: worker processes of this process, 0 to read in the process itself.
        limit: use only so many images from the start of the set, all processes together.
        max_failures: unreadable images that each process tolerates before it stops.
        collate: as in `train_loader`.
        pin_memory: as in `train_loader`.

    Returns:
        The loader; it may be iterated again. For a stream it has no length.

    Raises:
        ValueError: if the batch does not divide among the processes, a number is out of range, or maps come without a
            `collate`.
    """
    size = _local_size(batch_size, process_index, num_processes)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be positive, or None for all images")
    reader = _Reader(images, _collation(images, processor, collate), max_failures)
    options = {"num_workers": num_workers, "generator": torch.Generator(), "pin_memory": pin_memory}
    options["persistent_workers"] = num_workers > 0
    if images.streaming:
        rows = _Stream(images.dataset, limit=limit)
        return _image_loader(_StreamedOnce(reader, rows, size, process_index, num_processes), max_failures, **options)
    count = images.num_images if limit is None else min(limit, images.num_images)
    first, end = (count * index // num_processes for index in (process_index, process_index + 1))
    positions = [range(start, min(start + size, end)) for start in range(first, end, size)]
    return _image_loader(_Batches(reader, None), max_failures, sampler=positions, **options)


def check_readable(
    images: ImageSet, processor: BaseImageProcessor, *, limit: int | None = None, max_failures: int = 100
) -> None:
    """Refuses images of which none can be read, by reading the first that can.

    Args:
        images, processor, limit, max_failures: as in `eval_loader`.

    Raises:
        ValueError: all of them, or more than `max_failures` at the beginning, cannot be read.
    """
    try:
        next(iter(eval_loader(images, processor, batch_size=1, limit=limit, max_failures=max_failures)), None)
    except TooManyFailuresError as error:
        raise ValueError(f"images of {images.title}: {error}") from error


@dataclass(frozen=True)
class Steps:
    """Tells which positions of the endless sequence of epochs make up a step.

    Args:
        num_images: N, length of an epoch.
        batch_size: B, images per step in all processes together.
        last_batch: what becomes of the N % B images that fill no batch: "join" makes a batch of them and the first of
            the next epoch; "drop" leaves them out; "keep" makes a smaller batch of them, or of as many of them as
            divide among the processes.
        num_processes: n.

    Raises:
        ValueError: if "drop" leaves nothing.
    """

    num_images: int
    batch_size: int
    last_batch: LastBatch = "join"
    num_processes: int = 1

    def __post_init__(self) -> None:
        if self.last_batch == "drop" and self.num_images < self.batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be at most the {self.num_images} images, as last batches "
                "that are not full are dropped"
            )

    @property
    def per_epoch(self) -> int:
        """Steps that one pass over the images takes, rounded to the nearest where batches go on into the next."""
        if self.last_batch == "join":
            return max(1, round(self.num_images / self.batch_size))
        whole, rest = divmod(self.num_images, self.batch_size)
        return whole + (self.last_batch == "keep" and rest >= self.num_processes)

    def positions(self, step: int, process_index: int = 0) -> range:
        """Returns the positions of one process in a step."""
        if self.last_batch == "join":
            first, size = step * self.batch_size, self.batch_size
        else:
            epoch, index = divmod(step, self.per_epoch)
            first = epoch * self.num_images + index * self.batch_size
            size = min(self.batch_size, self.num_images - index * self.batch_size)
        share = size // self.num_processes
        return range(first + process_index * share, first + (process_index + 1) * share)


class EpochOrder:
    """Tells which image stands at a position of the endless sequence of epochs.

    Args:
        num_images: N, length of an epoch.
        seed: epoch e is `torch.randperm(N)` with a generator seeded from (seed, e); None leaves every epoch in order.
    """

    def __init__(self, num_images: int, seed: int | None) -> None:
        self.num_images = num_images
        self.seed = seed
        self._epoch = -1
        # of that epoch; a worker rarely needs two at a time. NumPy gives a single number sooner than torch.
        self._permutation = np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        """Returns the index of the image at a position."""
        epoch, offset = divmod(position, self.num_images)
        if self.seed is None:
            return offset
        if epoch != self._epoch:
            mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(mixed)
            self._permutation = torch.randperm(self.num_images, generator=generator).numpy()
            self._epoch = epoch
        return int(self._permutation[offset])


@dataclass
class _Classification:
    """The collation of images with class labels, or without."""

    processor: BaseImageProcessor
    has_labels: bool

    def __call__(self, images: list[PIL.Image.Image], labels: list[int | None]) -> dict[str, Tensor]:
        batch = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
        if self.has_labels:
            batch["labels"] = torch.tensor(labels, dtype=torch.int64)
        return batch


def _collation(images: ImageSet | DenseSet, processor: BaseImageProcessor, collate: Collate | None) -> Collate:
    if collate is None and isinstance(images, DenseSet):
        raise ValueError(
            f"{images.title} holds maps, which need a collate that fits them to their images; "
            "SegmentationCollate or DepthCollate of raptor_hf.data.transforms would do"
        )
    return _Classification(processor, images.has_labels) if collate is None else collate


@dataclass
class _Reader:
    """Reads rows into batches; what every worker has."""

    images: ImageSet | DenseSet
    collate: Collate
    max_failures: int
    augment: Augment | None = None
    seed: int = 0

    def guarded(self, make_batch: Callable[[], Batch]) -> Batch:
        """Makes a batch; an error that is the fault of the images becomes a batch that says so."""
        try:
            return make_batch()
        except (TooManyFailuresError, TargetError) as error:
            return {"names": [], "failures": {}, "error": error}

    def filled(
        self,
        row_at: Callable[[int], tuple[dict[str, Any], int | None]],
        positions: Iterable[int],
        places: Iterable[int],
    ) -> Batch:
        """Makes a full batch: where a row cannot be read, the one at the next position that can be takes its place.

        Args:
            row_at: gives the row at a position, and its index.
            positions: of the rows that make up the batch.
            places: the same in the sequence of the whole run, which differ where a reader has a share of a stream.

        Returns:
            The batch, augmented.
        """
        items, failures = [], {}
        for position, place in zip(positions, places, strict=True):
            failures_here = {}
            for tries, candidate in enumerate(itertools.count(position)):
                if tries > self.max_failures:  # in a row: without an end to it, a set of damaged images would hang
                    raise _too_many(f"{tries} images in a row", self.max_failures, failures_here)
                try:
                    name, image, label = self.images.read_row(*row_at(candidate))
                    break
                except ImageDecodeError as error:
                    failures_here[error.name] = error.reason
            failures |= failures_here
            if self.augment is not None:
                image, label = self.augment(image, label, np.random.default_rng((self.seed, place)))
            items.append((name, image, label))
        return self._collated(items, failures)

    def sifted(self, rows: Iterable[tuple[dict[str, Any], int | None]]) -> Batch:
        """Makes a batch of the rows that can be read."""
        items, failures = [], {}
        for row, index in rows:
            try:
                items.append(self.images.read_row(row, index))
            except TargetError:
                raise  # a wrong truth must not be left out of a result
            except ImageDecodeError as error:
                failures[error.name] = error.reason
        return self._collated(items, failures)

    def _collated(self, items: list[tuple[str, PIL.Image.Image, Any]], failures: dict[str, str]) -> Batch:
        if not items:
            return {"names": [], "failures": failures}
        names, images, labels = map(list, zip(*items, strict=True))
        return {"names": names, "failures": failures, **self.collate(images, labels)}


@dataclass
class _Batches(torch.utils.data.Dataset):
    """Batches of a set with random access, indexed by their positions; without an order, a position is a row."""

    reader: _Reader
    order: EpochOrder | None

    def __getitem__(self, positions: range) -> Batch:
        return self.reader.guarded(lambda: self._batch(positions))

    def _batch(self, positions: range) -> Batch:
        dataset = self.reader.images.dataset
        indices = list(positions if self.order is None else map(self.order, positions))
        # all at once: where images are small, asking for a row takes longer than what there is to read
        rows = dict(zip(positions, zip(dataset.__getitems__(indices), indices, strict=True), strict=True))
        if self.order is None:
            return self.reader.sifted(rows.values())

        def row_at(position: int) -> tuple[dict[str, Any], int]:
            if position in rows:
                return rows[position]
            index = self.order(position)
            return dataset[index], index

        return self.reader.filled(row_at, positions, positions)


@dataclass
class _SizedBatches(torch.utils.data.Dataset):
    """Batches of images of several sizes, indexed by size and positions."""

    batches: Mapping[int, _Batches]

    def __getitem__(self, item: tuple[int, range]) -> Batch:
        size, positions = item
        return self.batches[size][positions]


@dataclass
class _Stream:
    """The rows of a stream that one of several readers gets."""

    dataset: IterableDataset
    seed: int | None = None
    shuffle_buffer: int = 1000
    limit: int | None = None

    def once(self, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        """Yields the share of one reader."""
        if self.limit is not None:
            # "The first images" only exist in the whole stream, not in shares of its files.
            yield from itertools.islice(_rows(self.dataset), rank, self.limit, world_size)
        else:
            yield from _rows(_share(self.dataset, rank, world_size))

    def forever(self, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        """Yields the share of one reader, epoch after epoch."""
        dataset = self.dataset
        if self.seed is not None:
            dataset = dataset.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        dataset = _share(dataset, rank, world_size)
        for epoch in itertools.count():
            if self.seed is not None:  # an epoch number would shuffle the files of a stream that is not to be shuffled
                dataset.set_epoch(epoch)
            row = None
            for row in _rows(dataset):
                yield row
            if row is None:
                raise ValueError(f"reader {rank} of {world_size} got no image of the stream; use fewer workers")


class _Window:
    """Rows of a stream by position: those of the batch, and any after it that were read to replace a damaged one."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self._rows = rows
        self._held: deque[dict[str, Any]] = deque()
        self._first = 0

    def move_to(self, position: int) -> None:
        """Lets go of all rows before a position."""
        while self._first < position:
            if self._held:
                self._held.popleft()
            else:
                next(self._rows)
            self._first += 1

    def __call__(self, position: int) -> tuple[dict[str, Any], None]:
        while len(self._held) <= position - self._first:
            self._held.append(next(self._rows))
        return self._held[position - self._first], None


@dataclass
class _StreamedSteps(torch.utils.data.IterableDataset):
    """Training batches of a stream: each worker reads a share of its own and makes every W-th batch of the process."""

    reader: _Reader
    rows: _Stream
    size: int
    start_step: int
    num_steps: int
    process_index: int
    num_processes: int

    def __len__(self) -> int:
        return self.num_steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        worker, num_workers = _worker()
        # The loader asks worker 0 first, at whatever step it starts: that worker takes over the share whose turn it is.
        first_step = self.start_step + worker
        rank = self.process_index * num_workers + first_step % num_workers
        window = _Window(self.rows.forever(rank, self.num_processes * num_workers))
        for step in range(first_step, self.num_steps, num_workers):
            first = step // num_workers * self.size  # in the share
            window.move_to(first)
            place = (step * self.num_processes + self.process_index) * self.size
            own, places = range(first, first + self.size), range(place, place + self.size)
            yield self.reader.guarded(functools.partial(self.reader.filled, window, own, places))


@dataclass
class _StreamedOnce(torch.utils.data.IterableDataset):
    """Evaluation batches of a stream: each worker reads a share of its own, once."""

    reader: _Reader
    rows: _Stream
    size: int
    process_index: int
    num_processes: int

    def __iter__(self) -> Iterator[Batch]:
        worker, num_workers = _worker()
        rows = self.rows.once(self.process_index * num_workers + worker, self.num_processes * num_workers)
        while chunk := list(itertools.islice(rows, self.size)):
            yield self.reader.guarded(functools.partial(self.reader.sifted, [(row, None) for row in chunk]))


def _rows(dataset: IterableDataset) -> Iterator[dict[str, Any]]:
    # `iter`, as iterating itself would share the stream among the loader's workers a second time.
    for chunk in dataset.iter(batch_size=1):
        yield {column: values[0] for column, values in chunk.items()}


def _share(dataset: IterableDataset, rank: int, world_size: int) -> IterableDataset:
    if dataset.num_shards >= world_size:
        return dataset.shard(num_shards=world_size, index=rank)
    # Fewer files than readers: everyone reads all and keeps every world_size-th image.
    return split_dataset_by_node(dataset, rank=rank, world_size=world_size)


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def usable_cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _image_loader(dataset: torch.utils.data.Dataset, max_failures: int, **options: Any) -> ImageLoader:
    options["pin_memory"] &= torch.cuda.is_available()  # else the DataLoader warns
    if not isinstance(dataset, torch.utils.data.IterableDataset):
        # more than there are cores gains nothing, and the DataLoader warns; a stream's order depends on their number
        options["num_workers"] = min(options["num_workers"], usable_cores())
    return ImageLoader(DataLoader(dataset, batch_size=None, **options), max_failures)


def _local_size(batch_size: int, process_index: int, num_processes: int) -> int:
    if not 0 <= process_index < num_processes:
        raise ValueError(
            f"process_index is {process_index}; it must be between 0 and num_processes - 1 = {num_processes - 1}"
        )
    if batch_size < 1 or batch_size % num_processes:
        raise ValueError(
            f"batch_size is {batch_size}, which counts all processes together; it must be a positive multiple of "
            f"num_processes={num_processes}"
        )
    return batch_size // num_processes


def _too_many(what: str, max_failures: int, reasons: Mapping[str, str]) -> TooManyFailuresError:
    last = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[-5:])
    limit = "" if what.startswith("all ") else f", more than max_failures={max_failures}"
    return TooManyFailuresError(f"{what} cannot be read{limit}; the last ones: {last}")
