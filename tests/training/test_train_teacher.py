"""The recipe that trains a teacher, and the teacher of the digits that it made."""

import json
import re
from pathlib import Path

import PIL.Image
import pytest
import torch
import yaml
from accelerate.utils import set_seed
from datasets import ClassLabel, Dataset, Features, Image, Value
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.recipes.settings import parse_settings
from training import train_teacher
from training.train_teacher import TeacherSettings, make_model, make_optimizer, mixup

ROOT = Path(__file__).parents[2]
CONFIGS, CARD = ROOT / "training" / "configs", ROOT / "model_cards" / "digits-teacher"
TINY = {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_registers": 2}
SHORT = {"dataset": "digits", "steps": 8, "warmup_steps": 1, "batch_size": 16, "log_every": 3, "checkpoint_every": 3}
# everything that draws random numbers
RANDOM = {"drop_path_rate": 0.2, "rotation_degrees": 10, "translation": 0.1, "max_scale": 1.1, "mixup_alpha": 0.8}


def settings(output_dir: Path | str = "unused", **changes) -> TeacherSettings:
    return TeacherSettings(**TINY | SHORT | {"output_dir": str(output_dir)} | changes)


def run(monkeypatch, output_dir: Path, **changes) -> None:
    """The command line, in this process."""
    flags = TINY | SHORT | {"output_dir": output_dir} | changes
    argv = [argument for name, value in flags.items() for argument in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["train_teacher.py", *argv])
    train_teacher.main()


def accuracy(folder: Path, split: str = "test") -> float:
    """Of the folder's model on the digits, by what transformers alone offers."""
    images = open_images("digits", split)
    pictures, labels = zip(*(images.decode(index) for index in range(images.num_images)), strict=True)
    processor = load_image_processor(str(folder))
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(images=list(pictures), return_tensors="pt")).logits
    return (logits.argmax(dim=1) == torch.tensor(labels)).float().mean().item()


def test_trained_folder_loads_in_transformers_and_is_as_accurate_as_it_says(tmp_path, monkeypatch):
    recipe = {"hidden_size": 32, "learning_rate": 0.01, "initializer_range": 0.2, "batch_size": 32, "warmup_steps": 10}
    run(monkeypatch, tmp_path, **recipe, steps=100, log_every=40, eval_every=60)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["evaluations"]] == [60, 100]
    assert metrics["accuracy"] == metrics["evaluations"][-1]["accuracy"] == pytest.approx(accuracy(tmp_path))
    assert metrics["accuracy"] > 0.6
    losses = [record["loss"] for record in json.loads((tmp_path / "losses.json").read_text())]
    assert len(losses) == 3 and losses[-1] < losses[0]

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "dinov2_with_registers" and "auto_map" not in config
    assert config["id2label"] == {str(digit): str(digit) for digit in range(10)}
    assert (tmp_path / "figures" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["seed"] == 0 and metrics["unreadable_images"] == {} and "torch" in metrics["versions"]
    assert metrics["mixed_precision"] == "no"


def test_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    run(monkeypatch, tmp_path / "whole", **RANDOM, eval_every=2)
    calls = []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 6:  # between the checkpoints of steps 3 and 6
            raise KeyboardInterrupt
        return mixup(*arguments)

    monkeypatch.setattr(train_teacher, "mixup", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "stopped", **RANDOM, eval_every=2)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    run(monkeypatch, tmp_path / "stopped", **RANDOM, eval_every=2)
    assert len(calls) == 6 + 5  # steps 4 to 8 again

    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[name], stopped[name]) for name in whole)
    evaluations = [
        json.loads((tmp_path / name / "metrics.json").read_text())["evaluations"] for name in ("whole", "stopped")
    ]
    assert evaluations[0] == evaluations[1]
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "stopped")]
    assert [record["loss"] for record in losses[0]] == [record["loss"] for record in losses[1]]


def test_finished_run_started_again_writes_the_same_model(tmp_path, monkeypatch):
    run(monkeypatch, tmp_path)
    first = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    run(monkeypatch, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_evaluating_more_often_does_not_change_the_model(tmp_path, monkeypatch):
    for name, eval_every in (("never", 0), ("often", 1)):
        run(monkeypatch, tmp_path / name, **RANDOM, steps=3, eval_every=eval_every)
    never, often = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("never", "often"))
    assert never == often


def test_teacher_of_no_steps_is_the_model_as_it_is_initialised(tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, steps=0, warmup_steps=5, seed=4)  # without steps there is no warm-up to fit into them
    set_seed(4)
    expected = make_model(settings(), [str(digit) for digit in range(10)]).state_dict()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["evaluations"] == [{"step": 0, "accuracy": pytest.approx(accuracy(tmp_path))}]
    assert metrics["images_per_second"] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 9}, "image_size is 9; it must be a multiple of patch_size, 2"),
        ({"num_heads": 3}, "hidden_size is 16; it must be a multiple of num_heads, 3"),
        ({"steps": -1}, "steps is -1; it must be at least 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be above 0"),
        ({"num_registers": -1}, "num_registers is -1; it must be at least 0"),
        ({"warmup_steps": 8}, "warmup_steps is 8; it must be below steps, 8"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0; it must be below 1"),
        ({"max_scale": 0.9}, "max_scale is 0.9; it must be at least 1"),
    ],
)
def test_bad_setting_is_named_with_what_would_work(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**changes)


@pytest.mark.parametrize(
    "labels, feature, message",
    [
        (None, None, "has no class labels; name their column with label_column"),
        (
            [0, -5, 1, 0],
            ClassLabel(names=["cat", "dog"]),
            "row 1 of {folder}/{{split}}.parquet train has the label -5, but",
        ),
        (
            [-1, -1, -1, -1],
            ClassLabel(names=["cat", "dog"]),
            "no image of {folder}/{{split}}.parquet train has a class label",
        ),
    ],
)
def test_images_without_usable_labels_are_refused_before_the_folder_is_made(
    tmp_path, monkeypatch, capsys, labels, feature, message
):
    columns = {"image": [PIL.Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]}
    features = {"image": Image()}
    if labels is not None:
        columns, features = columns | {"label": labels}, features | {"label": Value("int64")}
    data = Dataset.from_dict(columns, features=Features(features))
    if feature is not None:
        data = data.cast_column("label", feature)
    for split in ("train", "test"):
        data.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path / "run", dataset=tmp_path / "{split}.parquet")
    assert stopped.value.code == 2 and message.format(folder=tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_registers_start_different_from_each_other():
    set_seed(0)
    model = make_model(settings(num_registers=3, initializer_range=0.1), ["a", "b"])
    registers = model.base_model.embeddings.register_tokens[0]
    assert torch.pdist(registers).min() > 0.1 and registers.std() < 0.2


def test_every_trainable_parameter_gets_a_gradient():
    model = make_model(settings(), ["a", "b"])
    model(torch.randn(2, 3, 8, 8)).logits.square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert without == {"dinov2_with_registers.embeddings.mask_token"}


def test_weight_decay_falls_on_the_weights_of_linear_and_convolution_layers_only():
    model = make_model(settings(), ["a", "b"])
    decayed, kept = make_optimizer(model, settings(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    expected = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert {id(parameter) for parameter in decayed["params"]} == expected
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(decayed["params"]) + len(kept["params"]) == len(trainable)


def test_mixup_mixes_images_and_targets_by_the_same_weight():
    targets = torch.eye(6)
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 2, 2)  # every pixel is the number of the class
    mixed, probabilities = mixup(images, targets, alpha=0.7)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(6))
    torch.testing.assert_close((probabilities @ torch.arange(6.0)).reshape(6, 1, 1, 1).expand(6, 3, 2, 2), mixed)
    assert len(set(probabilities.max(dim=1).values.tolist())) > 1  # a weight for each image
    assert torch.equal(probabilities > 0, targets + targets.flip(0) > 0)
    unmixed = mixup(images, targets, alpha=0)
    assert torch.equal(unmixed[0], images) and torch.equal(unmixed[1], targets)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_config_parses_and_shows_its_own_command(name):
    path = CONFIGS / "teacher" / f"{name}.yaml"
    made = parse_settings(TeacherSettings, [str(path)], exit_on_error=False)
    assert made.output_dir == f"runs/{name}_teacher" and made.num_layers == 12
    header = path.read_text().split("dataset:")[0]
    assert re.search(rf"training/train_teacher\.py \\\n# +training/configs/teacher/{name}\.yaml", header)


def test_committed_digits_teacher_reaches_98_percent():
    metrics = json.loads((CARD / "metrics.json").read_text())
    measured = accuracy(CARD)
    assert measured >= 0.98 and measured == pytest.approx(metrics["accuracy"], abs=0.002)  # one image


def test_committed_digits_teacher_has_the_settings_of_its_config():
    made = yaml.safe_load((CARD / "resolved.yaml").read_text())
    config = parse_settings(TeacherSettings, [str(CONFIGS / "teacher" / "digits.yaml")], exit_on_error=False)
    assert TeacherSettings(**made) == config


def test_committed_digits_teacher_is_whole_and_small():
    assert {path.name for path in CARD.iterdir()} == {
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "preprocessor_config.json",
        "resolved.yaml",
    }
    assert (CARD / "model.safetensors").stat().st_size < 10_000_000
