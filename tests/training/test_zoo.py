"""The table of the models that were trained here."""

import importlib
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf import RaptorConfig, RaptorModel
from raptor_hf.recipes.settings import parse_settings
from tests.support.hub_server import front_matter_problem
from tests.support.published_run import save_run_folder
from tests.support.tiny_models import tiny_dinov2

ROOT = Path(__file__).parents[2]
PUBLISHED = "training/configs/zoo.yaml"
NO_STUDENTS = "launch: gpu.yaml\nteachers: {}\nstudents: {}\n"


def cells(text: str, model: str) -> list[str]:
    """What the table says of a model, without links."""
    (line,) = (line for line in text.splitlines() if re.match(rf"\| \[?{model}\b", line))
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line).strip("| ").split(" | ")


@pytest.fixture(scope="module")
def zoo():
    return importlib.import_module("training.zoo")


@pytest.fixture
def run_zoo(zoo, monkeypatch, tmp_path):
    """Runs the command on a README and a folder of cards of its own, without published students; the README's text."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # no Hub
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{zoo.BEGIN}\nold\n{zoo.END}\n\nrest\n")
    published = tmp_path / "zoo.yaml"
    published.write_text(NO_STUDENTS)

    def call(*arguments: str) -> str:
        flags = ["--cards_dir", str(tmp_path / "cards"), "--readme", str(readme), "--published", str(published)]
        flags += arguments
        monkeypatch.setattr(sys, "argv", ["zoo.py", *flags])
        zoo.main()
        return readme.read_text()

    return call


@pytest.fixture
def teacher_run(tmp_path):
    """A folder as train_teacher.py leaves it, made where no one else may look."""
    folder = tmp_path / "teacher"
    tiny_dinov2(num_labels=3).save_pretrained(folder)
    half, side = [0.5] * 3, {"height": 28, "width": 28}
    BitImageProcessorPil(crop_size=side, image_mean=half, image_std=half).save_pretrained(folder)
    settings = {"dataset": str(tmp_path / "cifar10-{split}.parquet"), "output_dir": "runs/teacher", "num_layers": 4}
    settings |= {"train_split": "train", "test_split": "test", "steps": 4000, "batch_size": 128, "seed": 0}
    settings |= {"label_smoothing": 0.1, "rotation_degrees": 10.0, "horizontal_flip": True, "max_scale": 1.0}
    numbers = {"accuracy": 0.6564, "evaluations": [{"step": 4000, "accuracy": 0.6564}], "parameters": 1_365_216}
    numbers |= {"seconds": 1758.1, "device": "AMD EPYC, 1 threads", "unreadable_images": {str(tmp_path / "x"): "bad"}}
    (folder / "resolved.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.json").write_text(json.dumps(numbers))
    (folder / "losses.json").write_text("[]")
    return folder


def test_the_page_of_the_zoo_has_the_table_that_the_command_writes(zoo, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")
    table = zoo.make_table("model_cards", PUBLISHED, "model_cards")
    assert zoo.with_table(text, table) == text, "run python training/zoo.py"


def test_every_model_of_the_zoo_has_a_card_with_the_tag_raptor():
    folders = [path.parent for path in (ROOT / "model_cards").glob("*/metrics.json")]
    assert folders
    for folder in folders:
        front = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
        assert "- raptor\n" in front and "library_name: transformers" in front


def test_a_run_comes_in_whole_without_code_and_stands_in_the_table(zoo, run_zoo, tmp_path):
    run = save_run_folder(tmp_path / "run", blocks=[[1, 2, 3], [4], [5, 6]])
    text = run_zoo("--add", str(run), "--name", "tiny-k3", "--license", "mit")
    folder = tmp_path / "cards" / "tiny-k3"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    assert cells(text, "tiny-k3") == [
        *("tiny-k3", "dinov2-small", "3 (3+1+2)", "cifar10", "7.00 M (32 %)", "85.0 %", "94.4 % of 90.0 %", "0.950"),
        *("30 steps, 3 min, NVIDIA H100", "yaml", f"here, {size:.1f} MB"),
    ]
    assert "| [tiny-k3](cards/tiny-k3/README.md) |" in text
    assert "| [yaml](cards/tiny-k3/resolved.yaml) |" in text
    assert text.startswith("# Title\n\n") and text.endswith("\n\nrest\n") and "old" not in text
    assert not list(folder.rglob("*.py")) and not (folder / "losses.json").exists()
    assert (folder / "figures" / "phases.png").is_file()
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "trust_remote_code" not in card
    command = f"accelerate launch training/distill.py {folder.as_posix()}/resolved.yaml"
    assert f"```bash\n{command}\n```\n{zoo.END}" in text and f"```bash\n{command}\n```" in card
    AutoModelForSemanticSegmentation.from_pretrained(folder, variant="ade20k")
    assert run_zoo() == text


def test_a_teacher_comes_in_with_a_card_of_its_numbers(run_zoo, teacher_run, tmp_path):
    text = run_zoo("--add", str(teacher_run), "--name", "vit")
    folder = tmp_path / "cards" / "vit"
    assert cells(text, "vit") == [
        *("vit", "-", "4 layers", "cifar10", "1.37 M", "65.6 %", "-", "-"),
        *("4,000 steps, 29 min, AMD EPYC, 1 thread", "yaml", "here, 0.2 MB"),
    ]
    command = f"accelerate launch training/train_teacher.py {folder.as_posix()}/resolved.yaml --dataset PATH\n"
    assert command in text and command in (folder / "README.md").read_text()
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json", "resolved.yaml")
    }
    card = (folder / "README.md").read_text()
    assert front_matter_problem(card) is None
    for words in (
        *("license: apache-2.0", "| layers, width, heads | 4, 24, 3 |", "**65.6 %** of the split `test`"),
        *("1 class token, 2 registers, 4 patches of 14 x 14 px", "thing 0, thing 1, thing 2", "label smoothing 0.1"),
        *("with random rotations by up to 10 degrees and horizontal flips", "29 min on AMD EPYC, 1 thread."),
        *("4,000 steps of 128 images, 512,000 in all", "1 image was left out as unreadable", " --dataset PATH"),
    ):
        assert words in card, words
    assert "None" not in card and "{" not in card
    kept = "".join((folder / name).read_text() for name in ("metrics.json", "resolved.yaml", "config.json"))
    # the card names the folder that it was made for
    assert str(tmp_path) not in kept + card.replace(folder.as_posix(), "")
    AutoModelForImageClassification.from_pretrained(folder)


def test_a_student_is_linked_to_its_teacher_in_the_zoo(run_zoo, teacher_run, tmp_path, monkeypatch):
    run_zoo("--add", str(teacher_run), "--name", "vit")
    monkeypatch.chdir(tmp_path)
    numbers = {"teacher": {"name": "cards/vit", "revision": None}, "blocks": [[1, 2, 3], [4], [5, 6]]}
    run = save_run_folder(tmp_path / "run", settings={"teacher": "cards/vit"}, **numbers)
    run_zoo("--add", str(run), "--name", "tiny")
    card = (tmp_path / "cards" / "tiny" / "README.md").read_text()
    assert "[`cards/vit`](../vit/README.md)" in card and "license: apache-2.0" in card
    assert "auto_map" not in (tmp_path / "cards" / "tiny" / "config.json").read_text()


def test_refreshing_writes_the_cards_of_students_from_their_own_files(run_zoo, tmp_path):
    run = save_run_folder(tmp_path / "run", blocks=[[1, 2, 3], [4], [5, 6]])
    run_zoo("--add", str(run), "--name", "tiny", "--license", "mit")
    folder = tmp_path / "cards" / "tiny"
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "README.md").write_text("old")
    run_zoo("--refresh", "--license", "mit")
    after = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before and (folder / "README.md").read_text() != "old"


def test_digits_k3_of_the_zoo_is_the_run_of_its_config(zoo):
    config = zoo.parse_settings(zoo.DistillSettings, [str(ROOT / "training/configs/distill/digits_k3.yaml")])
    resolved = yaml.safe_load((ROOT / "model_cards" / "digits-k3" / "resolved.yaml").read_text())
    # the study of three seeds evaluates on the way, and names its folders
    same = {name: value for name, value in resolved.items() if name not in ("output_dir", "eval_every")}
    same = {name: value for name, value in same.items() if hasattr(config, name)}
    assert len(same) > 40 and {name: getattr(config, name) for name in same} == same
    numbers = json.loads((ROOT / "model_cards" / "digits-k3" / "metrics.json").read_text())
    comment = (ROOT / "training/configs/distill/digits_k3.yaml").read_text()
    assert f"R^2 {numbers['fidelity']['r2'][-1]:.3f}".replace(" 0.", " .") in comment
    assert numbers["teacher"]["name"] == "model_cards/digits-teacher"


def test_adding_again_replaces_a_student_whole_and_nothing_else(run_zoo, teacher_run, tmp_path, capsys):
    blocks = [[1, 2, 3], [4], [5, 6]]
    run = save_run_folder(tmp_path / "run", blocks=blocks)
    smaller = save_run_folder(tmp_path / "smaller", heads=False, probes={}, blocks=blocks)
    folder = tmp_path / "cards" / "tiny"
    left_by_a_kill = tmp_path / "cards" / ".tiny.tmp"
    left_by_a_kill.mkdir(parents=True)
    (left_by_a_kill / "metrics.json").write_text("{")
    run_zoo("--add", str(run), "--name", "tiny", "--license", "mit")
    assert (folder / "head-nyu.safetensors").is_file()
    run_zoo("--add", str(smaller), "--name", "tiny", "--license", "mit")
    assert not list(folder.glob("head-*")) and not left_by_a_kill.exists()
    run_zoo("--add", str(teacher_run), "--name", "vit")
    before = (tmp_path / "cards" / "vit" / "README.md").read_bytes()
    for source, name in ((run, "vit"), (teacher_run, "vit"), (teacher_run, "tiny")):
        with pytest.raises(SystemExit, match="2"):
            run_zoo("--add", str(source), "--name", name, "--license", "mit")
        assert "choose another, or remove that folder" in capsys.readouterr().err
    assert (tmp_path / "cards" / "vit" / "README.md").read_bytes() == before
    assert json.loads((folder / "config.json").read_text())["model_type"] == "raptor"


@pytest.mark.parametrize("destination", [".tiny.replaced", "tiny"])
def test_kills_while_a_model_is_replaced_lose_nothing(zoo, tmp_path, monkeypatch, destination):
    folder, rename = tmp_path / "cards" / "tiny", os.rename

    def rename_or_die(source: Path, target: Path) -> None:
        if target.name == destination:
            raise KeyboardInterrupt
        rename(source, target)

    zoo.write_folder(folder, {"config.json": b"old"})
    for _ in range(2):  # the second time with what the first has left
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "rename", rename_or_die)
            zoo.write_folder(folder, {"config.json": b"new"})
        # nothing is listed under a name that is not the model's
        assert {path.parent.name for path in folder.parent.glob("[!.]*/config.json")} <= {"tiny"}
        assert b"old" in [path.read_bytes() for path in folder.parent.glob("*/config.json")]
    zoo.write_folder(folder, {"config.json": b"new"})
    assert list(folder.parent.iterdir()) == [folder] and (folder / "config.json").read_bytes() == b"new"


def test_a_teacher_that_is_broken_stays_out(run_zoo, teacher_run, tmp_path, capsys):
    weights = load_file(teacher_run / "model.safetensors")
    name = next(iter(weights))
    for content in (weights | {name: weights[name] * torch.nan}, {k: v for k, v in weights.items() if k != name}):
        save_file(content, teacher_run / "model.safetensors", {"format": "pt"})
        with pytest.raises(SystemExit, match="2"):
            run_zoo("--add", str(teacher_run), "--name", "vit")
        assert name in capsys.readouterr().err
    assert not (tmp_path / "cards" / "vit").exists()


def test_large_weights_stay_out(zoo, run_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "MAX_WEIGHTS_BYTES", 1000)
    run = save_run_folder(tmp_path / "run", blocks=[[1, 2, 3], [4], [5, 6]])
    text = run_zoo("--add", str(run), "--name", "tiny", "--license", "mit")
    assert "| not here |" in text
    assert not list((tmp_path / "cards").rglob("*.safetensors"))
    assert "are not in this folder" in (tmp_path / "cards" / "tiny" / "README.md").read_text()


def test_missing_numbers_are_dashes_and_teachers_come_first(zoo, tmp_path):
    for name, numbers, settings in (
        ("a-student", {"fidelity": {"r2": [None]}, "blocks": [[1]], "teacher": {"name": "runs/b"}}, "teacher: runs/b"),
        ("b-teacher", {"accuracy": 0.5, "parameters": 1_250_000}, "num_layers: 12"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(numbers))
        (tmp_path / name / "resolved.yaml").write_text(f"dataset: digits\n{settings}\n")
    (tmp_path / "zoo.yaml").write_text(NO_STUDENTS)
    text = zoo.make_table(tmp_path, tmp_path / "zoo.yaml", tmp_path)
    teacher = ["b-teacher", "-", "12 layers", "digits", "1.25 M", "50.0 %", "-", "-", "-", "yaml", "not here"]
    student = ["a-student", "b", "1 (1)", "digits", "-", "-", "-", "-", "-", "yaml", "not here"]
    assert cells(text, "b-teacher") == teacher and cells(text, "a-student") == student
    assert text.index("b-teacher") < text.index("a-student")


def test_published_students_have_the_papers_numbers_and_say_that_they_are_not_ours(zoo, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = zoo.make_table("model_cards", PUBLISHED, "model_cards")
    # shares of ViT-B's parameters and accuracies as published
    for k, repeats, share, accuracy, retained in (
        *((2, "7+5", 24, "81.2 ± 0.2", "96.1"), (3, "7+3+2", 35, "83.0 ± 0.1", "98.2")),
        (4, "4+3+3+2", 46, "83.2 ± 0.1", "98.5"),
    ):
        row = cells(text, f"dinov2_vitb14_k{k}")
        assert row[1:4] == ["DINOv2 ViT-B/14", f"{k} ({repeats})", "imagenet-1k"]
        assert row[4].endswith(f" M ({share} %)")
        assert row[5:7] == [f"{accuracy} %, paper's", f"{retained} % of 84.5 %"]
    for name in ("dinov2_vitb14_k5", "dinov2_vits14_k3", "dinov2_vitl14_k3"):
        assert cells(text, name)[5:7] == ["-", "-"], name
    # of the published recipe
    configs = sorted(path.stem for path in (ROOT / "training" / "configs" / "distill").glob("dinov2_*_k?.yaml"))
    assert len(configs) == 6
    for name in configs:
        assert cells(text, name)[7:] == ["-", "not trained by us", "yaml", "none"]
        assert f"training/distill.py training/configs/distill/{name}.yaml\n" in text


def test_parameters_are_those_of_the_models_at_full_size(zoo):
    size = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    config = Dinov2WithRegistersConfig(num_hidden_layers=12, **size)
    # another partition than the one that is counted on: it makes no difference
    wanted = {"depth_conditioning": "scale", "ffn_type": "swiglu", "intermediate_size": 1536}
    student, teacher = (
        # the mask token is for pre-training alone
        sum(parameter.numel() for name, parameter in model.named_parameters() if not name.endswith("mask_token"))
        for model in (
            RaptorModel(RaptorConfig.from_teacher(config, (9, 2, 1), **wanted)),
            Dinov2WithRegistersModel(config),
        )
    )
    file = yaml.safe_load((ROOT / PUBLISHED).read_text())
    settings = zoo.parse_settings(
        zoo.DistillSettings, [str(ROOT / "training" / "configs" / "distill" / "dinov2_vits14_k3.yaml")]
    )
    assert zoo.count_both(settings, file["teachers"][settings.teacher]["config"]) == (student, teacher)


def test_every_command_of_the_zoo_is_one_that_its_recipe_takes(zoo, monkeypatch):
    monkeypatch.chdir(ROOT)
    classes = {
        "training/distill.py": importlib.import_module("training.distill").DistillSettings,
        "training/train_teacher.py": importlib.import_module("training.train_teacher").TeacherSettings,
    }
    text = zoo.make_table("model_cards", PUBLISHED, "model_cards")
    commands = re.search(r"```bash\n(.*?)\n```", text, re.DOTALL).group(1).splitlines()
    assert len(commands) == len([line for line in text.splitlines() if line.startswith("|")]) - 2
    for command in commands:
        words = shlex.split(command)
        position = next(index for index, word in enumerate(words) if word in classes)
        assert words[:position] in (
            ["accelerate", "launch"],
            ["accelerate", "launch", "--config_file", "training/accelerate/gpu8.yaml"],
        )
        settings = parse_settings(classes[words[position]], words[position + 1 :], exit_on_error=False)
        # of data outside of the repository only the name is recorded
        assert ("--dataset PATH" in command) == (settings.dataset == "PATH")
        assert "{" not in settings.dataset


def test_a_published_student_needs_a_config_and_a_teacher(zoo, tmp_path):
    path = tmp_path / "zoo.yaml"
    with pytest.raises(FileNotFoundError, match="published is"):
        zoo.published_rows(path, tmp_path)
    path.write_text("launch: gpu.yaml\nteachers: {}\nstudents: {a.yaml: {}}\n")
    with pytest.raises(FileNotFoundError, match=r"a\.yaml"):
        zoo.published_rows(path, tmp_path)
    (tmp_path / "a.yaml").write_text("{teacher: org/vit, dataset: digits, output_dir: x, num_blocks: 2}")
    with pytest.raises(ValueError, match="no teacher 'org/vit'"):
        zoo.published_rows(path, tmp_path)


def test_bad_input_is_one_line_and_changes_nothing(zoo, run_zoo, tmp_path, capsys):
    for arguments, message in (
        ((), "holds no model"),
        (("--add", "runs/x"), "add and name go together"),
        (("--add", "runs/x", "--name", "../x"), "name is '../x'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_zoo(*arguments)
        assert message in capsys.readouterr().err
    assert "old" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="once each"):
        zoo.with_table("no comments", "table")
