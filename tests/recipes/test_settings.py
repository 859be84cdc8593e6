"""Settings: what the file and the flags say is what the recipe gets, and mistakes are one clear line."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml

from raptor_hf.recipes import settings as settings_module
from raptor_hf.recipes.settings import parse_settings, prepare_output_dir, save_settings, settings_to_dict


@dataclass(frozen=True)
class Settings:
    output_dir: str
    base_lr: float = field(default=3e-4, metadata={"help": "learning rate after the warm-up"})
    num_steps: int = 1000
    block_repeats: list[int] = field(default_factory=lambda: [7, 5])
    stage1: bool = True
    resume: bool = False
    loss: Literal["mse", "cosine"] = "mse"
    revision: str | None = None
    max_images: int | None = None
    layers: list[int] | None = None
    num_workers: int = 2

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}\nmust be at least 1")


def parse(*argv: str) -> Settings:
    return parse_settings(Settings, [str(argument) for argument in argv], exit_on_error=False)


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_flags_win_over_the_file_and_the_file_over_the_defaults(config):
    path = config("output_dir: a\nbase_lr: 0.1\nnum_steps: 5\n")
    assert parse(path, "--num_steps", "7") == Settings("a", base_lr=0.1, num_steps=7)
    assert parse(path, "--output-dir", "b", "--base-lr=1e-2").output_dir == "b"


def test_flags_alone_are_enough():
    assert parse("--output_dir", "a") == Settings("a")


def test_field_without_default_is_asked_for():
    with pytest.raises(ValueError, match="required: --output_dir"):
        parse("--num_steps", "3")


@pytest.mark.parametrize("in_file", ["", "stage1: true\nresume: true\n", "stage1: false\nresume: false\n"])
@pytest.mark.parametrize("style", [str, lambda flag: flag.replace("_", "-")])
def test_booleans_are_switched_both_ways_whatever_the_file_says(config, in_file, style):
    path = config("output_dir: a\n" + in_file)
    on, off = parse(path, "--stage1", "--resume"), parse(path, style("--no_stage1"), style("--no_resume"))
    assert (on.stage1, on.resume, off.stage1, off.resume) == (True, True, False, False)
    by_value = parse(path, "--stage1", "false", "--resume", "true")
    assert (by_value.stage1, by_value.resume) == (False, True)
    unchanged = parse(path)
    expected = yaml.safe_load(in_file) or {"stage1": True, "resume": False}
    assert (unchanged.stage1, unchanged.resume) == (expected["stage1"], expected["resume"])


def test_none_on_the_command_line_takes_back_what_the_file_gives(config):
    path = config("output_dir: a\nrevision: main\nmax_images: 5\nlayers: [1, 2]\nloss: cosine\n")
    settings = parse(path, "--revision", "none", "--max-images=none", "--layers", "none")
    assert (settings.revision, settings.max_images, settings.layers) == (None, None, None)
    assert parse(path, "--max_images", "none", "--max_images", "3").max_images == 3
    assert parse(path, "--layers", "none", "--layers", "3", "4").layers == [3, 4]
    # only where None is a value; where it is the name of a choice it stays that
    assert parse("--output_dir", "none").output_dir == "none"
    for flags in (["--num_steps", "none"], ["--loss", "none"]):
        with pytest.raises(ValueError, match="'none'"):
            parse(path, *flags)
    with pytest.raises(ValueError, match="--layers: none goes with no other value, got none 3"):
        parse(path, "--layers", "none", "3")
    with pytest.raises(ValueError, match="invalid int value: 'nine'"):
        parse(path, "--max_images", "nine")


def test_none_is_the_choice_of_that_name_where_there_is_one():
    @dataclass(frozen=True)
    class Augmented:
        augment: Literal["none", "crop"] | None = None
        scale: Literal["small", "large"] | None = None

    settings = parse_settings(Augmented, ["--augment", "none", "--scale", "none"], exit_on_error=False)
    assert (settings.augment, settings.scale) == ("none", None)
    assert parse_settings(Augmented, ["--scale", "large"], exit_on_error=False).scale == "large"


@pytest.mark.parametrize("spelling", ["3e-4", "3.0e-4", "0.0003", "'3e-4'"])
def test_float_in_any_spelling(config, spelling):
    assert parse(config(f"output_dir: a\nbase_lr: {spelling}")).base_lr == 3e-4


def test_whole_number_is_a_float_where_one_is_due(config):
    value = parse(config("output_dir: a\nbase_lr: 1")).base_lr
    assert value == 1.0 and isinstance(value, float)


def test_lists_from_file_and_flags(config):
    path = config("output_dir: a\nblock_repeats: [7, 3, 2]\nlayers: [1]")
    assert parse(path).block_repeats == [7, 3, 2] and parse(path).layers == [1]
    flags = parse(path, "--block_repeats", "4", "3", "3", "2", "--layers", "5", "6")
    assert flags.block_repeats == [4, 3, 3, 2] and flags.layers == [5, 6]


def test_optional_fields_from_file_and_flags(config):
    path = config("output_dir: a\nmax_images: 10\nrevision: null\n")
    assert (parse(path).max_images, parse(path).revision) == (10, None)
    flags = parse(path, "--max_images", "20", "--revision", "main")
    assert (flags.max_images, flags.revision) == (20, "main")


WRONG = {
    "base_lr: abc": "base_lr must be of type float, got 'abc'",
    "base_lr: true": "base_lr must be of type float, got True",
    "base_lr: [1.0]": "base_lr must be of type float",
    "base_lr: null": "base_lr must be of type float, got None",
    "num_steps: 1.5": "num_steps must be of type int, got 1.5",
    "num_steps: true": "num_steps must be of type int, got True",
    "stage1: 1": "stage1 must be of type bool, got 1",
    "stage1: 'yes'": "stage1 must be of type bool",
    "revision: 1.10": r"revision must be of type str, got 1.1 \(float\)",
    "block_repeats: 7": r"block_repeats must be a list such as \[1, 2\], got 7",
    "block_repeats: [7, x]": "block_repeats must be of type int, got 'x'",
    "loss: l1": "loss must be one of mse, cosine, got 'l1'",
    "num_step: 5": "unknown setting 'num_step'; did you mean num_steps",
    "zzz: 5": "unknown setting 'zzz'$",
    "- a": "must hold `setting: value` lines, not a list",
    "a: [": "is not a YAML file",
    "num_steps: 0": "num_steps=0\nmust be at least 1",
}


@pytest.mark.parametrize("line", WRONG)
def test_mistake_in_the_file_is_named(config, line):
    with pytest.raises(ValueError, match=WRONG[line]) as caught:
        parse(config(line), "--output_dir", "a")
    assert "config.yaml" in str(caught.value) or line == "num_steps: 0"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_steps", "abc"], "--num_steps.*invalid int value: 'abc'"),
        (["--loss", "l1"], "--loss.*invalid choice: 'l1'"),
        (["--num_step", "3"], "unknown flag '--num_step'; did you mean --num_steps"),
        (["--num-workres=3"], "unknown flag '--num-workres=3'; did you mean --num_workers"),
        (["--num_steps", "3", "config.yaml"], "unexpected argument 'config.yaml'; one YAML file comes first"),
        (["--base", "3"], "unknown flag '--base'"),
        (["--no_num_steps"], "unknown flag '--no_num_steps'"),
    ],
)
def test_mistake_in_a_flag_is_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse("--output_dir", "a", *flags)


def test_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="'nowhere.yaml' does not exist"):
        parse("nowhere.yaml")


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--ouput_dir", "a"], "unknown flag '--ouput_dir'; did you mean --output_dir?"),
        (["--output_dir", "a", "--num_steps", "0"], "num_steps=0 must be at least 1"),
        (["nowhere.yaml"], "configuration file 'nowhere.yaml' does not exist"),
    ],
)
def test_script_ends_with_one_line_and_status_2(monkeypatch, capsys, flags, line):
    monkeypatch.setattr(sys, "argv", ["training/distill.py", *flags])
    with pytest.raises(SystemExit) as caught:
        parse_settings(Settings)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"distill.py: error: {line}\n"


def test_arguments_come_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training/distill.py", "--output_dir", "a", "--num_steps", "9"])
    assert parse_settings(Settings) == Settings("a", num_steps=9)


def test_help_shows_meaning_and_the_files_value(config, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(config("base_lr: 0.125"), "--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "[CONFIG.yaml]" in shown and "learning rate after the warm-up (default: 0.125, from config.yaml)" in shown


def test_saved_settings_are_a_configuration_that_gives_the_same_settings(tmp_path):
    settings = Settings(
        "ünder/a folder", 1 / 3 * 1e-7, 7, [1], False, True, "cosine", "1e-4", None, [3, 4], num_workers=0
    )
    save_settings(tmp_path / "saved.yaml", settings)
    assert parse(tmp_path / "saved.yaml") == settings
    assert settings_to_dict(settings)["base_lr"] == settings.base_lr


def test_output_dir_is_created_with_the_resolved_settings(tmp_path):
    settings = Settings("x", base_lr=1e-6)
    folder = prepare_output_dir(tmp_path / "new" / "run", settings)
    assert [path.name for path in folder.iterdir()] == ["resolved.yaml"]
    assert parse(folder / "resolved.yaml") == settings


def test_output_dir_of_the_same_run_is_taken_again(tmp_path):
    settings = Settings("x", revision="main")
    prepare_output_dir(tmp_path, settings)
    prepare_output_dir(tmp_path, settings)
    prepare_output_dir(tmp_path, replace(settings, num_workers=8, output_dir="moved"))
    assert parse(tmp_path / "resolved.yaml").num_workers == 8


def test_output_dir_of_another_run_is_refused_with_the_difference(tmp_path):
    prepare_output_dir(tmp_path, Settings("x", base_lr=1e-3, max_images=5))
    with pytest.raises(ValueError, match=r"\(base_lr: 0.001 -> 0.0003, max_images: 5 -> None\)"):
        prepare_output_dir(tmp_path, Settings("x"))
    assert parse(tmp_path / "resolved.yaml").base_lr == 1e-3
    prepare_output_dir(tmp_path, Settings("x"), override=True)
    assert parse(tmp_path / "resolved.yaml") == Settings("x")


def test_output_dir_of_another_recipe_or_version_is_refused(tmp_path):
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump({**settings_to_dict(Settings("x")), "num_classes": 10}))
    with pytest.raises(ValueError, match=r"num_classes: 10 -> \(absent\)"):
        prepare_output_dir(tmp_path, Settings("x"))


def test_folder_with_a_model_but_no_settings_is_refused_and_with_notes_is_not(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    prepare_output_dir(tmp_path, Settings("x"))
    (tmp_path / "resolved.yaml").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model of unknown settings"):
        prepare_output_dir(tmp_path, Settings("x"))


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_output_dir_that_cannot_be_a_folder_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"output_dir='.*{name}' is not a folder that can be written to"):
        prepare_output_dir(tmp_path / name, Settings("x"))


def test_read_only_output_dir_is_refused(tmp_path, monkeypatch):
    def refuse(dir):  # permissions do not bind the root user, whom tests may run as
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(settings_module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="is not a folder that can be written to.*Permission denied"):
        prepare_output_dir(tmp_path, Settings("x"))


def test_too_little_free_disk_is_refused_with_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(settings_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_500_000_000))
    with pytest.raises(OSError, match="1.50 GB free, and the run needs 2.00 GB"):
        prepare_output_dir(tmp_path, Settings("x"), needed_bytes=2_000_000_000)
    assert not (tmp_path / "resolved.yaml").exists()
    prepare_output_dir(tmp_path, Settings("x"), needed_bytes=1_000_000_000)
