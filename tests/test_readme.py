"""What the README shows works as it stands."""

import contextlib
import io
import re
from pathlib import Path

from raptor_hf.conversion import student_from_teacher
from raptor_hf.data.images import load_image_processor
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.teacher import load_teacher

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DIGITS_TEACHER = ROOT / "model_cards" / "digits-teacher"


def test_load_and_run_prints_a_label_and_one_state_per_step_more(tmp_path):
    student_from_teacher(load_teacher(DIGITS_TEACHER), (7, 3, 2), init="middle").save_pretrained(tmp_path)
    RaptorImageProcessor.from_teacher(load_image_processor(str(DIGITS_TEACHER))).save_pretrained(tmp_path)
    section = README.split("## Load and run")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert len(code.splitlines()) <= 14
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("runs/digits_k3", tmp_path.as_posix()), {})
    assert re.fullmatch(r"tensor\(\[\d\]\) 13\n", printed.getvalue())


def test_every_file_that_the_readme_names_exists():
    named = re.findall(r"(?:training|model_cards|raptor_hf|tests)/[\w./-]+\.(?:py|yaml|png|md|json)", README)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_pins_the_version_of_torch():
    commands = re.findall(r"^pip install .*$", README, re.MULTILINE)
    assert commands and all("torch==2.13.0" in command for command in commands)
