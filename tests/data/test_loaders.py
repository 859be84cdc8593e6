"""Claims about what a loader yields, in which order, after a resume, on several processes and with damaged images."""

import io
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf.data.dense import DenseSet, TargetError, open_dense
from raptor_hf.data.images import ImageSet, open_images, resized_processor
from raptor_hf.data.loaders import EpochOrder, Steps, TooManyFailuresError, eval_loader, train_loader
from raptor_hf.data.sizes import SizedSteps, View, draw_sizes
from raptor_hf.data.transforms import CropFlip, SegmentationCollate
from tests.support.dense_layouts import write_ade20k


@pytest.fixture(autouse=True)
def _quick_and_own_datasets(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # `datasets` waits five seconds at every end of a shuffled parquet stream, for old versions of Arrow.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def processor() -> BitImageProcessorPil:
    return BitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


@pytest.fixture
def digits() -> ImageSet:
    return open_images("digits", "train[:23]")


def encoded(value: int) -> bytes:
    """A PNG whose gray value tells which image it is."""
    buffer = io.BytesIO()
    PIL.Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, num_images: int, num_files: int = 1, damaged: tuple[int, ...] = ()) -> str:
    """Image i has the label i; those in `damaged` end within their pixels."""
    folder.mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    for file, rows in enumerate(np.array_split(np.arange(num_images), num_files)):
        cells = [{"bytes": encoded(i)[: 42 if i in damaged else None], "path": f"{i}.png"} for i in rows.tolist()]
        table = datasets.Dataset.from_dict({"image": cells, "label": rows}, features=features)
        table.to_parquet(folder / f"part-{file}.parquet")
    return str(folder / "*.parquet")


def labels(batches) -> list[int]:
    return list(chain.from_iterable(batch["labels"].tolist() for batch in batches))


def assert_equal(found: list, expected: list) -> None:
    """Bitwise."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one["names"] == other["names"]
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])


class TestOrder:
    def test_every_epoch_is_another_permutation(self):
        order = EpochOrder(50, seed=0)
        epochs = [[order(position) for position in range(50 * e, 50 * e + 50)] for e in range(3)]
        assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
        other = [EpochOrder(50, seed=1)(position) for position in range(50)]
        assert len({tuple(epoch) for epoch in [*epochs, other, range(50)]}) == 5

    def test_depends_on_seed_and_position_only(self):
        forward = [EpochOrder(7, seed=3)(position) for position in range(40)]
        order = EpochOrder(7, seed=3)
        assert [order(position) for position in reversed(range(40))] == forward[::-1]


class TestSteps:
    @pytest.mark.parametrize("num_processes", [1, 2])
    @pytest.mark.parametrize("num_images", [10, 12, 13])
    def test_dropped_and_kept_last_batches_are_those_of_a_plain_loader(self, num_images, num_processes):
        for last_batch in ("drop", "keep"):
            steps = Steps(num_images, 4, last_batch, num_processes)
            plain = torch.utils.data.DataLoader(range(num_images), 4, drop_last=last_batch == "drop")
            expected = [batch.tolist() for _ in range(3) for batch in plain if len(batch) >= num_processes]
            found = [
                [position for process in range(num_processes) for position in steps.positions(step, process)]
                for step in range(3 * steps.per_epoch)
            ]
            assert steps.per_epoch * 3 == len(expected)
            for step, (batch, positions) in enumerate(zip(expected, found, strict=True)):
                whole = len(batch) - len(batch) % num_processes
                epoch = step // steps.per_epoch
                assert positions == [epoch * num_images + index for index in batch[:whole]]

    def test_joined_batches_leave_no_image_out(self):
        steps = Steps(10, 4)
        assert [list(steps.positions(step)) for step in range(5)] == np.arange(20).reshape(5, 4).tolist()

    def test_nothing_left_is_refused(self):
        with pytest.raises(ValueError, match="batch_size is 16; it must be at most the 10 images"):
            Steps(10, 16, "drop")

    def test_a_loader_follows_them_through_a_resume(self, digits, processor):
        options = {"batch_size": 10, "seed": 1, "num_steps": 9, "last_batch": "keep"}
        whole = list(train_loader(digits, processor, **options))
        assert [len(batch["names"]) for batch in whole] == [10, 10, 3] * 3
        for epoch in range(3):
            names = [name for batch in whole[3 * epoch : 3 * epoch + 3] for name in batch["names"]]
            assert sorted(names) == sorted(digits.name(row) for row in range(23))
        assert_equal(list(train_loader(digits, processor, **options, start_step=4)), whole[4:])

    def test_a_stream_has_no_last_batch(self, processor):
        images = open_images("digits", "test", streaming=True)
        with pytest.raises(ValueError, match="last_batch='drop'"):
            train_loader(images, processor, batch_size=4, seed=0, num_steps=2, last_batch="drop")


class TestTraining:
    def test_batches_hold_what_the_set_and_the_processor_give(self, digits, processor):
        order = EpochOrder(23, seed=5)
        for step, batch in enumerate(train_loader(digits, processor, batch_size=4, seed=5, num_steps=3)):
            items = [digits.decode(order(4 * step + i)) for i in range(4)]
            expected = torch.stack([torch.tensor(np.asarray(image) / 255.0) for image, _ in items]).permute(0, 3, 1, 2)
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
            assert batch["pixel_values"].dtype == torch.float32
            torch.testing.assert_close(batch["pixel_values"].double(), (expected - mean) / std, atol=1e-5, rtol=0)
            assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [label for _, label in items]
            assert batch["names"] == [digits.name(order(4 * step + i)) for i in range(4)]

    def test_epochs_follow_without_a_gap(self, digits, processor):
        loader = train_loader(digits, processor, batch_size=5, seed=0, num_steps=23)
        names = list(chain.from_iterable(batch["names"] for batch in loader))
        assert len(loader) == 23 and len(names) == 5 * 23
        for epoch in range(5):
            assert len(set(names[23 * epoch : 23 * (epoch + 1)])) == 23

    def test_without_shuffling_epochs_run_in_the_order_of_the_set(self, digits, processor):
        loader = train_loader(digits, processor, batch_size=5, seed=0, num_steps=10, shuffle=False)
        assert labels(loader) == (digits.dataset["label"][:] * 3)[:50]

    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("start_step", [1, 7])
    def test_resume_is_bitwise_equal(self, digits, processor, num_workers, start_step):
        options = {"batch_size": 4, "seed": 1, "num_steps": 12}
        whole = list(train_loader(digits, processor, **options))
        rest = list(train_loader(digits, processor, **options, start_step=start_step, num_workers=num_workers))
        assert_equal(rest, whole[start_step:])

    def test_a_finished_run_yields_nothing(self, digits, processor):
        assert list(train_loader(digits, processor, batch_size=4, seed=0, num_steps=5, start_step=5)) == []

    def test_processes_together_see_what_one_sees(self, tmp_path, processor):
        images = open_images(write_parquet(tmp_path / "x", 20, damaged=(3, 4, 11)), "train")
        options = {"batch_size": 6, "seed": 0, "num_steps": 9}
        one = list(train_loader(images, processor, **options))
        three = [train_loader(images, processor, **options, process_index=r, num_processes=3) for r in range(3)]
        for batch, parts in zip(one, zip(*three, strict=True), strict=True):
            assert batch["names"] == [name for part in parts for name in part["names"]]
            assert torch.equal(batch["pixel_values"], torch.cat([part["pixel_values"] for part in parts]))

    def test_the_run_s_own_random_numbers_are_left_alone(self, digits, processor):
        torch.manual_seed(0)
        expected = torch.get_rng_state()
        for num_workers in (0, 1):
            list(train_loader(digits, processor, batch_size=4, seed=1, num_steps=2, num_workers=num_workers))
            list(eval_loader(digits, processor, batch_size=4, num_workers=num_workers))
        assert torch.equal(torch.get_rng_state(), expected)

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("has_cuda", [False, True])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_memory_is_pinned_where_asked_and_there_is_a_gpu(self, processor, monkeypatch, streaming, has_cuda):
        images = open_images("digits", "test", streaming=streaming)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
        for make, options in ((train_loader, {"seed": 0, "num_steps": 1}), (eval_loader, {"limit": 4})):
            asked = make(images, processor, batch_size=4, pin_memory=True, **options)
            assert asked._loader.pin_memory is has_cuda
            assert make(images, processor, batch_size=4, **options)._loader.pin_memory is False
            if not has_cuda:
                assert len(list(asked)) == 1  # and no warning

    @pytest.mark.parametrize("streaming", [False, True])
    def test_workers_can_be_started_afresh_instead_of_forked(self, processor, streaming):
        images = open_images("digits", "test", streaming=streaming)
        batches = train_loader(images, processor, batch_size=4, seed=0, num_steps=2)._loader.dataset
        source = batches if streaming else [batches[range(4)]]
        again = pickle.loads(pickle.dumps(batches))
        assert_equal(list(islice(again if streaming else [again[range(4)]], 1)), list(islice(source, 1)))

    def test_impossible_numbers_are_refused(self, digits, processor):
        options = {"batch_size": 6, "seed": 0, "num_steps": 4}
        for wrong, message in (
            ({"num_processes": 4}, "batch_size is 6.*multiple of num_processes=4"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"process_index": 2, "num_processes": 2}, "process_index is 2"),
            ({"start_step": 5}, "start_step is 5.*num_steps=4"),
            ({"seed": -1}, "seed is -1"),
            ({"max_failures": -1}, "max_failures is -1"),
        ):
            with pytest.raises(ValueError, match=message):
                train_loader(digits, processor, **options | wrong)
        with pytest.raises(ValueError, match="limit is 0"):
            eval_loader(digits, processor, batch_size=4, limit=0)


class TestDamagedImages:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_the_next_in_order_takes_the_place(self, tmp_path, processor, num_workers):
        images = open_images(write_parquet(tmp_path / "x", 12, damaged=(2, 5, 6)), "train")
        order = EpochOrder(12, seed=0)
        expected = []
        for position in range(40):
            while order(position) in (2, 5, 6):
                position += 1
            expected.append(order(position))
        loader = train_loader(images, processor, batch_size=4, seed=0, num_steps=10, num_workers=num_workers)
        batches = list(loader)
        assert labels(batches) == expected
        assert {batch["pixel_values"].shape for batch in batches} == {(4, 3, 8, 8)}

    def test_are_counted_and_logged_once(self, tmp_path, processor, caplog):
        images = open_images(write_parquet(tmp_path / "x", 12, damaged=(2, 5, 6)), "train")
        loader = train_loader(images, processor, batch_size=4, seed=0, num_steps=12)
        with caplog.at_level(logging.WARNING, "raptor_hf.data.loaders"):
            seen = Counter(name for batch in loader for name in batch["failures"])
        names = {images.name(index) for index in (2, 5, 6)}
        assert set(seen) == set(loader.failures.reasons) == names and min(seen.values()) > 1
        assert sorted(record.args[0] for record in caplog.records) == sorted(names)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_past_the_limit_the_run_ends_naming_them(self, tmp_path, processor, num_workers):
        images = open_images(write_parquet(tmp_path / "x", 12, damaged=(2, 5, 6)), "train")
        options = {"batch_size": 4, "seed": 0, "num_steps": 12, "num_workers": num_workers}
        list(train_loader(images, processor, **options, max_failures=3))
        with pytest.raises(TooManyFailuresError, match=r"max_failures=2; the last ones: row \d+ of .*OSError"):
            list(train_loader(images, processor, **options, max_failures=2))

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_set_of_nothing_else_does_not_hang(self, tmp_path, processor, num_workers, streaming):
        path = write_parquet(tmp_path / "x", 4, damaged=(0, 1, 2, 3))
        images = open_images(path, "train", streaming=streaming)
        with pytest.raises(TooManyFailuresError, match="101 images in a row"):
            list(train_loader(images, processor, batch_size=2, seed=0, num_steps=3, num_workers=num_workers))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_their_errors_hold_no_stack_of_a_worker(self, tmp_path, processor, num_workers):
        images = open_images(write_parquet(tmp_path / "x", 4, damaged=(0, 1, 2, 3)), "train")
        with pytest.raises(TooManyFailuresError) as caught:
            list(train_loader(images, processor, batch_size=2, seed=0, num_steps=3, num_workers=num_workers))
        assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_mask_that_cannot_be_right_is_named_by_a_worker_too(self, tmp_path, processor, num_workers):
        write_ade20k(tmp_path)
        path = tmp_path / "annotations" / "training" / "ADE_train_00000002.png"
        PIL.Image.fromarray(np.full((21, 30), 77, np.uint8)).save(path)
        images = open_dense("semantic-segmentation", str(tmp_path), "training")
        loader = eval_loader(
            images, processor, batch_size=2, num_workers=num_workers, collate=SegmentationCollate(processor, 8)
        )
        with pytest.raises(TargetError, match="holds the label 77") as caught:
            list(loader)
        assert caught.value.name.endswith("ADE_train_00000002.jpg") and "Traceback" not in str(caught.value)

    def test_a_set_of_nothing_else_is_no_result(self, tmp_path, processor):
        images = open_images(write_parquet(tmp_path / "x", 4, damaged=(0, 1, 2, 3)), "train")
        with pytest.raises(TooManyFailuresError, match="all 4 images cannot be read; the last ones: row 0"):
            list(eval_loader(images, processor, batch_size=2))

    @pytest.mark.filterwarnings("error")
    def test_more_workers_than_cores_are_not_started(self, digits, processor, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
        loader = train_loader(digits, processor, batch_size=4, seed=0, num_steps=2, num_workers=8)
        assert loader._loader.num_workers == 2

    def test_a_vanished_file_costs_one_image(self, tmp_path, processor):
        for i in range(6):
            (tmp_path / f"{i}.png").write_bytes(encoded(i))
        images = open_images(str(tmp_path), "train")
        (tmp_path / "3.png").unlink()
        batch = next(iter(train_loader(images, processor, batch_size=6, seed=0, num_steps=1, shuffle=False)))
        assert [Path(name).stem for name in batch["names"]] == ["0", "1", "2", "4", "4", "5"]
        assert list(batch["failures"]) == [str(tmp_path / "3.png")]
        assert "labels" not in batch


class TestEvaluation:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_every_image_comes_once_in_order_each_time(self, digits, processor, num_workers):
        loader = eval_loader(digits, processor, batch_size=5, num_workers=num_workers)
        for _ in range(2):
            batches = list(loader)
            assert [len(batch["names"]) for batch in batches] == [5, 5, 5, 5, 3]
            assert [name for batch in batches for name in batch["names"]] == [digits.name(i) for i in range(23)]

    @pytest.mark.parametrize("limit", [None, 10, 100])
    def test_processes_share_the_images(self, digits, processor, limit):
        parts = [
            eval_loader(digits, processor, batch_size=6, process_index=r, num_processes=3, limit=limit)
            for r in range(3)
        ]
        counts = [sum(len(batch["names"]) for batch in part) for part in parts]
        assert labels(chain.from_iterable(parts)) == digits.dataset["label"][:limit]
        assert max(counts) - min(counts) <= 1

    @pytest.mark.parametrize("streaming", [False, True])
    def test_damaged_images_are_left_out_and_listed(self, tmp_path, processor, streaming):
        damaged = (1, 4, 5, 6, 7)  # one batch has nothing else
        images = open_images(write_parquet(tmp_path / "x", 10, damaged=damaged), "train", streaming=streaming)
        loader = eval_loader(images, processor, batch_size=4)
        assert [batch["labels"].tolist() for batch in loader] == [[0, 2, 3], [8, 9]]
        assert len(loader.failures.reasons) == 5
        with pytest.raises(TooManyFailuresError, match="5 images .* max_failures=4"):
            list(eval_loader(images, processor, batch_size=4, max_failures=4))


class TestSizes:
    """Steps that differ in the size of their images read the same sequence as steps that do not."""

    def test_each_step_has_the_images_that_its_processor_makes_of_the_sequence(self, digits, processor):
        large = resized_processor(processor, 16, patch_size=1)
        sizes = draw_sizes(9, [0, 1], seed=2)
        sized = SizedSteps(sizes, {0: View(processor, 6), 1: View(large, 2)})
        options = {"batch_size": 6, "seed": 3, "num_steps": 9, "sized": sized}
        whole = list(train_loader(digits, processor, **options))
        order, place = EpochOrder(23, seed=3), 0
        for size, batch in zip(sizes, whole, strict=True):
            pictures = [digits.decode(order(place + i))[0] for i in range((6, 2)[size])]
            expected = (processor, large)[size](images=pictures, return_tensors="pt")["pixel_values"]
            assert torch.equal(batch["pixel_values"], expected)
            place += len(pictures)
        assert {*sizes} == {0, 1} and place > 23
        assert_equal(list(train_loader(digits, processor, **options, start_step=4, num_workers=2)), whole[4:])
        halves = [list(train_loader(digits, processor, **options, num_processes=2, process_index=r)) for r in (0, 1)]
        for batch, *parts in zip(whole, *halves, strict=True):
            assert torch.equal(batch["pixel_values"], torch.cat([part["pixel_values"] for part in parts]))

    def test_a_stream_is_refused(self, tmp_path, processor):
        images = open_images(write_parquet(tmp_path / "x", 10), "train", streaming=True)
        sized = SizedSteps([0], {0: View(processor, 2)})
        with pytest.raises(ValueError, match="neither with a stream"):
            train_loader(images, processor, batch_size=2, seed=0, num_steps=1, sized=sized)


class TestAugmentation:
    """Its randomness belongs to the place in the sequence, whoever reads it."""

    options = {"batch_size": 4, "seed": 3, "num_steps": 10, "augment": CropFlip(8)}

    def test_each_place_has_a_generator_of_its_own(self, digits, processor):
        order, seen = EpochOrder(23, seed=3), {}
        for step, batch in enumerate(train_loader(digits, processor, **self.options)):
            for i, pixel_values in enumerate(batch["pixel_values"]):
                image, label = digits.decode(order(4 * step + i))
                image, label = CropFlip(8)(image, label, np.random.default_rng((3, 4 * step + i)))
                assert torch.equal(pixel_values, processor(images=[image], return_tensors="pt")["pixel_values"][0])
                assert batch["labels"][i] == label
                seen.setdefault(batch["names"][i], []).append(pixel_values)
        assert not any(torch.equal(*epochs) for epochs in seen.values() if len(epochs) == 2)  # 40 places of 23 images

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_resume_and_workers_do_not_change_it(self, digits, processor, num_workers):
        whole = list(train_loader(digits, processor, **self.options))
        rest = list(train_loader(digits, processor, **self.options, start_step=3, num_workers=num_workers))
        assert_equal(rest, whole[3:])

    def test_processes_together_see_what_one_sees_with_damaged_images_too(self, tmp_path, processor):
        images = open_images(write_parquet(tmp_path / "x", 20, damaged=(3, 4, 11)), "train")
        options = self.options | {"batch_size": 6}
        one = list(train_loader(images, processor, **options))
        three = [train_loader(images, processor, **options, process_index=r, num_processes=3) for r in range(3)]
        for batch, parts in zip(one, zip(*three, strict=True), strict=True):
            assert torch.equal(batch["pixel_values"], torch.cat([part["pixel_values"] for part in parts]))

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_in_a_stream_it_belongs_to_the_place_too(self, tmp_path, processor, num_workers):
        places = []

        def note(image, label, generator):
            return image, int(generator.integers(2**40))

        images = open_images(write_parquet(tmp_path / "x", 40, 4), "train", streaming=True)
        options = {"batch_size": 4, "seed": 3, "num_steps": 10, "augment": note, "num_processes": 2}
        for r in range(2):
            batches = list(train_loader(images, processor, **options, process_index=r, num_workers=num_workers))
            rest = list(
                train_loader(images, processor, **options, process_index=r, num_workers=num_workers, start_step=5)
            )
            assert_equal(rest, batches[5:])
            places += [batch["labels"].tolist() for batch in batches]
        expected = [int(np.random.default_rng((3, place)).integers(2**40)) for place in range(40)]
        assert [
            place for step in zip(places[:10], places[10:], strict=True) for part in step for place in part
        ] == expected


class TestMaps:
    """Images with masks, as one set and in batches."""

    @pytest.fixture
    def masks(self, tmp_path) -> DenseSet:
        write_ade20k(tmp_path / "ade", num_images=7)
        (tmp_path / "ade/annotations/training/ADE_train_00000003.png").write_bytes(b"damaged")
        return open_dense("semantic-segmentation", str(tmp_path / "ade"), "training")

    def test_a_batch_holds_what_the_collation_makes_of_the_images(self, masks, processor):
        collate = SegmentationCollate(processor, 16)
        batches = list(eval_loader(masks, processor, batch_size=4, collate=collate))
        assert [batch["labels"].shape for batch in batches] == [(3, 16, 16), (3, 16, 16)]
        expected = collate(*map(list, zip(*(masks.decode(index) for index in (4, 5, 6)), strict=True)))
        assert all(torch.equal(batches[1][name], expected[name]) for name in ("pixel_values", "labels"))
        assert list(batches[0]["failures"]) == [masks.name(2)]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_resume_is_bitwise_equal_with_masks_augmented(self, masks, processor, num_workers):
        options = {"batch_size": 4, "seed": 1, "num_steps": 8, "augment": CropFlip(20)}
        options["collate"] = SegmentationCollate(processor, 16)
        whole = list(train_loader(masks, processor, **options))
        assert {batch["labels"].shape for batch in whole} == {(4, 16, 16)}
        assert_equal(list(train_loader(masks, processor, **options, start_step=3, num_workers=num_workers)), whole[3:])

    def test_masks_come_in_a_stream_as_well(self, masks, processor):
        collate = SegmentationCollate(processor, 16)
        stream = open_dense("semantic-segmentation", masks.title.split()[0], "training", streaming=True)
        assert_equal(*(list(eval_loader(s, processor, batch_size=4, collate=collate)) for s in (stream, stream)))
        found = [
            name for batch in eval_loader(stream, processor, batch_size=4, collate=collate) for name in batch["names"]
        ]
        assert found == [masks.name(index) for index in (0, 1, 3, 4, 5, 6)]

    def test_without_a_collation_they_are_refused(self, masks, processor):
        with pytest.raises(ValueError, match="SegmentationCollate or DepthCollate"):
            eval_loader(masks, processor, batch_size=4)
        with pytest.raises(ValueError, match="SegmentationCollate or DepthCollate"):
            train_loader(masks, processor, batch_size=4, seed=0, num_steps=1)


class TestStream:
    """Four files of ten images, of which two are damaged."""

    @pytest.fixture
    def images(self, tmp_path) -> ImageSet:
        return open_images(write_parquet(tmp_path / "x", 40, 4, damaged=(7, 23)), "train", streaming=True)

    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_resume_is_bitwise_equal(self, images, processor, num_workers, num_processes):
        options = {"batch_size": 6, "seed": 0, "num_steps": 16, "shuffle_buffer": 8, "num_workers": num_workers}
        for r in range(num_processes):
            options |= {"process_index": r, "num_processes": num_processes}
            loader = train_loader(images, processor, **options)
            whole = list(loader)
            assert len(whole) == len(loader) == 16
            for start_step in (5, 12):
                rest = train_loader(images, processor, **options, start_step=start_step)
                assert len(rest) == 16 - start_step
                assert_equal(list(rest), whole[start_step:])

    def test_every_epoch_shows_every_image_in_another_order(self, tmp_path, processor):
        images = open_images(write_parquet(tmp_path / "y", 40, 4), "train", streaming=True)
        found = labels(train_loader(images, processor, batch_size=8, seed=0, num_steps=15, shuffle_buffer=8))
        epochs = [found[:40], found[40:80], found[80:]]
        assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in [*epochs, range(40)]}) == 4

    def test_without_shuffling_epochs_run_in_the_order_of_the_files(self, tmp_path, processor):
        images = open_images(write_parquet(tmp_path / "y", 12, 6), "train", streaming=True)
        loader = train_loader(images, processor, batch_size=4, seed=0, num_steps=9, shuffle=False)
        assert labels(loader) == list(range(12)) * 3

    @pytest.mark.parametrize("num_files", [1, 4, 5])
    def test_readers_share_the_images(self, tmp_path, processor, num_files):
        images = open_images(write_parquet(tmp_path / "y", 40, num_files), "train", streaming=True)
        parts = [
            eval_loader(images, processor, batch_size=8, process_index=r, num_processes=2, num_workers=2)
            for r in range(2)
        ]
        assert sorted(labels(chain.from_iterable(parts))) == list(range(40))
        if num_files < 5:  # readers get the same number of files
            steps = {"batch_size": 20, "num_steps": 2, "seed": 0, "num_processes": 2, "num_workers": 2}
            found = [labels(train_loader(images, processor, **steps, process_index=r)) for r in range(2)]
            assert sorted(chain.from_iterable(found)) == list(range(40))

    def test_a_damaged_image_is_replaced_by_the_next(self, images, processor):
        loader = train_loader(images, processor, batch_size=8, seed=0, num_steps=5, shuffle=False)
        assert labels(loader) == [8 if i == 7 else 24 if i == 23 else i for i in range(40)]
        assert set(loader.failures.reasons) == {f"{i}.png of {images.title}" for i in (7, 23)}

    def test_limit_takes_the_first_images_whoever_reads_them(self, tmp_path, processor):
        images = open_images(write_parquet(tmp_path / "y", 40, 4), "train", streaming=True)
        for num_processes in (1, 2, 4):
            options = {"batch_size": 4, "num_processes": num_processes, "limit": 14}
            parts = [eval_loader(images, processor, **options, process_index=r) for r in range(num_processes)]
            assert sorted(labels(chain.from_iterable(parts))) == list(range(14))

    def test_a_reader_without_images_says_so(self, tmp_path, processor):
        images = open_images(write_parquet(tmp_path / "y", 1), "train", streaming=True)
        loader = train_loader(images, processor, batch_size=2, seed=0, num_steps=2, process_index=1, num_processes=2)
        with pytest.raises(ValueError, match="reader 1 of 2 got no image"):
            list(loader)


@pytest.mark.slow
def test_an_interrupt_ends_the_workers_with_one_traceback():
    script = """
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from raptor_hf.data.images import open_images
from raptor_hf.data.loaders import train_loader
loader = train_loader(
    open_images("digits", "train"), BitImageProcessorPil(), batch_size=4, seed=0, num_steps=10**6, num_workers=2
)
for step, batch in enumerate(loader):
    if step == 3:
        print("running", flush=True)
"""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to parent and workers alike
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
