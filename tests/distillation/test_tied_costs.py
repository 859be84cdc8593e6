"""What tying costs: against least squares on what the layers' own modules read, and phases where weights are shared."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from raptor_hf.distillation.tied_costs import tied_costs
from raptor_hf.phases import Partition, cheapest_phases, phases_cost
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import images, tiny_dinov2

IMAGES = images((42, 28), batch=6)


def test_layers_with_the_same_weights_become_one_phase_at_no_cost():
    model = tiny_dinov2()
    layers = model.encoder.layer
    layers[1].load_state_dict(layers[0].state_dict())
    layers[3].load_state_dict(layers[2].state_dict())
    costs = tied_costs(Teacher(model), [IMAGES], ridge=1e-9)
    assert np.isinf(costs[np.tril_indices(4, -1)]).all()
    assert max(np.diagonal(costs).max(), costs[0, 1], costs[2, 3]) < 1e-4 < 1e-2 < min(costs[1, 2], costs[0, 2])
    assert cheapest_phases(costs, 2).phases == [(0, 2), (2, 4)]


def test_cost_of_two_layers_is_what_weighted_least_squares_leaves():
    teacher = Teacher(tiny_dinov2("dinov2"))
    trajectory = teacher.trajectory(IMAGES).double()
    variance = trajectory.var(dim=(0, 2), correction=0).mean(-1)
    expected, first, second = 0.0, teacher.model.encoder.layer[1], teacher.model.encoder.layer[2]
    seen: list[torch.Tensor] = []
    for is_attention in (True, False):
        branch, norm = (first.attention, first.norm1) if is_attention else (first.mlp, first.norm2)
        projection = [module for module in branch.modules() if isinstance(module, torch.nn.Linear)][-1]
        rows, targets, shares = [], [], []
        for layer, module in ((2, first), (3, second)):
            # what the middle layer, the first of the two, reads where the other one is, and what that one adds
            before, after = trajectory[:, layer - 1].float(), trajectory[:, layer].float()
            with torch.no_grad():
                between = before + module.layer_scale1(as_tensor(module.attention(module.norm1(before))))
                source, added = (before, between - before) if is_attention else (between, after - between)
                hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
                branch(norm(source))
                hook.remove()
            rows.append(centered(seen[-1]))
            targets.append(centered(added))
            shares.append(1 / variance[layer].item())
        spreads = [np.linalg.norm(target) for target in targets]
        scales = [spread / np.sqrt(np.mean(np.square(spreads))) for spread in spreads]
        stacked = np.concatenate([np.sqrt(s) * k * x for s, k, x in zip(shares, scales, rows, strict=True)])
        wanted = np.concatenate([np.sqrt(s) * y for s, y in zip(shares, targets, strict=True)])
        weight = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
        for share, scale, x, y in zip(shares, scales, rows, targets, strict=True):
            fit = x @ weight
            pull = 0.01 * (fit**2).sum(0).mean()
            gain = ((fit * y).sum(0) + pull * scale) / ((fit**2).sum(0) + pull)
            expected += share * ((y - gain * fit) ** 2).mean()
    assert tied_costs(teacher, [IMAGES[:2], IMAGES[2:]], ridge=1e-9)[1, 2] == pytest.approx(expected, rel=1e-2)


def as_tensor(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def centered(values: torch.Tensor) -> np.ndarray:
    rows = values.flatten(0, -2).double().numpy()
    return rows - rows.mean(0)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 7])
def test_cheapest_phases_are_those_of_an_exhaustive_search(num_blocks):
    costs = np.random.default_rng(num_blocks).random((7, 7))
    cuts = combinations(range(1, 7), num_blocks - 1)
    best = min(sum(costs[a, b - 1] for a, b in pairwise((0, *cut, 7))) for cut in cuts)
    found = cheapest_phases(costs, num_blocks)
    assert found.objective == pytest.approx(best) == phases_cost(costs, found)
    assert (found.num_blocks, found.method) == (num_blocks, "fitted")
    assert phases_cost(costs, Partition(((1, 3), (2, 4, 5, 6, 7)))) is None


def test_costs_that_are_none_and_images_that_are_missing_are_refused():
    with pytest.raises(ValueError, match=r"costs has the shape \(2, 3\)"):
        cheapest_phases(np.zeros((2, 3)), 2)
    with pytest.raises(ValueError, match="finite"):
        cheapest_phases(np.full((3, 3), np.inf), 2)
    with pytest.raises(ValueError, match="num_blocks"):
        cheapest_phases(np.zeros((3, 3)), 4)
    with pytest.raises(ValueError, match="batches is empty"):
        tied_costs(Teacher(tiny_dinov2()), [])


def test_costs_are_of_the_layers_that_a_teacher_is_read_at():
    model = tiny_dinov2()
    for layer in (model.encoder.layer[0], model.encoder.layer[2]):  # these do nothing, so that each step is one layer
        for scale in (layer.layer_scale1, layer.layer_scale2):
            scale.lambda1.data.zero_()
    costs = tied_costs(Teacher(model, layers=(2, 4)), [IMAGES], ridge=1e-9)
    assert np.diagonal(costs).max() < 1e-4 < 1e-2 < costs[0, 1]
