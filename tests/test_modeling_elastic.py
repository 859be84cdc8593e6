"""One model at many depths: steps of another size against longer branches, by hand and in the limit of small steps."""

import itertools
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from raptor_hf import RaptorBackbone, RaptorForImageClassification, RaptorModel
from raptor_hf.configuration_raptor import EXIT_CRITERIA
from raptor_hf.conversion import to_dinov2
from tests.support.minimal_student import reference_step, step_weights
from tests.support.tiny_raptors import ALL_CLASSES, HEADS, KINDS, tiny_config, tiny_images, tiny_labels, tiny_model

# (block, depth index, size) of every step, worked out by hand for the blocks of 3, 1 and 2 layers of tiny_config:
# the depth index is the mean of the layers, or parts of layers, that a step stands for
PACES = {
    "a step per block": ({"num_steps": 3}, [(0, 2, 3), (1, 4, 1), (2, 5.5, 2)]),
    "two for the longest": ({"num_steps": 4}, [(0, 1.25, 1.5), (0, 2.75, 1.5), (1, 4, 1), (2, 5.5, 2)]),
    "half steps": (
        {"num_steps": 12},
        [(block, 0.75 + i / 2, 0.5) for i, block in enumerate((0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2))],
    ),
    "uneven": (
        {"block_repeats": (2, 2, 1)},
        [(0, 1.25, 1.5), (0, 2.75, 1.5), (1, 3.75, 0.5), (1, 4.25, 0.5), (2, 5.5, 2)],
    ),
}


def elastic(model_class: type = RaptorModel, **fields: Any) -> nn.Module:
    return tiny_model(model_class, step_scaling=True, **fields)


def resized(weights: dict[str, torch.Tensor], size: float) -> dict[str, torch.Tensor]:
    """Weights of a block with which one step adds `size` times as much to the tokens."""
    longer = {name: w * size if "lambda1" in name or "depth_embeddings" in name else w for name, w in weights.items()}
    if "conditioner.fc2.bias" in weights:
        # the gains are S = W z + b + 1; of the branches they become S size, of the output 1 + (S - 1) size
        dim = len(weights["norm1.weight"])
        longer |= {name: weights[name] for name in ("layer_scale1.lambda1", "layer_scale2.lambda1")}
        longer["conditioner.fc2.weight"] = weights["conditioner.fc2.weight"] * size
        branches = torch.arange(3 * dim) < 2 * dim
        bias = weights["conditioner.fc2.bias"]
        longer["conditioner.fc2.bias"] = torch.where(branches, (bias + 1) * size - 1, bias * size)
    return longer


@pytest.mark.parametrize("arguments", [{}, {"num_steps": 6}, {"block_repeats": (3, 1, 2)}], ids=str)
@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
def test_at_the_trained_pace_step_scaling_changes_no_bit(conditioning, ffn_type, arguments):
    kind = {"depth_conditioning": conditioning, "ffn_type": ffn_type}
    with torch.no_grad():
        states = [
            tiny_model(RaptorModel, step_scaling=scaling, **kind)(tiny_images(), **given, output_hidden_states=True)
            for scaling, given in ((False, {}), (True, arguments))
        ]
    assert all(torch.equal(a, b) for a, b in zip(*(output.hidden_states for output in states), strict=True))


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
def test_states_are_those_of_a_block_with_longer_branches(conditioning, ffn_type, pace):
    arguments, plan = PACES[pace]
    model = elastic(depth_conditioning=conditioning, ffn_type=ffn_type).double()
    images = tiny_images().double()
    with torch.no_grad():
        output = model(images, **arguments, output_hidden_states=True)
        states = [model.embeddings(images)]
        for block, depth, size in plan:
            weights = resized(step_weights(model, block), size)
            states.append(reference_step(states[-1], weights, depth, model.config.block_layers[block], model.config))
    torch.testing.assert_close(list(output.hidden_states), states, rtol=1e-7, atol=1e-7)


def test_smaller_steps_converge_as_an_integrator_of_first_order_does():
    model = elastic(layerscale_value=0.1).double()
    images = tiny_images().double()
    with torch.no_grad():
        ends = [model(images, num_steps=6 * 2**i).last_hidden_state for i in range(6)]
    errors = [(end - ends[-1]).norm() for end in ends[:4]]
    # against a reference that is itself h / 32 away, the error falls by a half and a little more
    for coarse, fine in itertools.pairwise(errors):
        assert 0.35 < fine / coarse < 0.55


def test_branch_shifts_grow_with_the_step():
    model = elastic(depth_conditioning="low_rank", branch_shifts=True).double()
    (coarse,) = (m for m in model.encoder.modulations(((0, 3.0),)))
    entry = model.encoder.conditioners[0]
    torch.testing.assert_close(coarse.attention_shift, 3 * entry.attention_shift[1])
    torch.testing.assert_close(coarse.ffn_shift, 3 * entry.ffn_shift[1])


@pytest.mark.parametrize("block_repeats", [(3, 1, 2), (7, 3, 2), (1, 1), (2, 3, 7)])
def test_steps_are_spread_so_that_the_longest_is_as_short_as_can_be(block_repeats):
    config = tiny_config(block_repeats=block_repeats)
    assert config.spread_steps(sum(block_repeats)) == block_repeats
    assert config.spread_steps(2 * sum(block_repeats)) == tuple(2 * repeats for repeats in block_repeats)
    for num_steps in range(len(block_repeats), 16):
        steps = config.spread_steps(num_steps)
        splits = itertools.product(range(1, num_steps + 1), repeat=len(block_repeats))
        longest = [
            max(r / s for r, s in zip(block_repeats, split, strict=True)) for split in splits if sum(split) == num_steps
        ]
        assert sum(steps) == num_steps and min(steps) >= 1
        assert max(r / s for r, s in zip(block_repeats, steps, strict=True)) == min(longest)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_steps": 2}, "num_steps is 2; it must be an integer from 3"),
        ({"num_steps": 4.0}, "num_steps is 4.0"),
        ({"num_steps": 10**9}, "num_steps is 1000000000"),
        ({"num_steps": 4, "block_repeats": (1, 1, 1)}, r"num_steps is 4 and block_repeats is \(1, 1, 1\)"),
    ],
)
def test_impossible_pace_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        elastic()(tiny_images(), **arguments)


def test_fragmented_blocks_have_no_pace():
    with pytest.raises((ValueError, StrictDataclassError), match="step_scaling is True"):
        tiny_config(block_schedule=(0, 2, 0, 1, 2, 0), step_scaling=True)


@pytest.mark.parametrize("arguments", [{}, *(arguments for arguments, _ in PACES.values())], ids=str)
@pytest.mark.parametrize("model_class", [RaptorModel, *HEADS])
def test_output_says_which_depth_each_state_stands_for(model_class, arguments):
    model = elastic(model_class)
    with torch.no_grad():
        output = model(tiny_images(), **arguments, output_hidden_states=True)
        assert "depths" not in model(tiny_images(), **arguments)
    ends = [depth for _, depth in model.config.step_plan(**arguments)]
    assert output.depths.tolist() == pytest.approx([0, *ends]) and len(output.hidden_states) == len(output.depths)
    assert ends[-1] == model.config.num_hidden_layers


@pytest.mark.parametrize("conditioning, ffn_type", KINDS)
def test_every_parameter_trains_at_another_pace_and_checkpointing_changes_nothing(conditioning, ffn_type):
    gradients = []
    for checkpointing in (False, True):
        model = elastic(RaptorForImageClassification, depth_conditioning=conditioning, ffn_type=ffn_type).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tiny_images(), labels=tiny_labels(RaptorForImageClassification), num_steps=4).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("conditioning", ["none", "scale", "low_rank"])
def test_half_precision_is_close_to_single_at_another_pace(conditioning, dtype, tolerance):
    model = elastic(depth_conditioning=conditioning)
    with torch.no_grad():
        expected = model(tiny_images(), num_steps=4).last_hidden_state
        actual = model.to(dtype)(tiny_images().to(dtype), num_steps=4).last_hidden_state
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_graph_and_export_at_another_pace_equal_eager(model_class):
    model = elastic(model_class, depth_conditioning="low_rank", block_repeats=(2, 1))
    images = tiny_images()
    with torch.no_grad():
        expected = model(images, num_steps=5)[0]
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images, num_steps=5)[0]
        program = torch.export.export(model, (), {"pixel_values": images, "num_steps": 5})
        exported = program.module()(pixel_values=images, num_steps=5)[0]
    torch.compiler.reset()
    torch.testing.assert_close([compiled, exported], [expected, expected])


def test_last_feature_map_is_the_final_state_at_every_pace():
    backbone = elastic(RaptorBackbone, out_features=["stage4", "stage6"], reshape_hidden_states=False)
    for num_steps in (3, 4, 6, 9):
        with torch.no_grad():
            output = backbone(tiny_images(), num_steps=num_steps, output_hidden_states=True)
        assert torch.equal(output.feature_maps[1], backbone.layernorm(output.hidden_states[-1]))
        at_layer_4 = [depth for _, depth in backbone.config.step_plan(num_steps)].index(4) + 1
        assert torch.equal(output.feature_maps[0], backbone.layernorm(output.hidden_states[at_layer_4]))


@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("conditioning", ["none", "low_rank"])
def test_unrolled_at_another_pace_it_is_plain_dinov2(conditioning, shifts):
    model = elastic(
        depth_conditioning=conditioning,
        branch_shifts=shifts,
        intermediate_size=48,
        block_layer_norm_eps=1e-6,
        image_size=16,
    ).double()
    images = tiny_images().double()
    for num_steps in (3, 8):
        plain = to_dinov2(model, num_steps=num_steps)
        assert plain.config.num_hidden_layers == num_steps
        with torch.no_grad():
            expected = model(images, num_steps=num_steps).last_hidden_state
            torch.testing.assert_close(plain(images).last_hidden_state, expected, rtol=1e-7, atol=1e-7)


def measured_by_hand(model, states: list[torch.Tensor], ends: list[float], criterion: str) -> list[torch.Tensor]:
    """What every step of one image did, written out token by token."""
    values, speeds = [], []
    for before, after, start, end in zip(states, states[1:], ends, ends[1:], strict=False):
        speeds.append((after - before).flatten() / (end - start))
        size = after.flatten().square().sum().sqrt()
        if criterion == "step_size":
            values.append(speeds[-1].square().sum().sqrt() / size)
        elif criterion == "second_difference":
            bend = (speeds[-1] - speeds[-2]).square().sum().sqrt() / size if len(speeds) > 1 else torch.tensor(9e9)
            values.append(bend)
        else:
            tokens = model.raptor.layernorm(after)
            features = torch.cat((tokens[:, 0], tokens[:, 3:].mean(1)), 1)  # cls, and the patches after two registers
            first, second = model.classifier(features).softmax(1)[0].sort(descending=True).values[:2]
            values.append(first - second)
    return values


def steps_by_hand(values: list[torch.Tensor], criterion: str, threshold: float) -> int:
    calm = [value >= threshold if criterion == "head_margin" else value <= threshold for value in values]
    for step, is_calm in enumerate(calm, start=1):
        if is_calm and (criterion != "second_difference" or (step > 1 and calm[step - 2])):
            return step
    return len(values)


@pytest.mark.parametrize("arguments", [{}, {"num_steps": 10}], ids=str)
@pytest.mark.parametrize("criterion", EXIT_CRITERIA)
def test_each_image_stops_where_it_has_settled_and_gives_what_it_gave_there(criterion, arguments):
    model = elastic(RaptorForImageClassification, depth_conditioning="low_rank").double()
    images = tiny_images(12).double()
    with torch.no_grad():
        rolled = model(images, **arguments, output_hidden_states=True)
        states = [[state[index : index + 1] for state in rolled.hidden_states] for index in range(12)]
        values = [measured_by_hand(model, own, rolled.depths.tolist(), criterion) for own in states]
        # half of the images can stop as soon as any can
        first = [max(own[1:3]) if criterion == "second_difference" else own[0] for own in values]
        threshold = (sum(sorted(first)[5:7]) / 2).item()
        output = model(images, **arguments, exit_criterion=criterion, exit_threshold=threshold)
        for index, own in enumerate(states):
            step = steps_by_hand(values[index], criterion, threshold)
            assert output.num_steps[index] == step
            torch.testing.assert_close(output.logits[index], model.classify(own[step])[0], rtol=1e-8, atol=1e-8)
    assert len(output.num_steps.unique()) > 1  # else nothing was told apart


def test_images_that_have_finished_leave_the_batch():
    model = elastic(RaptorForImageClassification)
    batches = []
    for block in model.raptor.encoder.blocks:
        block.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    with torch.no_grad():
        steps = model(tiny_images(12), exit_criterion="head_margin", exit_threshold=0.2).num_steps
    assert batches == [count for count in ((steps > done).sum().item() for done in range(6)) if count]
    assert len(set(batches)) > 1


def test_criterion_that_is_never_or_always_met_gives_all_steps_or_one():
    model = elastic(RaptorForImageClassification)
    with torch.no_grad():
        never = model(tiny_images(), exit_criterion="step_size", exit_threshold=0)
        always = model(tiny_images(), exit_criterion="head_margin", exit_threshold=0)
        assert torch.equal(never.logits, model(tiny_images()).logits) and never.num_steps.tolist() == [6, 6]
    assert always.num_steps.tolist() == [1, 1]


@pytest.mark.parametrize("model_class", [RaptorModel, *HEADS])
def test_every_head_stops_early(model_class):
    model = tiny_model(model_class)  # no need to be elastic
    with torch.no_grad():
        output = model(tiny_images(5), exit_criterion="step_size", exit_threshold=0.4)
        alone = model(tiny_images(5)[2:3], exit_criterion="step_size", exit_threshold=0.4)
    assert output.num_steps.min() < 6 and alone.num_steps[0] == output.num_steps[2]
    torch.testing.assert_close(alone[0][0], output[0][2])


@pytest.mark.parametrize(
    "model_class, arguments, message",
    [
        (RaptorModel, {"exit_criterion": "entropy"}, "exit_criterion is 'entropy'; it must be one of step_size"),
        (RaptorModel, {"exit_criterion": "step_size"}, "exit_thresholds in the configuration has none for 'step_size'"),
        (RaptorModel, {"exit_threshold": 0.1}, "exit_threshold is 0.1, but exit_criterion is None"),
        (RaptorModel, {"exit_criterion": "step_size", "exit_threshold": -1}, "exit_threshold is -1"),
        (RaptorModel, {"exit_criterion": "head_margin", "exit_threshold": 0.5}, "it needs a classifier"),
        (RaptorBackbone, {"exit_criterion": "step_size", "exit_threshold": 0.5}, "differ in their number of states"),
    ],
)
def test_early_exit_that_cannot_work_is_refused(model_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(model_class)(tiny_images(), **arguments)


def test_early_exit_is_refused_where_all_images_take_the_same_steps():
    model = tiny_model(RaptorModel)
    arguments = {"exit_criterion": "step_size", "exit_threshold": 0.5}
    with pytest.raises(Exception, match="the model is compiled or exported"):
        torch.compile(model, fullgraph=True, backend="eager")(tiny_images(), **arguments)
    torch.compiler.reset()
    with pytest.raises(Exception, match="the model is compiled or exported"):
        torch.export.export(model, (), {"pixel_values": tiny_images(), **arguments}, strict=False)
