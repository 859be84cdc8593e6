"""Students against the teachers they come from, and DINOv2 models against the students they come from."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from raptor_hf import (
    RaptorBackbone,
    RaptorConfig,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
)
from raptor_hf.conversion import load_meta_linear_head, student_from_teacher, to_dinov2
from raptor_hf.families import FAMILIES as TEACHERS
from raptor_hf.phases import Partition
from raptor_hf.teacher import Teacher, load_teacher
from tests.support.tiny_models import (
    DIM,
    FAMILIES,
    IMAGE_SIZES,
    NUM_LAYERS,
    hidden_states,
    images,
    randomize,
    tiny_dinov2,
)
from tests.support.tiny_vits import vit_fields

DATA = Path(os.environ.get("RAPTOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
UNTIED = (1,) * NUM_LAYERS


def assert_same_function(one, other, tolerance, sizes=IMAGE_SIZES):
    """All hidden states, and the last output, agree in float64, where only different weights can make a difference."""
    one, other = copy.deepcopy(one).double(), copy.deepcopy(other).double()
    for size in sizes:
        pixel_values = images(size).double()
        expected = hidden_states(other, pixel_values)
        assert expected.std() > 0.1
        torch.testing.assert_close(hidden_states(one, pixel_values), expected, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            torch.testing.assert_close(one(pixel_values)[0], other(pixel_values)[0], rtol=tolerance, atol=tolerance)


def tiny_student(num_labels: int | None = None, seed: int = 0, **fields):
    """A student with random weights, its conditioners included."""
    student = student_from_teacher(tiny_dinov2(num_labels=num_labels), (3, 1), **fields)
    return randomize(student, seed)


@pytest.mark.parametrize("num_labels", [None, 3])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_untied_student_is_the_teacher(family, swiglu, num_labels):
    teacher = tiny_dinov2(family, num_labels, use_swiglu_ffn=swiglu, qkv_bias=not swiglu)
    for init in ("first", "middle", "mean"):
        student = student_from_teacher(teacher, UNTIED, init=init)
        assert isinstance(student, RaptorModel if num_labels is None else RaptorForImageClassification)
        assert_same_function(student, teacher, 1e-9)
    if num_labels:
        assert student.config.id2label == {0: "thing 0", 1: "thing 1", 2: "thing 2"}


@pytest.mark.parametrize("conditioning", ["embedding", "low_rank"])
def test_conditioning_that_starts_neutral_keeps_the_untied_student_the_teacher(conditioning):
    teacher = tiny_dinov2()
    student = student_from_teacher(teacher, UNTIED, init="first", depth_conditioning=conditioning)
    assert_same_function(student, teacher, 1e-9, [(28, 56)])


def test_one_block_with_terms_of_full_rank_is_every_layer():
    # what the conditioning leaves alone is the same in all layers: the last projections of the branches, first biases
    model = tiny_dinov2()
    shared = ("o_proj.weight", "fc2.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias", "fc1.bias")
    shared += ("output.dense.weight", "query.bias", "key.bias", "value.bias")  # of earlier versions of transformers
    first, *others = Teacher(model).model.get_submodule(TEACHERS["dinov2_with_registers"].layers)
    for layer in others:
        for name, parameter in layer.named_parameters():
            if name.endswith(shared):
                parameter.data.copy_(first.get_parameter(name))
    options = {"depth_conditioning": "low_rank", "conditioning_rank": DIM, "branch_shifts": True}
    student = student_from_teacher(model, (NUM_LAYERS,), init="middle", **options)
    block, table = student.encoder.blocks[0].state_dict(), student.encoder.conditioners[0].state_dict()
    for layer in range(NUM_LAYERS):
        own = Teacher(copy.deepcopy(model)).block_state_dict(layer + 1)
        for name in ("attention.proj.weight", "ffn.fc2.weight", "attention.qkv.bias", "ffn.fc1.bias"):
            assert torch.equal(own[name], block[name])
        for term, name in (("qkv", "attention.qkv.weight"), ("ffn", "ffn.fc1.weight")):
            left, values, right = torch.linalg.svd(own[name] - block[name], full_matrices=False)
            table[f"{term}_up"][layer] = left * values
            table[f"{term}_down"][layer] = right
        for norm in ("norm1", "norm2"):
            table[f"{norm}_gain"][layer] = own[f"{norm}.weight"] / block[f"{norm}.weight"] - 1
            table[f"{norm}_shift"][layer] = own[f"{norm}.bias"] - block[f"{norm}.bias"]
        for branch, scale, bias in (
            ("attention", "layer_scale1", "attention.proj"),
            ("ffn", "layer_scale2", "ffn.fc2"),
        ):
            size = own[f"{scale}.lambda1"]
            table[f"{scale}_gain"][layer] = size / block[f"{scale}.lambda1"] - 1
            table[f"{branch}_shift"][layer] = size * (own[f"{bias}.bias"] - block[f"{bias}.bias"])
    assert_same_function(student, model, 1e-4)  # the factors are in float32


@pytest.mark.parametrize(
    "partition, layers",
    [
        ((3, 1), {"first": (1, 4), "middle": (2, 4)}),
        ((4,), {"first": (1,), "middle": (2,)}),
        (Partition(((1, 2), (3, 4))), {"first": (1, 3), "middle": (1, 3)}),
        (Partition(((1, 3, 4), (2,))), {"first": (1, 2), "middle": (3, 2)}),
    ],
)
def test_blocks_start_from_the_layers_they_stand_for(partition, layers):
    teacher = Teacher(tiny_dinov2())
    for init, chosen in layers.items():
        student = student_from_teacher(teacher, partition, init=init)
        for block, layer in zip(student.encoder.blocks, chosen, strict=True):
            expected = teacher.block_state_dict(layer)
            assert all(torch.equal(weight, expected[name]) for name, weight in block.state_dict().items())


def test_mean_blocks_average_the_layers_of_a_fragmented_partition():
    teacher = Teacher(tiny_dinov2())
    student = student_from_teacher(teacher, (3, 1), init="mean", block_schedule=(0, 1, 0, 0))
    for block, layers in zip(student.encoder.blocks, ((1, 3, 4), (2,)), strict=True):
        for name, weight in block.state_dict().items():
            expected = sum(teacher.block_state_dict(layer)[name] for layer in layers) / len(layers)
            torch.testing.assert_close(weight, expected)


def test_partition_gives_the_schedule_of_the_student():
    teacher = tiny_dinov2()
    contiguous = student_from_teacher(teacher, Partition.from_boundaries([3], 4)).config
    assert (contiguous.block_repeats, contiguous.block_schedule) == ((3, 1), None)
    fragmented = student_from_teacher(teacher, Partition(((1, 3), (2, 4)))).config
    assert fragmented.block_layers == ((1, 3), (2, 4))
    with pytest.raises(ValueError, match="leave block_schedule out"):
        student_from_teacher(teacher, Partition(((1, 3), (2, 4))), block_schedule=(0, 1, 0, 1))


def test_random_blocks_are_those_of_a_new_model():
    teacher = tiny_dinov2(num_labels=3)
    student = student_from_teacher(teacher, (3, 1), seed=5, depth_conditioning="scale")
    torch.manual_seed(5)
    new = RaptorForImageClassification(student.config)
    for name, weight in new.raptor.encoder.state_dict().items():
        assert torch.equal(student.raptor.encoder.state_dict()[name], weight), name
    copied = Teacher(teacher).embeddings_state_dict()
    assert all(torch.equal(student.raptor.embeddings.state_dict()[name], copied[name]) for name in copied)
    assert torch.equal(student.raptor.layernorm.weight, teacher.base_model.layernorm.weight)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert torch.equal(student.raptor.encoder.blocks[0].layer_scale1.lambda1, torch.full((DIM,), 1e-5))


def test_seed_decides_and_leaves_the_global_generator_alone():
    teacher = Teacher(tiny_dinov2())
    before = torch.get_rng_state()
    weights = [student_from_teacher(teacher, (3, 1), seed=seed).encoder.blocks[0].ffn.fc1.weight for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    student_from_teacher(teacher, (3, 1))
    assert not torch.equal(torch.get_rng_state(), before)


def test_student_shares_nothing_with_the_teacher_and_leaves_it_as_it_was():
    model = tiny_dinov2().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    randomize(student_from_teacher(model, UNTIED, init="first"), seed=9)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_student_of_a_half_precision_teacher_is_float32_and_can_train():
    student = student_from_teacher(tiny_dinov2().to(torch.bfloat16), (3, 1), init="mean")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not student.training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init": "last"}, "init is 'last'; it must be one of random, first, middle, mean"),
        ({"block_repeats": (3, 2)}, "sums to 5"),
        ({"hidden_size": 48}, "hidden_size=48 does not fit the teacher's weights, which need 24"),
        ({"num_register_tokens": 3}, "num_register_tokens=3"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05"),
        ({"num_labels": 7}, "num_labels=7 does not fit"),
        ({"init": "first", "ffn_type": "swiglu"}, "ffn_type='swiglu' .* need 'mlp'; init='first'"),
        ({"init": "mean", "intermediate_size": 64}, "intermediate_size=64 .* need 96"),
        ({"init": "middle", "num_attention_heads": 2}, "num_attention_heads=2 .* need 3"),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused(options, message):
    arguments = {"block_repeats": (3, 1)} | options
    with pytest.raises(ValueError, match=message):
        student_from_teacher(tiny_dinov2(num_labels=3), **arguments)


def test_random_blocks_may_differ_from_the_teachers():
    student = student_from_teacher(
        tiny_dinov2(), (3, 1), ffn_type="swiglu", intermediate_size=64, num_attention_heads=2, block_layer_norm_eps=1e-5
    )
    assert hidden_states(student, images()).isfinite().all()
    assert student.encoder.blocks[0].norm1.eps == 1e-5
    assert student_from_teacher(tiny_dinov2(), (3, 1)).encoder.blocks[0].norm1.eps == 1e-6


def test_pooling_keeps_the_teachers_heads_whatever_the_blocks_have():
    model = randomize(SiglipVisionModel(SiglipVisionConfig(**vit_fields("siglip_vision_model")))).eval()
    teacher, pixel_values = Teacher(model), images((28, 28))
    assert teacher.hidden_size == 8 * teacher.num_heads
    size = {"num_attention_heads": teacher.num_heads + 2, "head_dim": 8}
    student = student_from_teacher(model, UNTIED, **size).eval()
    with torch.no_grad():
        pooled = student.pooling(student.layernorm(teacher.trajectory(pixel_values)[:, -1]))
        torch.testing.assert_close(pooled, model(pixel_values).pooler_output, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match="num_attention_heads=6, of head_dim=4 does not fit the teacher's weights, which need 8$"
    ):
        student_from_teacher(model, (3, 1), num_attention_heads=6)


@pytest.mark.parametrize("num_labels", [None, 3])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dinov2_to_student_and_back_is_the_same_weights(family, swiglu, num_labels):
    teacher = tiny_dinov2(family, num_labels, use_swiglu_ffn=swiglu, layerscale_value=0.5)
    back = to_dinov2(student_from_teacher(teacher, UNTIED, init="first", layerscale_value=0.5))
    assert type(back) is type(teacher)
    assert back.config.to_dict() | {"dtype": None} == teacher.config.to_dict() | {"dtype": None}
    for name, weight in teacher.state_dict().items():
        expected = torch.zeros_like(weight) if name.endswith("mask_token") else weight
        assert torch.equal(back.state_dict()[name], expected), name


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5])
def test_swiglu_widths_that_dinov2_rounds_up_survive_unrolling(ratio):
    teacher = tiny_dinov2(use_swiglu_ffn=True, mlp_ratio=ratio, hidden_size=20, num_attention_heads=2)
    student = student_from_teacher(teacher, UNTIED, init="first", layerscale_value=1)
    assert to_dinov2(student).config.mlp_ratio == ratio


@pytest.mark.parametrize("conditioning", ["none", "low_rank"])
@pytest.mark.parametrize("ffn", [{}, {"ffn_type": "swiglu"}, {"intermediate_size": 2 * DIM}])
def test_unrolled_student_is_the_student(conditioning, ffn):
    student = tiny_student(3, depth_conditioning=conditioning, conditioning_rank=2, block_schedule=(0, 1, 0, 0), **ffn)
    unrolled = to_dinov2(student)
    assert_same_function(unrolled, student, 1e-5)
    assert unrolled.config.id2label == student.config.id2label
    assert all(parameter.requires_grad for parameter in unrolled.parameters()) and not unrolled.training
    layers = [Teacher(unrolled).block_state_dict(layer) for layer in (1, 3)]
    same = [torch.equal(layers[0][name], layers[1][name]) for name in layers[0]]
    assert all(same) if conditioning == "none" else not all(same)


def test_unrolling_leaves_the_student_as_it_was():
    student = tiny_student(depth_conditioning="low_rank")
    before = copy.deepcopy(student.state_dict())
    randomize(to_dinov2(student), seed=9)
    for name, weight in student.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, before[name])


def test_unrolled_student_keeps_its_precision():
    student = tiny_student(depth_conditioning="low_rank").double()
    unrolled = to_dinov2(student)
    assert unrolled.dtype == student.dtype == torch.float64
    states = hidden_states(unrolled, images().double())
    torch.testing.assert_close(states, hidden_states(student, images().double()), rtol=1e-9, atol=1e-9)
    assert to_dinov2(student.to(torch.bfloat16)).dtype == torch.bfloat16


def test_unrolled_student_without_registers_is_the_student():
    student = randomize(student_from_teacher(tiny_dinov2(num_register_tokens=0), (2, 2)))
    assert_same_function(to_dinov2(student), student, 1e-9, [(28, 56)])


def test_unrolled_student_loads_where_this_package_is_unknown(tmp_path):
    student = tiny_student(3, depth_conditioning="low_rank")
    to_dinov2(student).save_pretrained(tmp_path)
    save_file({"images": images()}, tmp_path / "images.safetensors")
    code = """
import sys
import safetensors.torch, transformers
images = safetensors.torch.load_file("images.safetensors")["images"]
states = transformers.AutoModel.from_pretrained(".")(images, output_hidden_states=True).hidden_states
logits = transformers.AutoModelForImageClassification.from_pretrained(".")(images).logits
assert not any(name.startswith("raptor") for name in sys.modules)
outputs = {"logits": logits.detach()} | {str(i): state.detach() for i, state in enumerate(states)}
safetensors.torch.save_file(outputs, "outputs.safetensors")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    outputs = load_file(tmp_path / "outputs.safetensors")
    torch.testing.assert_close(outputs["logits"], student(images()).logits.detach(), rtol=1e-4, atol=1e-4)
    for index, state in enumerate(hidden_states(student, images()).unbind(1)):
        torch.testing.assert_close(outputs[str(index)], state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"depth_conditioning": "scale"}, "'scale' cannot become DINOv2: it scales the tokens"),
        ({"depth_conditioning": "embedding"}, "'embedding' cannot become DINOv2: it adds a vector"),
        ({"block_layer_norm_eps": 1e-5}, "block_layer_norm_eps=1e-05 differs from layer_norm_eps=1e-06"),
        (
            {"num_attention_heads": 4, "head_dim": 8},
            "num_attention_heads=4, of head_dim=8, cannot become DINOv2, .* hidden_size=24",
        ),
        ({"intermediate_size": 40}, r"intermediate_size=40 .* nearest that are: \[24, 48\]"),
        ({"intermediate_size": 40, "ffn_type": "swiglu"}, r"intermediate_size=40 .* nearest that are: \[16, 32, 48\]"),
    ],
)
def test_students_that_dinov2_cannot_express_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        to_dinov2(student_from_teacher(tiny_dinov2(), (3, 1), **fields))


@pytest.mark.parametrize(
    "model_class", [RaptorBackbone, RaptorForSemanticSegmentation, RaptorForDepthEstimation], ids=lambda c: c.__name__
)
def test_students_with_other_heads_are_not_stripped_of_them_silently(model_class):
    config = RaptorConfig(block_repeats=(1,), hidden_size=24, num_attention_heads=3, image_size=28)
    with pytest.raises(ValueError, match=model_class.__name__):
        to_dinov2(model_class(config))


@pytest.mark.parametrize("family", [*FAMILIES, "raptor"])
def test_meta_head_classifies_cls_and_mean_patch_of_the_normalised_tokens(family, tmp_path):
    if family == "raptor":
        model = tiny_student(5)
    else:
        model = tiny_dinov2(family, num_labels=5)
    generator = torch.Generator().manual_seed(3)
    head = {"weight": torch.randn(5, 2 * DIM, generator=generator), "bias": torch.randn(5, generator=generator)}
    torch.save(head, tmp_path / "head.pth")
    load_meta_linear_head(tmp_path / "head.pth", model)
    tokens = model.base_model(images((42, 28))).last_hidden_state
    features = torch.cat([tokens[:, 0], tokens[:, -6:].mean(1)], 1)
    expected = features @ head["weight"].T + head["bias"]
    torch.testing.assert_close(model(images((42, 28))).logits, expected, rtol=1e-4, atol=1e-4)


def test_metas_own_head_file_loads_and_survives_distillation_and_unrolling(tmp_path):
    path = DATA / "dinov2_vits14_reg4_linear_head.pth"
    if not path.exists():
        pytest.skip(f"{path} is not there; set RAPTOR_DATA to the folder that has it")
    teacher = tiny_dinov2(num_labels=1000, hidden_size=384, num_attention_heads=6, num_hidden_layers=2)
    load_meta_linear_head(path, teacher)
    teacher.save_pretrained(tmp_path)
    unrolled = to_dinov2(student_from_teacher(load_teacher(tmp_path), (2,)))
    weights = torch.load(path, weights_only=True)
    assert torch.equal(unrolled.classifier.weight, weights["weight"])
    assert torch.equal(unrolled.classifier.bias, weights["bias"])


@pytest.mark.parametrize(
    "width, num_classes, message",
    [
        (5 * DIM, 5, "takes the cls tokens of 4 layers"),
        (DIM, 5, r"weight is \(5, 24\); .* needs \(5, 48\)"),
        (2 * DIM, 7, r"weight is \(7, 48\); a model with num_labels=5"),
    ],
)
def test_heads_that_do_not_fit_are_refused(width, num_classes, message):
    head = {"weight": torch.zeros(num_classes, width), "bias": torch.zeros(num_classes)}
    with pytest.raises(ValueError, match=message):
        load_meta_linear_head(head, tiny_dinov2(num_labels=5))


def test_what_is_no_linear_head_is_refused():
    head = {"weight": torch.zeros(5, 2 * DIM), "bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"\['bias', 'scale', 'weight'\]"):
        load_meta_linear_head(head | {"scale": torch.zeros(5)}, tiny_dinov2(num_labels=5))
    with pytest.raises(ValueError, match="Dinov2WithRegistersModel"):
        load_meta_linear_head(head, tiny_dinov2())
    with pytest.raises(ValueError, match="num_labels=0"):
        load_meta_linear_head(head, tiny_dinov2(num_labels=0))


def test_blocks_of_a_shallower_student_start_from_the_middle_of_what_they_stand_for():
    model = tiny_dinov2()
    student = student_from_teacher(Teacher(model, layers=(3, 4)), (1, 1), init="middle")
    whole = Teacher(model)
    for block, layer in zip(student.encoder.blocks, (2, 4), strict=True):
        expected = whole.block_state_dict(layer)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in block.state_dict().items())
