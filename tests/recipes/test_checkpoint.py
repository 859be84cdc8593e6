"""Checkpoints: exact after resuming, whole after a crash, clear when damaged."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from raptor_hf.recipes import checkpoint, files
from raptor_hf.recipes.averaging import averaged_weights, update_average
from raptor_hf.recipes.checkpoint import (
    CheckpointError,
    gather_rng_state,
    latest_checkpoint,
    load_checkpoint,
    load_model_and_optimizer,
    model_and_optimizer_tensors,
    restore_rng_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from raptor_hf.recipes.files import write_text_atomically

KINDS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
}


class Student(nn.Module):
    """Frozen embeddings, two blocks, a running statistic."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embeddings = nn.Linear(6, 8).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embeddings(x.to(self.embeddings.weight.dtype))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.norm(x)


def adamw(model: nn.Module, **kind) -> torch.optim.AdamW:
    groups = [
        {"params": [model.blocks[0].weight, model.blocks[1].weight], "lr": 3e-3, "weight_decay": 0.1},
        {"params": [model.blocks[0].bias, model.blocks[1].bias], "lr": 1 / 3 * 1e-2, "betas": (0.8, 0.95)},
        {"params": model.norm.parameters()},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0, **kind)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after_step: Callable = lambda: None):
    for step in steps:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_average(optimizer, decay=0.9, step=step)
        after_step()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All weights, buffers and optimizer states, by torch's own numbering: an account independent of the module's."""
    state = {
        f"{i}.{key}": value.clone()
        for i, some in optimizer.state_dict()["state"].items()
        for key, value in some.items()
    }
    return {name: value.clone() for name, value in model.state_dict().items()} | state


def assert_bitwise_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].numpy().tobytes() == value.numpy().tobytes(), name


def small_checkpoint(folder: Path, step: int, **options) -> Path:
    return save_checkpoint(folder, step, {"weight": torch.full((64,), float(step))}, {"step": step}, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise_equal_to_the_uninterrupted_run(tmp_path, kind):
    def build(seed: int):
        model = Student(seed)
        optimizer = adamw(model, **KINDS[kind])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.93**step)
        return model, optimizer, schedule

    model, optimizer, schedule = build(seed=0)
    take_steps(model, optimizer, range(4), schedule.step)
    tensors, info = model_and_optimizer_tensors(model, optimizer)
    save_checkpoint(tmp_path, 4, tensors, info | {"schedule": schedule.state_dict()})
    take_steps(model, optimizer, range(4, 9), schedule.step)

    resumed, resumed_optimizer, resumed_schedule = build(seed=1)
    tensors, info = load_checkpoint(latest_checkpoint(tmp_path))
    load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
    resumed_schedule.load_state_dict(info["schedule"])
    take_steps(resumed, resumed_optimizer, range(4, 9), resumed_schedule.step)

    assert_bitwise_equal(everything(resumed, resumed_optimizer), everything(model, optimizer))
    assert resumed_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def take_scaled_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps: range
) -> None:
    for step in steps:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        scaler.scale(model(x).square().mean() * (1e30 if step == 2 else 1.0)).backward()  # step 2 overflows
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_resume_under_a_grad_scaler_is_bitwise_equal(tmp_path):
    def build():
        model = Student()
        return model, adamw(model), torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)

    model, optimizer, scaler = build()
    take_scaled_steps(model, optimizer, scaler, range(5))
    tensors, info = model_and_optimizer_tensors(model, optimizer)
    save_checkpoint(tmp_path, 5, tensors, info | {"scaler": scaler.state_dict()})
    assert scaler.get_scale() == 2.0**39, "the test needs an overflow before the checkpoint"
    take_scaled_steps(model, optimizer, scaler, range(5, 10))

    resumed, resumed_optimizer, resumed_scaler = build()
    tensors, info = load_checkpoint(latest_checkpoint(tmp_path))
    load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
    resumed_scaler.load_state_dict(info["scaler"])
    take_scaled_steps(resumed, resumed_optimizer, resumed_scaler, range(5, 10))
    assert_bitwise_equal(everything(resumed, resumed_optimizer), everything(model, optimizer))
    assert resumed_scaler.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("steps_before_saving", [0, 4])
def test_settings_of_another_version_s_optimizer_are_dropped_and_new_ones_kept(steps_before_saving):
    def build(seed: int):
        model = Student(seed)
        return model, adamw(model)

    model, optimizer = build(0)
    take_steps(model, optimizer, range(steps_before_saving))
    tensors, info = model_and_optimizer_tensors(model, optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for group in info["optimizer"]["param_groups"]:
        group["lr"], group["momentum"] = 1e-3, 0.95
        del group["maximize"]
    resumed, resumed_optimizer = build(1)
    load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
    assert_bitwise_equal(everything(resumed, resumed_optimizer), everything(model, optimizer))
    for group in resumed_optimizer.param_groups:
        assert group["lr"] == 1e-3 and group["maximize"] is False and "momentum" not in group


@pytest.mark.parametrize("steps_before_saving", [0, 4])
@pytest.mark.parametrize("saved, own", [("loop", "fused"), ("fused", "loop"), ("loop", "foreach")])
def test_resume_keeps_the_kernels_of_the_new_optimizer_and_goes_on(saved, own, steps_before_saving):
    def build(seed: int, kind: str):
        # the norm leaves the blocks small gradients, which Adam scales up: in float32 it would be their rounding
        model = Student(seed).double()
        return model, adamw(model, **KINDS[kind]), torch.amp.GradScaler("cpu", init_scale=2.0**40)

    model, optimizer, scaler = build(0, saved)
    take_scaled_steps(model, optimizer, scaler, range(steps_before_saving))
    optimizer.param_groups[0]["lr"] = 1e-3
    tensors, info = model_and_optimizer_tensors(model, optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    resumed, resumed_optimizer, resumed_scaler = build(1, own)
    load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
    resumed_scaler.load_state_dict(scaler.state_dict())
    for group, expected in zip(resumed_optimizer.param_groups, build(1, own)[1].param_groups, strict=True):
        assert {key: group[key] for key in ("fused", "foreach")} == {key: expected[key] for key in ("fused", "foreach")}
    assert resumed_optimizer.param_groups[0]["lr"] == 1e-3, "all other settings are the saved ones"

    take_scaled_steps(model, optimizer, scaler, range(4, 9))
    take_scaled_steps(resumed, resumed_optimizer, resumed_scaler, range(4, 9))
    # the same steps by other kernels, which round otherwise; a step moves a weight by up to 3e-3
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=1e-4)


def test_saving_does_not_disturb_the_run_not_even_before_its_first_step():
    runs = []
    for save_at in ((), (0, 1, 3)):
        model = Student()
        with torch.no_grad():
            model.blocks[0].bias[:4] = torch.tensor([-0.0, 0.0, -0.0, 1e-40])  # signs of zero and subnormals count too
        optimizer = adamw(model)
        for step in range(5):
            if step in save_at:
                model_and_optimizer_tensors(model, optimizer)
            take_steps(model, optimizer, range(step, step + 1))
        runs.append(everything(model, optimizer))
    assert_bitwise_equal(*runs)


@pytest.mark.parametrize("steps_before_loading", [0, 2])
def test_checkpoint_of_step_zero_resumes_with_an_empty_optimizer(steps_before_loading):
    model = Student()
    optimizer = adamw(model)
    tensors, info = model_and_optimizer_tensors(model, optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    take_steps(model, optimizer, range(3))

    resumed = Student(seed=1)
    resumed_optimizer = adamw(resumed)
    take_steps(resumed, resumed_optimizer, range(steps_before_loading))
    load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
    assert not resumed_optimizer.state
    take_steps(resumed, resumed_optimizer, range(3))
    assert_bitwise_equal(everything(resumed, resumed_optimizer), everything(model, optimizer))


def test_parameter_that_met_no_gradient_yet_resumes_without_state():
    def forward_first_block(model, optimizer, steps):
        for step in steps:
            model.blocks[0](torch.full((1, 8), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, resumed = Student(), Student(seed=1)
    optimizer, resumed_optimizer = adamw(model), adamw(resumed)
    forward_first_block(model, optimizer, range(2))
    tensors, info = model_and_optimizer_tensors(model, optimizer)
    load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
    take_steps(model, optimizer, range(3))
    take_steps(resumed, resumed_optimizer, range(3))
    states = resumed_optimizer.state
    assert states[resumed.blocks[1].weight]["step"] == 3 and states[resumed.blocks[0].weight]["step"] == 5
    assert_bitwise_equal(everything(resumed, resumed_optimizer), everything(model, optimizer))


def test_optimizer_without_state_resumes(tmp_path):
    model, resumed = Student(), Student(seed=1)
    optimizer, resumed_optimizer = (torch.optim.SGD(m.blocks.parameters(), lr=0.1) for m in (model, resumed))
    take_steps(model, optimizer, range(2))
    optimizer.param_groups[0]["lr"] = 0.03
    tensors, info = model_and_optimizer_tensors(model, optimizer)
    load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
    take_steps(model, optimizer, range(2, 4))
    take_steps(resumed, resumed_optimizer, range(2, 4))
    assert_bitwise_equal(everything(resumed, resumed_optimizer), everything(model, optimizer))


def test_loading_copies_so_that_one_checkpoint_serves_two_runs():
    model = Student()
    optimizer = adamw(model)
    take_steps(model, optimizer, range(2))
    tensors, info = model_and_optimizer_tensors(model, optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    runs = []
    for _ in range(2):
        resumed = Student(seed=1)
        resumed_optimizer = adamw(resumed)
        load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
        take_steps(resumed, resumed_optimizer, range(2, 5))
        runs.append(everything(resumed, resumed_optimizer))
    assert_bitwise_equal(*runs)


def test_stale_gradients_do_not_survive_loading():
    model = Student()
    optimizer = adamw(model)
    take_steps(model, optimizer, range(2))
    tensors, info = model_and_optimizer_tensors(model, optimizer)
    resumed = Student()
    resumed_optimizer = adamw(resumed)
    resumed(torch.randn(5, 6)).sum().backward()
    load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
    assert all(parameter.grad is None for parameter in resumed.parameters())
    assert_bitwise_equal(everything(resumed, resumed_optimizer), everything(model, optimizer))


def test_trainable_only_leaves_the_teachers_part_out_and_alone():
    model = Student()
    optimizer = adamw(model)
    take_steps(model, optimizer, range(2))
    tensors, info = model_and_optimizer_tensors(model, optimizer, trainable_only=True)
    assert not any("embeddings" in name for name in tensors)
    assert "model.norm.running_mean" in tensors

    resumed = Student(seed=1)
    embeddings = resumed.embeddings.weight.clone()
    load_model_and_optimizer(resumed, adamw(resumed), tensors, info)
    assert torch.equal(resumed.embeddings.weight, embeddings)
    assert torch.equal(resumed.blocks[0].weight, model.blocks[0].weight)
    assert torch.equal(resumed.norm.running_mean, model.norm.running_mean)


def test_optimizer_and_model_wrapped_by_accelerate_give_the_same_checkpoint():
    plain, wrapped = Student(), Student()
    plain_optimizer, accelerator = adamw(plain), Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(wrapped, adamw(wrapped))
    take_steps(plain, plain_optimizer, range(2))
    take_steps(model, optimizer, range(2))
    (tensors, info), (expected, expected_info) = (
        model_and_optimizer_tensors(*pair) for pair in ((model, optimizer), (plain, plain_optimizer))
    )
    assert_bitwise_equal(tensors, expected)
    assert info == expected_info


@pytest.mark.parametrize("steps_before_loading", [0, 1])
def test_resume_between_the_parts_of_an_accumulated_step_is_complete(steps_before_loading):
    """Accelerate's optimizer ignores step() and zero_grad() there."""
    plain = Student()
    plain_optimizer = adamw(plain)
    take_steps(plain, plain_optimizer, range(2))
    tensors, info = model_and_optimizer_tensors(plain, plain_optimizer)

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    resumed = Student(seed=1)
    model, optimizer = accelerator.prepare(resumed, adamw(resumed))
    take_steps(model, optimizer, range(steps_before_loading))
    with accelerator.accumulate(model):
        assert not accelerator.sync_gradients
        model(torch.randn(5, 6)).sum().backward()
        load_model_and_optimizer(model, optimizer, tensors, info)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(parameter.grad is None for parameter in resumed.parameters())
    assert_bitwise_equal(everything(resumed, optimizer), everything(plain, plain_optimizer))


@pytest.mark.parametrize("saved_by, message", [("narrow", "has shape"), ("deep", "is not in the model")])
def test_checkpoint_of_another_model_is_refused_before_anything_is_loaded(saved_by, message):
    other = Student()
    if saved_by == "narrow":
        other.norm = nn.BatchNorm1d(4)
    else:
        other.blocks.append(nn.Linear(8, 8))
    tensors, info = model_and_optimizer_tensors(other, adamw(other))
    model = Student(seed=1)
    optimizer = adamw(model)
    take_steps(model, optimizer, range(1))
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        load_model_and_optimizer(model, optimizer, tensors, info)
    assert_bitwise_equal(everything(model, optimizer), before)


def test_other_parameter_groups_are_refused():
    model = Student()
    tensors, info = model_and_optimizer_tensors(model, adamw(model))
    with pytest.raises(CheckpointError, match=r"parameter groups differ.*\[6\].*\[2, 2, 2\]"):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        load_model_and_optimizer(model, torch.optim.AdamW(trainable), tensors, info)


def test_learning_rate_in_a_tensor_is_refused():
    model = Student()
    optimizer = torch.optim.AdamW(model.blocks.parameters(), lr=torch.tensor(1e-3), foreach=False)
    with pytest.raises(TypeError, match="lr of parameter group 0"):
        model_and_optimizer_tensors(model, optimizer)


def test_views_and_shared_tensors_are_stored_with_their_values(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "row": base[1],
        "scalar": torch.tensor(7),
        "none": base[:0],
    }
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {}))
    assert_bitwise_equal(loaded, {name: tensor.contiguous() for name, tensor in tensors.items()})


def test_info_comes_back_exactly(tmp_path):
    info = {"lr": 0.1 + 0.2, "best": float("inf"), "text": "é", "none": None, "nested": [{"tiny": 5e-324}]}
    assert load_checkpoint(save_checkpoint(tmp_path, 1, {}, info))[1] == info


def test_info_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path / "new", 1, {}, {"bad": {1, 2}})
    assert not (tmp_path / "new").exists()


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (1, 20, 300, 123456789):
        small_checkpoint(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000300", "step-123456789"]
    assert latest_checkpoint(tmp_path).name == "step-123456789"


def test_only_safetensors_and_json_are_written(tmp_path):
    path = small_checkpoint(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert torch.equal(load_file(path / "state.safetensors")["weight"], torch.full((64,), 1.0))


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "tmp-step-00000001").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert latest_checkpoint(tmp_path) is None


def truncate_state(path: Path) -> None:
    os.truncate(path / "state.safetensors", (path / "state.safetensors").stat().st_size - 1)


def flip_a_bit_of_the_state(path: Path) -> None:
    content = bytearray((path / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "state.safetensors").write_bytes(content)


def alter_info(path: Path) -> None:
    (path / "info.json").write_text((path / "info.json").read_text().replace("step", "stop"))


def truncate_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 20)


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def remove_state(path: Path) -> None:
    (path / "state.safetensors").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


DAMAGES = {
    truncate_state: r"state.safetensors has \d+ bytes instead of \d+",
    flip_a_bit_of_the_state: "state.safetensors does not match its SHA-256",
    alter_info: "info.json does not match its SHA-256",
    truncate_manifest: "manifest.json is damaged",
    empty_manifest: "manifest.json is damaged",
    remove_state: "state.safetensors is missing",
    remove_manifest: "manifest.json is missing",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage, caplog):
    good, bad = small_checkpoint(tmp_path, 1), small_checkpoint(tmp_path, 2)
    damage(bad)
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        load_checkpoint(bad)
    assert latest_checkpoint(tmp_path) == good
    assert "passed over" in caplog.text and bad.name in caplog.text
    damage(good)
    with pytest.raises(CheckpointError, match="every checkpoint"):  # not None: the run would start from scratch
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
def test_run_that_went_back_keeps_its_new_checkpoint_and_drops_the_later_ones(tmp_path, keep, caplog):
    small_checkpoint(tmp_path, 1)
    truncate_state(small_checkpoint(tmp_path, 3))
    saved = small_checkpoint(tmp_path, 2, keep=keep)
    assert latest_checkpoint(tmp_path) == saved
    assert len(list(tmp_path.iterdir())) == keep
    assert "went back" in caplog.text


def test_same_step_saved_again_is_replaced(tmp_path):
    save_checkpoint(tmp_path, 5, {}, {"try": 1}, keep=1)
    path = save_checkpoint(tmp_path, 5, {}, {"try": 2}, keep=1)
    assert load_checkpoint(path)[1] == {"try": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_crash_while_a_step_is_replaced_leaves_the_old_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 5, {}, {"try": 1}, keep=1)
    rename = os.rename

    def crash(source, target):
        if Path(source).name.startswith("tmp-"):
            raise KeyboardInterrupt
        rename(source, target)

    for _ in range(2):  # the second time round, with the first one's remains
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files.os, "rename", crash)
            save_checkpoint(tmp_path, 5, {}, {"try": 2}, keep=1)
        assert load_checkpoint(latest_checkpoint(tmp_path))[1] == {"try": 1}
    path = save_checkpoint(tmp_path, 5, {}, {"try": 3}, keep=1)
    assert load_checkpoint(latest_checkpoint(tmp_path))[1] == {"try": 3}
    assert list(tmp_path.iterdir()) == [path]


def save_forever(folder: Path, first_step: int, finished) -> None:
    torch.set_num_threads(1)  # a forked child has lost its parent's threads, and OpenMP would wait for them
    step = first_step
    while True:
        # Content that tells its step: a checkpoint mixed from two steps would show.
        tensors = {name: torch.full((100_000,), float(step)) for name in "abc"}
        save_checkpoint(folder, step, tensors, {"step": step})
        finished.send(step)
        step += 1


def test_kill_at_any_moment_never_loses_the_last_checkpoint(tmp_path):
    context = multiprocessing.get_context("fork")  # a new interpreter would import torch for seconds, each time
    delays, last, num_interrupted = random.Random(0), 0, 0
    for _ in range(25):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=save_forever, args=(tmp_path, last + 1, sender))
        child.start()
        sender.close()
        assert receiver.poll(60), "the child did not save anything"
        time.sleep(delays.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        finished = last
        try:
            while receiver.poll():
                finished = receiver.recv()
        except EOFError:
            pass
        num_interrupted += any(tmp_path.glob("tmp-step-*"))
        path = latest_checkpoint(tmp_path)
        tensors, info = load_checkpoint(path)
        # One more than it had told us is right too: it was killed between the rename and the message.
        assert finished <= info["step"] <= finished + 1
        assert all(torch.equal(tensor, torch.full((100_000,), float(info["step"]))) for tensor in tensors.values())
        last = info["step"]
    assert num_interrupted > 5, "the kills must land inside the saves"
    save_checkpoint(tmp_path, last + 1, {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (last, last + 1)]


def test_full_disk_leaves_the_earlier_checkpoints_and_says_so(tmp_path):
    good = small_checkpoint(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel then refuses writes, as on a full disk
    try:
        with pytest.raises(OSError, match=r"step 2 \(4.0 MB\) could not be written.*Earlier checkpoints are untouched"):
            save_checkpoint(tmp_path, 2, {"weight": torch.ones(1_000_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [good] and latest_checkpoint(tmp_path) == good
    assert small_checkpoint(tmp_path, 2).exists()


def test_unwritable_folder_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not be written to .*file.*free some space or give another folder"):
        small_checkpoint(tmp_path / "file", 1)


def test_text_is_replaced_or_left_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_text_atomically(path, "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def crash(*args):
            raise KeyboardInterrupt

        patch.setattr(files.os, "replace", crash)
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    write_text_atomically(path, "new")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "new"


def draw() -> tuple:
    # An odd number of Gaussians: Python and NumPy make two at a time and keep one for later.
    return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()


def test_random_numbers_go_on_where_they_stopped(tmp_path):
    draw()
    tensors, info = rng_state()
    tensors, info = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, info))
    expected = [draw() for _ in range(3)]
    set_rng_state(tensors, info)
    assert [draw() for _ in range(3)] == expected


def test_random_numbers_of_all_processes_go_on_where_they_stopped():
    accelerator = Accelerator(cpu=True)
    tensors, info = gather_rng_state(accelerator)
    expected = draw()
    draw()
    assert restore_rng_state(accelerator, tensors, info) is True
    assert draw() == expected


def test_other_number_of_processes_warns_and_leaves_the_random_numbers_alone(caplog):
    accelerator = Accelerator(cpu=True)
    tensors, info = gather_rng_state(accelerator)
    draw()
    before = rng_state()[0]
    assert restore_rng_state(accelerator, tensors, {"rng": info["rng"] * 4}) is False
    assert_bitwise_equal(rng_state()[0], before)
    assert "saved by 4 processes, resumed by 1" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_resume_on_a_gpu_is_bitwise_equal_random_numbers_included(tmp_path, kind):
    def take_noisy_steps(model, optimizer, num_steps):
        for _ in range(num_steps):
            model(torch.randn(5, 6, device="cuda")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = Student().cuda()
    optimizer = adamw(model, **KINDS[kind])
    take_noisy_steps(model, optimizer, 3)
    (tensors, info), (rng_tensors, rng_info) = model_and_optimizer_tensors(model, optimizer), rng_state()
    path = save_checkpoint(tmp_path, 3, tensors | rng_tensors, info | {"rng": rng_info})
    take_noisy_steps(model, optimizer, 3)

    resumed = Student(seed=1).cuda()
    resumed_optimizer = adamw(resumed, **KINDS[kind])
    tensors, info = load_checkpoint(path)
    load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
    set_rng_state(tensors, info["rng"])
    take_noisy_steps(resumed, resumed_optimizer, 3)
    actual, expected = everything(resumed, resumed_optimizer), everything(model, optimizer)
    assert_bitwise_equal({k: v.cpu() for k, v in actual.items()}, {k: v.cpu() for k, v in expected.items()})


def wrapped(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Student(seed)
    model.embeddings.load_state_dict(Student(0).embeddings.state_dict())  # the teacher's, whatever the seed
    if kind == "ddp":
        optimizer = adamw(model)
        return DistributedDataParallel(model), optimizer
    for part in (*model.blocks, model):
        fully_shard(part)
    return model, adamw(model)


def worker(folder: Path) -> None:
    """Runs on two processes: trains under DDP, saves, resumes under DDP and FSDP, saves again."""
    accelerator = Accelerator(cpu=True)
    model, optimizer = wrapped("ddp", seed=0)
    take_steps(model, optimizer, range(3))
    torch.manual_seed(100 + accelerator.process_index)
    rng_tensors, rng_info = gather_rng_state(accelerator)
    expected = torch.rand(4)
    for part in ("all", "trainable"):
        tensors, info = model_and_optimizer_tensors(model, optimizer, trainable_only=part == "trainable")
        assert bool(tensors) == bool(info) == accelerator.is_main_process
        if accelerator.is_main_process:
            save_checkpoint(folder / part, 3, tensors | rng_tensors, info | rng_info)
    accelerator.wait_for_everyone()

    for kind, part in product(("ddp", "fsdp"), ("all", "trainable")):
        resumed, resumed_optimizer = wrapped(kind, seed=1)
        tensors, info = load_checkpoint(latest_checkpoint(folder / part))
        load_model_and_optimizer(resumed, resumed_optimizer, tensors, info)
        assert restore_rng_state(accelerator, tensors, info)
        assert torch.equal(torch.rand(4), expected), "each rank goes on with its own random numbers"
        take_steps(resumed, resumed_optimizer, range(3, 5))
        tensors, info = model_and_optimizer_tensors(resumed, resumed_optimizer)
        with averaged_weights(resumed_optimizer):
            for name, value in get_model_state_dict(resumed, options=StateDictOptions(full_state_dict=True)).items():
                average = tensors.get(f"optimizer.{name}.average")
                assert average is None or torch.equal(value, average), "the weights are the average, whole"
        if accelerator.is_main_process:
            save_checkpoint(folder / f"{kind}-{part}", 5, tensors, info)
    dist.destroy_process_group()


@pytest.mark.slow
def test_resume_under_ddp_and_fsdp_is_bitwise_the_run_of_a_single_process(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", __file__]
    root = Path(checkpoint.__file__).parents[2]
    paths = os.pathsep.join((str(root), str(root / "training")))  # where neither package is installed
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, tmp_path], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]

    model = Student()
    optimizer = adamw(model)
    take_steps(model, optimizer, range(5))
    expected, expected_info = model_and_optimizer_tensors(model, optimizer)
    for run in ("ddp-all", "ddp-trainable", "fsdp-all", "fsdp-trainable"):
        tensors, info = load_checkpoint(latest_checkpoint(tmp_path / run))
        assert info == json.loads(json.dumps(expected_info)), run
        # Both processes see the same batch: their mean gradient (g + g) / 2 is the gradient, to the last bit.
        assert_bitwise_equal(tensors, expected)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
