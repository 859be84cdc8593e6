"""A student as vision tower beside the teacher's text tower, against the model of both itself."""

import pytest
import torch
from transformers import AutoModel

from raptor_hf.conversion import student_from_teacher
from raptor_hf.two_towers import with_student
from tests.support.tiny_models import NUM_LAYERS, images, randomize
from tests.support.tiny_vits import TWO_TOWERS, own_inputs, tiny_vit, two_towers

UNTIED = (1,) * NUM_LAYERS
WORDS = torch.tensor([[1, 7, 9, 2], [1, 8, 8, 2]])


def pair(family):
    return randomize(AutoModel.from_config(two_towers(family))).eval()


def features(output):
    # transformers before 5.20 or so gives the features themselves
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("family", TWO_TOWERS)
def test_untied_student_gives_the_same_image_features_and_logits(family):
    model = pair(family)
    joined = with_student(model, student_from_teacher(model, UNTIED, init="first"))
    inputs = own_inputs(model, images((28, 42)))
    with torch.no_grad():
        if hasattr(model, "get_image_features") and family != "aimv2_vision_model":
            expected, got = (features(m.get_image_features(**inputs)) for m in (model, joined))
            assert expected.std() > 0.05
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        expected, got = (m(input_ids=WORDS, **inputs).logits_per_image for m in (model, joined))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TWO_TOWERS)
def test_a_tied_student_changes_image_features_alone_and_leaves_the_model(family):
    model = pair(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    joined = with_student(model, student_from_teacher(model, (2, 2), init="first"))
    inputs = own_inputs(model, images())
    with torch.no_grad():
        first, second = (m(input_ids=WORDS, **inputs) for m in (model, joined))
    assert torch.equal(first.text_embeds, second.text_embeds)
    assert not torch.allclose(first.image_embeds, second.image_embeds, atol=1e-3)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_students_of_other_towers_and_without_the_pooling_are_refused():
    model, student = pair("siglip_vision_model"), student_from_teacher(tiny_vit("vit"), UNTIED)
    with pytest.raises(ValueError, match="student is of a 'vit' model .* the tower of model is of 'siglip_vision"):
        with_student(model, student)
    with pytest.raises(ValueError, match="pooling_type of student is 'mean'; the tower's is 'attention_mlp'"):
        with_student(model, student_from_teacher(tiny_vit("siglip_vision_model", num_labels=2), UNTIED))
    with pytest.raises(ValueError, match="model is a ViTModel; it must be one of images and text: clip"):
        with_student(tiny_vit("vit"), student)


def test_patches_of_several_shapes_are_refused():
    model = pair("siglip2_vision_model")
    joined = with_student(model, student_from_teacher(model, (2, 2)))
    inputs = own_inputs(model, images())
    inputs["spatial_shapes"] = torch.tensor([[4, 4], [2, 8]])
    with pytest.raises(ValueError, match="a student's batch must be of one shape"):
        joined.get_image_features(**inputs)
