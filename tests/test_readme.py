"""What the README shows works as it stands, offline."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

from raptor_hf.conversion import student_from_teacher, to_plain
from raptor_hf.families import FAMILIES
from tests.support.tiny_vits import TWO_TOWERS, VITS, WITH_CLASSIFIER, tiny_vit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_snippet(code: str) -> str:
    """What a snippet prints, with the packaged teacher of 8 pixels in the place of the Hub's of 224."""
    code = code.replace("facebook/dinov2-with-registers-base", "model_cards/digits-teacher").replace("224, 224", "8, 8")
    code = code.replace('"model_cards/', f'"{ROOT.as_posix()}/model_cards/')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        exec(code, {})
    return printed.getvalue()


def table_of_teachers() -> dict[str, list[str]]:
    """Family to the cells "analyse", "distil", "back to plain" and "heads"."""
    rows = [line.strip("| ").split(" | ") for line in README.split("| teacher, `model_type`")[1].splitlines()[2:]]
    rows = rows[: rows.index([""])]
    return {family: cells for names, *cells in rows for family in re.findall("`(.*?)`", names)}


def test_the_readme_takes_a_minute():
    assert len(README.splitlines()) <= 150
    assert len(SNIPPETS) == 2
    for code in SNIPPETS:
        assert len([line for line in code.splitlines() if line]) <= 10


def test_loading_a_student_prints_a_zero_and_one_state_per_step_more():
    assert run_snippet(SNIPPETS[0]) == "tensor([0]) 13\n"


def test_finding_phases_prints_three_that_end_at_the_last_layer():
    phases = eval(run_snippet(SNIPPETS[1]), {"__builtins__": {}})
    assert len(phases) == 3 and phases[0][0] == 0 and phases[-1][1] == 12


def test_the_table_of_teachers_has_every_family():
    assert set(table_of_teachers()) == set(FAMILIES) - {"raptor"}


@pytest.mark.parametrize("family", sorted(VITS))
def test_the_table_says_what_students_of_every_family_can(family):
    analyse, distil, plain, heads = table_of_teachers()[family]
    assert analyse == "yes" and distil.startswith("yes") == bool(FAMILIES[family].block_parts)
    student = student_from_teacher(tiny_vit(family), (2, 2), init="first")
    assert plain == "yes" and to_plain(student).config.model_type == family
    assert ("attention pooling" in heads) == student.config.pooling_type.startswith("attention")
    assert ("classifier" in heads) == (family in WITH_CLASSIFIER)
    assert ("image features" in heads) == (family in TWO_TOWERS)


def test_every_file_that_the_readme_names_exists():
    named = re.findall(r"(?:training|model_cards|raptor_hf|tests)/[\w./-]+\.(?:py|yaml|png|md|json)", README)
    named += re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_pins_the_version_of_torch():
    commands = re.findall(r"^pip install .*$", README, re.MULTILINE)
    assert len(commands) == 2 and all("torch==2.13.0" in command for command in commands)
