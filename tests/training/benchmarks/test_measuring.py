"""Measuring tools against what is known beforehand: counts by hand, orders of calls, memory that is really taken."""

import gc
import time

import pytest
import torch
from torch import nn

from raptor_hf.teacher import macs
from tests.support.tiny_models import images, tiny_dinov2
from training.benchmarks import measuring
from training.benchmarks.measuring import (
    Comparison,
    alternate,
    count_flops,
    matmul_peak,
    saved_bytes,
)

CPU = torch.device("cpu")


def test_a_comparison_is_of_pairs_not_of_medians():
    # the machine slows down for a while: the medians of both would say 1.5
    comparison = Comparison([2.0, 4.0, 6.0], [1.0, 4.0, 2.0])
    assert comparison.speedup == 2.0
    assert comparison.ratio == 0.5
    assert comparison.quartiles == (1.5, 2.5)
    assert comparison.to_dict() == {"speedup": 2.0, "speedup_quartiles": [1.5, 2.5]}


@pytest.mark.parametrize("pair", [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([float("nan")], [1.0])])
def test_a_comparison_refuses_what_are_no_pairs_of_times(pair):
    with pytest.raises(ValueError, match="seconds"):
        Comparison(*pair)


def test_alternate_takes_turns_and_turns_round():
    calls = []
    times = alternate([lambda: calls.append("a"), lambda: calls.append("b")], repeats=3, warmup=1, device=CPU)
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert times.shape == (2, 3) and (times > 0).all()


def test_alternate_times_each_function_by_itself(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    times = alternate([lambda: work(2.0), lambda: work(0.5)], repeats=3, warmup=1, device=CPU)
    assert times.tolist() == [[2.0] * 3, [0.5] * 3]


def test_alternate_collects_no_garbage_while_timing_and_does_again_afterwards():
    seen = []
    alternate([lambda: seen.append(gc.isenabled())], repeats=2, warmup=0, device=CPU)
    assert seen == [False, False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        alternate([lambda: 1 / 0], repeats=1, warmup=0, device=CPU)
    assert gc.isenabled()


@pytest.mark.parametrize("numbers", [{"repeats": 0, "warmup": 1}, {"repeats": 1, "warmup": -1}])
def test_alternate_refuses_numbers_out_of_range(numbers):
    with pytest.raises(ValueError, match="repeats is"):
        alternate([lambda: None], device=CPU, **numbers)


def test_saved_bytes_are_those_of_the_operands_that_backward_needs():
    x, weight = torch.randn(10, 20), torch.randn(20, 30, requires_grad=True)
    # x for the gradient of the weight; the exponential keeps its own output
    assert saved_bytes(lambda: (x @ weight).exp().sum(), exclude=[weight]) == 4 * (10 * 20 + 10 * 30)
    assert saved_bytes(lambda: (x @ weight).sum(), exclude=[weight, x]) == 0


def test_a_storage_saved_twice_counts_once():
    x = torch.randn(8, 8, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum() + (x[:2] * x[2:4]).sum()) == 4 * 8 * 8


def test_storages_that_are_let_go_are_not_taken_for_one():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: [x.exp().sum().backward() for _ in range(5)]) == 5 * 4 * 1000


def test_nothing_is_saved_without_gradients():
    x = torch.randn(8, 8, requires_grad=True)
    assert saved_bytes(torch.no_grad()(lambda: (x @ x).exp())) == 0


def test_flops_of_a_chain_of_matrix_products_are_counted_by_hand():
    x, layers = torch.randn(7, 16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    forward = 2 * 7 * (16 * 32 + 32 * 8)
    assert count_flops(lambda: layers(x)) == forward
    # backward: the gradients of both weights, and of the second layer's input only
    assert count_flops(lambda: layers(x).sum().backward()) == 2 * forward + 2 * 7 * 32 * 8


def test_flops_of_attention_are_two_products_forward_and_four_backward():
    query, key, value = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))

    def attend() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value)

    product = 2 * (2 * 3) * 5 * 5 * 4
    assert count_flops(attend) == 2 * product
    assert count_flops(lambda: attend().sum().backward()) == 6 * product


def test_flops_of_a_model_are_twice_its_multiply_accumulates():
    model, pixels = tiny_dinov2(), images(batch=1)
    assert count_flops(lambda: model(pixels)) == 2 * macs(model, pixels)


def test_the_peak_is_at_least_what_a_plain_product_reaches():
    left = torch.randn(256, 256)
    began = time.perf_counter()
    for _ in range(20):
        left @ left
    plain = 20 * 2 * 256**3 / (time.perf_counter() - began)
    # the best of many, with room for a disturbed machine
    assert matmul_peak(CPU, torch.float32, size=256, seconds=0.2) > 0.7 * plain


def test_the_peak_counts_two_operations_per_multiply_accumulate(monkeypatch):
    monkeypatch.setattr(measuring, "_least_seconds", lambda function, device, seconds: 1.0)
    # the largest of the shapes, (128, 32, 128)
    assert matmul_peak(CPU, torch.float32, size=64) == 2 * 128 * 32 * 128
