"""Growth: slopes of known functions, and a training step whose cost is known by hand."""

import math
import os

import numpy as np
import pytest
import torch

import training.benchmarks.growth as benchmark_growth
from raptor_hf.teacher import macs
from training.benchmarks.growth import (
    LAUNCHES,
    StepShape,
    TrainingStep,
    growth,
    log_slope,
    phase_growth,
    process_scaling,
    rate_after_warmup,
)
from training.benchmarks.measuring import count_flops

CPU = torch.device("cpu")
# with more tokens in a batch than any layer has inputs: with fewer the blocks keep other tensors for the gradient
TINY = StepShape(num_layers=4, num_blocks=2, hidden_size=32, image_size=8, batch_size=8)


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    values = {"num_layers": (2, 4, 8), "batch_size": (8, 16, 32), "num_blocks": (1, 2, 4), "image_size": (8, 16)}
    return {record["symbol"]: record for record in growth(TINY, values, device=CPU, repeats=1, warmup=1)}


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_slope_of_a_power_is_its_exponent(power):
    x = np.array([3, 7, 50, 400])
    assert log_slope(x, 0.02 * x**power) == pytest.approx(power, abs=1e-9)


def test_the_tokens_are_those_that_the_teacher_has():
    shape = StepShape(num_layers=2, num_blocks=1, hidden_size=32, image_size=12)
    assert TrainingStep(shape, CPU).states().shape == (8, 3, shape.num_tokens, 32)
    assert shape.num_tokens == 1 + 2 + 36


def test_blocks_share_the_layers_as_equally_as_they_can():
    assert StepShape(num_layers=12, num_blocks=3).partition.block_repeats == (4, 4, 4)
    assert sorted(StepShape(num_layers=12, num_blocks=5).partition.block_repeats) == [2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "fields", [{"hidden_size": 100}, {"image_size": 9}, {"num_blocks": 13}, {"num_blocks": 0}], ids=str
)
def test_a_shape_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        StepShape(**fields)


def test_a_step_trains_the_blocks_and_nothing_else():
    step = TrainingStep(TINY, CPU)
    before = {name: tensor.clone() for name, tensor in step.task.state_dict().items()}
    step()
    changed = {name for name, tensor in step.task.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("student.encoder.") for name in changed)
    assert len(changed) == len(step.trained)


def test_a_step_costs_the_teachers_forward_and_three_times_the_students():
    step = TrainingStep(TINY, CPU)
    teacher, student = (2 * macs(model, step.pixel_values) for model in (step.teacher, step.task.student))
    # not three times the embeddings, whose output both share; the first step needs no gradient of its input
    expected = TINY.batch_size * (teacher + 3 * student)
    assert 0.85 * expected < count_flops(step) < 1.02 * expected


@pytest.mark.parametrize("quantity", ["flops", "saved_bytes"])
@pytest.mark.parametrize("symbol", ["L", "B"])
def test_twice_the_layers_or_images_add_twice_the_work_and_memory(records, symbol, quantity):
    # not a share: what the weights alone cost is the same for any batch, and no small part of so small a model
    small, middle, large = (point[quantity] for point in records[symbol]["points"])
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.01)


def test_more_blocks_cost_neither_work_nor_memory(records):
    assert abs(records["k"]["flops_slope"]) < 0.01 and abs(records["k"]["memory_slope"]) < 0.01


def test_the_points_are_ratios_to_the_base_in_the_order_of_the_variable(records):
    assert [point["x"] for point in records["L"]["points"]] == [2, 4, 8]
    assert [point["x"] for point in records["T"]["points"]] == [19, 67]
    for record in records.values():
        base = next(point for point in record["points"] if point["x"] == record["base"])
        assert base["time_ratio"] == base["memory_ratio"] == base["flops_ratio"] == 1
        for point in record["points"]:
            assert point["memory_ratio"] == point["saved_bytes"] / base["saved_bytes"]
            assert point["time_ratio"] == pytest.approx(point["seconds"] / base["seconds"])  # of one repetition
    assert records["T"]["points"][1]["states_bytes"] == 4 * 8 * 5 * 67 * 32


def test_the_base_is_measured_even_if_it_is_not_among_the_values():
    (record,) = growth(TINY, {"batch_size": (1,)}, device=CPU, repeats=1, warmup=0)
    assert [point["x"] for point in record["points"]] == [1, 8] and record["base"] == 8


@pytest.mark.parametrize("values", [{"depth": (1, 2)}, {"batch_size": (8,)}, {"num_blocks": (1, 9)}], ids=str)
def test_values_that_mean_nothing_are_refused_before_anything_runs(values, monkeypatch):
    monkeypatch.setattr(benchmark_growth, "alternate", None)
    with pytest.raises(ValueError, match=next(iter(values))):
        growth(TINY, values, device=CPU)


def test_phases_are_timed_for_every_depth():
    record = phase_growth((24, 12, 400), num_blocks=3, repeats=1)
    assert [point["x"] for point in record["points"]] == [12, 24, 400]
    assert record["points"][0]["time_ratio"] == 1
    # no cheaper than nothing, and far from cubic: 30 times the layers
    assert 0 < record["time_slope"] < 2.6


def test_the_rate_leaves_the_first_interval_out():
    history = [
        {"images_per_second": 1.0, "seconds": 100.0},
        {"images_per_second": 50.0, "seconds": 102.0},
        {"images_per_second": 25.0, "seconds": 106.0},
    ]
    assert rate_after_warmup(history) == pytest.approx((2 * 50 + 4 * 25) / 6)
    with pytest.raises(ValueError, match="at least 2"):
        rate_after_warmup(history[:1])


def test_processes_are_compared_run_by_run(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    rates = {LAUNCHES[0]: iter([10.0, 20.0, 40.0]), LAUNCHES[1]: iter([15.0] * 3), LAUNCHES[2]: iter([19.0, 38, 76])}
    monkeypatch.setattr(benchmark_growth, "_launched", lambda launch, config, settings: (next(rates[launch]), 0.5))
    one, threads, processes = process_scaling(repeats=3)["launches"]
    assert [launch["name"] for launch in (one, threads, processes)] == [
        "1 process x 1 thread",
        "1 process x 2 threads",
        "2 processes x 1 thread",
    ]
    assert one["speedup"] == 1
    assert processes["speedup"] == pytest.approx(1.9) and processes["speedup_quartiles"] == pytest.approx([1.9, 1.9])
    assert threads["speedup"] == pytest.approx(0.75)
    assert processes["images_per_second"] == [19.0, 38.0, 76.0]


def test_two_processes_are_not_measured_on_one_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert "may use 1" in process_scaling()["skipped"]


@pytest.mark.slow
def test_a_run_that_fails_says_why():
    with pytest.raises(RuntimeError, match="1 process x 1 thread.*batch_size is 0"):
        benchmark_growth._launched(LAUNCHES[0], "training/configs/distill/digits_k3.yaml", {"batch_size": 0})


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    settings = {"batch_size": 8, "stage2_steps": 4, "log_every": 2, "checkpoint_every": 4, "warmup_steps": 1}
    settings |= {"phase_images": 16, "num_bootstraps": 0, "eval_images": 10, "eval_batch_size": 10}
    config = "training/configs/distill/digits_k3.yaml"
    (_, one), (rate, two) = (benchmark_growth._launched(launch, config, settings) for launch in LAUNCHES[::2])
    assert one == pytest.approx(two, rel=1e-4) and math.isfinite(rate) and rate > 0
