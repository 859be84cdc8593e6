"""The page that shows what models do with photographs: its numbers, and the page in a browser."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from raptor_hf.conversion import student_from_teacher
from raptor_hf.dynamics.explorer import explore, feature_colours, settled_at, token_paths
from raptor_hf.dynamics.motion import directions
from raptor_hf.phases import Partition
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import NUM_LAYERS, images, tiny_dinov2

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PARTITION = Partition.from_boundaries([2], NUM_LAYERS)
HALF = [0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def models():
    model = tiny_dinov2()
    model.set_attn_implementation("eager")
    teacher = Teacher(model)
    student = student_from_teacher(teacher, PARTITION, init="middle")
    student.set_attn_implementation("eager")
    return teacher, Teacher(student)


@pytest.fixture(scope="module")
def page(models):
    names = ["a </script> teacher", "student"]
    return explore(
        *models, images(), titles=[f"picture {i}" for i in range(len(images()))], names=names, mean=HALF, std=HALF
    )


def content_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_every_step_of_both_models(models, page):
    content, pixel_values = content_of(page), images()
    rows, columns = content["grid"]
    assert content["numLayers"] == NUM_LAYERS and content["blocks"] == [[1, 2], list(range(3, NUM_LAYERS + 1))]
    assert len(content["photographs"]) == len(pixel_values) and content["names"][0] == "a </script> teacher"
    for index, photograph in enumerate(content["photographs"]):
        for model, shown in zip(models, photograph["models"], strict=True):
            assert len(base64.b64decode(shown["colours"])) == (NUM_LAYERS + 1) * rows * columns * 3
            attention = torch.stack(model(pixel_values, output_attentions=True).attentions, 1)[index, :, :, 0]
            first = model.tokens.num_prefix_tokens
            strongest = np.frombuffer(base64.b64decode(shown["attention"]), np.uint8).reshape(NUM_LAYERS, -1).argmax(1)
            assert strongest.tolist() == attention.mean(1)[:, first:].argmax(1).tolist()
            assert [len(values) for values in shown["speed"].values()] == [NUM_LAYERS] * len(content["groups"])
            assert all(values[-1] == 1 for values in shown["convergence"].values())


def test_r2_is_the_share_of_the_teachers_variance_that_the_student_explains(models, page):
    teacher, student = (model.trajectory(images())[:, 1:].double() for model in models)
    spread = (teacher - teacher.mean(dim=(0, 2), keepdim=True)).square().sum(dim=(0, 2, 3))
    expected = 1 - (teacher - student).square().sum(dim=(0, 2, 3)) / spread
    assert content_of(page)["r2"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_equal_models_have_equal_colours_and_paths():
    states = directions(torch.randn(2, 4, 9, 16, generator=torch.Generator().manual_seed(0)))
    for view in (feature_colours, token_paths):
        first, second = view([states, states.clone()])
        assert torch.equal(first, second)


def test_a_rotation_of_the_features_does_not_change_the_colours():
    generator = torch.Generator().manual_seed(0)
    states = directions(torch.randn(2, 4, 30, 16, generator=generator))
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    plain, rotated = (feature_colours([x])[0].float() for x in (states, states @ rotation))
    # up to the signs of the first step's components, which turn a channel into its negative
    flips = [
        min((plain - sign(rotated))[..., c].abs().max() for sign in (lambda x: x, lambda x: 255 - x)) for c in range(3)
    ]
    assert max(flips) <= 2


def test_a_patch_settles_after_the_last_step_at_which_it_is_far():
    angles = torch.tensor([[90.0, 40.0, 20.0, 10.0, 0.0], [20.0, 10.0, 35.0, 0.0, 0.0], [5.0] * 5]).deg2rad()
    states = torch.stack([angles.cos(), angles.sin()], -1).transpose(0, 1)
    assert settled_at(states).tolist() == [2, 3, 0]


def test_a_student_of_another_depth_is_refused(models):
    shallow = Teacher(tiny_dinov2(), layers=[1, 2])
    with pytest.raises(ValueError, match=f"{NUM_LAYERS} steps.*2 steps"):
        explore(models[0], shallow, images(), titles=["a", "b"], names=["t", "s"], mean=HALF, std=HALF)


def test_the_page_says_what_the_classifier_reads_in_every_state():
    teacher = Teacher(tiny_dinov2(num_labels=5))
    page = explore(teacher, None, images(), titles=["a", "b"], names=["t"], mean=HALF, std=HALF)
    states = teacher.trajectory(images())
    for index, photograph in enumerate(content_of(page)["photographs"]):
        lens = photograph["models"][0]["lens"]
        probabilities = torch.stack([teacher.logits(state)[index].softmax(0) for state in states.unbind(1)])
        assert lens["probabilities"] == pytest.approx(probabilities.amax(1).tolist(), abs=1e-3)
        assert lens["labels"] == [f"thing {number}" for number in probabilities.argmax(1)]
        prefix = states[index, :, : teacher.num_prefix_tokens]
        for patch, settled in enumerate(lens["settled"]):
            alone = torch.cat([prefix, states[index, :, [teacher.num_prefix_tokens + patch]]], 1)
            classes = teacher.logits(alone).argmax(1)
            assert (classes[settled:] == classes[-1]).all()
            assert settled == 0 or classes[settled - 1] != classes[-1]


@pytest.mark.slow
def test_four_photographs_of_518_pixels_fit_in_five_megabytes():
    model = tiny_dinov2(num_hidden_layers=12, num_labels=3)
    model.set_attn_implementation("eager")
    teacher = Teacher(model)
    pixel_values = images((336, 336), batch=4)
    page = explore(teacher, teacher, pixel_values, titles=["photograph"] * 4, names=["t", "s"], mean=HALF, std=HALF)
    # 24 x 24 patches here; of the 37 x 37 of a photograph at 518 pixels, five megabytes would be as much
    share = (1 + 2 + 24 * 24) / (1 + 2 + 37 * 37)
    assert len(content_of(page)["photographs"]) == 4 and len(page.encode()) < 5e6 * share


def in_browser(page: str, tmp_path, address: str = "", script: str = "", size: str = "1200,2000") -> str:
    """The page as a browser has it, after a script has run; what goes wrong on it is an error here."""
    path = tmp_path / "explore.html"
    # before all others, so that it hears of their errors
    listen = "<script>window.onerror = message => { document.title = 'failed: ' + message; };</script>"
    page = page.replace("<head>", f"<head>{listen}").replace("</body>", f"<script>{script}</script></body>")
    path.write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", f"--window-size={size}"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [BROWSER, *flags, "--dump-dom", f"{path.as_uri()}{address}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>failed" not in shown.stdout and "CONSOLE" not in shown.stderr, shown.stderr
    return shown.stdout


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("step", [0, 3])
def test_a_browser_shows_the_step_that_the_address_names(page, tmp_path, step):
    shown = in_browser(page, tmp_path, f"#{step}")
    wanted = f"Step {step} of {NUM_LAYERS}, block 2 of 2" if step else f"Embedding, before step 1 of {NUM_LAYERS}"
    assert wanted in shown and shown.count("<canvas") == 2 * 4 + 1


@pytest.mark.slow
@needs_browser
def test_slider_keys_and_matrix_move_the_picture(page, tmp_path):
    """Every way to another step shows that step, and its pixels; a photograph's button shows that photograph."""
    script = """
      const first = document.querySelector("canvas"), found = [];
      const look = () => found.push([document.getElementById("step").textContent.match(/Step (\\d+)|Embedding/)[0],
        first.toDataURL().length + first.toDataURL().slice(-60)]);
      const key = name => document.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
      look();
      slider.value = 2; slider.dispatchEvent(new Event("input")); look();
      key("ArrowRight"); look(); key("ArrowLeft"); look(); key("Home"); look(); key("ArrowLeft"); look();
      const matrix = document.getElementById("matrix"), box = matrix.getBoundingClientRect();
      matrix.dispatchEvent(new MouseEvent("click", { clientX: box.left + box.width * 0.6, clientY: box.top + 2 }));
      look();
      document.querySelectorAll(".photographs button")[1].click(); look();
      document.getElementById("single").click(); look();
      const pre = document.createElement("pre");
      pre.id = "found"; pre.textContent = JSON.stringify(found); document.body.append(pre);
    """
    shown = in_browser(page, tmp_path, "#4", script)
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL)[1])
    steps, pictures = zip(*found, strict=True)
    expected = ["Step 4", "Step 2", "Step 3", "Step 2", "Embedding", "Embedding", "Step 3", "Step 3", "Step 3"]
    assert list(steps) == expected
    assert pictures[1] == pictures[3] and pictures[2] == pictures[6] and pictures[4] == pictures[5]
    # four steps, another photograph, other colours
    assert len({*pictures}) == 4 + 2


@pytest.mark.slow
@needs_browser
def test_a_narrow_screen_shows_all_without_scrolling_sideways(page, tmp_path):
    script = "document.title = `${document.documentElement.scrollWidth <= window.innerWidth}, ${window.innerWidth}`;"
    for width in (1200, 500):
        assert f"<title>true, {width}</title>" in in_browser(page, tmp_path, script=script, size=f"{width},900")
