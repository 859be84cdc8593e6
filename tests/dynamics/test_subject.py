"""What a report says first of its model: each sentence follows from a fact, and is not there without it."""

import pytest

from raptor_hf.dynamics.subject import cautions, describe_model
from raptor_hf.phases import Partition
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import tiny_dinov2

PHASES = Partition.from_boundaries([2], 4)
CAUTION = {
    "registers": "There are no registers",
    "size": "Positions are made for 28 px and interpolated: 16 patches in place of 4",
    "classifier": "There is no classifier",
    "classes": "The images have no labels of the classifier's classes",
    "unlabelled": "The images have no labels: nothing",
    "choice": "The phases [1-2][3-4] are a choice, for other searches find others (bisection: [1-3][4-4])",
}


def said(model, **changes):
    arguments = {"image_size": (28, 28), "has_labels": True, "knows_labels": True, "partition": PHASES, "others": {}}
    lines = cautions(model, **arguments | changes)
    assert lines[0].startswith("The paper's findings are of DINOv2 ViT-B/14")
    return {name for name, start in CAUTION.items() if any(line.startswith(start) for line in lines)}


@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("num_labels", [None, 3])
def test_cautions_are_those_of_the_model_s_facts(num_registers, num_labels):
    family = "dinov2_with_registers" if num_registers else "dinov2"
    model = Teacher(tiny_dinov2(family, num_labels))
    always = {"registers"} if num_registers == 0 else set()
    always |= {"classifier"} if num_labels is None else set()
    known = num_labels is not None
    assert said(model, knows_labels=known) == always
    assert said(model, image_size=(56, 56), knows_labels=known) == always | {"size"}
    assert said(model, has_labels=False, knows_labels=False) >= always | {"unlabelled"}
    if known:
        assert said(model, knows_labels=False) == always | {"classes"}
    others = {"bisection": Partition.from_boundaries([3], 4)}
    assert said(model, others=others, knows_labels=known) == always | {"choice"}


def test_a_model_is_described_by_its_configuration():
    model = Teacher(tiny_dinov2())
    assert describe_model("small", model, (28, 42)) == (
        f"small: a dinov2_with_registers model of 4 layers, {model.hidden_size} wide with {model.num_heads} heads, "
        f"a class token and 2 registers, patches of 14 px, {model.num_parameters / 1e6:.2f} M parameters; "
        "given images of 28 x 42 px."
    )
