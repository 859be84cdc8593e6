"""The input pipeline: images/s from parquet files to a batch, where the time goes, and how many workers a step needs.

    from .input import estimated_rate, input_pipeline
    needed = {"this machine": 21.5, "an H100, estimated": estimated_rate(989e12)["images_per_second"]}
    for record in input_pipeline("data", needed):
        print(record["source"], record.get("skipped") or record["workers"])

Images go the way they go in the recipes: `open_images`, `train_loader`, the image processor. Rates are those of a
loader under way, whose workers are never idle; the parts are timed in one process, alternately.
"""

import math
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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf import RaptorConfig, RaptorModel
from raptor_hf.data.images import ImageSet, open_images
from raptor_hf.data.loaders import train_loader
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.teacher import macs

from .measuring import Comparison, alternate

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
    needed: Mapping[str, float],
    *,
    sources: Sequence[Source] = SOURCES,
    num_workers: Sequence[int] = (0, 1, 2),
    batches: int = 10,
    repeats: int = 5,
    device: torch.device = CPU,
) -> list[dict[str, Any]]:
    """Measures the loader on files of images.

    Args:
        folder: where the files are.
        needed: what to images per second that training eats, which the loader must give.
        sources: the files; one that is not there is skipped, and its record says so.
        num_workers: to try; 0 and 1 are always tried.
        batches: in one measurement of the rate.
        repeats: repetitions of everything.
        device: what training runs on.

    Returns:
        A record for each source: file and batch size, and either "skipped", the reason, or
        "workers", the rates by number of workers, in images per second, with the speed-up over none;
        "split", microseconds per image of the parts of the work in one process, as `split` gives them;
        "transport_microseconds" per image from a worker to the process that trains, see `transport`;
        "to_device_microseconds" per image from there to a GPU, None on a CPU: of "pageable" and of "pinned" memory;
        "batched", what the processor gains by a call for the batch over a call for each image;
        "needed", for each rate the number of workers it takes, one core each.

    Raises:
        ValueError: a rate that is not positive, or a number out of range.
    """
    if batches < 1 or repeats < 1 or min(num_workers, default=0) < 0:
        raise ValueError(
            f"batches={batches}, repeats={repeats} and num_workers={num_workers} must be 1, 1 and 0 or more"
        )
    for name, rate in needed.items():
        if not rate > 0:
            raise ValueError(f"needed[{name!r}] is {rate}; it must be images per second, above 0")
    records = []
    for source in sources:
        record: dict[str, Any] = {"source": source.file, "batch_size": source.batch_size}
        path = Path(folder) / source.file
        if path.exists():
            images = open_images(str(path), "train")
            record |= _measured(images, source, sorted({0, 1, *num_workers}), batches, repeats, device)
            record["needed"] = workers_needed(record["workers"][1]["images_per_second"], needed)
        else:
            record["skipped"] = f"{path} is not there"
        records.append(record)
    return records


def _measured(
    images: ImageSet, source: Source, num_workers: list[int], batches: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    processor = RaptorImageProcessor(**source.processor)
    size = source.batch_size
    seconds: dict[int, list[float]] = {number: [] for number in num_workers}
    for _ in range(repeats):
        for number in num_workers:
            seconds[number].append(loader_seconds(images, processor, size, number, batches))
    workers = []
    for number in num_workers:
        comparison = Comparison(seconds[0], seconds[number])
        workers.append(
            {
                "num_workers": number,
                "images_per_second": size * batches / statistics.median(seconds[number]),
                **comparison.to_dict(),
            }
        )
    batch = next(iter(train_loader(images, processor, batch_size=size, seed=0, num_steps=1)))
    return {
        "image_size": list(batch["pixel_values"].shape[-2:]),
        "num_cores": len(os.sched_getaffinity(0)),
        "workers": workers,
        "split": split(images, processor, size, repeats),
        "transport_microseconds": 1e6 * transport(batch["pixel_values"], batches) / size,
        "to_device_microseconds": _to_device(batch["pixel_values"], device, repeats),
        "batched": _batched(images, processor, size, repeats),
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


class _Ready(Dataset):
    """Batches that cost nothing to make but a copy, which a worker cannot do without: what it sent is shared."""

    def __init__(self, pixel_values: Tensor, length: int) -> None:
        self.pixel_values, self.length = pixel_values, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values.clone()}


def transport(pixel_values: Tensor, batches: int) -> float:
    """Seconds that a batch takes from a worker to the process that trains, one copy of it included.

    Args:
        pixel_values: the batch, (B, 3, H, W).
        batches: in the measurement.
    """
    iterator = iter(DataLoader(_Ready(pixel_values, batches + 6), batch_size=None, num_workers=1))
    for _ in islice(iterator, 3):
        pass
    began = time.perf_counter()
    for _ in islice(iterator, batches):
        pass
    return (time.perf_counter() - began) / batches


def _to_device(pixel_values: Tensor, device: torch.device, repeats: int) -> dict[str, float] | None:
    if device.type != "cuda":
        return None
    memory = {"pageable": pixel_values, "pinned": pixel_values.pin_memory()}
    copies = [lambda batch=batch: batch.to(device, non_blocking=True) for batch in memory.values()]
    times = alternate(copies, repeats=repeats, warmup=1, device=device)
    return {
        name: 1e6 * float(np.median(seconds)) / len(pixel_values) for name, seconds in zip(memory, times, strict=True)
    }


def _batched(images: ImageSet, processor: RaptorImageProcessor, batch_size: int, repeats: int) -> dict[str, Any]:
    """The processor called once for a batch, beside a call for every image of it."""
    decoded = [images.decode(index)[0] for index in range(batch_size)]

    def one_by_one() -> Tensor:
        return torch.cat([processor(images=[image], return_tensors="pt")["pixel_values"] for image in decoded])

    def at_once() -> Tensor:
        return processor(images=decoded, return_tensors="pt")["pixel_values"]

    times = alternate([one_by_one, at_once], repeats=repeats, warmup=1, device=CPU)
    comparison = Comparison(*times.tolist())
    return {
        **comparison.to_dict(),
        "same_bits": torch.equal(one_by_one(), at_once()),
    }


def workers_needed(rate_of_one: float, needed: Mapping[str, float]) -> list[dict[str, Any]]:
    """How many workers give what training eats, if each has a core of its own.

    Args:
        rate_of_one: images per second of one worker.
        needed: what to images per second.
    """
    return [
        {"name": name, "images_per_second": rate, "num_workers": math.ceil(rate / rate_of_one)}
        for name, rate in needed.items()
    ]


def estimated_rate(peak_flops: float, *, utilisation: float = 0.4, ffn_type: str = "mlp") -> dict[str, Any]:
    """Estimates how many images a second training with ViT-B/14 at 224 pixels eats on a GPU that is not at hand.

    A step takes the teacher's forward pass and three times the student's, as a backward pass costs two; the GPU reaches
    a share of its peak. That is an estimate, not a measurement.

    Args:
        peak_flops: FLOP/s of the GPU at the step's precision, as its vendor states them.
        utilisation: the share of it that training reaches.
        ffn_type: of the student, "mlp" or "swiglu".

    Returns:
        "images_per_second" with the FLOPs of an image and the assumptions.

    Raises:
        ValueError: a peak that is not positive, or a share not in (0, 1].
    """
    if not (peak_flops > 0 and 0 < utilisation <= 1):
        raise ValueError(f"peak_flops={peak_flops} must be above 0 and utilisation={utilisation} in (0, 1]")
    config = Dinov2WithRegistersConfig(hidden_size=768, num_attention_heads=12, image_size=224, patch_size=14)
    # without weights: only shapes are counted
    with torch.device("meta"):
        teacher = Dinov2WithRegistersModel(config).eval()
        student_config = RaptorConfig.from_teacher(
            config, (7, 3, 2), depth_conditioning="low_rank", ffn_type=ffn_type, intermediate_size=4 * 768
        )
        student = RaptorModel(student_config).eval()
        pixel_values = torch.empty(1, 3, 224, 224)
    flops = 2 * macs(teacher, pixel_values) + 3 * 2 * macs(student, pixel_values)
    return {
        "images_per_second": utilisation * peak_flops / flops,
        "flops_per_image": flops,
        "peak_flops": peak_flops,
        "utilisation": utilisation,
        "is_estimate": True,
    }
