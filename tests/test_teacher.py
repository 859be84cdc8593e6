"""Teachers against the hidden states, logits and layers of the models themselves, and costs against formulas."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitConfig, BitModel

from raptor_hf import RaptorConfig, RaptorForImageClassification, RaptorForSemanticSegmentation, RaptorModel
from raptor_hf.families import block_modules
from raptor_hf.modeling_raptor import RaptorBlock
from raptor_hf.teacher import Teacher, count_parameters, load_teacher, macs
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

STUDENT = {"hidden_size": DIM, "num_attention_heads": 3, "image_size": 28, "num_register_tokens": 2}


@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_trajectory_is_the_models_hidden_states(family, size):
    model = tiny_dinov2(family, num_labels=3)
    teacher = Teacher(model)
    states = teacher.trajectory(images(size))
    num_tokens = teacher.num_prefix_tokens + size[0] // 14 * (size[1] // 14)
    assert states.shape == (2, NUM_LAYERS + 1, num_tokens, DIM)
    assert torch.equal(states, hidden_states(model, images(size)))
    assert torch.equal(teacher.final_norm(states[:, -1]), teacher.model(images(size)).last_hidden_state)


@pytest.mark.parametrize(
    "fields",
    [
        {"block_repeats": (3, 1), "depth_conditioning": "scale"},
        {"block_repeats": (2, 2), "block_schedule": (0, 1, 0, 1), "depth_conditioning": "embedding"},
    ],
)
def test_trajectory_of_a_student_is_its_hidden_states(fields):
    model = randomize(RaptorForImageClassification(RaptorConfig(**STUDENT, **fields))).eval()
    teacher = Teacher(model)
    assert torch.equal(teacher.trajectory(images()), hidden_states(model, images()))
    assert (teacher.num_layers, teacher.num_registers, teacher.num_prefix_tokens) == (4, 2, 3)
    with pytest.raises(ValueError, match="'raptor'"):
        teacher.block_state_dict(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models(family):
    model = tiny_dinov2(family, num_labels=3)
    teacher = Teacher(model)
    logits = teacher.logits(teacher.trajectory(images())[:, -1])
    torch.testing.assert_close(logits, model(images()).logits)
    assert logits.std() > 0.1
    assert teacher.classifier_state_dict().keys() == {"weight", "bias"}


def test_logits_accept_states_of_another_precision():
    model = tiny_dinov2(num_labels=3)
    teacher = Teacher(model)
    states = teacher.trajectory(images())[:, -1]
    expected = teacher.logits(states)
    logits = Teacher(model.to(torch.bfloat16)).logits(states)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)


def test_a_model_without_a_classifier_has_no_logits():
    segmenter = RaptorForSemanticSegmentation(RaptorConfig(block_repeats=(4,), **STUDENT))
    for model in (tiny_dinov2(), tiny_dinov2(num_labels=0), segmenter):
        teacher = Teacher(model)
        assert teacher.logits(teacher.trajectory(images())[:, -1]) is None
        assert teacher.classifier_state_dict() is None


def test_teacher_stays_frozen_and_deterministic_inside_a_model_that_trains():
    model = tiny_dinov2(hidden_dropout_prob=0.5, drop_path_rate=0.5).train()
    teacher = Teacher(model)
    nn.ModuleList([teacher]).train()
    assert torch.equal(teacher.trajectory(images()), teacher.trajectory(images()))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_trajectory_can_enter_a_backward_pass():
    model = tiny_dinov2(num_labels=3)
    teacher = Teacher(model)
    states = teacher.trajectory(images())
    student = nn.Linear(DIM, DIM)
    nn.functional.mse_loss(student(states[:, 0]), states[:, 1]).backward()  # fails on inference tensors
    assert student.weight.grad.abs().sum() > 0
    guess = states[:, -1].clone().requires_grad_()
    teacher.logits(guess).sum().backward()
    assert guess.grad.abs().sum() > 0


STUDENTS = [
    {"block_repeats": (3, 1)},
    {"block_repeats": (3, 1), "depth_conditioning": "scale"},
    {"block_repeats": (2, 2), "block_schedule": (0, 1, 0, 1), "depth_conditioning": "embedding"},
    {"block_repeats": (3, 1), "depth_conditioning": "low_rank", "conditioning_rank": 2},
]


@pytest.mark.parametrize("make", [*FAMILIES, *STUDENTS], ids=str)
def test_embeddings_and_all_layers_give_the_trajectory_to_the_bit(make):
    if isinstance(make, str):
        teacher = Teacher(tiny_dinov2(make, num_labels=3))
    else:
        teacher = Teacher(randomize(RaptorModel(RaptorConfig(**STUDENT, **make))).eval())
    states = teacher.trajectory(images((28, 42)))
    assert torch.equal(teacher.embed(images((28, 42))), states[:, 0])
    assert torch.equal(teacher.run_layers(states[:, 0], [1, 2, 3, 4]), states)
    assert torch.equal(teacher.run_layers(states[:, 2], range(3, 5)), states[:, 2:])
    assert torch.equal(teacher.run_layers(states[:, 1], []), states[:, 1:2])


def test_a_layer_of_a_shallower_teacher_is_all_that_it_stands_for():
    model = tiny_dinov2()
    teacher = Teacher(model, layers=(1, 4))
    states = teacher.trajectory(images())
    assert torch.equal(teacher.run_layers(teacher.embed(images()), [1, 2]), states)
    assert torch.equal(states, Teacher(model).trajectory(images())[:, [0, 1, 4]])


def test_layers_run_in_the_order_asked_for():
    teacher = Teacher(tiny_dinov2())
    state = teacher.embed(images())
    once = teacher.run_layers(state, [3])[:, 1]
    twice = teacher.run_layers(once, [1])[:, 1]
    assert torch.equal(teacher.run_layers(state, [3, 1]), torch.stack([state, once, twice], 1))
    assert not torch.equal(teacher.run_layers(state, [1, 3])[:, 2], twice)
    with pytest.raises(IndexError, match=r"layers is \[1, 5\]; each must be in 1..4, and 5 is not"):
        teacher.run_layers(state, [1, 5])


@pytest.mark.parametrize("conditioning", ["none", "scale", "low_rank"])
def test_repeating_a_students_last_layer_is_running_it_for_more_steps(conditioning):
    config = RaptorConfig(**STUDENT, block_repeats=(3, 1), depth_conditioning=conditioning)
    model = randomize(RaptorModel(config)).eval()
    with torch.no_grad():
        expected = model(images(), num_steps=7, output_hidden_states=True).hidden_states
    teacher = Teacher(model)
    states = teacher.run_layers(teacher.embed(images()), [1, 2, 3, 4, 4, 4, 4])
    torch.testing.assert_close(states, torch.stack(expected, 1))


def test_trajectory_leaves_no_hooks_behind_even_when_it_fails():
    teacher = Teacher(tiny_dinov2())
    teacher.trajectory(images())
    with pytest.raises(ValueError, match="channel"):
        teacher.trajectory(torch.zeros(1, 4, 28, 28))
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_weights_compute_what_the_layer_computes(family, swiglu):
    teacher = Teacher(tiny_dinov2(family, use_swiglu_ffn=swiglu).double())
    block = RaptorBlock(RaptorConfig.from_teacher(teacher.config, (1,) * NUM_LAYERS)).double().eval()
    states = teacher.trajectory(images().double())
    for layer in range(1, NUM_LAYERS + 1):
        block.load_state_dict(teacher.block_state_dict(layer))
        output, _ = block(states[:, layer - 1])
        torch.testing.assert_close(output, states[:, layer], rtol=1e-9, atol=1e-9)


def test_block_weights_do_not_depend_on_the_names_of_the_transformers_version():
    class Tree(nn.Module):
        """Modules under dotted names."""

        def __init__(self, modules):
            super().__init__()
            for name, module in modules.items():
                head, *rest = name.split(".", 1)
                if not rest:
                    self.add_module(head, module)
                elif head not in self._modules:
                    inner = {n.split(".", 1)[1]: m for n, m in modules.items() if n.startswith(f"{head}.")}
                    self.add_module(head, Tree(inner))

    query, key, value, out = (nn.Linear(4, 4) for _ in range(4))
    gate, up, down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
    both = nn.Linear(4, 12)
    both.load_state_dict({n: torch.cat([t, up.state_dict()[n]]) for n, t in gate.state_dict().items()})
    rest = {name: nn.LayerNorm(4) for name in ("norm1", "norm2", "layer_scale1", "layer_scale2")}
    old = {"attention.attention.query": query, "attention.attention.key": key, "attention.attention.value": value}
    old |= {"attention.output.dense": out, "mlp.weights_in": both, "mlp.weights_out": down}
    new = {"attention.q_proj": query, "attention.k_proj": key, "attention.v_proj": value, "attention.o_proj": out}
    new |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down}
    weights = []
    for modules in (old, new):
        teacher = Teacher(tiny_dinov2())
        teacher.model.encoder.layer[1] = Tree(modules | rest)
        weights.append(teacher.block_state_dict(2))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(weights[0]["attention.qkv.weight"][4:8], key.weight)
    assert torch.equal(weights[0]["ffn.fc1.bias"][:6], gate.bias)
    with pytest.raises(RuntimeError, match="unknown version"):
        block_modules(nn.Linear(4, 4), {"norm1": [("norm1",)]})


def test_layer_numbers_start_at_1():
    teacher = Teacher(tiny_dinov2())
    for layer in (0, NUM_LAYERS + 1, -1):
        with pytest.raises(IndexError, match=f"layer is {layer}; it must be in 1..4"):
            teacher.block_state_dict(layer)


@pytest.mark.parametrize("num_labels", [None, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_teacher_is_the_saved_model(family, num_labels, tmp_path):
    model = tiny_dinov2(family, num_labels)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(teacher.trajectory(images()), hidden_states(model, images()), rtol=1e-4, atol=1e-4)
    assert (teacher.classifier is None) == (num_labels is None)
    assert (teacher.name, teacher.revision, teacher.family) == (str(tmp_path), None, family)
    assert (teacher.num_layers, teacher.hidden_size, teacher.num_heads) == (4, 24, 3)
    assert (teacher.patch_size, teacher.image_size, teacher.has_cls) == (14, 28, True)
    assert teacher.num_registers == (2 if family == "dinov2_with_registers" else 0)
    assert teacher.config._attn_implementation == "eager"


def test_loaded_student_is_the_saved_model(tmp_path):
    model = randomize(RaptorModel(RaptorConfig(block_repeats=(3, 1), **STUDENT))).eval()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert torch.equal(teacher.trajectory(images()), hidden_states(model, images()))


def test_precision_is_the_one_asked_for_or_that_of_autocast(tmp_path):
    model = tiny_dinov2()
    model.save_pretrained(tmp_path)
    assert load_teacher(tmp_path).trajectory(images()).dtype == torch.float32
    teacher = load_teacher(tmp_path, dtype=torch.bfloat16)
    states = teacher.trajectory(images())
    assert states.dtype == torch.bfloat16
    expected = hidden_states(model, images())
    assert 0 < (states.float() - expected).norm() / expected.norm() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        states = Teacher(model).trajectory(images())
        assert torch.equal(states, hidden_states(model, images()))
    assert not torch.equal(states, expected)


@pytest.mark.parametrize("name", ["missing/folder/of/mine", "./missing", "/missing"])
def test_a_path_where_nothing_is_says_so(name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' is no such folder, and no repository"):
        load_teacher(name)


def test_other_models_are_refused_by_name(tmp_path):
    model = BitModel(BitConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_groups=1))
    model.save_pretrained(tmp_path)
    for load in (lambda: load_teacher(tmp_path), lambda: Teacher(model)):
        with pytest.raises(ValueError, match="'bit' model; supported are dinov2, .*, raptor, clip, siglip"):
            load()
    with pytest.raises(TypeError, match="load_teacher"):
        Teacher("facebook/dinov2-base")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    model = tiny_dinov2()
    model.layernorm.bias.data[3] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NaN or infinite.*layernorm\.bias"):
        load_teacher(tmp_path)


def test_missing_weights_are_refused_but_for_the_mask_token(tmp_path):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    tiny_dinov2().save_pretrained(whole)
    weights = load_file(whole / "model.safetensors")
    del weights["embeddings.mask_token"]
    save_file(weights, whole / "model.safetensors", {"format": "pt"})
    load_teacher(whole)
    shutil.copytree(whole, damaged)
    del weights["layernorm.weight"]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights.*layernorm\.weight"):
        load_teacher(damaged)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_macs_are_those_of_the_formula(attention):
    model = tiny_dinov2(num_labels=5)
    model.set_attn_implementation(attention)
    patches = 3 * 2
    tokens = 1 + 2 + patches
    per_layer = tokens * DIM * (3 * DIM + DIM + 2 * 4 * DIM) + 2 * tokens * tokens * DIM
    expected = patches * DIM * 3 * 14 * 14 + NUM_LAYERS * per_layer + 2 * DIM * 5
    assert macs(model, images((42, 28), batch=3)) == expected
    assert macs(model.base_model, images((42, 28))) == expected - 2 * DIM * 5


def test_a_step_of_a_student_costs_what_a_layer_of_its_teacher_costs():
    teacher = tiny_dinov2()
    config = RaptorConfig.from_teacher(teacher.config, (3, 1))
    assert macs(RaptorModel(config), images()) == macs(teacher, images())
    swiglu = RaptorConfig.from_teacher(teacher.config, (3, 1), ffn_type="swiglu")
    assert macs(RaptorModel(swiglu), images()) - macs(teacher, images()) == NUM_LAYERS * 7 * DIM * 4 * DIM


def test_macs_of_compiled_blocks_are_those_of_the_model():
    model = RaptorModel(RaptorConfig(block_repeats=(3, 1), **STUDENT))
    expected = macs(model, images())
    for block in model.encoder.blocks:
        block.compile(backend="aot_eager")
    model(images())
    assert macs(model, images()) == expected


def test_macs_refuse_attention_that_cannot_be_counted():
    model = tiny_dinov2()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        macs(model, images())


def test_parameters_count_what_a_forward_pass_without_head_uses():
    model = tiny_dinov2(num_labels=3)
    layer = 4 * DIM + 4 * (DIM * DIM + DIM) + 2 * DIM + 2 * 4 * DIM * DIM + 5 * DIM
    embeddings = (3 * 14 * 14 + 1) * DIM + (1 + 4) * DIM + DIM + 2 * DIM
    assert Teacher(model).num_parameters == embeddings + 4 * layer + 2 * DIM
    student = RaptorForImageClassification(RaptorConfig.from_teacher(model.config, (3, 1)))
    assert count_parameters(student) == embeddings + 2 * layer + 2 * DIM


def test_a_teacher_of_some_layers_has_their_states():
    model, pixel_values = tiny_dinov2(), images()
    teacher = Teacher(model, layers=(2, 4))
    assert teacher.num_layers == teacher.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 4
    assert torch.equal(teacher.trajectory(pixel_values), hidden_states(model, pixel_values)[:, [0, 2, 4]])
    assert [list(teacher.span(layer)) for layer in (1, 2)] == [[1, 2], [3, 4]]
    assert [list(Teacher(model).span(layer)) for layer in (1, 4)] == [[1], [4]]


@pytest.mark.parametrize("layers", [(), (0, 1), (2, 1), (2, 2), (1, 5)])
def test_a_teacher_of_layers_that_there_are_not_is_refused(layers):
    with pytest.raises(ValueError, match="1..4, ascending"):
        Teacher(tiny_dinov2(), layers=layers)
