"""Every place that raptor_hf/README.md lists for something new exists, and none was forgotten for what is there."""

import re
import typing
from pathlib import Path

import pytest
import raptor_settings.probe
import torch
from raptor_settings.command import RECIPES
from raptor_settings.distill import DistillSettings

import raptor_hf
from raptor_hf.configuration_raptor import AUTO_MAP, DEPTH_CONDITIONINGS, EMBEDDING_TYPES
from raptor_hf.conversion import NOT_IN_DINOV2, to_dinov2
from raptor_hf.distillation.task import LOSSES
from raptor_hf.families import FAMILIES
from raptor_hf.hub import heads, student_card
from raptor_hf.modeling_raptor import CONDITIONERS
from raptor_hf.probing import HEADS
from tests.support import tiny_raptors
from tests.support.tiny_raptors import tiny_images, tiny_model

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "raptor_hf" / "README.md").read_text(encoding="utf-8")
HEAD_CLASSES = {
    auto_class: getattr(raptor_hf, name.split(".")[-1])
    for auto_class, name in AUTO_MAP.items()
    if auto_class.startswith("AutoModelFor")
}


def test_places_of_the_guide_are_there():
    places = re.findall(r"`([\w./]+\.(?:py|toml)): ([\w.]+(?:-data)?)`", GUIDE)
    assert len(places) > 40
    for path, name in places:
        file = next((folder / path for folder in (ROOT / "raptor_hf", ROOT) if (folder / path).exists()), None)
        assert file is not None, path
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", file.read_text(encoding="utf-8")), f"{path}: {name}"


def test_links_and_files_of_the_guide_are_there():
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        assert (ROOT / "raptor_hf" / target).exists(), target


def test_the_rooms_of_the_guide_name_every_module():
    package = ROOT / "raptor_hf"
    rooms = GUIDE.split("## Rooms")[1].split("\n## ")[0]
    rows = dict(line.strip("| ").split(" | ", 1) for line in rooms.splitlines() if line.startswith("| "))
    wings = {f"`{folder.name}/`": folder for folder in package.iterdir() if (folder / "__init__.py").exists()}
    assert set(rows) == {"room", "front row", *wings}
    for room, folder in {"front row": package, **wings}.items():
        modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        assert set(re.findall(r"`(\w+\.py)`: ", rows[room])) == modules, room


def test_every_conditioning_is_in_every_place():
    settings = typing.get_type_hints(DistillSettings)["depth_conditioning"]
    assert set(DEPTH_CONDITIONINGS) == set(CONDITIONERS) == set(student_card._CONDITIONINGS)
    assert set(typing.get_args(settings)) == set(DEPTH_CONDITIONINGS)
    assert {conditioning for conditioning, _ in tiny_raptors.KINDS} == set(DEPTH_CONDITIONINGS)
    assert set(NOT_IN_DINOV2) < set(DEPTH_CONDITIONINGS)


@pytest.mark.parametrize("conditioning", sorted(set(DEPTH_CONDITIONINGS) - set(NOT_IN_DINOV2)))
def test_a_conditioning_that_dinov2_is_said_to_have_becomes_dinov2(conditioning):
    student = tiny_model(
        raptor_hf.RaptorModel,
        depth_conditioning=conditioning,
        intermediate_size=48,
        block_layer_norm_eps=1e-6,
        embedding_type="dinov2_with_registers",
    )
    with torch.no_grad():
        own = student(tiny_images()).last_hidden_state
        torch.testing.assert_close(to_dinov2(student)(tiny_images()).last_hidden_state, own, rtol=1e-4, atol=1e-4)


def test_every_loss_is_in_every_place():
    assert set(typing.get_args(typing.get_type_hints(DistillSettings)["loss"])) == set(LOSSES)


def test_every_family_that_can_be_distilled_has_embeddings():
    assert {name for name, family in FAMILIES.items() if family.block_parts} == set(EMBEDDING_TYPES)


def test_every_head_is_in_every_place():
    classes = set(HEAD_CLASSES.values())
    assert set(HEADS.values()) == set(heads.HEAD_FIELDS) == set(tiny_raptors.HEADS) == classes
    assert set(student_card.PIPELINE_TAGS) == classes | {raptor_hf.RaptorModel}
    assert {head.__name__ for head in classes} < set(raptor_hf.__all__)
    for head in classes:
        assert set(head._head_fields) & set(heads.HEAD_FIELDS[head])
    tasks = set(typing.get_args(raptor_settings.probe.Task))
    assert tasks == set(HEADS) == set(student_card._PROBE_TASKS)
    assert tasks == set(raptor_settings.probe.METRICS) == set(raptor_settings.probe.PUBLISHED)


def test_every_recipe_has_settings_and_a_section_of_the_guide():
    recipes = {path.stem for path in (ROOT / "training").glob("*.py")} - {"__init__", "raptor_minimal"}
    assert {script for script, _, _ in RECIPES.values()} <= recipes
    guide = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    for name in recipes:
        assert f"`{name}.py`" in guide, name
    packaged = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in (ROOT / "training" / "configs").iterdir():
        if folder.is_dir() and folder.name not in ("study", "results"):
            assert f'"configs/{folder.name}/*.yaml"' in packaged, folder.name
