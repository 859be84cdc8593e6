"""Claims about the recipes on images as people have them: no splits, no labels, classes in another order."""

import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf.data.images import load_image_processor
from raptor_hf.teacher import Teacher, load_teacher
from tests.support.tiny_models import tiny_dinov2
from training import distill, probe, train_teacher

NAMES = ["zero", "one", "two", "three"]
DISTILL = {"block_repeats": [3, 1], "phase_images": 8, "num_bootstraps": 0, "stage1_steps": 2, "stage2_steps": 0}
DISTILL |= {"batch_size": 8, "warmup_steps": 1, "eval_batch_size": 8}
PROBE = {"task": "image-classification", "variant": "own", "augment": "none", "epochs": 1, "batch_size": 8}
PROBE |= {"learning_rate": 1e-3, "warmup_steps": 0, "eval_batch_size": 8}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher of 8 x 8 images whose classes are named."""
    folder = tmp_path_factory.mktemp("own") / "teacher"
    options = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    tiny_dinov2(num_labels=4, id2label=dict(enumerate(NAMES)), **options).save_pretrained(folder)
    half, size = [0.5, 0.5, 0.5], {"height": 8, "width": 8}
    BitImageProcessorPil(size={"shortest_edge": 8}, crop_size=size, image_mean=half, image_std=half).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """A recipe's command line in this process; returns its folder."""

    def recipe(module, name: str = "run", **settings) -> Path:
        arguments = []
        for key, value in {"output_dir": tmp_path / name, **settings}.items():
            arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", [f"{module.__name__}.py", *arguments])
            module.main()
        return tmp_path / name

    return recipe


def picture(value: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(value).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def predicted(folder: Path, pictures: list[PIL.Image.Image]) -> list[str]:
    """The names that a classifier gives pictures."""
    model, processor = AutoModelForImageClassification.from_pretrained(folder), load_image_processor(str(folder))
    with torch.no_grad():
        logits = model(**processor(images=pictures, return_tensors="pt")).logits
    return [model.config.id2label[label] for label in logits.argmax(dim=1).tolist()]


def write_as_teacher_sees(folder: Path, teacher: Path, count: int = 24) -> Path:
    """A folder per class, named by the teacher; the first quarter in the class after the one it sees."""
    pictures = [picture(value) for value in range(count)]
    for value, name in enumerate(predicted(teacher, pictures)):
        name = NAMES[(NAMES.index(name) + 1) % 4] if value < count // 4 else name
        (folder / name).mkdir(parents=True, exist_ok=True)
        pictures[value].save(folder / name / f"{value}.png")
    for name in NAMES:  # a class that the teacher never sees has a folder as well
        if not (folder / name).exists():
            (folder / name).mkdir()
            picture(1000).save(folder / name / "extra.png")
    return folder


def accuracy_by_name(model: Path, folder: Path) -> float:
    paths = sorted(folder.glob("*/*.png"))
    found = predicted(model, [PIL.Image.open(path) for path in paths])
    return sum(name == path.parent.name for name, path in zip(found, paths, strict=True)) / len(paths)


def test_accuracy_of_a_folder_in_another_order_of_classes_is_by_name(recipe, teacher, tmp_path, caplog):
    photos = write_as_teacher_sees(tmp_path / "photos", teacher)
    folder = recipe(distill, teacher=teacher, dataset=photos, test_split="train", **DISTILL)
    fidelity = json.loads((folder / "metrics.json").read_text())["fidelity"]
    assert fidelity["teacher_accuracy"] == pytest.approx(accuracy_by_name(teacher, photos))
    assert fidelity["student_accuracy"] == pytest.approx(accuracy_by_name(folder, photos))
    assert fidelity["teacher_accuracy"] > 0.6 and "matched by name" in caplog.text


def test_accuracy_of_other_classes_is_refused_and_explained(recipe, teacher, tmp_path, caplog):
    photos = write_as_teacher_sees(tmp_path / "photos", teacher)
    (photos / "three").rename(photos / "many")
    folder = recipe(distill, teacher=teacher, dataset=photos, test_split="train", **DISTILL)
    fidelity = json.loads((folder / "metrics.json").read_text())["fidelity"]
    assert fidelity["teacher_accuracy"] is fidelity["student_accuracy"] is None and 0 <= fidelity["agreement"] <= 1
    assert "3 have the same name, and all must; the classifier has no 'many'" in caplog.text


@pytest.mark.parametrize("unlabelled", [[-1] * 8, [None] * 8, [0, -1, 2, None, 3, 1, -1, 0]])
def test_rows_without_a_label_count_for_fidelity_and_agreement_alone(recipe, teacher, tmp_path, unlabelled):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    for split, labels in (("train", [0] * 8), ("test", unlabelled)):
        columns = {"image": [picture(value) for value in range(8)], "label": labels}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    folder = recipe(distill, teacher=teacher, dataset=tmp_path / "{split}.parquet", test_split="test", **DISTILL)
    fidelity = json.loads((folder / "metrics.json").read_text())["fidelity"]
    known = [(value, label) for value, label in enumerate(unlabelled) if label not in (None, -1)]
    expected = None
    if known:
        found = predicted(teacher, [picture(value) for value, _ in known])
        expected = pytest.approx(sum(name == NAMES[label] for name, (_, label) in zip(found, known, strict=True)) / 5)
    assert fidelity["teacher_accuracy"] == expected
    model = load_teacher(str(folder))
    processor = load_image_processor(str(folder))
    with torch.no_grad():
        pixels = processor(images=[picture(value) for value in range(8)], return_tensors="pt")["pixel_values"]
        ours = model.logits(model.trajectory(pixels)[:, -1]).argmax(dim=1)
        theirs = load_teacher(str(teacher))
        agreement = (ours == theirs.logits(theirs.trajectory(pixels)[:, -1]).argmax(dim=1)).float().mean().item()
    assert fidelity["agreement"] == pytest.approx(agreement)


@pytest.mark.parametrize("labelled", [False, True], ids=["flat", "a folder per class"])
def test_a_folder_without_splits_is_distilled_and_probed_by_one_command_each(recipe, teacher, tmp_path, labelled):
    photos = tmp_path / "photos"
    for value in range(40):
        (photos / f"{value % 2}" if labelled else photos).mkdir(parents=True, exist_ok=True)
        picture(value).save((photos / f"{value % 2}" if labelled else photos) / f"{value:02d}.png")
    headless = tmp_path / "headless"
    tiny_dinov2(num_labels=None, hidden_size=16, num_attention_heads=2, image_size=8, patch_size=2).save_pretrained(
        headless
    )
    load_image_processor(str(teacher)).save_pretrained(headless)
    student = recipe(distill, teacher=headless, dataset=photos, **DISTILL)
    assert yaml.safe_load((student / "resolved.yaml").read_text())["test_split"] == "held_out"
    recipe(distill, teacher=headless, dataset=photos, **DISTILL)  # the same command again is the same run
    if labelled:
        recipe(probe, "probe", model=tmp_path / "run", dataset=photos, **PROBE)
        record = json.loads((student / "metrics.json").read_text())["probes"]["own"]
        assert (record["split"], record["num_images"]) == ("held_out", 4)


def test_a_head_to_start_from_is_taken_by_the_names_of_its_classes(recipe, teacher, tmp_path):
    photos = write_as_teacher_sees(tmp_path / "photos", teacher)
    settings = PROBE | {"init_head": "own", "learning_rate": 1e-12, "test_split": "train"}
    folder = recipe(probe, model=teacher, dataset=photos, **settings)
    record = json.loads((folder / "metrics.json").read_text())["probes"]["own"]
    assert record["last"]["accuracy"] == [pytest.approx(accuracy_by_name(teacher, photos))]


@pytest.mark.parametrize("content", ["junk", "empty", "pickle", "list", "numbers", "truncated"])
def test_a_file_that_holds_no_head_is_one_line(recipe, teacher, tmp_path, capsys, content):
    path = tmp_path / "head.pth"
    if content == "junk":
        path.write_bytes(b"no checkpoint at all")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "pickle":
        torch.save(Path("/etc"), path)
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "numbers":
        torch.save({"weight": 1, "bias": 2}, path)
    else:
        torch.save({"weight": torch.zeros(4, 32), "bias": torch.zeros(4)}, path)
        path.write_bytes(path.read_bytes()[:300])
    settings = PROBE | {"init_head": path, "train_split": "train[:16]", "test_split": "test[:8]"}
    with pytest.raises(SystemExit) as stopped:
        recipe(probe, model=teacher, dataset="digits", **settings)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error and f"init_head is '{path}'" in error.splitlines()[-1]


@pytest.mark.parametrize("bad", [("train", "test"), ("test",)], ids=["all", "test"])
def test_images_of_which_none_can_be_read_are_refused_before_any_work(
    recipe, teacher, tmp_path, capsys, monkeypatch, bad
):
    monkeypatch.setattr(Teacher, "trajectory", None)
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for value in range(20):
            path = tmp_path / "photos" / split / f"{value}.png"
            PIL.Image.new("RGB", (8, 8), (value, 0, 0)).save(path)
            if split in bad:
                path.write_bytes(b"no image")
    with pytest.raises(SystemExit) as stopped:
        recipe(distill, teacher=teacher, dataset=tmp_path / "photos", **DISTILL)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "photos test: all 20 images cannot be read" in line, line
    assert not (tmp_path / "run" / "resolved.yaml").exists()


def test_a_teacher_of_gray_images_is_told_so(recipe, teacher, tmp_path, capsys):
    options = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 2, "num_channels": 1}
    tiny_dinov2(**options).save_pretrained(tmp_path / "gray")
    BitImageProcessorPil(crop_size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        tmp_path / "gray"
    )
    with pytest.raises(SystemExit):
        recipe(distill, teacher=tmp_path / "gray", dataset="digits", **DISTILL)
    assert "the model takes images of 1 channel(s); it must take 3, as images are RGB" in capsys.readouterr().err


def test_a_teacher_is_trained_on_the_rows_that_have_a_label(recipe, tmp_path, caplog):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    columns = {"image": [picture(value) for value in range(20)], "label": [0, -1, 1, 0] * 5}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 1, "num_registers": 1}
    folder = recipe(
        train_teacher, dataset=tmp_path / "a.parquet", test_split="train", steps=2, batch_size=4, warmup_steps=1, **size
    )
    assert "5 of 20 images" in caplog.text
    assert json.loads((folder / "metrics.json").read_text())["unreadable_images"] == {}
