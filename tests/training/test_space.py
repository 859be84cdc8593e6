"""The folder of a Space: its front matter, its requirements, and the app in it."""

import html
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "training" / "space"


def test_a_space_finds_its_app_and_what_this_needs():
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (SPACE / "requirements.txt").read_text(encoding="utf-8").split() == [f"{project['name']}[demo]"]
    major = front["sdk_version"].split(".")[0]
    assert any(need.startswith(f"gradio>={major}") for need in project["optional-dependencies"]["demo"])
    assert f">={front['python_version']}" == project["requires-python"]
    assert front["license"] == project["license"].lower()


@pytest.fixture(scope="module")
def explorer():
    pytest.importorskip("gradio")
    from training.space.app import Explorer

    return Explorer()


def content_of(frame: str) -> dict:
    page = html.unescape(re.search(r'<iframe srcdoc="(.*?)" style', frame, re.DOTALL)[1])
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_app_shows_an_upload_and_digits_before_there_is_one(explorer, tmp_path):
    path = tmp_path / "a cat.png"
    Image.new("L", (50, 40), 90).save(path)
    assert [entry["title"] for entry in content_of(explorer.page([str(path)]))["photographs"]] == ["a cat.png"]
    content = content_of(explorer.page(None))
    assert len(content["photographs"]) == 4 and content["names"] == ["digits-teacher", "digits-k3"]
    assert content["r2"][-1] > 0.9
    assert explorer.app().fns


def test_the_app_says_what_is_wrong_with_an_upload(explorer, tmp_path):
    gradio = pytest.importorskip("gradio")
    path = tmp_path / "no.png"
    path.write_text("no image")
    with pytest.raises(gradio.Error, match="no.png is no readable image"):
        explorer.page([str(path)])
    with pytest.raises(gradio.Error, match="These are 5 photographs; choose up to 4"):
        explorer.page([str(path)] * 5)
