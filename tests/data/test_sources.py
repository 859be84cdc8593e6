"""Claims about folders as people have them: which splits they get, what is held out, names that look like patterns."""

from functools import partial
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from raptor_hf.data.dense import open_dense
from raptor_hf.data.images import open_images
from raptor_hf.data.sources import MissingSplitError, open_splits


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, names: list[str]) -> Path:
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8), (value, 0, 0)).save(folder / name)
    return folder


def values(images) -> list[int]:
    return [images.decode(row)[0].getpixel((0, 0))[0] for row in range(images.num_images)]


class TestHeldOut:
    @pytest.mark.parametrize("names", ["{}.png", "class-{parity}/{}.png"], ids=["flat", "a folder per class"])
    def test_is_a_tenth_of_a_folder_without_splits_the_same_each_time(self, tmp_path, names):
        write(tmp_path, [names.format(i, parity=i % 2) for i in range(40)])
        opener = partial(open_images, str(tmp_path))
        train, test = open_splits(opener, "train")
        assert test.num_images == 4 and test.split == "held_out" and train.split == "train"
        assert sorted(values(train) + values(test)) == list(range(40))
        again = [values(images) for images in open_splits(opener, "train", "held_out")]
        assert again == [values(train), values(test)]
        assert "(4 held out)" in test.title and "(without 4 held out)" in train.title
        assert train.has_labels == test.has_labels == ("class" in names)
        assert train.class_names == test.class_names

    def test_is_a_sample_and_not_the_end_of_the_alphabet(self, tmp_path):
        write(tmp_path, [f"{'cat' if i < 60 else 'dog'}/{i:03d}.png" for i in range(120)])
        _, test = open_splits(partial(open_images, str(tmp_path)), "train")
        assert len(set(test.labels())) == 2

    def test_is_five_thousand_at_most(self):
        rows = datasets.Dataset.from_dict({"image": [b""] * 60_000})

        class Stub:
            streaming, num_images, title = False, 60_000, "set"

            def select(self, indices, split, title):
                return rows.select(indices)

        def open_split(split):
            if split != "train":
                raise MissingSplitError(split)
            return Stub()

        assert [images.num_rows for images in open_splits(open_split, "train")] == [55_000, 5_000]

    def test_is_taken_from_the_slice_that_is_trained_on(self, tmp_path):
        write(tmp_path, [f"{i:02d}.png" for i in range(40)])
        train, test = open_splits(partial(open_images, str(tmp_path)), "train[:50%]")
        assert sorted(values(train) + values(test)) == list(range(20)) and test.num_images == 2

    def test_leaves_slices_alone(self, tmp_path):
        write(tmp_path, [f"{i:02d}.png" for i in range(40)])
        train, test = open_splits(partial(open_images, str(tmp_path)), "train[:80%]", "train[80%:]")
        assert values(train) == list(range(32)) and values(test) == list(range(32, 40))

    @pytest.mark.parametrize("folders, expected", [(["validation", "test"], "validation"), (["test"], "test")])
    def test_is_not_needed_where_there_are_other_images(self, tmp_path, folders, expected):
        write(tmp_path, [f"{folder}/cat/{i}.png" for folder in ["train", *folders] for i in range(3)])
        train, test = open_splits(partial(open_images, str(tmp_path)), "train")
        assert test.split == expected and train.num_images == test.num_images == 3

    def test_is_not_taken_for_a_split_that_was_asked_for(self, tmp_path):
        write(tmp_path, ["0.png", "1.png"])
        with pytest.raises(MissingSplitError, match=r"split='test' .* its splits are \['train'\]"):
            open_splits(partial(open_images, str(tmp_path)), "train", "test")

    def test_needs_two_images_and_no_stream(self, tmp_path):
        write(tmp_path, ["0.png"])
        for streaming, message in ((False, "one image only"), (True, "is a stream")):
            with pytest.raises(ValueError, match=message):
                open_splits(partial(open_images, str(tmp_path), streaming=streaming), "train")

    def test_keeps_images_and_masks_together(self, tmp_path):
        columns = {"image": [], "mask": []}
        for value in range(20):
            columns["image"].append(PIL.Image.new("RGB", (4, 4), (value, 0, 0)))
            columns["mask"].append(PIL.Image.new("L", (4, 4), value))
        features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
        opener = partial(open_dense, "semantic-segmentation", str(tmp_path / "a.parquet"), num_classes=20)
        train, test = open_splits(opener, "train")
        for images in (train, test):
            for row in range(images.num_images):
                image, mask = images.decode(row)
                assert image.getpixel((0, 0))[0] == mask[0, 0]
        assert (train.num_images, test.num_images) == (18, 2)


class TestNames:
    @pytest.mark.parametrize("name", ["a [b] c", "what?", "all*", "{split}", "{curly}", "[!x]*?"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_of_folders_may_look_like_patterns(self, tmp_path, name, streaming):
        folder = write(tmp_path / name, ["train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png"])
        images = open_images(str(folder), "test", streaming=streaming)
        assert images.class_names == ["cat", "dog"]
        found = [images.read_row(row) for row in images.dataset]
        assert [(image.getpixel((0, 0))[0], label) for _, image, label in found] == [(2, 0), (3, 1)]
        flat = write(tmp_path / "flat" / name, ["0.png", "1.png"])
        assert values(open_images(str(flat), "train")) == [0, 1]

    def test_of_parquet_files_may_look_like_patterns(self, tmp_path):
        folder = tmp_path / "a [b]" / "{c}"
        folder.mkdir(parents=True)
        features = datasets.Features(image=datasets.Image())
        for split, value in (("train", 1), ("test", 2)):
            columns = {"image": [PIL.Image.new("RGB", (4, 4), (value, 0, 0))]}
            datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"x [1]-{split}.parquet")
        assert values(open_images(str(folder / "x [1]-train.parquet"), "train")) == [1]
        assert values(open_images(str(folder / "*-{split}.parquet"), "test")) == [2]
        assert values(open_images(str(folder), "test")) == [2]

    def test_of_classes_in_metadata_are_numbered_alike_in_all_splits(self, tmp_path):
        for split, names in (("train", ["dog", "cat", "bird", "dog"]), ("test", ["dog", "cat"])):
            write(tmp_path / split, [f"{row}.png" for row in range(len(names))])
            lines = ["file_name,label", *(f"{row}.png,{name}" for row, name in enumerate(names))]
            (tmp_path / split / "metadata.csv").write_text("\n".join(lines) + "\n")
        train, test = (open_images(str(tmp_path), split) for split in ("train", "test"))
        assert train.class_names == test.class_names == ["bird", "cat", "dog"]
        assert train.labels().tolist() == [2, 1, 0, 2]
        assert [test.decode(row)[1] for row in range(2)] == [2, 1]
        with pytest.raises(ValueError, match="a stream cannot number"):
            open_images(str(tmp_path), "train", streaming=True)


class TestRelativePaths:
    @pytest.mark.parametrize("kind", ["folder", "parquet"])
    def test_of_a_data_set_start_where_it_was_opened(self, tmp_path, monkeypatch, kind):
        write(tmp_path / "home" / "photos", ["0.png", "1.png"])
        if kind == "parquet":
            paths = {"file": ["photos/0.png", "photos/1.png"]}
            datasets.Dataset.from_dict(paths).to_parquet(tmp_path / "home" / "list.parquet")
        monkeypatch.chdir(tmp_path / "home")
        options = {"folder": ("photos", None), "parquet": ("list.parquet", "file")}[kind]
        images = open_images(options[0], "train", image_column=options[1])
        monkeypatch.chdir("/")
        assert values(images) == [0, 1]

    def test_in_a_list_start_in_its_folder(self, tmp_path, monkeypatch):
        write(tmp_path / "photos", ["0.png", "1.png"])
        datasets.Dataset.from_dict({"file": ["photos/0.png", "photos/1.png"]}).to_parquet(tmp_path / "list.parquet")
        monkeypatch.chdir("/")
        images = open_images(str(tmp_path / "list.parquet"), "train", image_column="file")
        assert values(images) == [0, 1] and images.name(1) == str(tmp_path / "photos" / "1.png")

    def test_that_lead_nowhere_say_from_where(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"no such folder or file, seen from {tmp_path}"):
            open_images("./photos", "train")


def test_a_split_without_a_file_is_a_missing_one(tmp_path):
    features = datasets.Features(image=datasets.Image())
    rows = datasets.Dataset.from_dict({"image": [np.zeros((4, 4, 3), np.uint8)] * 20}, features=features)
    rows.to_parquet(tmp_path / "x-train.parquet")
    _, test = open_splits(partial(open_images, str(tmp_path / "x-{split}.parquet")), "train")
    assert test.split == "held_out"
