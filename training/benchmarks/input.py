"""The input pipeline: images per second from a parquet file to a batch, and where the time goes.

Images go the way they go in the recipes: `open_images`, `train_loader`, the image processor. Rates are those of a
loader under way, whose workers are never idle; the parts are timed in one process, alternately.
"""

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raptor_hf.data.images import ImageSet, open_images
from raptor_hf.data.loaders import train_loader, usable_cores
from raptor_hf.image_processing_raptor import RaptorImageProcessor

from .measuring import alternate

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """A parquet file of images, and what the model that trains on it wants.

    Args:
        file: name in the folder of data.
        processor: settings of the image processor, beside its defaults.
        batch_size: B.
    """

    file: str
    processor: Mapping[str, Any]
    batch_size: int


SOURCES = (
    Source("cifar10-train.parquet", {"size": {"height": 32, "width": 32}, "do_center_crop": False}, 128),
    Source("imagenet-sample.parquet", {}, 32),
)


def input_pipeline(
    folder: str | os.PathLike[str],
    *,
    sources: Sequence[Source] = SOURCES,
    num_workers: Sequence[int] = (0, 1, 2),
    batches: int = 10,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Measures the loader on files of images.

    Args:
        folder: where the files are.
        sources: the files; one that is not there is skipped, and its record says so.
        num_workers: to try.
        batches: in one measurement of the rate.
        repeats: repetitions of everything.

    Returns:
        A record for each source: file and batch size, and either "skipped", the reason, or "workers", the rates by
        number of workers, in images per second, and "split", microseconds per image of the parts of the work in one
        process, as `split` gives them.
    """
    records = []
    for source in sources:
        record: dict[str, Any] = {"source": source.file, "batch_size": source.batch_size}
        path = Path(folder) / source.file
        if path.exists():
            record |= _measured(open_images(str(path), "train"), source, num_workers, batches, repeats)
        else:
            record["skipped"] = f"{path} is not there"
        records.append(record)
    return records


def _measured(
    images: ImageSet, source: Source, num_workers: Sequence[int], batches: int, repeats: int
) -> dict[str, Any]:
    processor, size = RaptorImageProcessor(**source.processor), source.batch_size
    seconds: dict[int, list[float]] = {number: [] for number in num_workers}
    for _ in range(repeats):
        for number in num_workers:
            seconds[number].append(loader_seconds(images, processor, size, number, batches))
    batch = next(iter(train_loader(images, processor, batch_size=size, seed=0, num_steps=1)))
    return {
        "image_size": list(batch["pixel_values"].shape[-2:]),
        "num_cores": usable_cores(),
        "workers": [
            {"num_workers": number, "images_per_second": size * batches / statistics.median(times)}
            for number, times in seconds.items()
        ],
        "split": split(images, processor, size, repeats),
    }


def loader_seconds(
    images: ImageSet, processor: RaptorImageProcessor, batch_size: int, num_workers: int, batches: int
) -> float:
    """Seconds that batches of a loader under way take, without anything done with them.

    Batches before are not counted, in which workers start and their queues fill, and there are others after, so that
    none of the workers is done before the last one that counts.

    Args:
        images: what to load.
        processor: makes tensors of them.
        batch_size: B.
        num_workers: worker processes.
        batches: that are counted.
    """
    queued = 2 * num_workers
    steps = 1 + queued + batches + queued
    loader = train_loader(
        images, processor, batch_size=batch_size, seed=0, num_steps=steps, num_workers=num_workers, max_failures=0
    )
    iterator = iter(loader)
    for _ in islice(iterator, 1 + queued):
        pass
    began = time.perf_counter()
    for _ in islice(iterator, batches):
        pass
    return time.perf_counter() - began


def split(images: ImageSet, processor: RaptorImageProcessor, batch_size: int, repeats: int) -> dict[str, float]:
    """Times the parts of what a loader without workers does, alternately.

    Args:
        images: what to load.
        processor: makes tensors of them.
        batch_size: B.
        repeats: batches, the same one again and again.

    Returns:
        Microseconds per image: "read", bytes out of the file; "decode", to RGB; "convert", to arrays; "resize"; "crop";
        "tensor", to normalised floats; "rest", of the loader; and the "total". Parts of the processor are differences
        between it with and without the part, and may come out a little below 0 where there is nothing to do.
    """
    loader = train_loader(images, processor, batch_size=batch_size, seed=0, num_steps=1, shuffle=False)
    indices = list(range(batch_size))
    rows = images.dataset.__getitems__(indices)
    decoded = [images.read_row(row, index)[1] for index, row in enumerate(rows)]
    off = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False)
    resize = off | {"do_resize": processor.do_resize}
    crop = resize | {"do_center_crop": processor.do_center_crop}
    functions = {
        "total": lambda: next(iter(loader)),
        "read": lambda: images.dataset.__getitems__(indices),
        "decode": lambda: [images.read_row(row, index) for index, row in enumerate(rows)],
        "convert": lambda: processor(images=decoded, **off),
        "resize": lambda: processor(images=decoded, **resize),
        "crop": lambda: processor(images=decoded, **crop),
        "tensor": lambda: processor(images=decoded, return_tensors="pt"),
    }
    times = dict(zip(functions, alternate([*functions.values()], repeats=repeats, warmup=1, device=CPU), strict=True))
    # each of the processor's calls does all that the one before does
    parts = {name: times[name] for name in ("read", "decode", "convert")}
    parts |= {"resize": times["resize"] - times["convert"], "crop": times["crop"] - times["resize"]}
    parts |= {"tensor": times["tensor"] - times["crop"]}
    parts |= {"rest": times["total"] - sum(parts.values()), "total": times["total"]}
    return {name: 1e6 * float(np.median(seconds)) / batch_size for name, seconds in parts.items()}
