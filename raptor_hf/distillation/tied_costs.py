"""Measures for every run of layers the error that one block makes in their place, without training.

    costs = tied_costs(teacher, batches_of_pixel_values)   # (L, L)
    partition = cheapest_phases(costs, num_blocks=3)

Two layers can give similar states and still do different things to them; a distance between states does not show this.
Here one block starts from the middle layer of a run, and its last projections are fitted in closed form, as in `start`,
to what each layer of the run adds to the teacher's states. The error that remains is the cost of the run. A student
with `unit_gains` has blocks of another kind, whose costs are `gathered_costs`.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..conversion import student_from_teacher
from ..modeling_raptor import RaptorBlock
from ..teacher import Teacher
from .start import (
    BRANCHES,
    NormalEquations,
    Positions,
    TokenSample,
    between_branches,
    run_teacher,
    solve_tied,
    watch_branches,
    watch_layers,
)
from .units import head_variances, inverse_variance, lasting_weights, scaled_projections


@torch.no_grad()
def tied_costs(teacher: Teacher, batches: Iterable[Tensor], *, ridge: float = 0.03) -> np.ndarray:
    """Returns the cost of every run of layers: squared error over the teacher's variance, summed over its layers.

    Each branch of the block gets one last projection for all layers of the run, and for each layer a gain and a shift
    per feature. Errors do not add up from layer to layer here: every layer starts from the teacher's state.

    Args:
        teacher: of a family whose layers can become blocks.
        batches: of pixel values, (B, C, H, W), on the device; 64 photographs are enough. Two trajectories of each
            are kept in memory.
        ridge: strength of the pull towards the middle layer, relative to the features' mean square.

    Returns:
        (L, L), float64; entry [s, e] is of layers s + 1..e + 1, infinite below the diagonal and near zero on it.

    Raises:
        ValueError: if there is no batch, or the teacher's layers cannot become blocks.
    """
    num_layers = teacher.num_layers
    student = student_from_teacher(teacher, (num_layers,), init="first", depth_conditioning="none").eval()
    student.to(teacher.model.device)
    encoder, block = student.base_model.encoder, student.base_model.encoder.blocks[0]
    block.requires_grad_(False)
    trajectories, positions, variance = run_teacher(teacher, encoder, batches)
    weights = inverse_variance(variance)
    middles = between_branches(teacher, trajectories, positions)

    costs, sample = np.full((num_layers, num_layers), np.inf), TokenSample()
    for middle in range(1, num_layers + 1):
        block.load_state_dict(teacher.block_state_dict(teacher.span(middle)[-1]))
        torch.clear_autocast_cache()  # which has a half-precision copy of the weights before
        priors = [projection.T for projection in scaled_projections(block.state_dict())]
        ends = [(start, 2 * middle - start + odd) for start in range(1, middle + 1) for odd in (0, 1)]
        spans = [(start, end) for start, end in ends if end <= num_layers]
        sums = {
            layer: _layer_sums(block, layer, trajectories, middles, positions, sample)
            for layer in range(min(start for start, _ in spans), max(end for _, end in spans) + 1)
        }
        for start, end in spans:
            layers, cost = range(start, end + 1), 0.0
            importance = [weights[layer] / teacher.hidden_size for layer in layers]
            for branch, prior in enumerate(priors):
                errors = solve_tied([sums[layer][branch] for layer in layers], importance, prior, ridge).errors
                cost += sum(float(share) * error for share, error in zip(importance, errors, strict=True))
            costs[start - 1, end - 1] = cost
    return costs


def _layer_sums(
    block: RaptorBlock,
    layer: int,
    trajectories: list[Tensor],
    middles: list[Tensor],
    positions: list[Positions],
    sample: TokenSample,
) -> list[NormalEquations]:
    """What the last projection of each branch reads in the teacher's states at a layer, and what it should add."""
    sums = []
    for name, *_ in BRANCHES.values():
        projection = block.get_submodule(name)
        sums.append(NormalEquations(projection.in_features, projection.out_features, device=projection.weight.device))
    for trajectory, middle, own in zip(trajectories, middles, positions, strict=True):
        before, between, after = trajectory[layer - 1].float(), middle[layer].float(), trajectory[layer].float()
        with watch_branches(block) as seen:
            block.attention(block.norm1(before), positions=own)
            block.ffn(block.norm2(between))
        chosen = sample(before)
        sums[0].add(seen["attention"][:, chosen], (between - before)[:, chosen])
        sums[1].add(seen["ffn"][:, chosen], (after - between)[:, chosen])
    return sums


@torch.no_grad()
def gathered_costs(
    teacher: Teacher,
    batches: Iterable[Tensor],
    *,
    width: int | None = None,
    num_heads: int | None = None,
    ridge: float = 0.01,
) -> np.ndarray:
    """Returns the cost of every run of layers as one block that gathers their units, as `units.gather_units` does.

    In a run of n layers each keeps the nth part of a block's heads and neurons, its own most important; the error is
    what their best linear combination leaves of each branch. An error stays in the tokens: it counts in its own layer
    and in all later ones, relative to the teacher's variance there. So early layers weigh most.

    Args:
        teacher: of a family whose layers can become blocks.
        batches: of pixel values, (B, C, H, W), on the device; 64 photographs are enough. Their trajectories are kept
            in memory.
        width: neurons of a block; None takes those of the teacher's layers.
        num_heads: heads of a block; None takes those of the teacher's layers.
        ridge: added to the units' covariance, relative to its mean diagonal.

    Returns:
        (L, L), float64; entry [s, e] is of layers s + 1..e + 1, infinite below the diagonal; near zero on it, where a
        block has as many units as a layer.

    Raises:
        ValueError: if there is no batch, or the teacher's layers cannot become blocks.
    """
    num_layers = teacher.num_layers
    student = student_from_teacher(teacher, (num_layers,), init="random").eval().to(teacher.model.device)
    trajectories, positions, variance = run_teacher(teacher, student.base_model.encoder, batches)
    sample, lost = TokenSample(), np.zeros((num_layers, num_layers))  # by layer and number of layers in its run
    for layer, block, seen_in in watch_layers(teacher, trajectories, positions):
        heads, neurons = [], []
        for seen in seen_in:
            chosen = sample(seen["middle"])
            heads.append(seen["attention"][:, chosen].flatten(0, 1))
            neurons.append(seen["ffn"][:, chosen].flatten(0, 1))
        projections, own_heads = scaled_projections(block.state_dict()), block.attention.num_heads
        attention = _lost_by_heads(_covariance(heads, ridge), projections[0], own_heads)
        covariance, projection = _covariance(neurons, ridge), projections[1]
        order = (covariance.diagonal() * projection.square().sum(0)).argsort(descending=True)
        for run in range(1, num_layers + 1):
            kept = order[: (width or len(order)) // run]
            lost[layer - 1, run - 1] = np.interp((num_heads or own_heads) / run, range(own_heads + 1), attention)
            lost[layer - 1, run - 1] += _lost(covariance, projection, kept)
    weights = lasting_weights(variance)[1:].cpu().numpy() / teacher.hidden_size
    costs = np.full((num_layers, num_layers), np.inf)
    for start in range(num_layers):
        for end in range(start, num_layers):
            costs[start, end] = (weights[start : end + 1] * lost[start : end + 1, end - start]).sum()
    return costs


def _covariance(batches: list[Tensor], ridge: float) -> Tensor:
    rows = torch.cat(batches).float()
    with torch.autocast(rows.device.type, enabled=False):
        covariance = torch.cov(rows.T, correction=0).double()
    # units of a layer that adds nothing have no variance at all
    covariance.diagonal().add_((ridge * covariance.diagonal().mean()).clamp(min=1e-30))
    return covariance


def _lost(covariance: Tensor, projection: Tensor, kept: Tensor) -> float:
    """Variance of units @ projection.T, summed over features, that no linear function of the kept units explains."""
    rest = torch.ones(len(covariance), dtype=torch.bool, device=covariance.device)
    rest[kept] = False
    across = covariance[kept][:, rest]
    left = covariance[rest][:, rest] - across.T @ torch.linalg.solve(covariance[kept][:, kept], across)
    return float(((projection[:, rest] @ left) * projection[:, rest]).sum())


def _lost_by_heads(covariance: Tensor, projection: Tensor, num_heads: int) -> list[float]:
    """The same with the best 0, 1, 2, ... heads."""
    order = head_variances(covariance, projection, num_heads).argsort(descending=True)
    channels = torch.arange(len(covariance), device=order.device).view(num_heads, -1)[order].flatten()
    size = len(covariance) // num_heads
    return [_lost(covariance, projection, channels[: number * size]) for number in range(num_heads + 1)]
