"""Muon beside AdamW: each parameter goes as under the optimizer that it belongs to, also after saving and loading."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from raptor_hf import RaptorModel
from raptor_hf.recipes.optimizers import (
    ADAMW_SHARE,
    MuonWithAdamW,
    check_optimizer,
    make_optimizer,
    orthogonalized,
)
from tests.support.tiny_models import randomize
from tests.support.tiny_raptors import tiny_config


@pytest.fixture(params=["bf16", "no"])
def precision(request) -> str:
    """Of the run, which Muon follows."""
    return request.param


def network() -> RaptorModel:
    """A student of 2 blocks, conditioned by tables and factors, all of it random."""
    return randomize(RaptorModel(tiny_config(block_repeats=(2, 1), depth_conditioning="low_rank", branch_shifts=True)))


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices that Muon takes, named one by one, and all other parameters."""
    names = ("attention.qkv.weight", "attention.proj.weight", "ffn.fc1.weight", "ffn.fc2.weight")
    wanted = {f"encoder.blocks.{block}.{name}" for block in (0, 1) for name in names}
    named = dict(model.named_parameters())
    return [named[name] for name in sorted(wanted)], [value for name, value in named.items() if name not in wanted]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 4, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        model(torch.randn(2, 3, 16, 16, generator=generator)).last_hidden_state.square().mean().backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            optimizer.step()
            optimizer.zero_grad()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_each_step_of_a_matrix_is_the_learning_rate_times_its_size():
    # of any shape and size: Muon's own steps differ from an orthogonal one's by what its five iterations leave
    for shape, size in (((8, 8), 1.0), ((32, 8), 0.1), ((8, 96), 0.01)):
        matrix = nn.Parameter(size * torch.randn(shape, generator=torch.Generator().manual_seed(2)))
        before, rms = matrix.detach().clone(), float(matrix.detach().square().mean().sqrt())
        optimizer = MuonWithAdamW([matrix], [], learning_rate=0.1, weight_decay=0.0)
        for _ in range(2):  # the second step is measured by the size at the start, too
            matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
            optimizer.step()
            step = float((matrix.detach() - before).square().mean().sqrt())
            assert step == pytest.approx(0.1 * rms, rel=0.3)
            before = matrix.detach().clone()


def test_a_matrix_of_zeros_leaves_zero():
    matrix = nn.Parameter(torch.zeros(6, 12))
    matrix.grad = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))
    MuonWithAdamW([matrix], [], learning_rate=0.1, weight_decay=0.0).step()
    assert float(matrix.detach().square().mean().sqrt()) == pytest.approx(0.1 / 6, rel=0.3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 brings Muon")
def test_the_blocks_matrices_go_as_under_pytorch_s_muon_and_all_others_as_under_adamw(precision):
    ours, theirs = network(), network()
    matrices, others = split(theirs)
    # PyTorch's own scaling gives every step a root mean square of .2 times its rate
    rates = [float(matrix.detach().square().mean().sqrt()) / 0.2 for matrix in matrices]
    muons = [
        torch.optim.Muon([matrix], lr=1.0, weight_decay=0.1 / rate, adjust_lr_fn="match_rms_adamw")
        for matrix, rate in zip(matrices, rates, strict=True)
    ]
    adamw = torch.optim.AdamW(others, lr=1.0, weight_decay=0.1)
    for optimizer, rate in zip([*muons, adamw], [*rates, ADAMW_SHARE], strict=True):
        optimizer.step = partial(_at_rate, optimizer, optimizer.step, rate)
    start = copy.deepcopy(ours)
    train(ours, [make_optimizer("muon", ours, learning_rate=0.01, weight_decay=0.1, mixed_precision=precision)])
    train(theirs, [*muons, adamw])
    if precision == "bf16":  # as PyTorch's is in every run
        torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), atol=1e-6, rtol=1e-5)
    for one, other, before in zip(split(ours)[0], matrices, split(start)[0], strict=True):
        # PyTorch's loses some of the smallest directions in bf16
        assert (one - other).norm() < (1e-3 if precision == "bf16" else 0.25) * (one - before).norm()
    assert not same(ours, start)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.05), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (24, 24)])
def test_orthogonalised_matrices_keep_their_directions_and_all_have_about_the_same_length(shape, dtype, error):
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(draw, full_matrices=False)
    found = orthogonalized((left * torch.logspace(-1, 1, min(shape)) @ right).to(dtype))
    assert found.dtype == dtype and found.shape == shape
    lengths = left.T @ found.float() @ right.T
    assert (0.65 < lengths.diag()).all() and (lengths.diag() < 1.25).all()
    assert (lengths - lengths.diag().diag()).abs().max() < error


def test_a_gradient_of_zeros_gives_no_step():
    assert orthogonalized(torch.zeros(4, 6)).abs().max() == 0


def _at_rate(optimizer: torch.optim.Optimizer, step, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= rate
    step()


def test_a_loaded_state_goes_on_to_the_same_bits():
    whole, part = network(), network()
    train(whole, [make_optimizer("muon", whole, learning_rate=0.01, weight_decay=0.1)], steps=3)
    first = make_optimizer("muon", part, learning_rate=0.01, weight_decay=0.1)
    train(part, [first], steps=3)
    second = make_optimizer("muon", part, learning_rate=9.0, weight_decay=0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    continued = copy.deepcopy(part)
    third = make_optimizer("muon", continued, learning_rate=0.01, weight_decay=0.1)
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    train(part, [second], steps=2, seed=7)
    train(continued, [third], steps=2, seed=7)
    assert same(part, continued) and not same(part, whole)
    assert second.param_groups[0]["weight_decay"] == 0.1


def test_clearing_the_state_begins_afresh():
    cleared, fresh = network(), network()
    optimizer = make_optimizer("muon", cleared, learning_rate=0.01, weight_decay=0.0)
    train(cleared, [optimizer])
    optimizer.state.clear()
    fresh.load_state_dict(cleared.state_dict())
    train(cleared, [optimizer], seed=2)
    train(fresh, [make_optimizer("muon", fresh, learning_rate=0.01, weight_decay=0.0)], seed=2)
    assert same(cleared, fresh)


def test_unknown_names_and_models_without_matrices_are_refused():
    with pytest.raises(ValueError, match="'sgd'; it must be one of adamw, muon"):
        make_optimizer("sgd", network(), learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="with FSDP take 'adamw'"):
        check_optimizer("muon", sharded=True)
    with pytest.raises(ValueError, match="no matrix"):
        make_optimizer("muon", nn.Linear(3, 3), learning_rate=0.1, weight_decay=0.0)
    optimizer = MuonWithAdamW(*split(network()), learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(ValueError, match="all its parameters at once"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
