"""Claims about images with masks or depth: folders as ADE20k and NYUv2 lay them out, parquet files, and bad targets."""

import io
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from raptor_hf.data.dense import TargetError, open_dense
from raptor_hf.data.images import ImageDecodeError
from tests.support.dense_layouts import ADE_NAMES, noise, write_ade20k, write_kaggle_nyuv2, write_nyuv2

SEGMENTATION, DEPTH = "semantic-segmentation", "depth-estimation"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def encoded(values: np.ndarray, format: str = "PNG") -> dict:
    buffer = io.BytesIO()
    PIL.Image.fromarray(values).save(buffer, format)
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(folder: Path, column: str, targets: list[np.ndarray], format: str = "PNG") -> str:
    """Images of the sizes of the targets, all columns as a Hub data set has them."""
    pictures = [encoded(np.asarray(noise(i, target.shape))) for i, target in enumerate(targets)]
    features = datasets.Features(
        {"image": datasets.Image(), column: datasets.Image(), "scene": datasets.Value("int64")}
    )
    columns = {"image": pictures, column: [encoded(t, format) for t in targets], "scene": list(range(len(targets)))}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "data.parquet")
    return str(folder / "data.parquet")


def repaint(path: Path, value: int) -> None:
    """Sets one pixel of a stored map, at row 2, column 5."""
    with PIL.Image.open(path) as stored:
        values = np.array(stored)
    values[2, 5] = value
    PIL.Image.fromarray(values).save(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class TestAde20k:
    def test_label_0_is_ignored_and_the_classes_count_from_0(self, tmp_path):
        masks = write_ade20k(tmp_path)
        for split, word in (("training", "train"), ("validation", "val")):
            images = open_dense(SEGMENTATION, str(tmp_path), split)
            images.check()
            assert images.num_images == 3 and images.class_names == list(ADE_NAMES) and images.has_labels
            for index, mask in enumerate(masks[split]):
                image, found = images.decode(index)
                path = tmp_path / "images" / split / f"ADE_{word}_{index + 1:08d}.jpg"
                assert images.name(index) == str(path)
                with PIL.Image.open(path) as stored:
                    np.testing.assert_array_equal(np.asarray(image), np.asarray(stored))
                assert found.dtype == np.int64
                expected = [[255 if label == 0 else int(label) - 1 for label in row] for row in mask]
                assert found.tolist() == expected

    def test_without_the_table_there_are_150_numbered_classes(self, tmp_path):
        write_ade20k(tmp_path, names=False)
        assert open_dense(SEGMENTATION, str(tmp_path), "training").class_names == [str(i) for i in range(150)]

    def test_slices_and_streams_give_the_same_rows(self, tmp_path):
        write_ade20k(tmp_path)
        names = [open_dense(SEGMENTATION, str(tmp_path), "training").name(index) for index in range(3)]
        part = open_dense(SEGMENTATION, str(tmp_path), "training[1:]+validation[:1]")
        assert [part.name(0), part.name(1)] == names[1:] and part.num_images == 3
        stream = open_dense(SEGMENTATION, str(tmp_path), "training", streaming=True)
        stream.check()
        assert stream.num_images is None and [stream.read_row(row)[0] for row in stream.dataset] == names
        with pytest.raises(ValueError, match="one whole split"):
            open_dense(SEGMENTATION, str(tmp_path), "training[:1]", streaming=True)

    def test_a_label_that_is_no_class_is_named_with_its_file(self, tmp_path):
        write_ade20k(tmp_path)
        repaint(tmp_path / "annotations/training/ADE_train_00000002.png", 151)
        images = open_dense(SEGMENTATION, str(tmp_path), "training")
        message = (
            r"annotations/training/ADE_train_00000002.png holds the label 151 at row 2, column 5; .* 1 to 3, and 0"
        )
        with pytest.raises(ValueError, match=message):
            images.check()
        with pytest.raises(TargetError, match=message):  # and while training, it costs the image
            images.decode(1)

    def test_a_mask_of_another_size_than_the_image_is_refused(self, tmp_path):
        write_ade20k(tmp_path)
        shutil.copy(*(tmp_path / f"annotations/validation/ADE_val_0000000{i}.png" for i in (1, 3)))
        with pytest.raises(ValueError, match="ADE_val_00000003.png is 20 x 30 pixels large, the image 22 x 30"):
            open_dense(SEGMENTATION, str(tmp_path), "validation").check()

    def test_a_coloured_mask_is_refused(self, tmp_path):
        write_ade20k(tmp_path)
        noise(0, (20, 30)).save(tmp_path / "annotations/training/ADE_train_00000001.png")
        with pytest.raises(ValueError, match="has 3 channels"):
            open_dense(SEGMENTATION, str(tmp_path), "training").check()

    @pytest.mark.parametrize("kind", ["images", "annotations"])
    def test_a_truncated_or_vanished_file_costs_one_image(self, tmp_path, kind):
        write_ade20k(tmp_path)
        images = open_dense(SEGMENTATION, str(tmp_path), "training")
        first, second, _ = sorted((tmp_path / kind / "training").iterdir())
        truncate(first)
        second.unlink()
        for index, path in enumerate((first, second)):
            with pytest.raises(ImageDecodeError, match=path.name) as caught:
                images.decode(index)
            assert caught.value.name == images.name(index) and not isinstance(caught.value, TargetError)
        images.check()  # one can be read
        for path in (tmp_path / kind / "training").iterdir():
            truncate(path)
        with pytest.raises(ValueError, match="none of the images .* can be read"):
            images.check()

    def test_an_image_without_a_mask_is_found_on_opening(self, tmp_path):
        write_ade20k(tmp_path)
        (tmp_path / "annotations/training/ADE_train_00000002.png").unlink()
        with pytest.raises(FileNotFoundError, match="1 of 3 images .*annotations/training/ADE_train_00000002.png"):
            open_dense(SEGMENTATION, str(tmp_path), "training")

    def test_unknown_splits_and_options_that_do_not_fit_are_refused(self, tmp_path):
        write_ade20k(tmp_path)
        for options, message in (
            ({"split": "train"}, r"its splits are \['training', 'validation'\]"),
            ({"num_classes": 150}, "num_classes=150, but .* 3 classes"),
            ({"depth_unit": 0.001}, "depth_unit=0.001 means nothing"),
            ({"target_column": "mask"}, "target_column='mask' means nothing"),
            ({"task": "segmentation"}, "task is 'segmentation'; it must be one of"),
        ):
            arguments = {"task": SEGMENTATION, "dataset": str(tmp_path), "split": "training"} | options
            with pytest.raises(ValueError, match=message):
                open_dense(**arguments)


class TestNyu:
    @pytest.mark.parametrize("lists", [False, True])
    def test_depth_is_stored_millimetres_in_metres_and_0_where_unknown(self, tmp_path, lists):
        depths = write_nyuv2(tmp_path, lists=lists)
        for split in ("train", "test"):
            images = open_dense(DEPTH, str(tmp_path), split, depth_unit=0.001)
            images.check(depth_range=(0.001, 10))
            assert images.num_images == 4 and images.class_names is None
            place = "sync" if lists and split == "train" else f"official_splits/{split}"
            assert images.name(3) == str(tmp_path / place / "kitchen_0028b/rgb_00046.jpg")
            for index, stored in enumerate(depths[split]):
                image, depth = images.decode(index)
                assert depth.dtype == np.float32 and image.size == (16, 12)
                np.testing.assert_allclose(depth, stored / 1000, rtol=1e-6)

    @pytest.mark.parametrize("opened", ["", "data"])
    def test_at_kaggle_is_two_lists_of_pairs_in_two_units(self, tmp_path, opened):
        metres = write_kaggle_nyuv2(tmp_path)
        for split, unit in (("train", 10 / 255), ("test", 0.001)):
            images = open_dense(DEPTH, str(tmp_path / opened), split, depth_unit=unit)
            images.check(depth_range=(1e-3, 10.0))
            assert images.num_images == 3
            for index, expected in enumerate(metres[split]):
                image, depth = images.decode(index)
                path = tmp_path / "data" / f"nyu2_{split}" / f"{index}.jpg"
                assert images.name(index) == str(path)
                np.testing.assert_allclose(depth, expected, rtol=1e-6)
                np.testing.assert_array_equal(np.asarray(image), np.asarray(PIL.Image.open(path)))
                assert depth.max() <= 10.0  # and so no pixel of bytes is beyond the range

    def test_a_list_decides_which_images_there_are(self, tmp_path):
        write_nyuv2(tmp_path)
        line = "bathroom/rgb_00046.jpg bathroom/sync_depth_00046.png 518.8579\n"
        (tmp_path / "nyu_test.txt").write_text(line)  # as the Monocular Depth Toolbox calls it
        images = open_dense(DEPTH, str(tmp_path), "test", depth_unit=0.001)
        assert images.num_images == 1 and Path(images.name(0)).name == "rgb_00046.jpg"
        (tmp_path / "nyu_test.txt").write_text(line + "bathroom/rgb_00045.jpg\n")
        with pytest.raises(ValueError, match="line 2 of .*nyu_test.txt"):
            open_dense(DEPTH, str(tmp_path), "test", depth_unit=0.001)
        (tmp_path / "nyu_test.txt").write_text("cellar/rgb_1.jpg cellar/sync_depth_1.png 518.8579\n")
        with pytest.raises(FileNotFoundError, match="cellar/rgb_1.jpg, are in none of"):
            open_dense(DEPTH, str(tmp_path), "test", depth_unit=0.001)

    def test_a_missing_unit_is_an_error_that_says_what_works(self, tmp_path):
        write_nyuv2(tmp_path)
        with pytest.raises(ValueError, match="give depth_unit, .* 0.001 for millimetres"):
            open_dense(DEPTH, str(tmp_path), "test").check()
        for unit in (0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"depth_unit is {unit}; it must be"):
                open_dense(DEPTH, str(tmp_path), "test", depth_unit=unit)

    def test_depth_without_a_valid_pixel_is_refused(self, tmp_path):
        write_nyuv2(tmp_path)
        path = tmp_path / "official_splits/test/bathroom/sync_depth_00046.png"
        images = open_dense(DEPTH, str(tmp_path), "test", depth_unit=0.001)
        PIL.Image.fromarray(np.zeros((12, 16), np.uint16)).save(path)
        with pytest.raises(ValueError, match="bathroom/sync_depth_00046.png holds no valid depth"):
            images.check()

    def test_a_wrong_unit_leaves_no_valid_depth_in_range(self, tmp_path):
        write_nyuv2(tmp_path)
        images = open_dense(DEPTH, str(tmp_path), "test", depth_unit=1.0)
        images.check()
        with pytest.raises(ValueError, match=r"no depth is valid, between 0.001 and 10 m; they are \d+ to \d+ m"):
            images.check(depth_range=(0.001, 10))

    def test_truncated_missing_and_misshapen_depth(self, tmp_path):
        write_nyuv2(tmp_path)
        images = open_dense(DEPTH, str(tmp_path), "test", depth_unit=0.001)
        folder = tmp_path / "official_splits/test/bathroom"
        truncate(folder / "sync_depth_00045.png")
        with pytest.raises(ImageDecodeError, match="sync_depth_00045.png"):
            images.decode(0)
        PIL.Image.fromarray(np.ones((12, 15), np.uint16)).save(folder / "sync_depth_00046.png")
        with pytest.raises(ValueError, match="12 x 15 pixels large, the image 12 x 16"):
            images.check()
        (folder / "sync_depth_00046.png").unlink()
        with pytest.raises(FileNotFoundError, match="1 of 4 images have no target, the first is .*00046.png"):
            open_dense(DEPTH, str(tmp_path), "test", depth_unit=0.001)


class TestColumns:
    masks = [np.random.default_rng(i).integers(0, 5, (6, 8 + i), dtype=np.uint8) for i in range(3)]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_masks_in_parquet_are_classes_as_stored(self, tmp_path, streaming):
        masks = [mask.copy() for mask in self.masks]
        masks[1][0, 0] = 255
        path = write_parquet(tmp_path, "annotation", masks)
        images = open_dense(SEGMENTATION, path, "train", num_classes=5, streaming=streaming)
        images.check()
        assert images.class_names == list("01234")
        for row, mask in zip(images.dataset, masks, strict=True):
            np.testing.assert_array_equal(images.read_row(row)[2], mask)

    def test_ignore_label_0_counts_classes_from_1_and_another_does_not(self, tmp_path):
        path = write_parquet(tmp_path, "mask", self.masks)
        mask = self.masks[0].astype(int)
        reduced = open_dense(SEGMENTATION, path, "train", num_classes=4, ignore_label=0).decode(0)[1]
        np.testing.assert_array_equal(reduced, np.where(mask == 0, 255, mask - 1))
        kept = open_dense(SEGMENTATION, path, "train", num_classes=4, ignore_label=4).decode(0)[1]
        np.testing.assert_array_equal(kept, np.where(mask == 4, 255, mask))

    def test_the_number_of_classes_must_be_known(self, tmp_path):
        path = write_parquet(tmp_path, "mask", self.masks)
        with pytest.raises(ValueError, match="give num_classes"):
            open_dense(SEGMENTATION, path, "train")
        with pytest.raises(ValueError, match="num_classes is 256"):
            open_dense(SEGMENTATION, path, "train", num_classes=256)
        with pytest.raises(ValueError, match="row 0 of .* holds the label 3 .* classes are 0 to 2"):
            open_dense(SEGMENTATION, path, "train", num_classes=3).check()

    def test_float_depth_is_metres_unless_a_unit_is_given(self, tmp_path):
        depth = np.array([[0.5, 2.25], [np.nan, np.inf], [-1, 0]], np.float32)
        path = write_parquet(tmp_path, "depth_map", [depth], "TIFF")
        expected = np.array([[0.5, 2.25], [0, 0], [0, 0]])
        np.testing.assert_array_equal(open_dense(DEPTH, path, "train").decode(0)[1], expected)
        images = open_dense(DEPTH, path, "train", depth_unit=0.5)
        np.testing.assert_array_equal(images.decode(0)[1], expected / 2)

    def test_columns_are_named_where_they_cannot_be_found(self, tmp_path):
        path = write_parquet(tmp_path, "truth", self.masks)
        with pytest.raises(ValueError, match=r"target_column. Its columns are \['image', 'truth', 'scene'\]"):
            open_dense(SEGMENTATION, path, "train", num_classes=5)
        with pytest.raises(ValueError, match="target_column='scene' .* holds no images"):
            open_dense(SEGMENTATION, path, "train", num_classes=5, target_column="scene")
        with pytest.raises(ValueError, match="target_column='maks'"):
            open_dense(SEGMENTATION, path, "train", num_classes=5, target_column="maks")
        images = open_dense(SEGMENTATION, path, "train", num_classes=5, target_column="truth", image_column="image")
        np.testing.assert_array_equal(images.decode(2)[1], self.masks[2])

    def test_a_data_set_that_is_not_there_says_so(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            open_dense(DEPTH, str(tmp_path / "nothing"), "train")


def test_check_tries_the_whole_range_of_a_large_set(tmp_path):
    masks = [np.zeros((4, 4), np.uint8) for _ in range(30)]
    masks[-1][0, 0] = 9
    images = open_dense(SEGMENTATION, write_parquet(tmp_path, "mask", masks), "train", num_classes=2)
    with pytest.raises(ValueError, match="row 29 of .* label 9"):
        images.check(limit=3)
    with pytest.raises(ValueError, match="limit is 0"):
        images.check(limit=0)
