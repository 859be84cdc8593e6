"""What the README shows works as it stands, offline."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

from raptor_hf.conversion import student_from_teacher, to_dinov2
from raptor_hf.families import FAMILIES
from raptor_hf.teacher import Teacher
from tests.support.tiny_vits import VITS, tiny_vit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# words of the README's table of teachers -> families
TABLE_NAMES = {
    "DINOv2": ("dinov2", "dinov2_with_registers"),
    "ViT": ("vit",),
    "DeiT": ("deit",),
    "MAE": ("vit_mae",),
    "CLIP": ("clip_vision_model",),
    "SigLIP": ("siglip_vision_model",),
    "DINOv3": ("dinov3_vit",),
}


def run_snippet(code: str) -> str:
    """What a snippet prints, with the packaged teacher of 8 pixels in the place of the Hub's of 224."""
    code = code.replace("facebook/dinov2-with-registers-base", "model_cards/digits-teacher").replace("224, 224", "8, 8")
    code = code.replace('"model_cards/', f'"{ROOT.as_posix()}/model_cards/')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        exec(code, {})
    return printed.getvalue()


def table_of_teachers() -> dict[str, list[str]]:
    """Family to the cells "analyse", "distil" and "student as plain DINOv2"."""
    rows = [line.strip("| ").split(" | ") for line in README.split("| teacher | analyse")[1].splitlines()[2:]]
    rows = rows[: rows.index([""])]
    cells = {}
    for names, *values in rows:
        for name in re.findall(
            r"\b(?:DINOv2|DINOv3|ViT|DeiT|MAE|CLIP|SigLIP)\b", names.replace("DINOv3 ViT", "DINOv3")
        ):
            cells |= dict.fromkeys(TABLE_NAMES[name], values)
    return cells


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
def test_the_table_says_which_families_can_be_distilled_and_become_dinov2(family):
    analyse, distil, as_dinov2 = table_of_teachers()[family]
    teacher = Teacher(tiny_vit(family))
    assert analyse == "yes"
    assert distil.startswith("yes") == bool(FAMILIES[family].block_parts)
    if FAMILIES[family].block_parts:
        student = student_from_teacher(teacher, (1,) * teacher.num_layers)
        with pytest.raises(ValueError, match="cannot become DINOv2"):
            to_dinov2(student)
    assert as_dinov2 == "no"


def test_every_file_that_the_readme_names_exists():
    named = re.findall(r"(?:training|model_cards|raptor_hf|tests)/[\w./-]+\.(?:py|yaml|png|md|json)", README)
    named += re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_pins_the_version_of_torch():
    commands = re.findall(r"^pip install .*$", README, re.MULTILINE)
    assert len(commands) == 2 and all("torch==2.13.0" in command for command in commands)
