"""The running average of the weights, against its sum written out."""

import pytest
import torch
from torch import nn

from raptor_hf.recipes.averaging import averaged_weights, update_average


def trained(decay: float, num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer, list[torch.Tensor]]:
    """A layer, its optimizer, and its weights after every step; a second layer never meets a gradient."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.Linear(3, 2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    weights = []
    for step in range(num_steps):
        model[0](torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_average(optimizer, decay, step)
        weights.append(model[0].weight.detach().clone())
    return model, optimizer, weights


@pytest.mark.parametrize("decay, num_steps", [(0.5, 6), (0.999, 30), (0.0, 3), (0.9, 1)])
def test_average_is_the_sum_of_all_weights_with_falling_shares(decay, num_steps):
    model, optimizer, weights = trained(decay, num_steps)
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(num_steps)]
    expected = weights[0].double()
    for weight, factor in zip(weights[1:], decays[1:], strict=True):
        expected = factor * expected + (1 - factor) * weight.double()
    with averaged_weights(optimizer):
        torch.testing.assert_close(model[0].weight, expected.float())
    assert torch.equal(model[0].weight, weights[-1])


def test_weights_come_back_after_an_error_and_without_an_average_stay():
    model, optimizer, weights = trained(0.9, 4)
    untouched = model[1].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), averaged_weights(optimizer):
        assert not torch.equal(model[0].weight, weights[-1]) and torch.equal(model[1].weight, untouched)
        raise KeyboardInterrupt
    assert torch.equal(model[0].weight, weights[-1])
    fresh = torch.optim.AdamW(model.parameters(), lr=0.1)
    update_average(fresh, 0.9, 0)  # before its first step there is nothing to average
    with averaged_weights(fresh):
        assert torch.equal(model[0].weight, weights[-1])


def test_an_optimizer_steps_as_it_does_without_an_average():
    with_average, _, _ = trained(0.9, 5)
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.Linear(3, 2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(5):
        model[0](torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model[0].weight, with_average[0].weight)
