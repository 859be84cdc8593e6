"""Growth: slopes of known functions, and a training step whose cost is known by hand."""

import numpy as np
import pytest
import torch

from raptor_hf.teacher import macs
from training.benchmarks.growth import (
    StepShape,
    growth,
    log_slope,
    make_step,
    phase_growth,
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
    assert make_step(shape, CPU).states().shape == (8, 3, shape.num_tokens, 32)
    assert shape.num_tokens == 1 + 2 + 36


def test_blocks_share_the_layers_as_equally_as_they_can():
    assert StepShape(num_layers=12, num_blocks=3).partition.block_repeats == (4, 4, 4)
    assert sorted(StepShape(num_layers=12, num_blocks=5).partition.block_repeats) == [2, 2, 2, 3, 3]


def test_a_step_trains_the_blocks_and_nothing_else():
    step = make_step(TINY, CPU)
    before = {name: tensor.clone() for name, tensor in step.task.state_dict().items()}
    step()
    step()  # the first one has no gradient for factors whose partner is still zero
    changed = {name for name, tensor in step.task.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("student.encoder.") for name in changed)
    assert len(changed) == len(sum(step.groups, []))


def test_a_step_costs_the_teachers_forward_and_three_times_the_students():
    step = make_step(TINY, CPU)
    teacher, student = (2 * macs(model, step.images) for model in (step.teacher, step.task.student))
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


def test_the_base_is_measured_even_if_it_is_not_among_the_values():
    (record,) = growth(TINY, {"batch_size": (1,)}, device=CPU, repeats=1, warmup=0)
    assert [point["x"] for point in record["points"]] == [1, 8] and record["base"] == 8


def test_phases_are_timed_for_every_depth():
    record = phase_growth((24, 12, 400), num_blocks=3, repeats=1)
    assert [point["x"] for point in record["points"]] == [12, 24, 400]
    # no cheaper than nothing, and far from cubic: 30 times the layers
    assert 0 < record["time_slope"] < 2.6
