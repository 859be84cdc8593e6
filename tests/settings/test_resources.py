"""Shipped files: models of the package are found from any folder, and a folder that is missing is never asked for."""

from pathlib import Path

import pytest
from raptor_settings.resources import find_model, find_path

from raptor_hf.data.images import load_image_processor
from raptor_hf.teacher import load_teacher

ROOT = Path(__file__).parents[2]


def test_packaged_model_is_found_from_any_folder_and_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_model("model_cards/digits-teacher")).samefile(ROOT / "model_cards" / "digits-teacher")
    teacher = load_teacher("model_cards/digits-teacher")
    assert teacher.name == "model_cards/digits-teacher" and teacher.num_layers == 12
    assert load_image_processor("model_cards/digits-teacher") is not None


def test_model_here_wins_over_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model_cards/digits-teacher").mkdir(parents=True)
    assert find_model("model_cards/digits-teacher") == "model_cards/digits-teacher"
    assert find_path("model_cards/digits-teacher") == Path("model_cards/digits-teacher")


MISSING = ("runs/k3", "model_cards/nothing", "/nowhere/x", "./x", "../x", "~/x", "a/b/c", "a\\b", "mine/x", "a/", "")


@pytest.mark.parametrize("name", MISSING)
def test_folder_that_is_missing_is_refused_and_not_taken_for_a_name_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_model(name)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_teacher(name)


@pytest.mark.parametrize("name", ["facebook/dinov2-with-registers-base", "gpt2", "org/na.me_1"])
def test_name_on_the_hub_is_left_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model(name) == name


def test_misspelled_packaged_model_gets_the_right_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="did you mean model_cards/digits-teacher"):
        find_model("model_cards/digit-teacher")
