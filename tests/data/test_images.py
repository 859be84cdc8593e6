"""Claims about opening, naming and decoding images, and about the image processor in front of a model."""

import io
import math
import os
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from raptor_hf.data import sources
from raptor_hf.data.images import (
    ImageDecodeError,
    augment,
    check_image_size,
    load_image_processor,
    open_images,
    resized_processor,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def noise(seed: int, size: tuple[int, int] = (24, 16)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(image: PIL.Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write_folder(folder: Path, names: list[str]) -> str:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(folder / name)
    return str(folder)


def write_parquet(path: Path, columns: dict, features: dict | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features and datasets.Features(features)).to_parquet(path)
    return str(path)


def pixels(image: PIL.Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


class TestDigits:
    def test_are_scikit_learns_images_in_0_to_255(self):
        images = open_images("digits", "test")
        digits = load_digits()
        _, rows = train_test_split(range(1797), test_size=500, stratify=digits.target, random_state=0)
        assert images.num_images == 500
        assert images.class_names == [str(digit) for digit in range(10)]
        for index in (0, 17, 499):
            image, label = images.decode(index)
            expected = np.round(digits.images[rows[index]] * 255 / 16)[..., None].repeat(3, axis=-1)
            np.testing.assert_array_equal(pixels(image), expected)
            assert label == digits.target[rows[index]]

    def test_splits_share_no_row_and_hold_all(self):
        joined = open_images("digits", "train+test")
        found = sorted(row["image"]["bytes"] for row in joined.dataset)
        gray = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
        assert found == sorted(encoded(PIL.Image.fromarray(image)) for image in gray)

    def test_slices_select_the_same_rows_as_python_slices(self):
        train, test = (open_images("digits", split).dataset["label"] for split in ("train", "test"))
        part = open_images("digits", "train[:10]+test[-2%:]")
        assert part.dataset["label"][:] == train[:10] + test[-10:]
        assert part.name(3) == "row 3 of digits train[:10]+test[-2%:]"


class TestFolder:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_sub_folders_are_splits_and_classes(self, tmp_path, streaming):
        names = ["train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png"]
        images = open_images(write_folder(tmp_path, names), "validation", streaming=streaming)
        rows = list(images.dataset)
        assert images.class_names == ["cat", "dog"]
        assert images.num_images == (None if streaming else 2)
        for row, name, label, seed in zip(rows, names[2:], (0, 1), (2, 3), strict=True):
            path, image, found = images.read_row(row)
            assert (path, found) == (str(tmp_path / name), label)
            np.testing.assert_array_equal(pixels(image), pixels(noise(seed)))

    def test_without_split_folders_everything_is_train(self, tmp_path):
        images = open_images(write_folder(tmp_path, ["cat/0.png", "dog/1.png", "dog/2.png"]), "train")
        assert [images.decode(index)[1] for index in range(3)] == [0, 1, 1]
        assert images.name(2) == str(tmp_path / "dog/2.png")

    def test_split_folders_are_not_taken_for_classes(self, tmp_path):
        images = open_images(write_folder(tmp_path, ["train/0.png", "test/1.png"]), "test")
        assert not images.has_labels and images.class_names is None
        assert images.decode(0)[1] is None

    def test_every_mode_becomes_rgb(self, tmp_path):
        for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
            noise(0).convert(mode).save(tmp_path / f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}")
        images = open_images(str(tmp_path), "train")
        assert images.num_images == 6
        for index in range(6):
            with PIL.Image.open(images.name(index)) as stored:
                np.testing.assert_array_equal(pixels(images.decode(index)[0]), pixels(stored.convert("RGB")))

    def test_exif_orientation_is_applied(self, tmp_path):
        exif = PIL.Image.Exif()
        exif[PIL.Image.ExifTags.Base.Orientation] = 6  # the camera was held so that upright is a quarter turn clockwise
        noise(0).save(tmp_path / "0.png", exif=exif)
        image, _ = open_images(str(tmp_path), "train").decode(0)
        np.testing.assert_array_equal(pixels(image), np.rot90(pixels(noise(0)), k=-1))


class TestModes:
    ramp = np.linspace(0, 65535, 24 * 16).round().astype(np.uint16).reshape(16, 24)

    @pytest.mark.parametrize("name", ["gray.png", "gray.tiff", "gray.pgm"])
    def test_gray_of_16_bits_is_scaled_by_its_range(self, tmp_path, name):
        PIL.Image.fromarray(self.ramp).save(tmp_path / name)
        images = open_images(str(tmp_path), "train")
        expected = np.rint(self.ramp / 65535 * 255)[..., None].repeat(3, axis=-1)
        np.testing.assert_array_equal(pixels(images.decode(0)[0]), expected)
        assert len(np.unique(expected)) == 256

    def test_gray_of_16_bits_is_turned_upright_too(self, tmp_path):
        exif = PIL.Image.Exif()
        exif[PIL.Image.ExifTags.Base.Orientation] = 6
        PIL.Image.fromarray(self.ramp).save(tmp_path / "0.png", exif=exif)
        image, _ = open_images(str(tmp_path), "train").decode(0)
        np.testing.assert_array_equal(pixels(image)[..., 0], np.rot90(np.rint(self.ramp / 257), k=-1))

    @pytest.mark.parametrize("dtype, mode", [(np.float32, "F"), (np.int32, "I")])
    def test_numbers_without_a_range_are_refused_by_the_name_of_their_mode(self, tmp_path, dtype, mode):
        PIL.Image.fromarray((self.ramp / 65535).astype(dtype)).save(tmp_path / "0.tiff")
        with pytest.raises(ImageDecodeError, match=f"0.tiff' has mode '{mode}'.* range is not known"):
            open_images(str(tmp_path), "train").decode(0)

    @pytest.mark.parametrize("size", [(1, 3000), (50_000, 20)])
    def test_a_long_thin_image_is_unreadable_before_anything_resizes_it(self, tmp_path, size):
        PIL.Image.new("RGB", size).save(tmp_path / "0.png")
        message = f"0.png' is {size[1]} x {size[0]} pixels large; its longer side must be at most 200 times the shorter"
        with pytest.raises(ImageDecodeError, match=message):
            open_images(str(tmp_path), "train").decode(0)

    def test_a_model_that_takes_gray_images_is_refused(self):
        gray = BitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=[0.5])
        with pytest.raises(ValueError, match=r"its image processor takes images of 1 channel.* images are RGB"):
            check_image_size(gray, 2)
        with pytest.raises(ValueError, match=r"the model takes images of 1 channel"):
            check_image_size(BitImageProcessorPil(), 14, num_channels=1)


class TestParquet:
    columns = {"picture": [noise(seed) for seed in range(4)], "kind": [0, 1, 1, 0], "note": list("abcd")}
    features = {
        "picture": datasets.Image(),
        "kind": datasets.ClassLabel(names=["a", "b"]),
        "note": datasets.Value("string"),
    }

    @pytest.mark.parametrize("place", ["{folder}/x-{{split}}.parquet", "{folder}/*{{split}}*", "{folder}"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_file_per_split_is_found_by_pattern_or_folder(self, tmp_path, place, streaming):
        for split, rows in (("train", slice(0, 3)), ("test", slice(3, 4))):
            columns = {name: values[rows] for name, values in self.columns.items()}
            write_parquet(tmp_path / f"x-{split}.parquet", columns, self.features)
        dataset = place.format(folder=tmp_path)
        for split, seeds in (("train", [0, 1, 2]), ("test", [3])):
            images = open_images(dataset, split, streaming=streaming)
            rows = list(images.dataset)
            assert images.class_names == ["a", "b"] and set(rows[0]) == {"picture", "kind"}
            for row, seed in zip(rows, seeds, strict=True):
                _, image, label = images.read_row(row)
                np.testing.assert_array_equal(pixels(image), pixels(noise(seed)))
                assert label == self.columns["kind"][seed]

    def test_a_file_or_glob_without_split_is_train(self, tmp_path):
        for part in range(2):
            write_parquet(tmp_path / f"part-{part}.parquet", self.columns, self.features)
        assert open_images(str(tmp_path / "part-0.parquet"), "train[1:]").num_images == 3
        assert open_images(str(tmp_path / "*.parquet"), "train").num_images == 8

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("kind", ["bytes", "large bytes", "struct", "paths"])
    def test_images_need_no_image_feature(self, tmp_path, kind, streaming):
        write_folder(tmp_path, ["0.png", "1.png"])
        stored = [(tmp_path / f"{i}.png").read_bytes() for i in range(2)]
        column = {
            "bytes": pa.array(stored),
            "large bytes": pa.array(stored, pa.large_binary()),
            "struct": pa.array([{"bytes": content, "path": None} for content in stored]),
            "paths": pa.array([str(tmp_path / f"{i}.png") for i in range(2)]),
        }[kind]
        pq.write_table(pa.table({"x": column, "labels": [5, 7]}), tmp_path / "plain.parquet")
        images = open_images(
            str(tmp_path / "plain.parquet"), "train", image_column="x" if kind == "paths" else None, streaming=streaming
        )
        assert images.class_names is None
        found = [images.read_row(row)[1:] for row in images.dataset]
        assert [label for _, label in found] == [5, 7]
        for seed, (image, _) in enumerate(found):
            np.testing.assert_array_equal(pixels(image), pixels(noise(seed)))

    def test_columns_can_be_chosen_among_several(self, tmp_path):
        columns = {"left": [noise(0)], "right": [noise(1)], "coarse": [0], "fine": [1]}
        names = datasets.ClassLabel(names=["a", "b"])
        features = {"left": datasets.Image(), "right": datasets.Image(), "coarse": names, "fine": names}
        path = write_parquet(tmp_path / "two.parquet", columns, features)
        image, label = open_images(path, "train", image_column="right", label_column="fine").decode(0)
        np.testing.assert_array_equal(pixels(image), pixels(noise(1)))
        assert label == 1
        with pytest.raises(ValueError, match=r"several columns of images, \['left', 'right'\]"):
            open_images(path, "train", label_column="fine")
        with pytest.raises(ValueError, match=r"several columns of class labels, \['coarse', 'fine'\]"):
            open_images(path, "train", image_column="left")

    def test_real_cifar10_equals_a_plain_read_of_the_file(self):
        folder = Path(os.environ.get("RAPTOR_DATA", Path(__file__).parents[3] / "shared" / "data"))
        if not (folder / "cifar10-test.parquet").exists():
            pytest.skip(f"no cifar10-test.parquet in {folder}; set RAPTOR_DATA to where it is")
        images = open_images(str(folder / "cifar10-{split}.parquet"), "test")
        rows = pq.read_table(folder / "cifar10-test.parquet").slice(0, 50).to_pylist()
        assert images.num_images == 10_000 and len(images.class_names) == 10
        for index, row in enumerate(rows):
            image, label = images.decode(index)
            np.testing.assert_array_equal(pixels(image), pixels(PIL.Image.open(io.BytesIO(row["img"]["bytes"]))))
            assert label == row["label"]


class TestUnreadableImages:
    def test_truncated_foreign_and_missing_files_are_named(self, tmp_path):
        whole = encoded(noise(0, (64, 64)), "JPEG")
        contents = {"cut.jpg": whole[: len(whole) // 2], "text.png": b"hello", "empty.png": b"", "gone.png": whole}
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        images = open_images(str(tmp_path), "train")  # nothing is decoded yet
        (tmp_path / "gone.png").unlink()
        assert images.num_images == 4
        for index in range(4):
            with pytest.raises(ImageDecodeError) as caught:
                images.decode(index)
            assert caught.value.name == images.name(index) == str(tmp_path / sorted(contents)[index])
            assert caught.value.name in str(caught.value)

    def test_damaged_bytes_and_empty_cells_are_named_by_row(self, tmp_path):
        damaged = encoded(noise(0))[:-40]
        column = pa.array([{"bytes": damaged, "path": "0.png"}, None])
        pq.write_table(pa.table({"image": column, "label": [0, 1]}), tmp_path / "x.parquet")
        images = open_images(str(tmp_path / "x.parquet"), "train")
        for index, reason in enumerate(["OSError", "no image"]):
            with pytest.raises(ImageDecodeError, match=reason) as caught:
                images.decode(index)
            assert caught.value.name == f"row {index} of {tmp_path}/x.parquet train"

    def test_names_in_a_stream_do_not_depend_on_the_order(self, tmp_path):
        column = pa.array([{"bytes": encoded(noise(0)), "path": "0.png"}, {"bytes": encoded(noise(1)), "path": None}])
        pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
        images = open_images(str(tmp_path / "x.parquet"), "train", streaming=True)
        names = [images.read_row(row)[0] for row in images.dataset]
        assert names[0] == f"0.png of {images.title}" and names[1].startswith("SHA-1 ")
        assert {images.read_row(row)[0] for row in reversed(list(images.dataset))} == set(names)


class TestErrors:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_say_what_there_is(self, tmp_path, streaming):
        path = write_parquet(tmp_path / "a-train.parquet", TestParquet.columns, TestParquet.features)
        for options, message in (
            ({"split": "test"}, r"split='test' .* its splits are \['train'\]"),
            ({"image_column": "image"}, r"image_column='image' .* \['picture', 'kind', 'note'\]"),
            ({"label_column": "label"}, r"label_column='label' .* \['picture', 'kind', 'note'\]"),
            ({"image_column": "kind"}, "image_column='kind' .* holds no images"),
            ({"label_column": "picture"}, "label_column='picture' .* holds no class labels"),
            ({"revision": "main"}, "revision='main' means nothing"),
            ({"split": "train[:1"}, r"train\[:1"),
        ):
            with pytest.raises(ValueError, match=message):
                open_images(path, **{"split": "train", "streaming": streaming, **options})
        with pytest.raises(
            FileNotFoundError, match=r"a-test.parquet' for split 'test'; there are \['a-train.parquet'\]"
        ):
            open_images(str(tmp_path / "a-{split}.parquet"), "test", streaming=streaming)

    def test_splits_and_columns_are_checked_before_the_data_set_is_prepared(self, tmp_path, monkeypatch):
        path = write_parquet(tmp_path / "a.parquet", TestParquet.columns, TestParquet.features)
        monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("prepared"))
        for options in ({"split": "test"}, {"split": "train", "image_column": "image"}):
            with pytest.raises(ValueError):
                open_images(path, **options)

    def test_of_places_without_images(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "a.csv").write_text("x,y\n1,2\n")
        (tmp_path / "a.txt").write_text("hello")
        for dataset, error, message in (
            (tmp_path / "nowhere", FileNotFoundError, "no such folder or file"),
            (tmp_path / "empty", FileNotFoundError, "no folder or file with images"),
            (tmp_path / "no.parquet", FileNotFoundError, "no file"),
            (tmp_path / "text", ValueError, r"no column of images\. .* \['x', 'y'\]"),
            (tmp_path / "a.txt", ValueError, "must be a folder, parquet files"),
            (tmp_path / "*.txt", ValueError, "not parquet"),
        ):
            with pytest.raises(error, match=message):
                open_images(str(dataset), "train")

    def test_of_empty_sets(self, tmp_path):
        path = write_parquet(tmp_path / "none.parquet", {"image": []}, {"image": datasets.Image()})
        for dataset, split, message in ((path, "train", "none.parquet.*no data"), ("digits", "test[:0]", "no images")):
            with pytest.raises(ValueError, match=message):
                open_images(dataset, split)

    def test_a_stream_has_no_slices(self):
        with pytest.raises(ValueError, match=r"reads one whole split, one of \['test', 'train'\]"):
            open_images("digits", "train[:10]", streaming=True)


class TestHub:
    def test_name_configuration_and_revision_are_handed_on(self, monkeypatch):
        calls = []

        def load(streaming=False, **arguments):
            calls.append(arguments)
            rows = datasets.Dataset.from_dict({"image": [noise(0)]}, features=datasets.Features(image=datasets.Image()))
            return {"train": rows.to_iterable_dataset()} if streaming else rows

        monkeypatch.setattr(sources, "load_dataset", load)
        images = open_images("owner/name", "train", config_name="small", revision="v1")
        common = {"path": "owner/name", "name": "small", "revision": "v1"}
        assert calls == [common, common | {"split": "train"}]
        assert images.num_images == 1

    def test_an_unreachable_data_set_is_named(self, monkeypatch):
        def load(**_):
            raise ConnectionError("offline")

        monkeypatch.setattr(sources, "load_dataset", load)
        with pytest.raises(FileNotFoundError, match="dataset='owner/name' .* offline"):
            open_images("owner/name", "train")


class TestImageProcessor:
    def test_loads_from_a_folder_what_was_saved(self, tmp_path):
        saved = BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 28, "width": 42})
        saved.save_pretrained(tmp_path)
        loaded = load_image_processor(str(tmp_path))
        found, expected = (p(images=[noise(0)], return_tensors="pt")["pixel_values"] for p in (loaded, saved))
        assert torch.equal(found, expected) and check_image_size(loaded, 14) == (28, 42)

    def test_a_folder_without_one_says_which_file_is_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
            load_image_processor(str(tmp_path))

    def test_sizes_that_do_not_divide_name_the_nearest_that_do(self):
        processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 30})
        with pytest.raises(ValueError, match="28 x 30 .* patch_size=14; use 28 or 42 in place of 30"):
            check_image_size(processor, 14)
        with pytest.raises(ValueError, match="patch_size=32; use 32 in place of 28"):
            check_image_size(processor, 32)
        assert check_image_size(processor, (14, 15)) == (28, 30)
        with pytest.raises(ValueError, match=r"patch_size=\(14, 16\); use 16 or 32 in place of 30"):
            check_image_size(processor, (14, 16))

    @pytest.mark.parametrize(
        "processor, fields",
        [
            (
                BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 42}),
                {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 84}},
            ),
            (
                ViTImageProcessorPil(size={"height": 28, "width": 28}),
                {"size": {"height": 56, "width": 56}},
            ),
        ],
        ids=["crop", "no crop"],
    )
    def test_resized_processor_makes_the_images_of_one_that_was_made_for_that_size(self, processor, fields):
        resized, expected = resized_processor(processor, 56, 14), type(processor)(**fields)
        pictures = [noise(0, (90, 60)), noise(1, (50, 80))]
        pixels = [each(images=pictures, return_tensors="pt")["pixel_values"] for each in (resized, expected)]
        assert torch.equal(*pixels) and min(pixels[0].shape[-2:]) == 56
        assert min(check_image_size(processor, 14)) == 28  # the given one is as it was
        with pytest.raises(ValueError, match="does not divide into patches of patch_size=14; use 42 or 56"):
            resized_processor(processor, 50, 14)

    def test_sizes_that_vary_are_refused(self):
        with pytest.raises(ValueError, match="varies"):
            check_image_size(BitImageProcessorPil(do_center_crop=False), 14)


class TestAugment:
    @staticmethod
    def blob(batch: int, x: float, y: float) -> torch.Tensor:
        """A smooth spot at (x, y) pixels from the centre of images that are no squares."""
        rows, columns = torch.arange(60.0) - 29.5, torch.arange(100.0) - 49.5
        return torch.exp(-((columns - x) ** 2 + (rows[:, None] - y) ** 2) / 18).expand(batch, 1, 60, 100)

    @staticmethod
    def centre(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = images[:, 0] / images[:, 0].sum(dim=(1, 2), keepdim=True)
        x = (weights.sum(dim=1) * (torch.arange(100.0) - 49.5)).sum(dim=1)
        y = (weights.sum(dim=2) * (torch.arange(60.0) - 29.5)).sum(dim=1)
        return x, y

    def test_is_a_function_of_its_generator(self):
        options = {"rotation_degrees": 20, "translation": 0.1, "scale": (0.8, 1.2), "horizontal_flip": True}
        images = torch.randn(3, 3, 16, 16)
        first, again = (augment(images, torch.Generator().manual_seed(0), **options) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, augment(images, torch.Generator().manual_seed(1), **options))

    def test_does_nothing_unless_asked(self):
        images = torch.randn(3, 3, 16, 20)
        torch.testing.assert_close(augment(images, torch.Generator()), images, atol=1e-5, rtol=0)

    def test_half_precision_rounds_the_result_only(self):
        images = torch.randn(2, 3, 100, 100).bfloat16()
        options = {"rotation_degrees": 20, "translation": 0.1}
        half, full = (augment(x, torch.Generator().manual_seed(0), **options) for x in (images, images.float()))
        assert torch.equal(half, full.bfloat16())

    def test_flips_about_half_of_the_images(self):
        images = torch.randn(64, 1, 8, 10)
        found = augment(images, torch.Generator().manual_seed(0), horizontal_flip=True)
        flipped = torch.isclose(found, images.flip(-1), atol=1e-4).flatten(1).all(dim=1)
        kept = torch.isclose(found, images, atol=1e-4).flatten(1).all(dim=1)
        assert (flipped ^ kept).all() and 20 < flipped.sum() < 44

    def test_rotation_turns_pixels_without_shear(self):
        x, y = self.centre(augment(self.blob(32, 12, 5), torch.Generator().manual_seed(0), rotation_degrees=30))
        torch.testing.assert_close(torch.hypot(x, y), torch.full((32,), 13.0), atol=0.05, rtol=0)
        degrees = torch.rad2deg(torch.atan2(y, x)) - math.degrees(math.atan2(5, 12))
        assert degrees.abs().max() < 30.1 and degrees.min() < -20 and degrees.max() > 20

    def test_scale_magnifies(self):
        x, y = self.centre(augment(self.blob(4, 12, 5), torch.Generator().manual_seed(0), scale=(1.5, 1.5)))
        torch.testing.assert_close((x, y), (torch.full((4,), 18.0), torch.full((4,), 7.5)), atol=0.05, rtol=0)

    def test_translation_stays_within_its_fraction_of_each_side(self):
        x, y = self.centre(augment(self.blob(64, 0, 0), torch.Generator().manual_seed(0), translation=0.1))
        assert 9 < x.abs().max() < 10.05 and 5.4 < y.abs().max() < 6.05

    def test_refuses_what_it_cannot_mean(self):
        with pytest.raises(ValueError, match="floating point"):
            augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.Generator())
        with pytest.raises(ValueError, match="scale is \\(1.2, 0.8\\)"):
            augment(torch.zeros(1, 3, 8, 8), torch.Generator(), scale=(1.2, 0.8))
