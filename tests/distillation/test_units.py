"""Blocks that gather units of several layers: which units, in which place, and what a fit makes of them."""

import numpy as np
import pytest
import torch

from raptor_hf import RaptorConfig
from raptor_hf.conversion import student_from_teacher
from raptor_hf.distillation import tied_costs
from raptor_hf.distillation.start import NormalEquations, between_branches, fit_to_teacher, run_teacher
from raptor_hf.distillation.tied_costs import gathered_costs
from raptor_hf.distillation.units import OTHER_GATE, UnitScores, gather_units, lasting_weights
from raptor_hf.phases import cheapest_phases
from raptor_hf.teacher import Teacher
from tests.distillation.test_start import normalised_loss, states_of
from tests.support.tiny_models import images, tiny_dinov2
from tests.support.tiny_vits import tiny_vit

GATHERING = {"depth_conditioning": "low_rank", "branch_shifts": True, "unit_gains": True}


def last_projections(layer: torch.nn.Module) -> list[torch.nn.Linear]:
    """Of the attention and of the FFN of a DINOv2 layer."""
    return [[m for m in part.modules() if isinstance(m, torch.nn.Linear)][-1] for part in (layer.attention, layer.mlp)]


def units_of(teacher: Teacher, layer: int, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """Heads and neurons of a layer, as the teacher's own modules read them, (B, T, D) and (B, T, F)."""
    seen: list[torch.Tensor] = []
    modules = last_projections(teacher.model.encoder.layer[layer - 1])
    hooks = [module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for module in modules]
    teacher.trajectory(pixel_values)
    for hook in hooks:
        hook.remove()
    return seen


def fit_scores(teacher: Teacher, student: torch.nn.Module, pixel_values: torch.Tensor) -> UnitScores:
    """As `fit_to_teacher` counts them, for any family."""
    scores, encoder = UnitScores(), student.base_model.encoder
    trajectories, positions, _ = run_teacher(teacher, encoder, [pixel_values])
    between_branches(teacher, trajectories, positions, scores)
    return scores


def scores_of(teacher: Teacher, pixel_values: torch.Tensor) -> UnitScores:
    scores = UnitScores()
    for layer in range(1, teacher.num_layers + 1):
        block = student_from_teacher(teacher, (teacher.num_layers,), init="first").base_model.encoder.blocks[0]
        block.load_state_dict(teacher.block_state_dict(layer))
        for heads, neurons in zip(*(unit.split(2) for unit in units_of(teacher, layer, pixel_values)), strict=True):
            scores.add(layer, block, heads, neurons)
    return scores


def test_scores_are_the_variance_that_a_unit_alone_adds():
    teacher, pixel_values = Teacher(tiny_dinov2("dinov2")), images((42, 28), batch=6)
    scores, weights = scores_of(teacher, pixel_values), teacher.block_state_dict(1)
    heads, neurons = units_of(teacher, 1, pixel_values)
    for unit in (0, 3):
        own = torch.zeros_like(neurons)
        own[..., unit] = neurons[..., unit]
        added = own @ (weights["ffn.fc2.weight"] * weights["layer_scale2.lambda1"][:, None]).T
        assert scores.neurons(1)[unit] == pytest.approx(float(added.flatten(0, 1).var(0, correction=0).sum()), rel=1e-4)
    num_heads = teacher.model.config.num_attention_heads
    size = heads.shape[-1] // num_heads
    own = torch.zeros_like(heads)
    own[..., size : 2 * size] = heads[..., size : 2 * size]
    added = own @ (weights["attention.proj.weight"] * weights["layer_scale1.lambda1"][:, None]).T
    expected = float(added.flatten(0, 1).var(0, correction=0).sum())
    assert scores.heads(1, num_heads)[1] == pytest.approx(expected, rel=1e-4)


def test_an_error_counts_in_its_layer_and_in_all_later_ones():
    weights = lasting_weights(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    assert weights.dtype == torch.float64 and weights.tolist() == [1.75, 1.75, 0.75, 0.25]


def test_a_fit_chooses_units_by_what_they_add_to_all_later_layers():
    teacher, pixel_values = Teacher(tiny_dinov2("dinov2")), images((42, 28), batch=6)
    student = student_from_teacher(teacher, (2, 2), **GATHERING)
    fit_to_teacher(teacher, student, [pixel_values], rounds=0)
    inverse = 1 / teacher.trajectory(pixel_values).double().var(dim=(0, 2), correction=0).sum(-1)
    early, late = (scores_of(teacher, pixel_values).neurons(layer) for layer in (1, 2))

    def taken(*weights):
        """How many neurons of layer 1 are among the best of layers 1 and 2."""
        return int((torch.cat((early * weights[0], late * weights[1])).topk(len(early)).indices < len(early)).sum())

    number = taken(inverse[1:].sum(), inverse[2:].sum())
    assert number != taken(inverse[1], inverse[2])
    best = early.topk(number).indices.sort().values
    rows = student.base_model.encoder.blocks[0].ffn.fc1.weight[: number + 1].data
    torch.testing.assert_close(rows[:-1], teacher.block_state_dict(1)["ffn.fc1.weight"][best])
    assert rows[-1].tolist() in teacher.block_state_dict(2)["ffn.fc1.weight"].tolist()


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_step_with_its_own_units_alone_is_its_layer_without_the_others(swiglu):
    teacher = Teacher(tiny_dinov2("dinov2", use_swiglu_ffn=swiglu))
    pixel_values = images((42, 28), batch=6)
    scores, weights = scores_of(teacher, pixel_values), torch.ones(teacher.num_layers + 1)
    student = student_from_teacher(teacher, (2, 2), **GATHERING)
    encoder = student.base_model.encoder
    gather_units(teacher, encoder, 1, scores, weights)
    block, tables = encoder.blocks[1], encoder.conditioners[1]
    num_heads, width = student.config.num_attention_heads, student.config.intermediate_size
    every_head = torch.cat([scores.heads(layer, num_heads) for layer in (3, 4)])
    every_neuron = torch.cat([scores.neurons(layer) for layer in (3, 4)])
    state = teacher.trajectory(pixel_values)[:, 2]
    for step, layer in enumerate((3, 4)):
        # closed for all that is not its own, which is then the teacher's layer with some of its units
        for table in (tables.heads_gain, tables.neurons_gain):
            assert set(np.round(table[step].tolist(), 6)) <= {0.0, round(OTHER_GATE - 1, 6)}
            table.data[step] = torch.where(table[step] == 0, 0.0, -1.0)
        kept_heads = (every_head >= every_head.topk(num_heads).values[-1])[step * num_heads :][:num_heads]
        kept_neurons = (every_neuron >= every_neuron.topk(width).values[-1])[step * width :][:width]
        assert int((tables.neurons_gain[step] == 0).sum()) == int(kept_neurons.sum()) > 0
        own = teacher.block_state_dict(layer)
        channels = kept_heads.repeat_interleave(student.config.hidden_size // num_heads)
        own["attention.proj.weight"] = own["attention.proj.weight"] * channels
        own["ffn.fc2.weight"] = own["ffn.fc2.weight"] * kept_neurons
        for name in ("attention.proj.bias", "ffn.fc2.bias"):
            own[name] = torch.zeros_like(own[name])
        alone = student_from_teacher(teacher, (4,), init="first").base_model.encoder.blocks[0]
        alone.load_state_dict(own)
        with torch.no_grad():
            modulation = encoder.modulations(((1, float(layer)),))[0]
            torch.testing.assert_close(block(state, *modulation)[0], alone(state)[0], rtol=1e-4, atol=1e-5)


def test_a_gate_is_least_squares_in_the_gates():
    generator = np.random.default_rng(0)
    features, weight = generator.normal(size=(50, 4)), generator.normal(size=(4, 3))
    targets = (features * [1.0, 0.0, 0.5, -1.0]) @ weight + [1.0, 2.0, 3.0]
    equations = NormalEquations(4, 3)
    equations.add(torch.tensor(features), torch.tensor(targets))
    found = equations.gate(torch.tensor(weight), torch.ones(4), 0.0)
    np.testing.assert_allclose(found, [1.0, 0.0, 0.5, -1.0], atol=1e-5)
    gated, expected = equations.gated(found), NormalEquations(4, 3)
    expected.add(torch.tensor(features) * found, torch.tensor(targets))
    torch.testing.assert_close(gated.gram, expected.gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gated.cross, expected.cross, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["vit", "siglip_vision_model", "dinov3_vit", "aimv2_vision_model", "beit"])
def test_a_fit_of_untied_blocks_with_all_units_leaves_the_teacher_as_it_is(family):
    teacher = Teacher(tiny_vit(family))
    student = student_from_teacher(teacher, (1,) * teacher.num_layers, **GATHERING)
    pixel_values = images((28, 28), batch=6)
    fit_to_teacher(teacher, student, [pixel_values])
    states = teacher.trajectory(pixel_values)
    torch.testing.assert_close(states_of(student, pixel_values), states, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("swiglu", [False, True])
def test_units_of_all_layers_are_a_nearer_start_than_those_of_the_middle_one(swiglu):
    teacher = Teacher(tiny_dinov2(use_swiglu_ffn=swiglu))
    size = teacher.image_size
    pixel_values = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(5))
    losses = []
    for options in ({"init": "middle"} | GATHERING | {"unit_gains": False}, GATHERING):
        student = student_from_teacher(teacher, (3, 1), seed=0, **options)
        fit_to_teacher(teacher, student, pixel_values.split(8))
        losses.append(normalised_loss(teacher, student, pixel_values))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("family", ["dinov2", "swiglu", "vit", "dinov3_vit", "beit"])
def test_blocks_with_all_units_of_all_their_layers_are_the_teacher(family):
    if family in ("dinov2", "swiglu"):
        teacher = Teacher(tiny_dinov2("dinov2", use_swiglu_ffn=family == "swiglu"))
    else:
        teacher = Teacher(tiny_vit(family))
    pixel_values = images((28, 28), batch=4)
    one = student_from_teacher(teacher, (4,)).config
    size = {"num_attention_heads": 4 * one.num_attention_heads, "head_dim": one.head_size}
    student = student_from_teacher(teacher, (4,), intermediate_size=4 * one.intermediate_size, **size, **GATHERING)
    # a fit with nothing left to gain: each step weighs its own units alone, and shifts stand for the lost biases
    encoder = student.base_model.encoder
    gather_units(teacher, encoder, 0, fit_scores(teacher, student, pixel_values), torch.ones(5))
    tables = encoder.conditioners[0]
    with torch.no_grad():
        for table in (tables.heads_gain, tables.neurons_gain):
            table.copy_(torch.where(table == 0, 0.0, -1.0))
        for step in range(4):
            own = teacher.block_state_dict(step + 1)
            for number, branch, projection in ((1, "attention", "attention.proj"), (2, "ffn", "ffn.fc2")):
                shift = own.get(f"{projection}.bias", torch.zeros(())) * own[f"layer_scale{number}.lambda1"]
                getattr(tables, f"{branch}_shift")[step] = shift
    states = teacher.trajectory(pixel_values)
    torch.testing.assert_close(states_of(student, pixel_values), states, atol=1e-4, rtol=1e-4)


def test_units_beyond_those_of_all_layers_add_nothing_at_the_start():
    teacher = Teacher(tiny_dinov2())
    own = RaptorConfig.from_teacher(teacher.config, (4,))
    width, heads = own.intermediate_size, own.hidden_size
    size = {"num_attention_heads": own.num_attention_heads + 1, "head_dim": own.head_size}
    student = student_from_teacher(teacher, (3, 1), intermediate_size=width + 4, **size, **GATHERING)
    scores = scores_of(teacher, images((28, 28), batch=4))
    gather_units(teacher, student.base_model.encoder, 1, scores, torch.ones(5))
    block = student.base_model.encoder.blocks[1]
    for first, last, number in (
        (block.ffn.fc1, block.ffn.fc2, width),
        (block.attention.qkv, block.attention.proj, heads),
    ):
        assert not last.weight[:, number:].any() and first.weight[-1].any()
    assert torch.equal(block.ffn.fc1.weight[:width], teacher.block_state_dict(4)["ffn.fc1.weight"])
    queries = block.attention.qkv.weight.chunk(3)[0][:heads]
    assert torch.equal(queries, teacher.block_state_dict(4)["attention.qkv.weight"].chunk(3)[0])


def test_costs_of_gathering_follow_their_definition():
    teacher, pixel_values = Teacher(tiny_dinov2("dinov2")), images((42, 28), batch=6)
    costs = gathered_costs(teacher, [pixel_values[:2], pixel_values[2:]], ridge=0.0)
    assert np.isinf(costs[np.tril_indices(4, -1)]).all() and np.diagonal(costs).max() < 1e-6
    # the last two layers as one block: of the FFN, what least squares on half of the neurons leaves
    states = teacher.trajectory(pixel_values).double()
    variance = states.var(dim=(0, 2), correction=0).sum(-1)
    scores, expected = scores_of(teacher, pixel_values), 0.0
    for layer, weight in ((3, 1 / variance[3] + 1 / variance[4]), (4, 1 / variance[4])):
        own = teacher.block_state_dict(layer)
        heads, neurons = units_of(teacher, layer, pixel_values)
        for rows, name, scale in ((heads, "attention.proj", "layer_scale1"), (neurons, "ffn.fc2", "layer_scale2")):
            rows = rows.flatten(0, 1).double()
            target = rows @ (own[f"{name}.weight"].double() * own[f"{scale}.lambda1"].double()[:, None]).T
            num_heads = teacher.model.config.num_attention_heads
            order = scores.heads(layer, num_heads) if scale == "layer_scale1" else scores.neurons(layer)
            rows, target = rows - rows.mean(0), target - target.mean(0)
            # of an odd number, half way between one unit less and one more
            for number in (len(order) // 2, (len(order) + 1) // 2):
                best, size = order.argsort(descending=True)[:number], rows.shape[1] // len(order)
                kept = rows[:, (best[:, None] * size + torch.arange(size)).flatten()]
                left = target - kept @ torch.linalg.lstsq(kept, target).solution
                expected += float(weight * left.square().sum(1).mean()) / 2
    assert costs[2, 3] == pytest.approx(expected, rel=1e-4)
    assert cheapest_phases(costs, 2).num_blocks == 2


def test_a_layer_without_any_active_unit_has_costs_too():
    model = tiny_dinov2()
    for part in ("weight", "bias"):
        getattr(model.encoder.layer[1].mlp.fc1, part).data.zero_()
    costs = gathered_costs(Teacher(model), [images((28, 28), batch=6)])
    assert np.isfinite(costs[np.triu_indices(4)]).all()


def test_blocks_of_more_units_lose_less():
    teacher, batches = Teacher(tiny_dinov2()), [images((28, 28), batch=6)]
    config = RaptorConfig.from_teacher(teacher.config, (4,))
    size = {"width": config.intermediate_size, "num_heads": config.num_attention_heads}
    own = gathered_costs(teacher, batches)
    assert np.array_equal(own, gathered_costs(teacher, batches, **size))
    for name, number in size.items():
        assert gathered_costs(teacher, batches, **{name: 2 * number})[0, 3] < own[0, 3]
    everything = gathered_costs(teacher, batches, **{name: 4 * number for name, number in size.items()})
    assert everything[0, 3] < 1e-6


def test_covariances_of_units_are_of_full_precision_under_autocast():
    rows = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        covariance = tied_costs._covariance([rows], 0.0)
    np.testing.assert_allclose(covariance, np.cov(rows.T.double(), bias=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2])
def test_a_branch_that_adds_nothing_in_its_whole_phase_is_fitted_too(number):
    model = tiny_dinov2()
    for layer in model.encoder.layer[2:]:
        getattr(layer, f"layer_scale{number}").lambda1.data.zero_()
    teacher, pixel_values = Teacher(model), images((28, 28), batch=6)
    student = student_from_teacher(teacher, (2, 2), **GATHERING)
    fit_to_teacher(teacher, student, [pixel_values], rounds=0)
    if number == 1:  # the FFN makes good for what the attention lacks
        assert not student.base_model.encoder.blocks[1].attention.proj.weight.any()
    assert normalised_loss(teacher, student, pixel_values) < 0.1


@pytest.mark.parametrize("field, value", [("ffn_type", "mlp"), ("head_dim", 4), ("qkv_bias", False)])
def test_units_of_layers_of_another_kind_are_refused(field, value):
    teacher = Teacher(tiny_dinov2(use_swiglu_ffn=True))
    student = student_from_teacher(teacher, (3, 1), **GATHERING, **{field: value})
    with pytest.raises(ValueError, match=f"{field} is {value!r}; to take units of the teacher's layers it must be"):
        fit_to_teacher(teacher, student, [images()])
