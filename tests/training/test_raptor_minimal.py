"""The method in one file is the method of the package: distances, phases, R2, losses, clipping, steps; and it runs."""

import ast
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raptor_hf import RaptorModel
from raptor_hf.distillation.student import block_parameters
from raptor_hf.distillation.task import DistillationTask, TrajectoryLoss
from raptor_hf.metrics import FidelityAccumulator
from raptor_hf.phases import find_phases
from raptor_hf.research_checkpoints import BLOCK_NAMES, CONDITIONER_NAMES
from raptor_hf.similarity import SimilarityAccumulator
from raptor_hf.tokens import TokenLayout
from tests.support.minimal_student import reference_step, step_weights
from tests.support.tiny_raptors import tiny_model
from training import raptor_minimal
from training.benchmarks.training import MinimalLoop

MINIMAL = Path(raptor_minimal.__file__)
DIM, REGISTERS, LAYERS = 24, 2, 6
STAGES = {"teacher forcing": (1, 1.0), "annealing": (1, 0.5), "autoregressive": (1, 0.0), "stage 2": (2, 0.0)}


def make_student(ffn_type: str) -> RaptorModel:
    return tiny_model(RaptorModel, depth_conditioning="scale", ffn_type=ffn_type).train()


def make_task(student: RaptorModel) -> DistillationTask:
    return DistillationTask(
        student,
        TrajectoryLoss("mse", TokenLayout(REGISTERS)),
        stage1_weights=[0.34, 0.33, 0.33],
        stage2_weights=[0.45, 0.10, 0.45],
    )


def random_states(batch: int = 4, seed: int = 0, scale: float = 1.0) -> Tensor:
    """As if of a teacher, (B, L + 1, T, D)."""
    return scale * torch.randn(batch, LAYERS + 1, 19, DIM, generator=torch.Generator().manual_seed(seed))


def reference_loss(loop: MinimalLoop, states: Tensor) -> Tensor:
    return sum(loss(states.unbind(1)) for loss in loop.losses)


def papers_loss(model: RaptorModel, states: Tensor, stage: int, forcing: float) -> Tensor:
    """Losses written out from section 4, on single steps."""

    def step(state: Tensor, block: int, layer: int) -> Tensor:
        layers = model.config.block_layers[block]
        return reference_step(state, step_weights(model, block), float(layer), layers, model.config)

    def loss(state: Tensor, layer: int, weights: tuple[float, ...] | None) -> Tensor:
        error = (state - states[:, layer]).square()
        if weights is None:
            return error.mean()
        groups = error[:, :1], error[:, 1 : 1 + REGISTERS], error[:, 1 + REGISTERS :]
        return sum(weight * group.mean() for weight, group in zip(weights, groups, strict=True))

    if stage == 2:
        state, total = states[:, 0], 0.0
        for layer, (block, _) in enumerate(model.config.step_plan(), start=1):
            state = step(state, block, layer)
            total = total + loss(state, layer, (0.45, 0.10, 0.45)) / LAYERS
        return total
    total = 0.0
    for block, layers in enumerate(model.config.block_layers):
        weights = (0.34, 0.33, 0.33) if LAYERS in layers else None
        state = states[:, layers[0] - 1]
        for layer in layers:
            state = step(state, block, layer)
            forced = loss(step(states[:, layer - 1], block, layer), layer, weights)
            total = total + (forcing * forced + (1 - forcing) * loss(state, layer, weights)) / len(layers)
    return total


@pytest.mark.parametrize("batch", [1, 4], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("stage, forcing", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("ffn_type", ["mlp", "swiglu"])
def test_losses_are_ours_and_those_of_the_paper(ffn_type, stage, forcing, batch):
    student, states = make_student(ffn_type), random_states(batch)
    with torch.no_grad():
        reference = reference_loss(MinimalLoop(student, 1e-4, stage, forcing), states)
        ours = make_task(student)(states, stage=stage, forcing=forcing)["loss"]
        paper = papers_loss(student, states, stage, forcing)
    torch.testing.assert_close(reference, paper, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)


def train_ours(student: RaptorModel, stage: int, forcing: float, together: bool) -> list[float]:
    """Three steps as the recipe takes them, gradients clipped for all blocks together or for each; the losses."""
    task = make_task(student)
    groups = [block_parameters(student, block) for block in range(student.config.num_blocks)]
    optimizer = torch.optim.AdamW(sum(groups, []), lr=1e-3, weight_decay=1e-4, fused=True)
    losses = []
    for states in batches():
        loss = task(states, stage=stage, forcing=forcing)["loss"]
        loss.backward()
        for group in [sum(groups, [])] if together else groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batches() -> list[Tensor]:
    """Of very different sizes, so that it shows how gradients are clipped."""
    return [random_states(seed=seed, scale=scale) for seed, scale in enumerate((1.0, 0.1, 3.0))]


def largest_difference(student: RaptorModel, loop: MinimalLoop) -> float:
    """Between weights of both, those left out whose gradient is nothing but rounding."""
    differences = []
    for index, theirs in enumerate(loop.blocks):
        ours = dict(student.encoder.blocks[index].named_parameters())
        gains = dict(student.encoder.conditioners[index].named_parameters())
        for name, parameter in theirs.named_parameters():
            own = ours[BLOCK_NAMES[name]] if name in BLOCK_NAMES else gains[CONDITIONER_NAMES[name]]
            difference = (own - parameter).abs()
            if name == "attn.in_proj_bias":
                difference[DIM : 2 * DIM] = 0  # keys: the softmax does not see it, and AdamW makes steps of rounding
            differences.append(difference.max().item())
    return max(differences)


@pytest.mark.parametrize("stage, forcing", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("ffn_type", ["mlp", "swiglu"])
def test_weights_are_the_same_after_three_steps(ffn_type, stage, forcing):
    student = make_student(ffn_type)
    loop, before = MinimalLoop(student, 1e-3, stage, forcing), copy.deepcopy(student)
    reference = [loop.step(states.unbind(1)) for states in batches()]
    ours = train_ours(student, stage, forcing, together=stage == 2)
    assert ours == pytest.approx(reference, rel=1e-4)
    assert largest_difference(student, loop) < 1e-4
    assert largest_difference(before, loop) > 1e-3
    # and it would show if the blocks of stage 1 shared a gradient norm, or those of stage 2 did not
    train_ours(before, stage, forcing, together=stage == 1)
    assert largest_difference(before, loop) > 2e-4


def test_the_loop_has_weights_of_its_own():
    student = make_student("mlp")
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    MinimalLoop(student, 1e-3, stage=2).step(random_states().unbind(1))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in student.state_dict().items())


def test_stage_1_returns_the_sum_of_the_losses_before_the_step():
    loop, states = MinimalLoop(make_student("swiglu"), 1e-3, stage=1, forcing=0.5), random_states()
    with torch.no_grad():
        before = reference_loss(loop, states).item()
    assert loop.step(states.unbind(1)) == pytest.approx(before, rel=1e-6)
    assert reference_loss(loop, states).item() < before


def test_it_imports_nothing_of_the_package():
    imported = set()
    for node in ast.walk(ast.parse(MINIMAL.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported == {"math", "pathlib", "torch", "sklearn", "transformers"}


def test_distances_and_phases_are_those_of_the_package():
    for seed in range(5):
        states = random_states(seed=seed)
        accumulator = SimilarityAccumulator(LAYERS, TokenLayout(REGISTERS))
        accumulator.update(states)
        distance = raptor_minimal.layer_distance(states.unbind(1), REGISTERS)
        np.testing.assert_allclose(distance.numpy(), accumulator.compute(), rtol=0, atol=1e-7)
        for num_blocks in (1, 2, 3):
            found = raptor_minimal.find_phases(distance, num_blocks)
            assert tuple(map(tuple, found)) == find_phases(accumulator.compute(), num_blocks).blocks


def test_of_tied_phases_it_too_takes_the_later():
    ties = np.ones((6, 6)) - np.eye(6)
    for num_blocks in (1, 2, 3):
        found = raptor_minimal.find_phases(torch.from_numpy(ties), num_blocks)
        assert tuple(map(tuple, found)) == find_phases(ties, num_blocks).blocks


def test_r2_is_that_of_the_package():
    teacher = random_states(seed=1)
    student = teacher + 0.2 * random_states(seed=2)
    accumulator = FidelityAccumulator(LAYERS, TokenLayout(REGISTERS))
    accumulator.update(teacher, student)
    own = raptor_minimal.r_squared(student.unbind(1)[1:], teacher.unbind(1)[1:])
    assert own == pytest.approx(accumulator.compute().r2.tolist(), abs=1e-5)


@pytest.mark.slow
def test_a_few_steps_explain_most_of_the_digits_teacher(capsys):
    explained = raptor_minimal.main(stage1_steps=40, stage2_steps=80)
    assert len(explained) == 12 and explained[-1] > 0.6
    assert "phases: layers 1-2, layers 3-5, layers 6-12" in capsys.readouterr().out
