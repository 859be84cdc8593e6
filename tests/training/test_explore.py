"""The recipe that writes one page about photographs."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.tiny_models import tiny_dinov2
from training import explore

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "model_cards" / "digits-teacher"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs that must end with one line and status 2, and write nothing."""

    def refused(**settings) -> str:
        given = {"teacher": TEACHER, "output": tmp_path / "page.html"} | settings
        flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["explore.py", *flags])
        with pytest.raises(SystemExit) as stopped:
            explore.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in error and not (tmp_path / "page.html").exists()
        return error.splitlines()[-1]

    return refused


def test_a_student_of_another_teacher_is_refused(refused, tmp_path):
    tiny_dinov2(patch_size=4, image_size=8).save_pretrained(tmp_path / "other")
    line = refused(student=tmp_path / "other")
    assert f"student is '{tmp_path / 'other'}', of patch_size 4; that of teacher '{TEACHER}' is 2" in line


def test_what_cannot_be_read_or_written_is_named(refused, tmp_path, monkeypatch):
    nowhere = tmp_path / "nowhere"
    assert f"student is '{nowhere}': " in refused(student=nowhere)
    (tmp_path / "file").write_text("")
    assert "folder of output=" in refused(output=tmp_path / "file" / "page.html")
    assert "image_size is 15; it must be a multiple of the patch, 2" in refused(image_size=15)
    Image.new("L", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert f"images has '{tmp_path / 'large.png'}', which is no readable image" in refused(
        images=tmp_path / "large.png"
    )
