"""The parts around the training loops: schedule, log lines, guards, result files."""

import json
import logging
import math
import os
import platform
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from raptor_hf.recipes import loop
from raptor_hf.recipes.files import write_json
from raptor_hf.recipes.loop import (
    DivergedError,
    IntervalLog,
    NonFiniteError,
    NonFiniteGuard,
    RisingLossGuard,
    cosine_schedule,
    describe_environment,
    logged,
    multiplies_in_bf16,
    peak_memory_bytes,
    precision_of,
    warn_if_single_thread,
    warn_if_slow_precision,
)

PAPER = {"num_steps": 312_500, "warmup_steps": 10_000, "base_lr": 3e-4, "final_lr": 1e-6}


def process(rank: int = 0, num_processes: int = 1, device: str = "cpu", reduce=lambda tensor, reduction: tensor):
    """What IntervalLog sees of an Accelerator."""
    return SimpleNamespace(
        is_main_process=rank == 0, num_processes=num_processes, device=torch.device(device), reduce=reduce
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock.now)
    return clock


def test_schedule_is_zero_full_and_final_where_the_paper_says():
    assert cosine_schedule(0, **PAPER) == 0.0
    assert cosine_schedule(10_000, **PAPER) == 3e-4
    assert cosine_schedule(312_499, **PAPER) == 1e-6
    assert cosine_schedule(10**9, **PAPER) == 1e-6


def test_schedule_equals_torch_linear_then_cosine():
    settings = {"num_steps": 50, "warmup_steps": 10, "base_lr": 0.3, "final_lr": 0.01}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=39, eta_min=0.01)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[10])
    for step in range(50):
        assert cosine_schedule(step, **settings) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), step
        optimizer.step()
        schedule.step()


def test_schedule_of_a_single_step_trains():
    assert cosine_schedule(0, num_steps=1, warmup_steps=0, base_lr=0.5, final_lr=0.1) == 0.5


@pytest.mark.parametrize("warmup_steps", [-1, 5, 6])
def test_schedule_whose_warmup_takes_the_whole_run_is_refused(warmup_steps):
    with pytest.raises(ValueError, match=f"warmup_steps is {warmup_steps}; .*num_steps, 5"):
        cosine_schedule(0, num_steps=5, warmup_steps=warmup_steps, base_lr=1.0, final_lr=0.0)


def test_guard_ends_the_run_at_the_first_bad_step_and_names_the_images():
    guard = NonFiniteGuard()
    assert guard.check(1, True, ["a.png"]) is True
    with pytest.raises(NonFiniteError, match=r"at step 2 \(1 in a row, 0 allowed\), images b.png, c.png\."):
        guard.check(2, False, ["b.png", "c.png"])


def test_guard_counts_bad_steps_in_a_row_only():
    guard = NonFiniteGuard(max_in_a_row=2)
    judged = [guard.check(step, finite, ["x"]) for step, finite in enumerate([False, False, True, False, False])]
    assert judged == [False, False, True, False, False] and guard.num_skipped == 4
    with pytest.raises(NonFiniteError, match=r"at step 5 \(3 in a row, 2 allowed\)"):
        guard.check(5, False, ["x"])


def test_guard_names_only_some_images_of_a_large_batch():
    with pytest.raises(NonFiniteError, match="images 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"):
        NonFiniteGuard().check(1, False, range(100))


def test_a_loss_that_stays_above_its_start_ends_the_run_and_says_what_to_change():
    guard = RisingLossGuard(max_in_a_row=3, num_steps=100)
    for step, loss in enumerate([2.0, 2.1, 2.2, 1.9, 2.5, math.nan, 2.0, 5.0, 6.0], start=1):
        guard.check(step, loss, lr=0.01)  # never three in a row above 2
    with pytest.raises(DivergedError, match=r"19.8 at step 10 .* above the 2 .* 3 steps: lower learning_rate.* 0.01"):
        guard.check(10, 19.8, lr=0.01)


def test_a_guard_goes_on_where_another_was():
    first = RisingLossGuard(max_in_a_row=3, num_steps=100)
    assert first.state == {"first": None, "in_a_row": 0}
    for step, loss in enumerate([2.0, 2.1, 2.2], start=1):
        first.check(step, loss, lr=0.01)
    guard = RisingLossGuard(max_in_a_row=3, num_steps=100, **first.state)
    with pytest.raises(DivergedError, match="above the 2 that it began with for 3 steps"):
        guard.check(4, 2.3, lr=0.01)


def test_a_run_that_begins_near_zero_may_rise_to_a_harmless_loss():
    guard = RisingLossGuard(max_in_a_row=3, num_steps=100, first=0.01, factor=1.5, harmless=0.5)
    for step in range(1, 20):
        guard.check(step, 0.5, lr=0.01)
    with pytest.raises(DivergedError, match="0.6 at step 22"):
        for step in range(20, 23):
            guard.check(step, 0.6, lr=0.01)


def test_a_guard_of_zero_steps_lets_every_loss_rise():
    guard = RisingLossGuard(max_in_a_row=0, num_steps=1000)
    for step in range(1000):
        guard.check(step, float(step), lr=0.01)


@pytest.mark.parametrize("num_steps, enough", [(10_000, 100), (200, 100), (60, 30), (40, 20), (25, 20)])
def test_a_short_run_ends_when_its_loss_is_above_its_start_for_half_of_its_steps(num_steps, enough):
    guard = RisingLossGuard(max_in_a_row=100, num_steps=num_steps)
    guard.check(1, 1.0, lr=0.01)
    for step in range(2, enough + 1):
        guard.check(step, 2.0, lr=0.01)
    with pytest.raises(DivergedError, match=f"for {enough} steps"):
        guard.check(enough + 1, 2.0, lr=0.01)


def test_log_line_says_loss_rate_speed_and_time_left(clock, capsys):
    log = IntervalLog(process(), num_steps=100, images_per_step=64, log_every=4)
    records = []
    for step in range(1, 5):
        clock.now += 0.5
        records.append(log.update(step, {"loss": torch.tensor(float(step)), "tf": torch.tensor(0.25)}, lr=3e-4))
    assert records[:3] == [None, None, None]
    expected = {"step": 4, "loss": 2.5, "tf": 0.25, "lr": 3e-4, "images_per_second": 128.0, "seconds": 2.0}
    assert records[3] == expected and log.history == [expected]
    (line,) = capsys.readouterr().out.splitlines()
    start = "step 4/100 | loss 2.5 | tf 0.25 | lr 0.0003 | 128.0 img/s | ETA 0:00:48 | memory "
    assert line.startswith(start) and line.endswith(" GB")


def test_log_averages_each_interval_alone_and_the_last_may_be_short(clock, capsys):
    log = IntervalLog(process(), num_steps=5, images_per_step=10, log_every=2)
    for step in range(1, 6):
        clock.now += step
        losses = {"loss": torch.tensor(float(step))} | ({"tf": torch.tensor(8.0)} if step == 1 else {})
        log.update(step, losses, lr=0.1)
    assert [(record["step"], record["loss"]) for record in log.history] == [(2, 1.5), (4, 3.5), (5, 5.0)]
    assert [record.get("tf") for record in log.history] == [8.0, None, None]
    assert [record["images_per_second"] for record in log.history] == pytest.approx([20 / 3, 20 / 7, 2.0])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_log_averages_over_processes_and_only_the_main_one_prints(capsys):
    def average_with_the_other_process(tensor, reduction):
        assert reduction == "mean"
        return (tensor + torch.tensor([30.0, 3.0])) / 2  # the other one's sums over the interval

    losses = {"loss": torch.tensor(10.0), "tf": torch.tensor(1.0)}
    for rank in range(2):
        accelerator = process(rank, num_processes=2, reduce=average_with_the_other_process)
        log = IntervalLog(accelerator, num_steps=1, images_per_step=1, log_every=1)
        record = log.update(1, losses, lr=0.1)
        assert (record["loss"], record["tf"]) == (20.0, 2.0)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_log_does_not_wait_for_the_device_within_an_interval():
    class CountTransfers(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    log = IntervalLog(process(), num_steps=100, images_per_step=1, log_every=50)
    with CountTransfers() as transfers:
        for step in range(1, 50):
            log.update(step, {"loss": torch.ones((), requires_grad=True) * 2}, lr=0.1)
        assert transfers.count == 0
        float(torch.ones(()))
        assert transfers.count == 1, "the test must see a transfer"


def test_log_keeps_no_activations_alive():
    class Packed:
        def __init__(self, tensor):
            self.tensor = tensor
            saved.append(weakref.ref(self))

    saved = []
    weight = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.tensor):
        loss = (weight * weight).sum()
    log = IntervalLog(process(), num_steps=10, images_per_step=1, log_every=2)
    log.update(1, {"loss": loss}, lr=0.1)
    assert saved and saved[0]() is not None
    del loss
    assert all(packed() is None for packed in saved)


def test_log_does_not_change_with_the_callers_tensor():
    log = IntervalLog(process(), num_steps=10, images_per_step=1, log_every=2)
    loss = torch.ones(())
    log.update(1, {"loss": loss}, lr=0.1)
    loss.fill_(100.0)
    record = log.update(2, {"loss": torch.tensor(3.0)}, lr=0.1)
    assert record["loss"] == 2.0


def test_log_resumed_mid_interval_has_the_history_of_the_uninterrupted_run(clock):
    def build():
        return IntervalLog(process(), num_steps=9, images_per_step=2, log_every=3)

    def run(log, steps):
        for step in steps:
            clock.now += 1.0
            log.update(step, {"loss": torch.tensor(0.1) * step}, lr=1e-3 / step)

    whole = build()
    run(whole, range(1, 10))
    clock.now += 1000
    first, second = build(), build()
    run(first, range(1, 6))
    state = json.loads(json.dumps(first.state_dict()))
    run(first, range(6, 7))  # steps after the checkpoint are lost, and must not leak into the state
    clock.now += 1000
    second.load_state_dict(state)
    run(second, range(6, 10))
    assert second.history == whole.history


def test_log_works_beside_a_progress_bar_with_a_real_accelerator(capsys):
    accelerator = Accelerator(cpu=True)
    log = IntervalLog(accelerator, num_steps=4, images_per_step=8, log_every=2)
    for step in tqdm(range(1, 5), disable=not accelerator.is_main_process):
        log.update(step, {"loss": torch.tensor(1.0)}, lr=0.1)
    captured = capsys.readouterr()
    assert [line.split(" |")[0] for line in captured.out.splitlines()] == ["step 2/4", "step 4/4"]
    assert "100%" in captured.err


def test_log_needs_an_interval():
    with pytest.raises(ValueError, match="log_every must be at least 1, got 0"):
        IntervalLog(process(), num_steps=1, images_per_step=1, log_every=0)


def test_json_takes_numbers_of_all_kinds(tmp_path):
    write_json(
        tmp_path / "a.json",
        {
            "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.arange(4).reshape(2, 2)],
            "torch": (torch.tensor(2), torch.tensor([0.25], dtype=torch.bfloat16), torch.ones(1, requires_grad=True)),
            "plain": [1, 0.1 + 0.2, True, None, "é"],
        },
    )
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "numpy": [0.5, 3, True, [[0, 1], [2, 3]]],
        "torch": [2, [0.25], [1.0]],
        "plain": [1, 0.30000000000000004, True, None, "é"],
    }


def test_json_has_null_for_what_is_not_finite(tmp_path):
    values = [math.nan, np.float32("inf"), torch.tensor([1.0, -math.inf])]
    write_json(tmp_path / "a.json", {"values": values})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == {"values": [None, None, [1.0, None]]}


@pytest.mark.parametrize("wrong, message", [({"a": object()}, "cannot write a object"), ({1: 2}, "keys are strings")])
def test_json_refuses_what_it_cannot_hold_and_leaves_the_file(tmp_path, wrong, message):
    path = tmp_path / "a.json"
    write_json(path, {"good": 1})
    with pytest.raises(TypeError, match=message):
        write_json(path, wrong)
    assert json.loads(path.read_text()) == {"good": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "num_threads, bf16, words", [(1, True, " with bf16, 1 thread"), (2, False, ", 2 threads"), (2, None, ", 2 threads")]
)
def test_environment_is_device_and_versions_and_nothing_about_machine_or_user(monkeypatch, num_threads, bf16, words):
    monkeypatch.setattr(loop, "_processor_name", lambda: "Some CPU @ 3 GHz")
    monkeypatch.setattr(loop, "multiplies_in_bf16", lambda device: bf16)
    monkeypatch.setattr(loop.torch, "get_num_threads", lambda: num_threads)
    environment = describe_environment(torch.device("cpu"))
    assert environment.keys() == {"device", "versions"}
    assert environment["device"] == f"Some CPU @ 3 GHz{words}"
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["python"] == platform.python_version()
    assert {"transformers", "accelerate", "datasets"} <= environment["versions"].keys()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_processor_is_named_as_the_system_names_it():
    device = describe_environment(torch.device("cpu"))["device"]
    name = device.rpartition(", ")[0].removesuffix(" with bf16")
    assert name and (name in Path("/proc/cpuinfo").read_text() or name == platform.machine())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_is_the_systems_high_water_mark_in_bytes():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    expected = int(status["VmHWM"].split()[0]) * 1024
    assert peak_memory_bytes(torch.device("cpu")) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "num_threads, num_cores, num_processes, device, warns",
    [
        (1, 8, 1, "cpu", True),
        (1, 8, 2, "cpu", True),
        (8, 8, 1, "cpu", False),
        (1, 1, 1, "cpu", False),
        (1, 8, 8, "cpu", False),
        (1, 8, 1, "cuda", False),
    ],
)
def test_idle_cores_are_pointed_out(monkeypatch, caplog, num_threads, num_cores, num_processes, device, warns):
    monkeypatch.setattr(loop.torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)), raising=False)
    warn_if_single_thread(logging.getLogger("test"), process(num_processes=num_processes, device=device))
    assert ("training/accelerate/cpu.yaml" in caplog.text) == warns
    assert len(caplog.records) == warns


def test_a_pass_over_images_says_how_many_are_done_at_what_rate_and_how_long_the_rest_takes(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 12.0, 16.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    batches = [{"pixel_values": torch.zeros(size, 3, 2, 2)} for size in (8, 8, 4)]
    passed = list(logged(batches, "features", 40, process(num_processes=2), every=10))
    assert all(one is other for one, other in zip(passed, batches, strict=True))
    assert capsys.readouterr().out.splitlines() == [
        "features | 32/40 images | 2.7 img/s | ETA 0:00:03",
        "features | 40/40 images | 2.5 img/s | ETA 0:00:00",
    ]


@pytest.fixture(params=[True, False], ids=["with bf16", "without"])
def has_bf16(request, monkeypatch):
    """Whether the processors of this machine, of both kinds, multiply in bf16."""
    monkeypatch.setattr(loop.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    # emulation would make it True on every GPU
    native = {False: request.param}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native[including_emulation])
    return request.param


@pytest.mark.parametrize(
    "environment, accelerator, known",
    [
        ({}, None, True),
        ({}, "cuda", True),
        ({}, "mps", False),
        ({"ACCELERATE_USE_CPU": "true"}, "mps", True),
        ({"ACCELERATE_TORCH_DEVICE": "cpu"}, "mps", True),
    ],
)
def test_automatic_precision_is_bf16_where_the_processor_multiplies_in_it(
    monkeypatch, has_bf16, environment, accelerator, known
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator))
    assert precision_of("auto") == ("bf16" if has_bf16 and known else "no")
    assert precision_of(None) is None and precision_of("fp16") == "fp16"


def test_nothing_is_said_of_processors_that_are_not_known(monkeypatch):
    monkeypatch.setattr(loop.platform, "machine", lambda: "aarch64")
    assert multiplies_in_bf16(torch.device("cpu")) is None and multiplies_in_bf16(torch.device("xpu")) is None


@pytest.mark.parametrize(
    "device, advice", [("cpu", "this CPU .* could be no"), ("cuda", "GPU .* fp16 or no"), ("mps", None)]
)
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_bf16_is_said_to_be_slow_where_the_processor_does_not_multiply_in_it(
    caplog, has_bf16, device, advice, precision
):
    for rank in (0, 1):
        accelerator = process(rank, num_processes=2, device=device)
        accelerator.mixed_precision = precision
        warn_if_slow_precision(logging.getLogger("test"), accelerator, "float32")
    warns = advice is not None and precision == "bf16" and not has_bf16
    assert [bool(re.search(advice, text)) for text in caplog.messages] == [True] * warns


def test_a_teacher_in_bf16_is_said_to_be_slow_too(caplog, monkeypatch):
    monkeypatch.setattr(loop, "multiplies_in_bf16", lambda device: False)
    accelerator = process()
    accelerator.mixed_precision = "no"
    warn_if_slow_precision(logging.getLogger("test"), accelerator, "bfloat16")
    (message,) = caplog.messages
    assert message.startswith("teacher_dtype is bfloat16, in which this CPU") and message.endswith("could be float32")
