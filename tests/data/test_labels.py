"""Claims about which labels count, what their classes are called, and which class of a classifier they mean."""

import datasets
import PIL.Image
import pytest
import torch

from raptor_hf.data.images import ImageSet
from raptor_hf.data.labels import check_labels, keep_labelled, match_classes, name_classes, names_in_order

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def images_of(labels: list[int | None], names: list[str] | None = None, title: str = "set") -> ImageSet:
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    cells = [{"bytes": b"", "path": f"{row}.png"} for row in range(len(labels))]
    rows = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)
    return ImageSet(rows, title, "image", "label", names)


def numbered(names: list[str]) -> dict[int, str]:
    return dict(enumerate(names))


class TestNames:
    def test_of_a_configuration_come_in_the_order_of_their_numbers(self):
        names = [f"class {label}" for label in range(12)]
        stored = {str(label): names[label] for label in sorted(range(12), key=str)}
        assert list(stored)[:4] == ["0", "1", "10", "11"]  # as JSON sorts them
        assert names_in_order(stored) == names

    def test_are_those_of_the_data_set_or_numbers(self):
        assert name_classes(images_of([0, 2], ["a", "b", "c"]), images_of([1])) == ["a", "b", "c"]
        assert name_classes(images_of([0, 2]), images_of([3, None, -1])) == ["0", "1", "2", "3"]

    @pytest.mark.parametrize("labels", [[0, 1, 2**40], [0, 1, 2, 99_999], [2**62] * 3])
    def test_numbers_that_count_no_classes_are_refused_before_they_are_named(self, labels):
        with pytest.raises(ValueError, match=f"go up to {max(labels)}"):
            name_classes(images_of(labels))

    def test_a_set_without_any_label_has_no_classes(self):
        with pytest.raises(ValueError, match="no image of set has a class label"):
            name_classes(images_of([-1, None]))


class TestRows:
    def test_without_a_label_are_told_apart_and_left_out(self, caplog):
        images = images_of([1, -1, 0, None, 1])
        assert check_labels(images, 2).tolist() == [True, False, True, False, True]
        kept = keep_labelled(images, ["a", "b"])
        assert [row["image"]["path"] for row in kept.dataset] == ["0.png", "2.png", "4.png"]
        assert "2 of 5 images of set have no class label" in caplog.text

    @pytest.mark.parametrize("label", [2, -2, 2**40])
    def test_with_a_label_outside_the_classes_are_named(self, label):
        with pytest.raises(ValueError, match=f"row 3 of set has the label {label}, but there are 2 classes"):
            check_labels(images_of([0, 1, -1, label]), 2)

    def test_of_a_whole_split_without_labels_are_refused(self):
        with pytest.raises(ValueError, match="no image of set has a class label; choose another split"):
            keep_labelled(images_of([-1, -1]), ["a"])


class TestMatch:
    def test_of_the_same_names_in_another_order_is_by_name(self):
        folders = sorted(DIGITS)  # eight, five, ...
        match = match_classes(images_of(list(range(10)), folders), 10, numbered(DIGITS))
        found = match(torch.arange(10)).tolist()
        assert [DIGITS[label] for label in found] == folders and "by name" in match.reason

    def test_reads_a_configuration_by_its_numbers(self):
        names = [f"class {label}" for label in range(12)]
        stored = {str(label): names[label] for label in sorted(range(12), key=str)}
        assert match_classes(images_of([11], names), 12, stored)(torch.arange(12)).tolist() == list(range(12))

    def test_forgives_case_and_underscores(self):
        match = match_classes(images_of([0], ["Sea_Lion", "cat"]), 2, numbered(["cat", "sea lion"]))
        assert match(torch.tensor([0, 1])).tolist() == [1, 0]

    @pytest.mark.parametrize(
        "names, ours",
        [
            (["cat", "dog", "bird"], ["cat", "dog", "fox"]),  # partly
            (["cat", "dog"], ["cat", "dog", "fox"]),
            (["eight", "five"], ["0", "1"]),  # not at all
            (["cat", "dog"], ["cat", "cat"]),
        ],
    )
    def test_of_other_names_is_refused_and_explained(self, names, ours):
        match = match_classes(images_of([0, 1], names), len(ours), numbered(ours))
        assert match.classes is None
        assert "no accuracy" in match.reason and f"the {len(ours)} of the classifier" in match.reason

    @pytest.mark.parametrize("ours", [None, numbered(["LABEL_0", "LABEL_1"]), numbered(["only one"])])
    def test_is_by_number_where_the_classifier_has_no_names(self, ours):
        match = match_classes(images_of([0, 1], ["cat", "dog"]), 2, ours)
        assert match(torch.tensor([1, 0])).tolist() == [1, 0] and match.reason is None

    def test_is_by_number_where_the_data_set_has_no_names(self):
        assert match_classes(images_of([0, 1]), 2, numbered(["cat", "dog"]))(torch.tensor([1])).tolist() == [1]

    def test_of_folders_named_by_numbers_is_by_these_and_not_by_their_alphabet(self):
        folders = sorted(map(str, range(12)))
        for ours in (None, numbered([f"class {label}" for label in range(12)])):
            match = match_classes(images_of([0], folders), 12, ours)
            assert match(torch.arange(12)).tolist() == [int(name) for name in folders]

    def test_takes_imagenets_numbers_and_spellings_for_its_classes(self):
        synsets = [f"n{label:08d}" for label in range(1000)]
        ours = [f"name {label}" for label in range(1000)]
        for folders in (synsets, [f"{synset}_kind" for synset in synsets]):
            match = match_classes(images_of([0], folders), 1000, numbered(ours))
            assert match.reason is None and match(torch.arange(1000)).tolist() == list(range(1000))
        assert match_classes(images_of([0], synsets[::-1]), 1000, numbered(ours)).classes is None
        spelled = [name if label != 134 else "crane, bird" for label, name in enumerate(ours)]
        match = match_classes(images_of([0], spelled), 1000, numbered(ours))
        assert match(torch.tensor([134])).tolist() == [134] and "1 of 1000 classes" in match.reason

    def test_leaves_rows_without_a_label_out_and_says_so(self):
        match = match_classes(images_of([0, -1, None]), 2, None)
        assert match(torch.tensor([0, -1, -1])).tolist() == [0, -1, -1]
        assert "2 of 3 images of set have no class label" in match.reason

    @pytest.mark.parametrize("labels, message", [([-1, -1], "no image of set has"), ([0, 7], "has the label 7")])
    def test_is_refused_where_no_label_can_be_right(self, labels, message):
        match = match_classes(images_of(labels), 2, None)
        assert match.classes is None and "no accuracy" in match.reason and message in match.reason

    def test_of_a_stream_takes_numbers_outside_the_classes_for_none(self):
        match = match_classes(images_of([0]), 3, None)
        assert match(torch.tensor([-5, 3, 2, 2**40])).tolist() == [-1, -1, 2, -1]


def test_an_unlabelled_row_is_read_with_minus_one(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    cells = {"image": [str(tmp_path / "0.png")] * 2, "label": [None, -1]}
    images = ImageSet(datasets.Dataset.from_dict(cells, features=features), "set", "image", "label")
    assert [images.decode(row)[1] for row in range(2)] == [-1, -1]
