"""The table of the models that were trained here."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import front_matter_problem
from published_run import metrics, save_run_folder
from safetensors.torch import load_file, save_file
from tiny_models import tiny_dinov2
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def zoo():
    # as a script it finds publish.py beside itself
    sys.path.insert(0, str(ROOT / "training"))
    try:
        yield importlib.import_module("training.zoo")
    finally:
        sys.path.remove(str(ROOT / "training"))


@pytest.fixture
def run_zoo(zoo, monkeypatch, tmp_path):
    """Runs the command on a README and a folder of cards of its own; the README's text."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # no Hub
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{zoo.BEGIN}\nold\n{zoo.END}\n\nrest\n")

    def call(*arguments: str) -> str:
        flags = ["--cards_dir", str(tmp_path / "cards"), "--readme", str(readme), *arguments]
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


def test_the_readme_has_the_table_that_the_command_writes(zoo, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert zoo.with_table(text, zoo.make_table(Path("model_cards"))) == text, "run python training/zoo.py"


def test_every_model_of_the_zoo_has_a_card_with_the_tag_raptor():
    folders = [path.parent for path in (ROOT / "model_cards").glob("*/metrics.json")]
    assert folders
    for folder in folders:
        front = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
        assert "- raptor\n" in front and "library_name: transformers" in front


def test_a_run_comes_in_whole_without_code_and_stands_in_the_table(run_zoo, tmp_path):
    run = save_run_folder(tmp_path / "run", blocks=[[1, 2, 3], [4], [5, 6]])
    text = run_zoo("--add", str(run), "--name", "tiny-k3", "--license", "mit")
    folder = tmp_path / "cards" / "tiny-k3"
    assert f"| [tiny-k3]({folder.as_posix()}/README.md) | student of dinov2-small, 3 blocks (3+1+2) |" in text
    row = next(line for line in text.splitlines() if "tiny-k3" in line)
    assert row.endswith("| uoft-cs/cifar10 | 85.0 % | 0.950 | 7.00 M | 1.32 M | here |")
    assert text.startswith("# Title\n\n") and text.endswith("\n\nrest\n") and "old" not in text
    assert not list(folder.rglob("*.py")) and not (folder / "losses.json").exists()
    assert (folder / "figures" / "phases.png").is_file()
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "trust_remote_code" not in card
    AutoModelForSemanticSegmentation.from_pretrained(folder, variant="ade20k")
    assert run_zoo() == text


def test_a_teacher_comes_in_with_a_card_of_its_numbers(run_zoo, teacher_run, tmp_path):
    text = run_zoo("--add", str(teacher_run), "--name", "vit")
    folder = tmp_path / "cards" / "vit"
    assert "README.md) | teacher, 4 layers | cifar10 | 65.6 % | - | 1.37 M | - | here |" in text
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
    for name, numbers in (
        ("a-student", {"fidelity": {"r2": [None]}, "blocks": [[1]], "teacher": metrics()["teacher"]}),
        ("b-teacher", {"accuracy": 0.5, "parameters": 1_250_000}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(numbers))
        (tmp_path / name / "resolved.yaml").write_text("dataset: digits\nnum_layers: 12\n")
    teacher, student = zoo.make_table(tmp_path).splitlines()[2:]
    assert "| teacher, 12 layers | digits | 50.0 % | - | 1.25 M | - | not here |" in teacher
    assert "| student of dinov2-small, 1 block (1) | digits | - | - | - | - | not here |" in student


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
