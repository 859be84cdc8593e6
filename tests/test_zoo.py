"""The table of the models that were trained here."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from published_run import metrics, save_run_folder
from transformers import AutoModelForSemanticSegmentation

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
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{zoo.BEGIN}\nold\n{zoo.END}\n\nrest\n")

    def call(*arguments: str) -> str:
        flags = ["--cards_dir", str(tmp_path / "cards"), "--readme", str(readme), *arguments]
        monkeypatch.setattr(sys, "argv", ["zoo.py", *flags])
        zoo.main()
        return readme.read_text()

    return call


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


def test_large_weights_stay_out(zoo, run_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "MAX_WEIGHTS_BYTES", 1000)
    run = save_run_folder(tmp_path / "run", blocks=[[1, 2, 3], [4], [5, 6]])
    text = run_zoo("--add", str(run), "--name", "tiny", "--license", "mit")
    assert "| not here |" in text
    assert not list((tmp_path / "cards").rglob("*.safetensors"))


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
