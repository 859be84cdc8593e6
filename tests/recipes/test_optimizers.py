"""Muon beside AdamW: each parameter goes as under the optimizer that it belongs to, also after saving and loading."""

import copy

import pytest
import torch
from torch import nn

from raptor_hf.recipes.optimizers import MuonWithAdamW, check_optimizer, make_optimizer

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 brings Muon")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    model.register_parameter("table", nn.Parameter(torch.randn(2, 3, 4)))
    return model


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 4, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        loss = model(torch.randn(5, 6, generator=generator)).square().mean() + model.table.square().sum()
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            optimizer.step()
            optimizer.zero_grad()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_matrices_go_as_under_muon_and_all_others_as_under_adamw():
    ours, theirs = network(), network()
    parameters = list(theirs.parameters())
    apart = [
        torch.optim.Muon(
            [p for p in parameters if p.ndim == 2], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([p for p in parameters if p.ndim != 2], lr=0.01, weight_decay=0.1),
    ]
    train(ours, [make_optimizer("muon", ours.parameters(), learning_rate=0.01, weight_decay=0.1)])
    train(theirs, apart)
    assert same(ours, theirs) and not same(ours, network())


def test_a_loaded_state_goes_on_to_the_same_bits():
    whole, part = network(), network()
    train(whole, [make_optimizer("muon", whole.parameters(), learning_rate=0.01, weight_decay=0.1)], steps=3)
    first = make_optimizer("muon", part.parameters(), learning_rate=0.01, weight_decay=0.1)
    train(part, [first], steps=3)
    second = make_optimizer("muon", part.parameters(), learning_rate=9.0, weight_decay=0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    continued = copy.deepcopy(part)
    third = make_optimizer("muon", continued.parameters(), learning_rate=0.01, weight_decay=0.1)
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    train(part, [second], steps=2, seed=7)
    train(continued, [third], steps=2, seed=7)
    assert same(part, continued) and not same(part, whole)
    assert second.param_groups[0]["weight_decay"] == 0.1


def test_clearing_the_state_begins_afresh():
    cleared, fresh = network(), network()
    optimizer = make_optimizer("muon", cleared.parameters(), learning_rate=0.01, weight_decay=0.0)
    train(cleared, [optimizer])
    optimizer.state.clear()
    fresh.load_state_dict(cleared.state_dict())
    train(cleared, [optimizer], seed=2)
    train(fresh, [make_optimizer("muon", fresh.parameters(), learning_rate=0.01, weight_decay=0.0)], seed=2)
    assert same(cleared, fresh)


def test_unknown_names_and_models_without_matrices_are_refused():
    with pytest.raises(ValueError, match="'sgd'; it must be one of adamw, muon"):
        make_optimizer("sgd", network().parameters(), learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="with FSDP take 'adamw'"):
        check_optimizer("muon", sharded=True)
    with pytest.raises(ValueError, match="no matrix"):
        make_optimizer("muon", nn.LayerNorm(3).parameters(), learning_rate=0.1, weight_decay=0.0)
    optimizer = MuonWithAdamW(network().parameters(), learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="all its parameters at once"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


def test_muon_is_refused_by_a_torch_without_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="needs PyTorch 2.9"):
        check_optimizer("muon")
