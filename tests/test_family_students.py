"""Students of teachers beside DINOv2 against these teachers, and what changes where there is no cls token."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
)

from raptor_hf import (
    RaptorBackbone,
    RaptorConfig,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
)
from raptor_hf.configuration_raptor import EMBEDDING_TYPES
from raptor_hf.conversion import load_meta_linear_head, student_from_teacher, to_dinov2, to_plain
from raptor_hf.families import FAMILIES, count_parameters
from raptor_hf.teacher import Teacher, load_teacher
from tests.support.tiny_models import DIM, NUM_LAYERS, images, randomize, tiny_dinov2
from tests.support.tiny_raptors import tiny_images, tiny_labels, tiny_model
from tests.support.tiny_vits import (
    STUDENTS,
    WITH_CLASSIFIER,
    own_hidden_states,
    own_inputs,
    tiny_vit,
    two_towers,
    vit_fields,
)

TEACHERS = STUDENTS
ACTIVATIONS = dict.fromkeys(TEACHERS, "gelu")
ACTIVATIONS |= dict.fromkeys(("clip_vision_model", "metaclip_2_vision_model"), "quick_gelu")
ACTIVATIONS |= dict.fromkeys(("siglip_vision_model", "siglip2_vision_model"), "gelu_pytorch_tanh")
ACTIVATIONS |= {"aimv2_vision_model": "silu"}
UNTIED = (1,) * NUM_LAYERS
SIGLIP = {"embedding_type": "siglip_vision_model", "num_register_tokens": 0}


def student_states(student, pixel_values):
    with torch.no_grad():
        return torch.stack(student(pixel_values, output_hidden_states=True).hidden_states, 1)


def test_every_family_whose_layers_make_blocks_has_students():
    assert {name for name, family in FAMILIES.items() if family.block_parts} == {*EMBEDDING_TYPES}
    assert {*TEACHERS} == {*EMBEDDING_TYPES} - {"dinov2", "dinov2_with_registers", "timm_wrapper"}


@pytest.mark.parametrize("size", [(28, 28), (42, 42), (28, 56), (35, 14)])
@pytest.mark.parametrize("family", TEACHERS)
def test_untied_student_is_the_teacher(family, size):
    model, pixels = tiny_vit(family), images(size)
    if family == "radio":
        pixels = pixels.sigmoid()  # it takes values from 0 to 1
    expected = own_hidden_states(model, pixels)
    student = student_from_teacher(model, UNTIED, init="first")
    assert student.config.hidden_act == ACTIVATIONS[family]
    states = student_states(student, pixels)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.5
    teacher = Teacher(model)
    with torch.no_grad():
        last = student(pixels).last_hidden_state
    torch.testing.assert_close(last, teacher.final_norm(expected[:, -1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", TEACHERS)
def test_in_double_precision_it_is_so_to_the_last_digits(family):
    if family in ("aimv2_vision_model", "mlcd_vision_model", "radio"):
        pytest.skip("its own norms, rotary positions or normalisation of images are always in single precision")
    student = student_from_teacher(tiny_vit(family), UNTIED, init="middle").double()
    states = student_states(student, images().double())
    torch.testing.assert_close(states, own_hidden_states(tiny_vit(family).double(), images().double()))


@pytest.mark.parametrize("family", TEACHERS)
def test_student_says_what_its_teacher_says_of_its_tokens(family):
    teacher = Teacher(tiny_vit(family))
    student = Teacher(student_from_teacher(teacher, (3, 1), init="first"))
    for fact in (
        "has_cls",
        "num_registers",
        "num_prefix_tokens",
        "patch_size",
        "image_size",
        "hidden_size",
        "num_heads",
    ):
        assert getattr(student, fact) == getattr(teacher, fact), fact
    state = student.embed(images())
    torch.testing.assert_close(state, teacher.embed(images()), rtol=1e-6, atol=2e-5 if family == "radio" else 1e-6)
    assert torch.equal(student.run_layers(state, [1, 2, 3, 4]), student.trajectory(images()))


@pytest.mark.parametrize("family", TEACHERS)
def test_untied_student_has_its_teachers_parameters_and_two_layer_scales_per_block(family):
    teacher = Teacher(tiny_vit(family))
    student = student_from_teacher(teacher, UNTIED)
    position = DIM if family == "deit" else 0  # that of the distillation token is part of it
    scales = 0 if "layer_scale1" in FAMILIES[family].block_parts else NUM_LAYERS * 2 * DIM
    bias = DIM if family == "radio" else 0  # its normalisation of images is part of the patches' projection
    assert count_parameters(student) == teacher.num_parameters + scales - position + bias


@pytest.mark.parametrize("family", WITH_CLASSIFIER)
def test_student_takes_over_the_classifier(family):
    model = tiny_vit(family, num_labels=5)
    expected = model(**own_inputs(model, images())).logits
    student = student_from_teacher(model, UNTIED, init="first")
    assert isinstance(student, RaptorForImageClassification)
    torch.testing.assert_close(student(images()).logits, expected, rtol=0, atol=1e-5)
    assert student.config.id2label == {i: f"thing {i}" for i in range(5)}
    again = Teacher(student)
    torch.testing.assert_close(again.logits(again.trajectory(images())[:, -1]), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="num_labels=3 does not fit"):
        student_from_teacher(model, UNTIED, num_labels=3)


def test_the_classifier_on_a_distillation_token_is_left_to_the_teacher():
    model = randomize(DeiTForImageClassificationWithTeacher(DeiTConfig(**vit_fields("deit"), num_labels=3))).eval()
    teacher = Teacher(model)
    assert teacher.classifier_state_dict() is None
    student = student_from_teacher(teacher, UNTIED, init="first")
    assert type(student) is RaptorModel
    logits = teacher.logits(student_states(student, images())[:, -1])
    torch.testing.assert_close(logits, model(images()).logits, rtol=0, atol=1e-4)


def test_student_of_two_towers_is_that_of_the_vision_tower():
    model = randomize(CLIPModel(two_towers("clip_vision_model"))).eval()
    student = student_from_teacher(model, UNTIED, init="first")
    expected = own_hidden_states(model.vision_model, images())
    torch.testing.assert_close(student_states(student, images()), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(student(images()).pooler_output, model.vision_model(images()).pooler_output, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("dinov3_vit", {"use_gated_mlp": True, "hidden_act": "silu", "key_bias": True}),
        ("aimv2_vision_model", {"is_native": False, "qkv_bias": True}),
        ("beit", {"use_absolute_position_embeddings": False, "use_mean_pooling": False, "layer_scale_init_value": 0.0}),
        ("tipsv2_vision_model", {"use_swiglu_ffn": True, "num_register_tokens": 0}),
        ("radio", {"num_cls_tokens": 1, "num_registers": 0, "summary_idxs": [0]}),
    ],
)
def test_other_kinds_of_a_familys_layers_and_embeddings_make_students_and_back(family, fields):
    model, pixels = tiny_vit(family, **fields), images().sigmoid()
    student = student_from_teacher(model, UNTIED, init="first")
    expected = own_hidden_states(model, pixels)
    torch.testing.assert_close(student_states(student, pixels), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(own_hidden_states(to_plain(student), pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("beit", {"use_relative_position_bias": True}, "use_relative_position_bias of teacher_config is True"),
        ("data2vec-vision", {"use_shared_relative_position_bias": True}, "use_shared_relative_position_bias of"),
        (
            "dinov3_vit",
            {"use_gated_mlp": True},
            "hidden_act of teacher_config is 'gelu'; for a block it must be",
        ),
    ],
)
def test_layers_that_no_block_can_be_are_refused_and_can_be_analysed(family, fields, message):
    model = tiny_vit(family, **fields)
    with pytest.raises(ValueError, match=message):
        student_from_teacher(model, UNTIED)
    states = Teacher(model).trajectory(images())
    assert torch.equal(states, own_hidden_states(model, images()))
    assert torch.equal(Teacher(model).run_layers(states[:, 1], [2])[:, 1], states[:, 2])


def test_layers_without_qkv_bias_make_blocks_without():
    model = tiny_vit("vit", qkv_bias=False)
    student = student_from_teacher(model, UNTIED, init="first")
    assert student.encoder.blocks[0].attention.qkv.bias is None
    expected = own_hidden_states(model, images())
    torch.testing.assert_close(student_states(student, images()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", TEACHERS)
def test_saved_student_loads_as_it_was(family, tmp_path):
    num_labels = 3 if family in WITH_CLASSIFIER else None
    student = student_from_teacher(tiny_vit(family, num_labels), (3, 1), init="first", depth_conditioning="low_rank")
    student.save_pretrained(tmp_path)
    auto_class = AutoModel if num_labels is None else AutoModelForImageClassification
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config.embedding_type == family
    assert torch.equal(student_states(loaded, images()), student_states(student, images()))
    assert torch.equal(load_teacher(tmp_path).trajectory(images()), student_states(student, images()))


@pytest.mark.parametrize("family", TEACHERS)
def test_new_embeddings_are_initialised_and_all_of_them_learn(family, tmp_path):
    config = RaptorConfig.from_teacher(tiny_vit(family).config, (3, 1), layerscale_value=1.0)
    RaptorModel(config).save_pretrained(tmp_path)
    model = RaptorForImageClassification.from_pretrained(tmp_path, num_labels=3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    norm = model.raptor.embeddings.norm
    assert (norm is not None) == ("clip" in family or family in ("mlcd_vision_model", "aimv2_vision_model"))
    assert norm is None or (norm.weight.eq(1).all() and (not hasattr(norm, "bias") or norm.bias.eq(0).all()))
    model(images(), labels=torch.tensor([0, 2])).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_without_cls_classification_reads_the_mean_patch():
    model = tiny_model(RaptorForImageClassification, **SIGLIP)
    with torch.no_grad():
        outputs, tokens = model(tiny_images()), model.raptor(tiny_images())
    assert tokens.last_hidden_state.shape == (2, 16, 24) and model.classifier.in_features == 24
    mean = tokens.last_hidden_state.mean(1)
    torch.testing.assert_close(tokens.pooler_output, mean)
    torch.testing.assert_close(outputs.logits, mean @ model.classifier.weight.T + model.classifier.bias)


def test_without_cls_depth_reads_the_mean_patch_in_its_place():
    model = tiny_model(RaptorForDepthEstimation, **SIGLIP)
    tokens = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(3))
    features = model.features(tokens)
    assert torch.equal(features[:, 1:], tokens)
    torch.testing.assert_close(features[:, 0], tokens.mean(1))
    assert model(tiny_images()).predicted_depth.shape == (2, 16, 16)


@pytest.mark.parametrize(
    "model_class", [RaptorForImageClassification, RaptorForSemanticSegmentation, RaptorForDepthEstimation]
)
def test_without_cls_every_head_learns(model_class):
    model = tiny_model(model_class, **SIGLIP).train()
    model(tiny_images(), labels=tiny_labels(model_class)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_without_cls_feature_maps_hold_all_tokens():
    model = tiny_model(RaptorBackbone, **SIGLIP)
    outputs = model(tiny_images(height=16, width=8), output_hidden_states=True)
    states = model.layernorm(outputs.hidden_states[-1])
    expected = states.transpose(1, 2).reshape(2, 24, 4, 2)
    torch.testing.assert_close(outputs.feature_maps[0], expected)


def test_a_linear_head_on_cls_and_mean_patch_reads_a_student_of_dinov3(tmp_path):
    teacher = Teacher(tiny_vit("dinov3_vit"))
    student_from_teacher(teacher, UNTIED, init="first").save_pretrained(tmp_path)
    student = RaptorForImageClassification.from_pretrained(tmp_path, num_labels=3)
    generator = torch.Generator().manual_seed(0)
    head = {"weight": torch.randn(3, 2 * DIM, generator=generator), "bias": torch.randn(3, generator=generator)}
    load_meta_linear_head(head, student)
    tokens = teacher(images((28, 42))).last_hidden_state
    features = torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1)
    expected = features @ head["weight"].T + head["bias"]
    torch.testing.assert_close(student(images((28, 42))).logits, expected, rtol=0, atol=1e-4)


def test_a_segmentation_head_is_no_classifier_of_the_student_without_cls():
    model = tiny_model(RaptorForSemanticSegmentation, **SIGLIP)
    assert model.classifier.in_features == model.config.hidden_size
    assert Teacher(model).classifier is None


def test_only_students_of_dinov2_become_dinov2():
    student = student_from_teacher(tiny_vit("vit"), (3, 1))
    with pytest.raises(ValueError, match="embedding_type is 'vit'; to become DINOv2"):
        to_dinov2(student)
    head = {"weight": torch.zeros(3, 2 * DIM), "bias": torch.zeros(3)}
    siglip = student_from_teacher(tiny_vit("siglip_vision_model", num_labels=3), (3, 1))
    with pytest.raises(ValueError, match="and a cls token"):
        load_meta_linear_head(head, siglip)
    load_meta_linear_head(head, student_from_teacher(tiny_vit("vit", num_labels=3), (3, 1)))


@pytest.mark.parametrize(
    ("family", "given", "needed"),
    [("vit", 4, 0), ("deit", 0, 1), ("clip_vision_model", 1, 0), ("siglip_vision_model", 1, 0), ("vit_mae", 2, 0)],
)
def test_registers_are_those_of_the_teachers_family(family, given, needed):
    with pytest.raises(
        StrictDataclassError, match=f"num_register_tokens is {given}; it must be {needed} for embedding_type"
    ):
        RaptorConfig(embedding_type=family, num_register_tokens=given)
    RaptorConfig(embedding_type=family, num_register_tokens=needed)


def test_students_of_dinov2_keep_their_parameters():
    student = student_from_teacher(tiny_dinov2(num_labels=3), (3, 1))
    embeddings = {name for name in student.state_dict() if ".embeddings." in name}
    names = ("cls_token", "register_tokens", "position_embeddings", "patch_embeddings.projection.weight")
    assert embeddings == {f"raptor.embeddings.{n}" for n in (*names, "patch_embeddings.projection.bias")}
    assert student.classifier.in_features == 2 * DIM
