"""The input pipeline's measurements, on files and loaders whose cost is known."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image

import training.benchmarks.input as benchmark_input
from raptor_hf.data.loaders import train_loader
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from training.benchmarks import measuring
from training.benchmarks.input import Source, input_pipeline, loader_seconds, split

SMALL = Source("small.parquet", {"size": {"height": 8, "width": 8}, "do_center_crop": False}, batch_size=4)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless its `sleep` is called, in the place of the machine's."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def sleep(seconds):
        clock.now += seconds

    clock.sleep = sleep
    monkeypatch.setattr(benchmark_input, "time", clock)
    monkeypatch.setattr(measuring, "time", clock)
    return clock


class SlowProcessor(RaptorImageProcessor):
    """Takes 4 ms over resizing an image."""

    def resize(self, *args, **kwargs):
        benchmark_input.time.sleep(0.004)
        return super().resize(*args, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a file of 24 photographs of noise, 20 x 16 pixels."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (24, 16, 20, 3), dtype=np.uint8)
    stored = []
    for pixels in noise:
        PIL.Image.fromarray(pixels).save(content := io.BytesIO(), format="jpeg")
        stored.append({"bytes": content.getvalue(), "path": None})
    Dataset.from_dict({"image": stored}, features=Features({"image": Image()})).to_parquet(folder / SMALL.file)
    return folder


def test_a_file_is_measured_as_the_recipes_read_it(folder):
    (record,) = input_pipeline(folder, sources=[SMALL], batches=2, repeats=2)
    assert record["image_size"] == [8, 8] and "skipped" not in record
    assert [workers["num_workers"] for workers in record["workers"]] == [0, 1, 2]
    assert all(workers["images_per_second"] > 0 for workers in record["workers"])
    assert record["split"]["total"] > 0


def test_a_file_that_is_not_there_is_skipped_and_the_record_says_so(tmp_path):
    (record,) = input_pipeline(tmp_path, sources=[SMALL])
    assert record == {"source": SMALL.file, "batch_size": 4, "skipped": f"{tmp_path / SMALL.file} is not there"}


def test_the_rate_is_of_the_median_time(folder, monkeypatch):
    seconds = {0: iter([1.0, 5.0, 2.0]), 1: iter([0.5, 1.0, 1.0])}
    monkeypatch.setattr(benchmark_input, "loader_seconds", lambda images, processor, size, n, b: next(seconds[n]))
    settings = {"sources": [SMALL], "num_workers": (0, 1), "batches": 10, "repeats": 3}
    (record,) = input_pipeline(folder, **settings)
    none, one = record["workers"]
    assert (none["images_per_second"], one["images_per_second"]) == (20.0, 40.0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_only_a_loader_under_way_is_timed(monkeypatch, clock, num_workers):
    asked = []

    def loader(*args, num_steps, **kwargs):
        for step in range(num_steps):
            # the start is slow, and so would be the wait for a last batch
            clock.sleep(0.2 if step in (0, num_steps - 1) and num_workers else 0.01)
            asked.append(step)
            yield step

    monkeypatch.setattr(benchmark_input, "train_loader", loader)
    assert loader_seconds(None, None, 4, num_workers, 5) == pytest.approx(0.05)
    assert len(asked) == 1 + 2 * num_workers + 5


def test_the_time_of_a_part_is_found_in_that_part(folder, clock):
    images = benchmark_input.open_images(str(folder / SMALL.file), "train")
    parts = split(images, SlowProcessor(**SMALL.processor), 4, repeats=5)
    assert parts.keys() == {"read", "decode", "convert", "resize", "crop", "tensor", "rest", "total"}
    for part, microseconds in parts.items():
        assert microseconds == pytest.approx(4000 if part in ("resize", "total") else 0, abs=1e-6)


def test_a_batch_of_the_loader_has_the_bits_of_its_images_alone(folder):
    images = benchmark_input.open_images(str(folder / SMALL.file), "train")
    processor = RaptorImageProcessor(**SMALL.processor)
    (batch,) = train_loader(images, processor, batch_size=4, seed=0, num_steps=1, shuffle=False)
    alone = [processor(images=[images.decode(index)[0]], return_tensors="pt")["pixel_values"] for index in range(4)]
    assert torch.equal(batch["pixel_values"], torch.cat(alone))
