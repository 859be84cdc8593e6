"""The recipe of the probes, end to end, on tiny backbones of handwritten digits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    pipeline,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf.conversion import student_from_teacher
from raptor_hf.data import images as image_module
from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.hub.heads import list_heads
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.probing import PROTOCOLS, Probe
from raptor_hf.recipes.loop import NonFiniteError
from raptor_hf.recipes.settings import parse_settings
from tests.support.tiny_models import tiny_dinov2
from training import probe
from training.probe import ProbeSettings

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "training" / "configs" / "probe").glob("*.yaml"))
SHORT = {
    "task": "image-classification",
    "variant": "digits",
    "dataset": "digits",
    "train_split": "train[:96]",
    "test_split": "test[:40]",
    "augment": "none",
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "eval_batch_size": 16,
    "log_every": 5,
    "checkpoint_every": 4,
}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probes") / "teacher"
    options = {"num_labels": 10, "hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    options |= {"id2label": {digit: str(digit) for digit in range(10)}}
    tiny_dinov2(**options).save_pretrained(folder)
    half, size = [0.5, 0.5, 0.5], {"height": 8, "width": 8}
    BitImageProcessorPil(size={"shortest_edge": 8}, crop_size=size, image_mean=half, image_std=half).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def student(teacher, tmp_path) -> Path:
    """A student's folder as distill.py leaves it."""
    folder = tmp_path / "student"
    model = student_from_teacher(AutoModelForImageClassification.from_pretrained(teacher), (3, 1), init="middle")
    model.save_pretrained(folder)
    RaptorImageProcessor.from_teacher(load_image_processor(str(teacher))).save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps({"seed": 0}))
    return folder


@pytest.fixture(scope="session")
def digits() -> dict[str, Dataset]:
    return image_module._load_digits()


def flags(**settings) -> list[str]:
    arguments = []
    for name, value in settings.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


@pytest.fixture
def run(monkeypatch, tmp_path, digits):
    """The command line in this process; without pictures unless asked for."""
    monkeypatch.setattr(image_module, "_load_digits", lambda: digits)

    def run(model: Path, name: str = "run", *, pictures: bool = False, **changes) -> Path:
        settings = SHORT | {"model": model, "output_dir": tmp_path / name} | changes
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["probe.py", *flags(**settings)])
            if not pictures:
                patch.setattr(probe, "draw_predictions", lambda run, path: path.write_bytes(b""))
            probe.main()
        return tmp_path / name

    return run


def head(folder: Path, variant: str = "digits") -> dict[str, torch.Tensor]:
    return load_file(folder / f"head-{variant}.safetensors")


def accuracy(folder: Path, split: str = SHORT["test_split"]) -> float:
    """Of the variant on the digits, by what transformers offers."""
    model = AutoModelForImageClassification.from_pretrained(folder, variant="digits")
    images, processor = open_images("digits", split), load_image_processor(str(folder))
    pictures, labels = zip(*(images.decode(index) for index in range(images.num_images)), strict=True)
    with torch.no_grad():
        logits = model(**processor(images=list(pictures), return_tensors="pt")).logits
    return (logits.argmax(dim=1) == torch.tensor(labels)).float().mean().item()


def test_a_probed_student_carries_its_head_and_numbers(run, student):
    folder = run(
        student,
        pictures=True,
        seeds=[0, 1],
        quick_checks=True,
        epochs=40,
        learning_rate=0.2,
        train_split="train",
        batch_size=128,
    )
    metrics = json.loads((student / "metrics.json").read_text())
    record = metrics["probes"]["digits"]
    assert metrics["seed"] == 0  # what was there stays
    assert record["last"]["accuracy"][0] == pytest.approx(accuracy(student)) and len(record["last"]["accuracy"]) == 2
    assert record["best"]["accuracy"][0] >= record["last"]["accuracy"][0] > 0.25  # chance is 0.1
    assert record["metric"] == "accuracy" and record["seeds"] == [0, 1] and record["num_images"] == 40
    checks = metrics["quick_checks"]["digits"]
    assert checks["logistic_regression_accuracy"] > 0.25 and 0 < checks["knn_accuracy"] < 1
    assert list_heads(student) == ["digits", "teacher"]
    assert (folder / "figures" / "probe-digits.png").read_bytes()[:4] == b"\x89PNG"
    assert (student / "figures" / "probe-digits.png").exists()
    assert isinstance(AutoModel.from_pretrained(student), torch.nn.Module)


def test_the_folder_runs_in_a_pipeline(run, student):
    run(student)
    model = AutoModelForImageClassification.from_pretrained(student, variant="digits")
    classify = pipeline("image-classification", model=model, image_processor=load_image_processor(str(student)))
    picture, _ = open_images("digits", "test").decode(0)
    assert classify(picture)[0]["label"] in [str(digit) for digit in range(10)]


def test_a_probed_teacher_is_saved_as_the_raptor_that_it_is(run, teacher):
    folder = run(teacher)
    assert AutoModel.from_pretrained(folder).config.block_repeats == (1, 1, 1, 1)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["probes"]["digits"]["last"]["accuracy"] == [pytest.approx(accuracy(folder))]
    assert metrics["teacher"]["name"] == str(teacher) and metrics["macs"]["student"] > 0
    assert not list(teacher.glob("head-*"))


def test_a_cut_teacher_costs_less(run, teacher):
    costs = [
        json.loads((run(teacher, f"cut {layers}", num_layers=layers) / "metrics.json").read_text())
        for layers in (2, None)
    ]
    assert costs[0]["num_layers"] == 2 and costs[0]["parameters"]["student"] < costs[1]["parameters"]["student"]


def test_stored_features_and_those_made_anew_train_the_same_head(run, student, teacher):
    cached, online = run(teacher, "cached"), run(teacher, "online", cache_gb=0)
    for name, tensor in head(cached).items():
        torch.testing.assert_close(head(online)[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", [3, 10, 19, 29])  # in either seed, between and at checkpoints
def test_interrupted_run_resumes_to_the_same_bits(run, teacher, monkeypatch, stop):
    whole = run(teacher, "whole", seeds=[3, 4])
    forward, calls = Probe.forward, []

    def interrupt(self, *arguments):
        calls.append(torch.is_grad_enabled())
        if sum(calls) > stop:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Probe, "forward", interrupt)
        run(teacher, "resumed", seeds=[3, 4])
    resumed = run(teacher, "resumed", seeds=[3, 4])
    for seed in (3, 4):
        expected = load_file(whole / "heads" / f"seed-{seed}.safetensors")
        found = load_file(resumed / "heads" / f"seed-{seed}.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    results = [json.loads((folder / "probe.json").read_text()) for folder in (whole, resumed)]
    assert results[0]["evaluations"] == results[1]["evaluations"] and results[0]["last"] == results[1]["last"]


def test_the_teachers_own_head_is_a_start(run, student):
    own = AutoModelForImageClassification.from_pretrained(student).classifier.weight.detach().clone()
    run(student, init_head="own", learning_rate=1e-12)
    torch.testing.assert_close(head(student)["classifier.weight"], own)
    # it is a variant by now, and still the model's own
    run(student, "again", init_head="own", learning_rate=1e-12, variant="digits-again")
    torch.testing.assert_close(head(student, "digits-again")["classifier.weight"], own)


def test_metas_head_is_a_start(run, teacher, tmp_path):
    start = {"weight": torch.randn(10, 32), "bias": torch.randn(10)}
    torch.save(start, tmp_path / "head.pth")
    folder = run(teacher, init_head=str(tmp_path / "head.pth"), learning_rate=1e-12)
    torch.testing.assert_close(head(folder)["classifier.weight"], start["weight"])


def test_the_metric_that_counts_picks_the_best_epoch(run, teacher):
    folder = run(teacher, metric="top5_accuracy", epochs=5)
    result = json.loads((folder / "probe.json").read_text())
    scores = [entry["top5_accuracy"] for entry in result["evaluations"][0]]
    assert result["metric"] == "top5_accuracy" and result["best"]["top5_accuracy"] == [max(scores)]
    assert result["best"]["epoch"] == [1 + scores.index(max(scores))]


def test_epochs_between_evaluations_are_not_evaluated_but_the_last_is(run, teacher):
    often, seldom = run(teacher, "often"), run(teacher, "seldom", eval_every=2)
    often, seldom = (json.loads((folder / "probe.json").read_text())["evaluations"][0] for folder in (often, seldom))
    assert seldom == often[1:] and [entry["epoch"] for entry in seldom] == [2, 3]


def test_augmented_images_are_seen_anew(run, teacher):
    plain, flipped = run(teacher, "plain"), run(teacher, "flipped", augment="crop_flip")
    assert not torch.equal(head(plain)["classifier.weight"], head(flipped)["classifier.weight"])
    assert json.loads((flipped / "metrics.json").read_text())["probes"]["digits"]["augment"] == "crop_flip"


SCENES = {"dataset": "scenes", "train_split": "train[:24]", "test_split": "test[:12]", "batch_size": 8}
DENSE = {
    "semantic-segmentation": {"dataset_config": "segmentation-16", "image_size": 16, "variant": "masks"},
    "depth-estimation": {"dataset_config": "depth-16", "variant": "depth"},
}


@pytest.mark.parametrize("task", DENSE)
def test_dense_heads_join_the_student_and_run_in_a_pipeline(run, student, task):
    changes = SCENES | DENSE[task] | {"task": task, "learning_rate": 1e-2}
    run(student, pictures=True, **changes)
    record = json.loads((student / "metrics.json").read_text())["probes"][changes["variant"]]
    metric = next(iter(PROTOCOLS[task].metrics))
    assert record["metric"] == metric and len(record["last"][metric]) == 1 and record["num_images"] == 12
    assert (student / "figures" / f"probe-{changes['variant']}.png").read_bytes()[:4] == b"\x89PNG"
    auto_class = AutoModelForDepthEstimation if task == "depth-estimation" else AutoModelForSemanticSegmentation
    model = auto_class.from_pretrained(student, variant=changes["variant"])
    name = "depth-estimation" if task == "depth-estimation" else "image-segmentation"
    predict = pipeline(name, model=model, image_processor=load_image_processor(str(student)))
    result = predict(PIL.Image.new("RGB", (16, 16)))
    size = result["depth"].size if task == "depth-estimation" else result[0]["mask"].size
    assert size == (16, 16)


def test_a_loss_of_some_pixels_trains_another_head_and_must_divide_the_images(run, teacher, capsys):
    changes = SCENES | DENSE["semantic-segmentation"] | {"task": "semantic-segmentation"}
    whole, some = run(teacher, "whole", **changes), run(teacher, "some", **changes, loss_stride=4)
    weights = [head(folder, "masks")["classifier.weight"].flatten() for folder in (whole, some)]
    assert 0.95 < torch.nn.functional.cosine_similarity(*weights, dim=0) < 0.999999
    with pytest.raises(SystemExit):
        run(teacher, "odd", **changes, loss_stride=3)
    assert "loss_stride is 3; it must divide both sides of the images, 16 x 16 pixels" in capsys.readouterr().err


@pytest.mark.parametrize("task", DENSE)
def test_stored_dense_features_and_those_made_anew_train_the_same_head(run, teacher, task):
    changes = SCENES | DENSE[task] | {"task": task}
    cached, online = run(teacher, "cached", **changes), run(teacher, "online", **changes, cache_gb=0)
    for name, tensor in head(cached, changes["variant"]).items():
        torch.testing.assert_close(head(online, changes["variant"])[name], tensor, rtol=1e-3, atol=1e-5)


def test_an_overridden_run_leaves_nothing_of_the_one_before(run, teacher):
    folder = run(teacher)
    run(teacher, num_layers=2, variant="short", override=True)
    assert list_heads(folder) == ["short"]
    assert AutoModel.from_pretrained(folder).config.num_hidden_layers == 2
    assert json.loads((folder / "metrics.json").read_text())["probes"].keys() == {"short"}


def test_a_loss_that_is_not_finite_never_reaches_the_head(run, teacher, monkeypatch):
    forward = Probe.forward

    def infinite(self, *arguments):
        loss, logits = forward(self, *arguments)
        return loss * float("inf"), logits

    monkeypatch.setattr(Probe, "forward", infinite)
    with pytest.raises(NonFiniteError, match="step 1.*row"):
        run(teacher)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "a/b"}, "variant is 'a/b'"),
        ({"init_head": "no/such.pth"}, "init_head='no/such.pth' does not exist"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"warmup_steps": 18}, "warmup_steps is 18; it must be below the 18 steps"),
        ({"num_layers": 2}, "only a teacher can be cut"),
        ({"image_size": 7}, "multiple|patch"),
        ({"label_column": "name"}, "name"),
        ({"crop_size": [8, 8]}, "crop_size is [8, 8]; it goes with depth-estimation"),
        ({"crop_area": [0.5, 0.1]}, "crop_area is [0.5, 0.1]; it must be two numbers, smallest and largest"),
        ({"color_jitter": [0, 0, 0, 0.7]}, "color_jitter is"),
        ({"resize_size": 7, "image_size": 8}, "resize_size is 7"),
        ({"batch_size": 128, "last_batch": "drop"}, "batch_size is 128; it must be at most the 96 images"),
        ({"loss_stride": 2}, "loss_stride is 2; it goes with semantic-segmentation"),
        ({"metric": "f1"}, "metric is 'f1'; those of image-classification are accuracy, top5_accuracy"),
        ({"variant": "teacher"}, "variant is 'teacher'"),
        ({"quick_checks": True, "augment": "crop_flip"}, "quick_checks"),
        ({"quick_checks": True, "cache_gb": 0}, "cache_gb=0"),
        ({"eigen_crop": True}, "eigen_crop"),
        ({"task": "image-classificaton"}, "image-classificaton"),
    ],
)
def test_bad_settings_are_told_before_any_work(run, student, monkeypatch, capsys, changes, message):
    monkeypatch.setattr(probe, "pool_features", None)
    with pytest.raises(SystemExit) as exit:
        run(student, **changes)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert any(part in error for part in message.split("|")), error


def test_damaged_numbers_or_weights_of_the_model_are_told_before_any_work(run, student, monkeypatch, capsys):
    monkeypatch.setattr(probe, "pool_features", None)
    for name in ("metrics.json", "model.safetensors"):
        damaged = student.parent / f"damaged-{name}"
        shutil.copytree(student, damaged)
        whole = (damaged / name).read_bytes() if (damaged / name).exists() else b'{"fidelity": {}}'
        (damaged / name).write_bytes(whole[:10])
        before = sorted(damaged.iterdir())
        with pytest.raises(SystemExit) as exit:
            run(damaged)
        line = capsys.readouterr().err.splitlines()[-1]
        assert exit.value.code == 2 and str(damaged) in line and sorted(damaged.iterdir()) == before


@pytest.mark.parametrize("name", ["../../x", "a/b", "a b", ".hidden"])
def test_the_name_of_a_head_on_a_teacher_is_checked_before_any_work(run, teacher, monkeypatch, capsys, name):
    monkeypatch.setattr("raptor_hf.recipes.probe_inputs.load_backbone", None)
    with pytest.raises(SystemExit) as exit:
        run(teacher, variant=name)
    assert exit.value.code == 2 and f"variant is {name!r}" in capsys.readouterr().err


def parquet(folder: Path, labels: list[int], names: list[str]) -> str:
    for split in ("train", "test"):
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        pictures = [PIL.Image.new("RGB", (8, 8), (label * 20, 0, 0)) for label in labels]
        Dataset.from_dict({"image": pictures, "label": labels}, features).to_parquet(str(folder / f"{split}.parquet"))
    return str(folder / "{split}.parquet")


@pytest.mark.parametrize("probed", [False, True])
def test_other_classes_than_those_of_a_head_that_is_there_are_refused_before_any_work(
    run, student, tmp_path, capsys, probed
):
    if probed:
        run(student)
    source = parquet(tmp_path, [0, 1] * 20, ["cat", "dog"])
    with pytest.raises(SystemExit):
        run(student, "cats", dataset=source, train_split="train", test_split="test", variant="cats")
    assert "id2label" in capsys.readouterr().err


def test_a_label_outside_the_classes_is_named(run, teacher, tmp_path, capsys):
    features = Features({"image": Image(), "label": Value("int64")})
    for split, labels in (("train", [0, 1] * 20), ("test", [0, 1, -5])):
        pictures = [PIL.Image.new("RGB", (8, 8))] * len(labels)
        rows = Dataset.from_dict({"image": pictures, "label": labels}, features)
        rows.to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(SystemExit):
        run(teacher, dataset=str(tmp_path / "{split}.parquet"), train_split="train", test_split="test")
    assert "row 2" in (error := capsys.readouterr().err) and "-5" in error


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_what_it_costs(path):
    settings = parse_settings(ProbeSettings, [str(path)], exit_on_error=False)
    assert all(word in path.read_text() for word in ("training/probe.py", "Costs"))
    for name, value in PROTOCOLS[settings.task].settings.items():
        if path.stem in ("imagenet", "ade20k", "nyuv2"):
            assert getattr(settings, name) == value, name


def test_published_protocols_are_those_of_the_paper():
    """The table of the published code, column by column."""
    cosine = {"schedule": "cosine", "warmup_steps": 100, "start_fraction": 0.01, "final_fraction": 0.01}
    still = {"color_jitter": [0, 0, 0, 0], "augment": "crop_flip"}
    table = {
        "image-classification": cosine
        | still
        | {"epochs": 15, "batch_size": 512, "learning_rate": 1e-4, "weight_decay": 1e-2, "max_grad_norm": 1}
        | {"crop_area": [0.08, 1], "crop_ratio": [3 / 4, 4 / 3], "interpolation": "bicubic", "last_batch": "keep"},
        "semantic-segmentation": cosine
        | still
        | {"epochs": 10, "batch_size": 32, "learning_rate": 1e-3, "weight_decay": 1e-2, "max_grad_norm": 1}
        | {"crop_area": [0.5, 1], "crop_ratio": [0.75, 1.33], "interpolation": "bilinear", "last_batch": "drop"}
        | {"image_size": 518},
        "depth-estimation": cosine
        | still
        | {"epochs": 25, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 1e-3, "max_grad_norm": 0}
        | {"crop_area": [0.5, 2], "crop_ratio": [4 / 3, 4 / 3], "interpolation": "bilinear", "last_batch": "keep"}
        | {"color_jitter": [0.2, 0.2, 0.2, 0.1], "crop_size": [480, 640], "schedule": "constant", "warmup_steps": 0},
    }
    assert {task: dict(protocol.settings) for task, protocol in PROTOCOLS.items()} == table


@pytest.mark.slow
def test_two_processes_end_with_the_head_of_one(student, teacher, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines=1", "--mixed_precision=no"]
    for processes in (1, 2):
        settings = SHORT | {"model": teacher, "output_dir": tmp_path / str(processes)}
        launch = [*command, f"--num_processes={processes}", str(ROOT / "training" / "probe.py"), *flags(**settings)]
        result = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
    for name, tensor in head(tmp_path / "1").items():
        torch.testing.assert_close(head(tmp_path / "2")[name], tensor, rtol=1e-4, atol=1e-5)
    numbers = [json.loads((tmp_path / str(n) / "metrics.json").read_text())["probes"]["digits"]["last"] for n in (1, 2)]
    assert numbers[0] == numbers[1]
