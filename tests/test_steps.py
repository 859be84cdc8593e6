"""Places in a model by step: what is read there is what is computed, and an edit is one made by hand."""

import pytest
import torch
from torch import nn

from raptor_hf import RaptorForImageClassification, RaptorModel
from raptor_hf.families import FAMILIES
from raptor_hf.steps import ablate, patch, record, steer
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import NUM_LAYERS, images, tiny_dinov2
from tests.support.tiny_raptors import KINDS, tiny_images, tiny_model
from tests.support.tiny_vits import VITS, tiny_vit

PARTS = ("attention", "heads", "ffn", "neurons")
STEPS = 6


def raptor(conditioning="low_rank", ffn_type="mlp", **fields):
    return tiny_model(RaptorModel, depth_conditioning=conditioning, ffn_type=ffn_type, **fields)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def states_of(model, pixel_values, **arguments):
    return model(pixel_values, output_hidden_states=True, **arguments).hidden_states


def by_hand(model, pixel_values, edits):
    """A student's final state from its blocks, one after another, and what was computed on the way.

    `edits` maps (step, part) to a function; the parts are written out from the modules' own calls.
    """
    identity = {key: lambda value: value for key in [(s, p) for s in range(STEPS + 1) for p in (None, *PARTS)]}
    edits, encoder = identity | edits, model.encoder
    state = edits[0, None](model.embeddings(pixel_values))
    steps = zip(encoder.plan, encoder.modulations(encoder.plan), strict=True)
    for step, ((block, _), m) in enumerate(steps, 1):
        block = encoder.blocks[block]
        attention, ffn = block.attention, block.ffn
        batch, tokens, dim = state.shape
        x = block.norm1(state, m.norm1_gain, m.norm1_shift)
        qkv = attention.qkv(x) + nn.functional.linear(nn.functional.linear(x, m.qkv_down), m.qkv_up)
        qkv = qkv.view(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(*qkv.unbind(), scale=attention.scaling)
        heads = edits[step, "heads"](heads.transpose(1, 2).reshape(batch, tokens, dim))
        branch = edits[step, "attention"](attention.proj(heads))
        state = torch.addcmul(state, branch, block.layer_scale1(m.layer_scale1_gain, m.attention_gain))
        x = block.norm2(state, m.norm2_gain, m.norm2_shift)
        up = ffn.fc1(x) + nn.functional.linear(nn.functional.linear(x, m.ffn_down), m.ffn_up)
        neurons = edits[step, "neurons"](ffn.activation(up))
        branch = edits[step, "ffn"](ffn.fc2(neurons))
        state = torch.addcmul(state, branch, block.layer_scale2(m.layer_scale2_gain, m.ffn_gain))
        state = edits[step, None](state)
    return state


@pytest.mark.parametrize("part", [None, *PARTS])
@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_patch_is_bit_for_bit_an_edit_by_hand(step, part):
    model, pixel_values = raptor(), tiny_images()
    place = f"step.{step}" + (f".{part}" if part else "")

    def edit(value):
        return value.flip(0) * 1.5

    with torch.no_grad():
        plain = states_of(model, pixel_values)[-1]
        assert torch.equal(plain, by_hand(model, pixel_values, {}))
        with patch(model, {place: edit}):
            patched = states_of(model, pixel_values)[-1]
        assert torch.equal(patched, by_hand(model, pixel_values, {(step, part): edit}))
    assert not torch.equal(patched, plain)


def every_model() -> list:
    cases = []
    for conditioning, ffn_type in KINDS:
        cases.append(
            pytest.param(
                lambda c=conditioning, f=ffn_type: (raptor(c, f), tiny_images()), id=f"{conditioning}-{ffn_type}"
            )
        )
    for family in ("dinov2", "dinov2_with_registers"):
        cases.append(pytest.param(lambda f=family: (tiny_dinov2(f), images()), id=family))
    cases.append(pytest.param(lambda: (tiny_dinov2(use_swiglu_ffn=True), images()), id="swiglu"))
    for family in VITS:
        cases.append(pytest.param(lambda f=family: (tiny_vit(f), images()), id=family))
    return cases


@pytest.mark.parametrize("make", every_model())
def test_states_are_those_of_the_trajectory_in_every_family(make):
    model, pixel_values = make()
    teacher = Teacher(model)
    trajectory = teacher.trajectory(pixel_values)
    last = teacher.num_layers
    before = hooks(model)
    with record(teacher, ["step.0", "step.*"]) as seen:
        teacher(pixel_values)
    assert torch.equal(torch.stack([seen[f"step.{step}"] for step in range(last + 1)], 1), trajectory)
    new = trajectory[:, 2].flip(0)
    with patch(model, {"step.2": new}):
        patched = teacher.trajectory(pixel_values)
    assert torch.equal(patched[:, :2], trajectory[:, :2]) and torch.equal(patched[:, 2], new)
    continued = teacher.run_layers(new, range(3, last + 1), image_size=tuple(pixel_values.shape[2:]))
    assert torch.equal(patched[:, 2:], continued)
    assert hooks(model) == before


@pytest.mark.parametrize("make", every_model())
def test_branches_of_every_family_add_up_to_the_state(make):
    model, pixel_values = make()
    teacher = Teacher(model)
    family = FAMILIES[teacher.family]
    if not (family.block_parts or teacher.family == "raptor"):
        with pytest.raises(ValueError, match="at has 'attention'"):
            record(teacher, "step.1.attention").__enter__()
        return
    trajectory = teacher.trajectory(pixel_values)
    with ablate(teacher, "step.2.attention"), ablate(teacher, "step.2.ffn"), record(teacher, "step.*.ffn") as seen:
        ablated = teacher.trajectory(pixel_values)
    assert not seen["step.2.ffn"].any() and seen["step.3.ffn"].any()
    assert torch.equal(ablated[:, 1], trajectory[:, 1])
    if teacher.family != "raptor":
        assert torch.equal(ablated[:, 2], trajectory[:, 1])
    # without heads or neurons the branch gives its bias alone
    for part, inner in (("attention", "heads"), ("ffn", "neurons")):
        with ablate(teacher, f"step.2.{inner}"), record(teacher, f"step.2.{part}") as seen:
            teacher(pixel_values)
        value = seen[f"step.2.{part}"]
        assert torch.equal(value, value[:1, :1].expand_as(value))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_edits_hold_under_attention_kernels_precisions_and_batches(attention, dtype, batch):
    model, pixel_values = raptor().to(dtype), tiny_images(batch)
    model.set_attn_implementation(attention)
    direction = torch.linspace(-1, 1, 24)
    with torch.no_grad():
        states = states_of(model, pixel_values)
        with steer(model, "step.3", direction, tokens="patches", strength=2.0):
            steered = states_of(model, pixel_values)
        expected = states[3].clone()
        expected[:, 3:] += 2.0 * direction.to(dtype)
        teacher = Teacher(model)
        for step, state in enumerate(teacher.run_layers(expected, [4, 5, 6]).unbind(1), 3):
            assert torch.equal(steered[step], state) and state.dtype == dtype
        for step in range(3):
            assert torch.equal(steered[step], states[step])


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["stored", "plain", "reentrant"])
def test_gradients_under_checkpointing_are_those_of_the_edited_model(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = raptor().train()
        if checkpointing and use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        places = ["step.2", "step.4.attention"]
        with patch(model, {"step.2": lambda x: 2 * x, "step.4.ffn": torch.tanh}), record(model, places) as seen:
            output = model(tiny_images()).last_hidden_state
            before = {place: value.detach().clone() for place, value in seen.items()}
            (output * torch.linspace(-1, 1, 24)).square().sum().backward()
        assert set(before) == set(places) and all(torch.equal(seen[place], before[place]) for place in places)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_recorded_value_has_a_gradient():
    model = raptor()
    with record(model, "step.4.ffn") as seen:
        output = model(tiny_images()).last_hidden_state
    (gradient,) = torch.autograd.grad(output.square().sum(), seen["step.4.ffn"])
    assert gradient.shape == output.shape and gradient.any()


def test_nothing_is_left_after_an_exception():
    model, pixel_values = raptor(), tiny_images()
    expected, before = states_of(model, pixel_values), hooks(model)

    def fail(value):
        raise RuntimeError("stopped")

    for edits in ({"step.4.heads": fail}, {"step.*": lambda value: value[:, :3]}):
        with pytest.raises((RuntimeError, ValueError)):
            with record(model, "step.*.ffn"), steer(model, "step.1", torch.ones(24)), patch(model, edits):
                model(pixel_values)
        assert hooks(model) == before
    assert all(map(torch.equal, states_of(model, pixel_values), expected))


def test_edits_come_in_order_and_records_and_outputs_after_them():
    model, pixel_values = raptor(), tiny_images()
    states_of(model, pixel_values)  # from now on transformers' own hooks are there
    for place in ("step.3", "step.3.heads"):
        with (
            record(model, place) as outer,
            patch(model, {place: lambda x: x + 1}),
            patch(model, {place: lambda x: x * 2}),
            record(model, place) as inner,
            patch(model, {place: torch.zeros(())}),
            patch(model, {place: lambda x: x + 3}),
        ):
            states = states_of(model, pixel_values)
        assert torch.equal(outer[place], torch.full_like(outer[place], 3)) and torch.equal(inner[place], outer[place])
    with patch(model, {"step.3": lambda x: x * 0 + 3}):
        assert (states_of(model, pixel_values)[3] == 3).all()
    assert len(states) == STEPS + 1


@pytest.mark.parametrize("arguments", [{"num_steps": 4}, {"num_steps": 8}, {"block_repeats": (1, 2, 1)}], ids=str)
def test_steps_are_counted_as_the_student_runs_them(arguments):
    model, pixel_values = raptor(), tiny_images()
    states = states_of(model, pixel_values, **arguments)
    with record(model, "step.*") as seen:
        model(pixel_values, **arguments)
    assert list(seen) == [f"step.{step}" for step in range(1, len(states))]
    assert all(torch.equal(seen[f"step.{step}"], states[step]) for step in range(1, len(states)))


def test_a_second_batch_replaces_the_recording_of_the_first():
    model = raptor()
    with record(model, "step.*.ffn") as seen:
        model(tiny_images(3))
        model(tiny_images(1), num_steps=2)
        assert list(seen) == ["step.1.ffn", "step.2.ffn"] and seen["step.2.ffn"].shape[0] == 1
        with pytest.raises(KeyError, match="step.5.ffn was not recorded; there are step.1.ffn, step.2.ffn"):
            seen["step.5.ffn"]


def test_ablated_heads_are_the_columns_of_these_heads():
    model, pixel_values = raptor(), tiny_images()
    with record(model, "step.5.heads") as plain:
        model(pixel_values)
    mean = plain["step.5.heads"].mean((0, 1))
    with ablate(model, "step.5.heads", tokens=[0, 4], heads=[1], to=mean), record(model, "step.5.heads") as seen:
        model(pixel_values)
    expected = plain["step.5.heads"].clone()
    expected[:, [0, 4], 8:16] = mean[8:16]
    assert torch.equal(seen["step.5.heads"], expected)


def test_a_model_with_a_head_takes_the_places_of_its_backbone():
    model = tiny_model(RaptorForImageClassification)
    with torch.no_grad(), ablate(model, "step.6"):
        logits = model(tiny_images()).logits
        assert torch.equal(logits[0], logits[1])


def test_a_teacher_of_some_layers_has_their_states():
    teacher, pixel_values = Teacher(tiny_dinov2(), layers=[2, NUM_LAYERS]), images()
    with record(teacher, "step.*") as seen:
        trajectory = teacher.trajectory(pixel_values)
    assert torch.equal(torch.stack([seen["step.1"], seen["step.2"]], 1), trajectory[:, 1:])
    with pytest.raises(ValueError, match="stands for several"):
        record(teacher, "step.1.ffn").__enter__()


@pytest.mark.parametrize(
    "place, message",
    [
        ("layer.3", "at has 'layer.3'; it must be like 'step.7'"),
        ("step.3.mlp", "at has 'step.3.mlp'; it must be like"),
        ("step.0.ffn", "at has 'step.0.ffn'; its step must be in 1"),
        ("step.7", rf"at has 'step.7'; its step must be in 0..{NUM_LAYERS}"),
    ],
)
def test_a_place_that_is_none_is_refused(place, message):
    with pytest.raises(ValueError, match=message):
        record(tiny_dinov2(), place).__enter__()


def test_a_step_that_a_student_never_takes_is_an_error():
    model = raptor()
    with pytest.raises(ValueError, match="at has 'step.9', where the model never came: it ran 6 steps"):
        with record(model, "step.9"):
            model(tiny_images())
    with record(model, "step.9"):
        pass


@pytest.mark.parametrize(
    "context, message",
    [
        (lambda m: steer(m, "step.1", torch.ones(24), tokens="words"), "tokens is 'words'; this model has cls, reg"),
        (lambda m: ablate(m, "step.1.heads", heads=[3]), "heads is .3. at 'step.1.heads'; they must be in 0..2"),
        (lambda m: ablate(m, "step.1.ffn", heads=[0]), "heads is .0. at 'step.1.ffn'; they must be"),
    ],
)
def test_tokens_and_heads_that_are_none_are_refused(context, message):
    with pytest.raises(ValueError, match=message):
        context(raptor())


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="model is of type Linear"):
        record(nn.Linear(1, 1), "step.1").__enter__()


def test_nnsight_edits_the_step_that_the_guide_says():
    nnsight = pytest.importorskip("nnsight")
    student, pixel_values = raptor(), tiny_images()
    traced = nnsight.NNsight(student)
    with traced.trace(pixel_values) as tracer:
        for _ in tracer.iter[1]:
            traced.encoder.blocks[0].ffn.output[:] = 0
        tokens = traced.layernorm.output.save()
    with ablate(student, "step.2.ffn"):
        assert torch.equal(tokens, student(pixel_values).last_hidden_state)
        with traced.trace(pixel_values):
            within = traced.layernorm.output.save()
    assert torch.equal(within, tokens)


@pytest.mark.parametrize("is_training", [False, True])
def test_heads_and_neurons_are_those_after_the_gains_of_their_step(is_training):
    model = raptor(unit_gains=True).train(is_training)
    with record(model, ["step.2.heads", "step.2.attention", "step.2.neurons", "step.2.ffn"]) as seen:
        model(tiny_images(4))
    block = model.encoder.blocks[0]
    torch.testing.assert_close(block.attention.proj(seen["step.2.heads"]), seen["step.2.attention"])
    torch.testing.assert_close(block.ffn.fc2(seen["step.2.neurons"]), seen["step.2.ffn"])
