"""Losses and schedules of the distillation, against loops written from the paper's equations in float64."""

import collections
import copy
import math

import numpy as np
import pytest
import torch

from raptor_hf import RaptorConfig, RaptorForImageClassification, RaptorModel
from raptor_hf.distillation.task import (
    DistillationTask,
    LayerVariance,
    TrajectoryLoss,
    draw_num_steps,
    group_weights,
    runs,
    teacher_forcing,
)
from raptor_hf.tokens import TokenLayout
from tests.support.tiny_models import randomize

BATCH, PATCHES, DIM, LAYERS = 3, 4, 8, 6
STAGE1, STAGE2 = [0.34, 0.33, 0.33], [0.45, 0.10, 0.45]
CONTIGUOUS = {"block_repeats": (3, 1, 2)}
# block 0 is layers 1, 2 and 6, the last of all; block 1 is layer 3; block 2 is layers 4 and 5
FRAGMENTED = {"block_repeats": (3, 1, 2), "block_schedule": (0, 0, 1, 2, 2, 0)}


def make_student(num_registers: int = 2, seed: int = 0, **fields) -> RaptorModel:
    family = {"num_register_tokens": num_registers} if num_registers else {"embedding_type": "dinov2"}
    defaults = {"hidden_size": DIM, "num_attention_heads": 2, "image_size": 4, "patch_size": 2} | CONTIGUOUS
    options = {"num_register_tokens": 0, "depth_conditioning": "scale"} | defaults | family | fields
    return randomize(RaptorModel(RaptorConfig(**options)), seed)


def make_states(num_registers: int = 2, seed: int = 1) -> torch.Tensor:
    """A trajectory (B, L + 1, T, D) of no model in particular."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, LAYERS + 1, 1 + num_registers + PATCHES, DIM, generator=generator)


class Reference:
    """Section 4 of the paper, one image, token and step at a time."""

    def __init__(self, student, num_registers, kind="mse", layer_scale=None):
        self.encoder = copy.deepcopy(student.base_model).double().encoder
        self.num_registers, self.kind, self.layer_scale = num_registers, kind, layer_scale

    @torch.no_grad()
    def step(self, state, layer):
        """B_j for the block j of that layer, told the layer's index."""
        (block,) = (j for j, layers in enumerate(self.encoder.config.block_layers) if layer in layers)
        (modulation,) = self.encoder.modulations(((block, float(layer)),))
        return self.encoder.blocks[block](state, *modulation)[0]

    def loss(self, student, teacher, layer, weights):
        error = (student - teacher).numpy()
        if self.layer_scale is not None:
            error = error / self.layer_scale[layer]
        first_patch = 1 + self.num_registers
        groups = [error[:, :1], error[:, 1:first_patch], error[:, first_patch:]]
        if weights is None:
            groups, weights = [error], [1.0]
        pairs = [(weight, group) for weight, group in zip(weights, groups, strict=True) if group.shape[1]]
        total = 0.0
        for weight, group in pairs:
            if self.kind == "mse":
                value = np.mean([np.mean(token**2) for image in group for token in image])
            else:
                value = np.mean([math.sqrt(np.sum(image**2)) for image in group])
            # what an empty group leaves over goes to the others, in proportion
            total += weight * sum(weights) / sum(w for w, _ in pairs) * value
        return total

    def stage1(self, states, layers, forcing, weights):
        forced, rolled = [], []
        for layer in layers:
            forced.append(self.loss(self.step(states[:, layer - 1], layer), states[:, layer], layer, weights))
            own = self.step(own if layer - 1 in layers else states[:, layer - 1], layer)  # noqa: F821
            rolled.append(self.loss(own, states[:, layer], layer, weights))
        return forcing * np.mean(forced) + (1 - forcing) * np.mean(rolled)

    def stage2(self, states, horizon, weights):
        """The losses of all steps."""
        losses, own = [], None
        for layer in range(1, LAYERS + 1):
            own = self.step(states[:, layer - 1] if (layer - 1) % horizon == 0 else own, layer)
            losses.append(self.loss(own, states[:, layer], layer, weights))
        return losses


def test_teacher_forcing_falls_linearly_to_zero_over_the_first_quarter_of_the_paper_s_steps():
    num_steps = 312_500
    assert teacher_forcing(0, num_steps) == 1.0
    assert teacher_forcing(78_125 // 5, num_steps) == 0.8
    assert teacher_forcing(78_124, num_steps) == pytest.approx(1 / 78_125)
    assert [teacher_forcing(step, num_steps) for step in (78_125, 78_126, 312_499)] == [0.0, 0.0, 0.0]


def test_teacher_forcing_can_take_all_steps_or_none():
    assert [teacher_forcing(step, 4, anneal_fraction=1.0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [teacher_forcing(step, 4, anneal_fraction=0.0) for step in range(2)] == [0.0, 0.0]


@pytest.mark.parametrize("fields", [CONTIGUOUS, FRAGMENTED], ids=["contiguous", "fragmented"])
@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("kind", ["mse", "frobenius"])
@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalized"])
def test_stage1_is_the_paper_s_equation(fields, num_registers, kind, normalized):
    student, states = make_student(num_registers, **fields), make_states(num_registers)
    scale = torch.linspace(0.5, 3, LAYERS + 1) if normalized else None
    reference = Reference(student, num_registers, kind, None if scale is None else scale.double().numpy())
    task = DistillationTask(student, TrajectoryLoss(kind, TokenLayout(num_registers), scale), stage1_weights=STAGE1)
    for forcing in (0.0, 0.3, 1.0):
        losses = task(states, stage=1, forcing=forcing)
        expected = {
            f"block_{block}": reference.stage1(states.double(), layers, forcing, STAGE1 if LAYERS in layers else None)
            for block, layers in enumerate(student.config.block_layers)
        }
        assert losses.keys() == {*expected, "loss"}
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value, rel=1e-5), (name, forcing)
        assert losses["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-5)


@pytest.mark.parametrize("fields", [CONTIGUOUS, FRAGMENTED], ids=["contiguous", "fragmented"])
@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("kind", ["mse", "frobenius"])
@pytest.mark.parametrize("weights", [None, STAGE2], ids=["all tokens alike", "groups"])
def test_stage2_is_the_paper_s_equation_for_every_horizon(fields, num_registers, kind, weights):
    student, states = make_student(num_registers, **fields), make_states(num_registers)
    reference = Reference(student, num_registers, kind)
    found = {}
    for horizon in (None, 1, 2, 4, 7):
        task = DistillationTask(
            student, TrajectoryLoss(kind, TokenLayout(num_registers)), stage2_weights=weights, horizon=horizon
        )
        losses = task(states, stage=2)
        steps = reference.stage2(states.double(), horizon or LAYERS, weights)
        assert losses["loss"].item() == pytest.approx(np.mean(steps), rel=1e-5)
        blocks = {f"block_{j}": [steps[i - 1] for i in layers] for j, layers in enumerate(student.config.block_layers)}
        assert losses.keys() == {*blocks, "loss"}
        for name, values in blocks.items():
            assert losses[name].item() == pytest.approx(np.mean(values), rel=1e-5)
            assert not losses[name].requires_grad
        found[horizon] = losses["loss"].item()
    assert found[None] == found[7]  # no start within the 6 steps but the first
    assert len(set(found.values())) == 4


# where the steps of a student of 3 + 1 + 2 layers end, and which two layers of the teacher each end is between
PACES = {4: [(1, 2), (3, 3), (4, 4), (6, 6)], 5: [(1, 2), (3, 3), (4, 4), (5, 5), (6, 6)]}


@pytest.mark.parametrize("targets", ["interpolated", "nearest"])
@pytest.mark.parametrize("num_steps", PACES)
def test_stage2_at_another_pace_compares_the_end_of_every_step_with_the_teacher_there(num_steps, targets):
    student, states = make_student(step_scaling=True), make_states()
    scale = torch.linspace(0.5, 3, LAYERS + 1)
    task = DistillationTask(student, TrajectoryLoss("mse", TokenLayout(2), scale), targets=targets)
    with torch.no_grad():
        own = student.encoder.run(states[:, 0], num_steps=num_steps, output_hidden_states=True).hidden_states[1:]
    losses = []
    for state, (below, above) in zip(own, PACES[num_steps], strict=True):
        # the only end between two layers, 1.5, is as near to both
        target = (states[:, below] + states[:, above]) / 2 if targets == "interpolated" else states[:, above]
        losses.append(((state - target).square().mean() / scale[above] ** 2).item())
    found = task(states, stage=2, num_steps=num_steps)
    assert found["loss"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["block_0"].item() == pytest.approx(np.mean(losses[:2]), rel=1e-5)


def test_paces_are_drawn_by_seed_and_step_alone_in_the_share_that_is_asked_for():
    draws = [draw_num_steps([4, 6, 16], 0.6, 0, step)[0] for step in range(2000)]
    np.random.seed(5)
    torch.manual_seed(5)
    assert draws == [draw_num_steps([4, 6, 16], 0.6, 0, step)[0] for step in range(2000)]
    assert draws != [draw_num_steps([4, 6, 16], 0.6, 1, step)[0] for step in range(2000)]
    for number in (4, 6, 16):  # 400 expected, with a standard deviation of 18
        assert 310 < draws.count(number) < 490
    assert 710 < draws.count(None) < 890
    assert {draw_num_steps([4], 0.0, 0, step)[0] for step in range(50)} == {None}
    assert {draw_num_steps([4], 1.0, 0, step)[0] for step in range(50)} == {4}
    assert draw_num_steps(None, 1.0, 0, 0, parts=3) == [None] * 3


def test_parts_of_a_batch_are_drawn_as_if_alone_and_differ():
    batches = [draw_num_steps([4, 6, 16], 0.75, 0, step, parts=4) for step in range(50)]
    assert batches == [[None, 4, 6, 16]] * 50  # a quarter each
    batches = [draw_num_steps([4, 6, 16], 0.6, 0, step, parts=2) for step in range(2000)]
    for part, expected in ((0, {None: 0.8, 4: 0.2}), (1, {4: 0.2, 6: 0.4, 16: 0.4})):
        counts = collections.Counter(batch[part] for batch in batches)
        assert counts.keys() == expected.keys()
        assert all(abs(counts[number] / 2000 - share) < 0.05 for number, share in expected.items())


def test_paces_near_the_trained_one_are_drawn_by_their_ratio_to_it():
    draws = collections.Counter(draw_num_steps([6, 12, 24], 1, 0, step, near=12)[0] for step in range(2000))
    assert all(abs(draws[number] / 2000 - share) < 0.05 for number, share in ((6, 0.25), (12, 0.5), (24, 0.25)))


def test_stage2_divides_every_layer_by_its_scale():
    student, states = make_student(), make_states()
    scale = torch.linspace(0.5, 3, LAYERS + 1)
    task = DistillationTask(student, TrajectoryLoss("mse", TokenLayout(2), scale), stage2_weights=STAGE2)
    expected = np.mean(Reference(student, 2, "mse", scale.double().numpy()).stage2(states.double(), LAYERS, STAGE2))
    assert task(states, stage=2)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_blocks_can_be_chosen_in_stage1():
    student, states = make_student(), make_states()
    task = DistillationTask(student, TrajectoryLoss("mse", TokenLayout(2)))
    every, one = task(states, stage=1, forcing=0.5), task(states, stage=1, forcing=0.5, blocks=(1,))
    assert one.keys() == {"block_1", "loss"}
    assert one["block_1"] == one["loss"] == every["block_1"]


def test_blocks_of_stage1_get_no_gradient_from_each_other():
    for fields in (CONTIGUOUS, FRAGMENTED):
        student, states = make_student(**fields), make_states()
        task = DistillationTask(student, TrajectoryLoss("mse", TokenLayout(2)), stage1_weights=STAGE1)
        encoder = student.encoder
        own = [[*encoder.blocks[j].parameters(), *encoder.conditioners[j].parameters()] for j in range(3)]
        together = torch.autograd.grad(task(states, stage=1, forcing=0.5)["loss"], sum(own, []))
        alone = []
        for block in range(3):
            loss = task(states, stage=1, forcing=0.5)[f"block_{block}"]
            others = [parameter for j in range(3) if j != block for parameter in own[j]]
            gradients = torch.autograd.grad(loss, own[block] + others, allow_unused=True)
            assert all(gradient is None for gradient in gradients[len(own[block]) :])
            alone += gradients[: len(own[block])]
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_stage2_sends_the_error_of_the_last_layer_through_all_steps():
    student, states = make_student(), make_states()
    first = student.encoder.blocks[0].norm1.weight
    state, plan = states[:, 0], student.config.step_plan()
    for (block, _), modulation in zip(plan, student.encoder.modulations(plan), strict=True):
        state = student.encoder.blocks[block](state, *modulation)[0]
    expected = torch.autograd.grad((state - states[:, -1]).square().mean() / LAYERS, first)[0]
    scale = torch.tensor([math.inf] * LAYERS + [1.0])  # no other layer has an error left
    loss = DistillationTask(student, TrajectoryLoss("mse", TokenLayout(2), scale))(states, stage=2)["loss"]
    found = torch.autograd.grad(loss, first)[0]
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["mse", "frobenius"])
def test_student_that_is_the_teacher_has_no_loss_and_no_gradient(kind):
    student = make_student()
    with torch.no_grad():
        images = torch.randn(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(2))
        states = torch.stack(student(images, output_hidden_states=True).hidden_states, dim=1)
    task = DistillationTask(student, TrajectoryLoss(kind, TokenLayout(2)), stage1_weights=STAGE1, stage2_weights=STAGE2)
    for losses in (task(states, stage=1, forcing=0.5), task(states, stage=2)):
        assert losses["loss"].item() == pytest.approx(0, abs=1e-5)
        student.zero_grad()
        losses["loss"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())  # a norm has none at zero


def test_task_takes_a_model_with_a_head():
    student = make_student()
    headed = RaptorForImageClassification(student.config)
    headed.base_model.load_state_dict(student.state_dict())
    states = make_states()
    bare, wrapped = (DistillationTask(model, TrajectoryLoss("mse", TokenLayout(2))) for model in (student, headed))
    assert wrapped(states, stage=2)["loss"] == bare(states, stage=2)["loss"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_of_a_teacher_in_half_precision_train_a_student_in_float32(dtype):
    student, states = make_student(), make_states().to(dtype)
    task = DistillationTask(student, TrajectoryLoss("mse", TokenLayout(2)), input_noise=0.0)
    exact = DistillationTask(student, TrajectoryLoss("mse", TokenLayout(2)))
    for stage in (1, 2):
        loss = task(states, stage=stage, forcing=0.5)["loss"]
        assert loss.dtype == torch.float32
        assert loss == exact(states.float(), stage=stage, forcing=0.5)["loss"]


def test_runs_are_the_consecutive_layers():
    assert runs((1, 2, 3)) == [(1, 2, 3)]
    assert runs((1, 2, 5, 7, 8)) == [(1, 2), (5,), (7, 8)]
    assert runs((4,)) == [(4,)]


def test_autoregression_starts_from_the_teacher_before_every_run_of_a_fragmented_block():
    student, states = make_student(**FRAGMENTED), make_states()
    inputs = record_inputs(student, lambda task: task(states, stage=1, forcing=0.0, blocks=(0,)))
    starts = [(states[:, 0], True), (states[:, 1], False), (states[:, 5], True)]  # layers 1, 2 and 6
    assert [torch.equal(found, state) for found, (state, _) in zip(inputs, starts, strict=True)] == [
        is_start for _, is_start in starts
    ]


def test_weights_of_absent_registers_go_to_cls_and_patches_in_proportion():
    assert group_weights(STAGE2, (1, 4, 16)) == pytest.approx(STAGE2)
    assert group_weights(STAGE2, (1, 0, 16)) == pytest.approx([0.5, 0.0, 0.5])
    assert group_weights(STAGE1, (1, 0, 16)) == pytest.approx([0.34 / 0.67, 0.0, 0.33 / 0.67])
    assert sum(group_weights([2.0, 1.0, 1.0], (1, 0, 16))) == pytest.approx(4.0)


def test_groups_are_the_tokens_in_their_order():
    assert TokenLayout(4).sizes(21) == (1, 4, 16)
    loss = TrajectoryLoss("mse", TokenLayout(2))
    teacher = torch.zeros(BATCH, 7, DIM)
    for weights, tokens in ([1, 0, 0], [0]), ([0, 1, 0], [1, 2]), ([0, 0, 1], [3, 4, 5, 6]):
        for token in range(7):
            student = teacher.clone()
            student[:, token] = 3.0
            found = loss(student, teacher, 1, weights).item()
            assert found == pytest.approx(9.0 / len(tokens) if token in tokens else 0.0)


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1.0, 1.0], r"weights is \[1.0, 1.0\]; it must be three numbers >= 0"),
        ([1.0, -0.1, 1.0], "must be three numbers >= 0"),
        ([0.0, 0.0, 0.0], "there must be a positive one"),
    ],
)
def test_weights_that_weigh_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        DistillationTask(make_student(), TrajectoryLoss("mse", TokenLayout(2)), stage2_weights=weights)


def test_weights_of_registers_alone_are_refused_without_registers():
    with pytest.raises(ValueError, match=r"tokens that exist: \(1, 0, 4\)"):
        group_weights([0.0, 1.0, 0.0], (1, 0, 4))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"horizon": 0}, "horizon is 0; it must be at least 1"),
        ({"input_noise": -0.1}, "input_noise is -0.1"),
        ({"targets": "next"}, "targets is 'next'; it must be one of interpolated, nearest"),
    ],
)
def test_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationTask(make_student(), TrajectoryLoss("mse", TokenLayout(2)), **options)


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match="kind is 'cka'; it must be one of mse, frobenius, cosine, normed_mse"):
        TrajectoryLoss("cka")
    with pytest.raises(ValueError, match="final_norm is None; it must be the teacher's final norm"):
        TrajectoryLoss("mse", added={"normed_mse": 0.5})
    with pytest.raises(ValueError, match=r"final_norm is Identity\(\); it must be the teacher's final norm"):
        TrajectoryLoss("normed_mse", final_norm=torch.nn.Identity())


@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalized"])
def test_losses_beside_the_mse_are_their_equations_token_by_token(normalized):
    student, teacher = make_states(seed=1)[:, 3], make_states(seed=2)[:, 3]
    norm = randomize(torch.nn.LayerNorm(DIM)).requires_grad_(False)
    scale = torch.linspace(0.5, 3, LAYERS + 1) if normalized else None
    gain, shift = norm.weight.double().numpy(), norm.bias.double().numpy()

    def normed(token):
        return (token - token.mean()) / np.sqrt(token.var() + norm.eps) * gain + shift

    def cosine(own, target):
        return 1 - own @ target / np.sqrt((own @ own) * (target @ target))

    def normed_mse(own, target):
        return np.mean((normed(own) - normed(target)) ** 2) / (np.mean(gain**2) if normalized else 1)

    def mse(own, target):
        return np.mean((own - target) ** 2) / (scale[3].item() ** 2 if normalized else 1)

    def weighted(distance):
        """By group, the mean over its tokens."""
        groups = [[0], [1, 2], [3, 4, 5, 6]]
        rows = zip(student.double().numpy(), teacher.double().numpy(), strict=True)
        values = np.array([[distance(*pair) for pair in zip(*row, strict=True)] for row in rows])  # (B, T)
        return sum(weight * values[:, group].mean() for weight, group in zip(STAGE2, groups, strict=True))

    expected = {name: weighted(distance) for name, distance in (("cosine", cosine), ("normed_mse", normed_mse))}
    for name, value in expected.items():
        loss = TrajectoryLoss(name, TokenLayout(2), scale, final_norm=norm)
        assert loss(student, teacher, 3, STAGE2).item() == pytest.approx(value, rel=1e-5)
    mixture = TrajectoryLoss("mse", TokenLayout(2), scale, {"cosine": 0.7, "normed_mse": 0.2}, norm)
    found = mixture(student, teacher, 3, STAGE2).item()
    assert found == pytest.approx(weighted(mse) + 0.7 * expected["cosine"] + 0.2 * expected["normed_mse"], rel=1e-5)
    for kind in ("mse", "frobenius"):  # further kinds of no weight are none
        plain, none = TrajectoryLoss(kind, TokenLayout(2), scale), {"cosine": 0.0, "normed_mse": 0.0}
        assert torch.equal(
            TrajectoryLoss(kind, TokenLayout(2), scale, none)(student, teacher, 3, STAGE2),
            plain(student, teacher, 3, STAGE2),
        )


def test_cosine_does_not_see_the_length_and_normed_mse_not_the_scale_of_a_token():
    states, norm = make_states()[:, 2], torch.nn.LayerNorm(DIM, eps=0).requires_grad_(False)
    for kind, changed in (("cosine", 3 * states), ("normed_mse", 3 * states + 1)):
        loss = TrajectoryLoss(kind, TokenLayout(2), final_norm=norm)
        assert loss(changed, states, 2, STAGE2).item() == pytest.approx(0, abs=1e-6)
        assert loss(states.flip(0), states, 2, STAGE2).item() > 0.1


def record_inputs(student, run, **options) -> list[torch.Tensor]:
    """What the blocks are given, in order, while `run` is called with a task."""
    inputs = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
        for block in student.encoder.blocks
    ]
    run(DistillationTask(student, TrajectoryLoss("mse", TokenLayout(2)), **options))
    for hook in hooks:
        hook.remove()
    return inputs


def test_input_noise_changes_the_states_that_blocks_start_from_and_nothing_else():
    student, states = make_student(), make_states()
    before = states.clone()
    torch.manual_seed(0)
    inputs = record_inputs(student, lambda task: task(states, stage=2), input_noise=0.5, horizon=4)
    assert torch.equal(states, before)  # the targets
    plan = student.config.step_plan()
    with torch.no_grad():
        for step, ((block, _), modulation) in enumerate(zip(plan, student.encoder.modulations(plan), strict=True)):
            if step in (0, 4):
                assert not torch.allclose(inputs[step], states[:, step], atol=0.01)
            else:
                assert torch.equal(inputs[step], state)  # noqa: F821
            state = student.encoder.blocks[block](inputs[step], *modulation)[0]  # noqa: F841


def test_input_noise_of_stage1_falls_on_every_forced_step_and_no_rolled_one():
    student, states = make_student(), make_states()
    run = lambda task: task(states, stage=1, forcing=0.5, blocks=(0,))  # noqa: E731
    clean, noisy = record_inputs(student, run), record_inputs(student, run, input_noise=0.5)
    assert len(clean) == len(noisy) == 5  # forced 1, 2, 3 and rolled 2, 3
    from_teacher = [any(torch.equal(found, states[:, layer]) for layer in range(3)) for found in clean]
    assert from_teacher.count(True) == 3
    assert not any(torch.equal(found, states[:, layer]) for found in noisy for layer in range(3))
    # the first rolled step goes on from what the noisy start gave
    modulation = student.encoder.modulations(((0, 1.0), (0, 2.0), (0, 3.0)))[0]
    with torch.no_grad():
        first = student.encoder.blocks[0](noisy[0], *modulation)[0]
    assert any(torch.equal(first, found) for found in noisy[1:])


def test_input_noise_is_relative_to_the_root_mean_square_of_each_state():
    task = DistillationTask(make_student(), TrajectoryLoss("mse", TokenLayout(2)), input_noise=0.1)
    torch.manual_seed(0)
    states = torch.randn(2, 100, 500) * torch.tensor([1.0, 20.0])[:, None, None] + 5
    noise = task._start(states) - states
    rms = states.square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(noise.flatten(1).std(dim=1), 0.1 * rms, rtol=0.02, atol=0)
    assert noise.flatten(1).mean(dim=1).abs().max() < 0.02


def test_layer_variance_is_numpy_s_over_batches_and_processes():
    generator = np.random.default_rng(0)
    # means far from zero, another spread in every layer and feature, images with different numbers of tokens
    spread, mean = generator.uniform(0.1, 3, (LAYERS + 1, 1, DIM)), generator.normal(0, 30, (LAYERS + 1, 1, DIM))
    batches = [generator.normal(0, 1, (size, LAYERS + 1, 7, DIM)) * spread + mean for size in (3, 1, 5)]
    accumulators = [LayerVariance(LAYERS, DIM) for _ in range(2)]
    for index, batch in enumerate(batches):
        accumulators[index % 2].update(torch.from_numpy(batch).float())
    accumulators[0].load_sums(accumulators[0].sums() + accumulators[1].sums())
    expected = np.concatenate(batches).transpose(1, 0, 2, 3).reshape(LAYERS + 1, -1, DIM).var(axis=1).mean(axis=1)
    found = accumulators[0].compute()
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_layer_variance_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="has seen no images"):
        LayerVariance(LAYERS, DIM).compute()


def test_normalized_loss_of_the_mean_state_is_one():
    states = make_states() * torch.linspace(1, 100, LAYERS + 1)[:, None, None]
    accumulator = LayerVariance(LAYERS, DIM)
    accumulator.update(states)
    loss = TrajectoryLoss("mse", TokenLayout(2), accumulator.compute().sqrt())
    for layer in range(1, LAYERS + 1):
        mean = states[:, layer].mean(dim=(0, 1)).expand_as(states[:, layer])
        assert loss(mean, states[:, layer], layer).item() == pytest.approx(1.0, rel=1e-4)
