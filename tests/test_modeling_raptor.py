"""The recurrence, the embeddings and the backbone against independent references."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf import RaptorBackbone, RaptorForImageClassification, RaptorModel
from raptor_hf.modeling_raptor import RaptorDropPath
from tests.support.minimal_student import reference_states
from tests.support.tiny_raptors import (
    ALL_CLASSES,
    HEADS,
    KINDS,
    PLANS,
    tiny_config,
    tiny_images,
    tiny_labels,
    tiny_model,
)


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
def test_states_are_those_of_the_papers_block(conditioning, ffn_type, plan_name):
    arguments, plan = PLANS[plan_name]
    model = tiny_model(RaptorModel, depth_conditioning=conditioning, ffn_type=ffn_type).double()
    images = tiny_images().double()
    with torch.no_grad():
        output = model(images, **arguments, output_hidden_states=True)
        states, _ = reference_states(model, images, plan)
        torch.testing.assert_close(list(output.hidden_states), states, rtol=1e-10, atol=1e-10)
        final = F.layer_norm(states[-1], (24,), model.layernorm.weight, model.layernorm.bias, 1e-6)
    torch.testing.assert_close(output.last_hidden_state, final, rtol=1e-10, atol=1e-10)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


@pytest.mark.parametrize("conditioning", ["none", "scale", "low_rank"])
def test_fragmented_blocks_run_in_the_order_of_the_schedule(conditioning):
    schedule = (0, 2, 0, 1, 2, 0)
    model = tiny_model(RaptorModel, depth_conditioning=conditioning, block_schedule=schedule).double()
    images = tiny_images().double()
    with torch.no_grad():
        output = model(images, output_hidden_states=True)
        states, _ = reference_states(model, images, [(block, layer) for layer, block in enumerate(schedule, start=1)])
    torch.testing.assert_close(list(output.hidden_states), states, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("ffn_type", ["mlp", "swiglu"])
def test_gains_of_units_are_columns_of_the_last_projections(ffn_type, is_training):
    options = {"depth_conditioning": "low_rank", "unit_gains": True, "ffn_type": ffn_type}
    # in training, with more tokens than features, they are multiplied into the weight
    model, images = tiny_model(RaptorModel, **options).double().train(is_training), tiny_images(4).double()
    assert model.encoder.conditioners[0].neurons_gain.shape == (3, 40)
    states, weights = reference_states(model, images, PLANS["trained"][1])
    output = model(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(list(output), states, rtol=1e-10, atol=1e-10)
    output[-1].square().sum().backward()
    states[-1].square().sum().backward()
    for name in ("heads_gain", "neurons_gain"):
        own = getattr(model.encoder.conditioners[0], name).grad
        expected = sum(step[f"conditioner.{name}"].grad for step in weights[:3])
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pace", ["slower", "faster"])
def test_gains_of_units_between_two_layers_are_mixed(pace):
    model = tiny_model(RaptorModel, depth_conditioning="low_rank", unit_gains=True).double()
    arguments, plan = PLANS[pace]
    images = tiny_images().double()
    with torch.no_grad():
        output = model(images, output_hidden_states=True, **arguments)
        states, _ = reference_states(model, images, plan)
    torch.testing.assert_close(list(output.hidden_states), states, rtol=1e-10, atol=1e-10)


def test_a_hook_sees_units_before_their_gain_in_training_too():
    model, seen = tiny_model(RaptorModel, depth_conditioning="low_rank", unit_gains=True).train(), []
    model.encoder.blocks[1].ffn.neurons.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    output = model(tiny_images(4)).last_hidden_state
    assert len(seen) == 1 and torch.equal(seen[0][1], model.encoder.conditioners[1].neurons_gain[0])
    torch.testing.assert_close(output, model.eval()(tiny_images(4)).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_projection_without_bias_has_none():
    model = tiny_model(RaptorModel, qkv_bias=False).double()
    assert model.encoder.blocks[0].attention.qkv.bias is None
    images = tiny_images().double()
    with torch.no_grad():
        states, _ = reference_states(model, images, PLANS["trained"][1])
        torch.testing.assert_close(list(model(images, output_hidden_states=True).hidden_states), states)


@pytest.mark.parametrize("arguments", [{}, {"num_steps": 4}, {"num_steps": 9}, {"block_repeats": (1, 2, 1)}])
def test_there_is_one_state_more_than_steps_and_one_attention_per_step(arguments):
    model = tiny_model(RaptorModel)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(tiny_images(), **arguments, output_hidden_states=True, output_attentions=True)
    num_steps = len(model.config.step_plan(**arguments))
    assert len(output.hidden_states) == num_steps + 1 and len(output.attentions) == num_steps
    for step, (block, _) in enumerate(model.config.step_plan(**arguments)):
        attention = model.encoder.blocks[block].attention
        reference = nn.MultiheadAttention(24, 3, batch_first=True)
        reference.in_proj_weight.data, reference.in_proj_bias.data = attention.qkv.weight, attention.qkv.bias
        tokens = model.encoder.blocks[block].norm1(output.hidden_states[step])
        weights = reference(tokens, tokens, tokens, average_attn_weights=False)[1]
        torch.testing.assert_close(output.attentions[step], weights, rtol=1e-4, atol=1e-6)


# of the trained plan, transformers selects, 5.17 without placeholders for the states that are left out
@pytest.mark.parametrize("arguments", [{"num_steps": 4}, {"num_steps": 9}, {"block_repeats": (1, 2, 1)}])
def test_selected_states_are_those_of_all_states(arguments):
    model = tiny_model(RaptorModel)
    with torch.no_grad():
        everything = model(tiny_images(), **arguments, output_hidden_states=True).hidden_states
        chosen = model(tiny_images(), **arguments, output_hidden_states=[0, 2, -1]).hidden_states
    kept = {0, 2, len(everything) - 1}
    for index, state in enumerate(everything):
        assert torch.equal(chosen[index], state) if index in kept else chosen[index] is None


@pytest.mark.parametrize("conditioning", ["embedding", "low_rank"])
def test_conditioning_is_neutral_at_the_start(conditioning):
    torch.manual_seed(0)
    model = RaptorModel(tiny_config(depth_conditioning=conditioning)).eval()
    plain = RaptorModel(tiny_config()).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        ours, theirs = (m(tiny_images(), output_hidden_states=True).hidden_states for m in (model, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_scale_starts_close_to_neutral():
    torch.manual_seed(0)
    model = RaptorModel(tiny_config(depth_conditioning="scale")).eval()
    gains = [gain for step in model.encoder.modulations(model.encoder.plan) for gain in step if gain is not None]
    assert len(gains) == 3 * 6
    assert all(((gain - 1).abs() < 0.02).all() and (gain != 1).any() for gain in gains)


@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
def test_gradient_of_a_block_is_the_sum_over_its_steps(conditioning, ffn_type):
    model = tiny_model(RaptorModel, depth_conditioning=conditioning, ffn_type=ffn_type).double()
    images, plan = tiny_images().double(), PLANS["trained"][1]
    direction = torch.randn(2, 19, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    encoded = model(images, output_hidden_states=True).hidden_states[-1]
    (encoded * direction).sum().backward()
    states, weights = reference_states(model, images, plan)
    (states[-1] * direction).sum().backward()
    parts = {"": model.encoder.blocks, "conditioner.": model.encoder.conditioners}
    for prefix, modules in parts.items():
        for block, module in enumerate(modules):
            own = [step for step, (owner, _) in zip(weights, plan, strict=True) if owner == block]
            for name, parameter in module.named_parameters():
                expected = torch.stack([step[prefix + name].grad for step in own]).sum(dim=0)
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
def test_every_parameter_gets_a_gradient(model_class, conditioning, ffn_type):
    model = tiny_model(model_class, depth_conditioning=conditioning, ffn_type=ffn_type).train()
    if model_class in HEADS:
        model(tiny_images(), labels=tiny_labels(model_class)).loss.backward()
    elif model_class is RaptorModel:
        (model(tiny_images()).last_hidden_state * torch.arange(24)).sum().backward()
    else:
        (model(tiny_images()).feature_maps[-1] * torch.arange(24)[:, None, None]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "embeddings frozen"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
def test_checkpointing_changes_neither_loss_nor_gradients(conditioning, ffn_type, use_reentrant, frozen):
    model = tiny_model(RaptorForImageClassification, depth_conditioning=conditioning, ffn_type=ffn_type).train()
    model.raptor.embeddings.requires_grad_(not frozen)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    losses = [m(tiny_images(), labels=torch.tensor([0, 3])).loss for m in (model, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, plain), again in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        assert (plain.grad is None) == (again.grad is None) == (not plain.requires_grad), name
        torch.testing.assert_close(again.grad, plain.grad, rtol=1e-5, atol=1e-7)


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop_path = RaptorDropPath(0.25)
    samples = drop_path(torch.ones(4000, 3, 2)).flatten(1)
    assert (samples == samples[:, :1]).all()
    assert samples.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert samples.mean().item() == pytest.approx(1, abs=0.03)
    assert (drop_path.eval()(torch.ones(50, 3, 2)) == 1).all()


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_attention_implementations_agree(model_class, implementation):
    model = tiny_model(model_class)
    outputs = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        with torch.no_grad():
            outputs.append(model(tiny_images(height=20), output_hidden_states=True).to_tuple())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("conditioning", ["none", "scale", "low_rank"])
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_half_precision_is_close_to_single(model_class, conditioning, dtype, tolerance):
    model = tiny_model(model_class, depth_conditioning=conditioning)
    with torch.no_grad():
        single = _main_output(model(tiny_images()))
        half = _main_output(model.to(dtype)(tiny_images()))
    assert half.dtype == dtype
    assert (half.float() - single).norm() < tolerance * single.norm()


def _main_output(output) -> torch.Tensor:
    first = output.to_tuple()[0]
    return first[-1] if isinstance(first, tuple) else first


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (12, 20), (32, 8), (64, 64), (28, 28), (4, 4), (4, 36)])
@pytest.mark.parametrize("family", ["dinov2_with_registers", "dinov2"])
def test_embeddings_equal_the_teachers_at_every_size(family, size):
    shape = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    registers = 2 if family == "dinov2_with_registers" else 0
    torch.manual_seed(0)
    if registers:
        teacher = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=registers))
    else:
        teacher = Dinov2Model(Dinov2Config(**shape))
    model = tiny_model(RaptorModel, embedding_type=family, num_register_tokens=registers)
    missing, unexpected = teacher.embeddings.load_state_dict(model.embeddings.state_dict(), strict=False)
    assert missing == ["mask_token"] and not unexpected
    images = tiny_images(height=size[0], width=size[1])
    with torch.no_grad():
        torch.testing.assert_close(model.embeddings(images), teacher.eval().embeddings(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_positions_are_interpolated_in_single(dtype):
    model = tiny_model(RaptorModel)
    model.embeddings.position_embeddings.data = model.embeddings.position_embeddings.to(dtype).float()
    single = model.embeddings.interpolate_pos_encoding(24, 12)
    assert torch.equal(model.to(dtype).embeddings.interpolate_pos_encoding(24, 12), single.to(dtype))


def test_images_are_cast_to_the_weights_type():
    model = tiny_model(RaptorModel)
    pixels = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(pixels).last_hidden_state, model(pixels.float()).last_hidden_state)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 1, 16, 16), r"pixel_values has shape \(2, 1, 16, 16\); it must be \(batch, 3, height, width\)"),
        ((3, 16, 16), r"pixel_values has shape \(3, 16, 16\)"),
        ((2, 3, 3, 16), "height 3; it must be a multiple of patch_size 4: at least 4"),
        ((2, 3, 16, 0), "width 0; .* at least 4"),
        ((2, 3, 18, 16), "height 18; it must be a multiple of patch_size 4: 16 or 20"),
        ((2, 3, 16, 31), "width 31; it must be a multiple of patch_size 4: 28 or 32"),
    ],
)
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_images_that_do_not_fit_are_refused(model_class, shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(model_class)(torch.zeros(shape))


def test_grey_images_work_if_the_model_is_for_them():
    model = tiny_model(RaptorForImageClassification, num_channels=1)
    assert model(torch.zeros(2, 1, 16, 16)).logits.shape == (2, 4)


# stage l is the last state whose depth index does not exceed l, looked up in PLANS
STAGES = {
    "trained": [0, 1, 2, 3, 4, 5, 6],
    "fewer steps": [0, 1, 2, 3, 4, 4, 4],
    "more steps": [0, 1, 2, 3, 4, 5, 8],
    "slower": [0, 2, 4, 6, 8, 8, 9],
    "faster": [0, 0, 0, 1, 2, 3, 5],
}


@pytest.mark.parametrize("name", STAGES)
def test_feature_maps_are_the_normalised_states_on_the_grid(name):
    arguments, _ = PLANS[name]
    stages = ["stem", *(f"stage{i}" for i in range(1, 7))]
    backbone = tiny_model(RaptorBackbone, out_features=stages)
    assert backbone.channels == [24] * 7 and backbone.out_features == stages
    with torch.no_grad():
        output = backbone(tiny_images(height=12, width=20), **arguments, output_hidden_states=True)
        for state, feature_map in zip(STAGES[name], output.feature_maps, strict=True):
            tokens = backbone.layernorm(output.hidden_states[state])
            assert feature_map.shape == (2, 24, 3, 5) and feature_map.is_contiguous()
            for row in range(3):
                for column in range(5):
                    # cls and two registers come before the patches
                    assert torch.equal(feature_map[:, :, row, column], tokens[:, 3 + 5 * row + column])


@pytest.mark.parametrize("out_features", [["stage6"], ["stem"], ["stage2", "stage5"], ["stem", "stage6"]])
def test_backbone_gives_the_stages_asked_for(out_features):
    everything = tiny_model(RaptorBackbone, out_indices=list(range(7)))
    backbone = tiny_model(RaptorBackbone, out_features=out_features)
    assert backbone.channels == [24] * len(out_features)
    with torch.no_grad():
        maps = dict(zip(everything.out_features, everything(tiny_images()).feature_maps, strict=True))
        output = backbone(tiny_images())
    assert output.hidden_states is None and output.attentions is None
    assert all(torch.equal(m, maps[s]) for m, s in zip(output.feature_maps, out_features, strict=True))


def test_backbone_without_norm_and_reshape_gives_the_states():
    backbone = tiny_model(RaptorBackbone, out_indices=[2, 6], apply_layernorm=False, reshape_hidden_states=False)
    with torch.no_grad():
        output = backbone(tiny_images(), output_hidden_states=True)
    assert torch.equal(output.feature_maps[0], output.hidden_states[2])
    assert torch.equal(output.feature_maps[1], output.hidden_states[6])


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_tuple_outputs_equal_the_named_ones(model_class):
    model = tiny_model(model_class)
    as_tuples = copy.deepcopy(model)
    as_tuples.config.return_dict = False
    with torch.no_grad():
        named = model(tiny_images(), output_hidden_states=True).to_tuple()
        for output in (
            model(tiny_images(), output_hidden_states=True, return_dict=False),
            as_tuples(tiny_images(), output_hidden_states=True),
        ):
            assert isinstance(output, tuple)
            torch.testing.assert_close(output, named, rtol=0, atol=0)
