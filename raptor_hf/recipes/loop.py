"""Learning rate, log lines, guards against runs that go wrong, and facts for the result files, for every training loop.

A loop uses them like this:

    log = IntervalLog(accelerator, num_steps=num_steps, images_per_step=batch_size, log_every=50)
    guard = NonFiniteGuard()
    for step, batch in enumerate(batches):
        lr = cosine_schedule(step, num_steps=..., warmup_steps=..., base_lr=..., final_lr=...)
        ...
        if guard.check(step, is_finite, batch["names"]):
            optimizer.step()
        if record := log.update(step + 1, {"loss": loss}, lr=lr):
            accelerator.log(record, step=step + 1)
"""

import contextlib
import importlib.metadata
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from ..data.loaders import usable_cores

try:
    import resource
except ImportError:  # Windows
    resource = None


def cosine_schedule(step: int, *, num_steps: int, warmup_steps: int, base_lr: float, final_lr: float) -> float:
    """Learning rate of one step: linear from 0 over the warm-up, then a cosine down to `final_lr` at the last step.

    Args:
        step: 0-based index of the optimizer step; past the last one the rate stays at `final_lr`.
        num_steps: length of the run.
        warmup_steps: step 0 has rate 0, step `warmup_steps` the full rate; 0 for none.
        base_lr: the full rate.
        final_lr: the rate of step `num_steps - 1`.

    Raises:
        ValueError: the warm-up takes the whole run.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be at least 0 and below num_steps, {num_steps}")
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    if step == warmup_steps:  # a run that ends where the warm-up does never leaves the full rate
        return base_lr
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    return final_lr + (base_lr - final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give all parameter groups a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def is_step_finite(accelerator: Accelerator, loss: Tensor, gradients_finite: Tensor | bool) -> bool:
    """Whether a step may be taken, the same on all processes; a collective operation.

    Args:
        accelerator: the scale of its GradScaler is found by overflowing gradients, whose steps the scaler skips itself;
            with one only losses count.
        loss: of this process, a scalar.
        gradients_finite: whether the gradients are, of this process.
    """
    finite = loss.detach().isfinite() if accelerator.scaler is not None else torch.as_tensor(gradients_finite)
    if accelerator.num_processes == 1:
        return bool(finite)
    return bool(accelerator.reduce(finite.to(accelerator.device).float(), reduction="mean") == 1)


def progress_bar(
    batches: Iterable[Any], title: str, accelerator: Accelerator, total: int | None = None, initial: int = 0
) -> Iterable[Any]:
    """Show a progress bar of the main process, on a terminal only: a log file has a line per interval.

    Args:
        batches: to iterate over.
        title: left of the bar.
        accelerator: tells the main process.
        total: number of all steps, where `batches` does not know it.
        initial: steps that are done already.
    """
    hidden = not accelerator.is_main_process or not sys.stderr.isatty()
    return tqdm(batches, title, total=total, initial=initial, disable=hidden, leave=False)


def logged(
    batches: Iterable[dict[str, Any]], title: str, num_images: int, accelerator: Accelerator, every: float = 10.0
) -> Iterator[dict[str, Any]]:
    """Pass batches on, with a line about images done, their rate and the time left, now and then and at the end.

    Args:
        batches: of this process, with "pixel_values".
        title: what is done to them.
        num_images: of all processes.
        accelerator: its main process prints, for all: they are as fast as one another.
        every: seconds between lines.
    """
    began = last = time.perf_counter()
    done = 0
    for batch in progress_bar(batches, title, accelerator):
        yield batch
        done = min(num_images, done + len(batch["pixel_values"]) * accelerator.num_processes)
        now = time.perf_counter()
        if accelerator.is_main_process and (now - last >= every or done == num_images):
            rate, last = done / (now - began), now
            eta = timedelta(seconds=round((num_images - done) / rate))
            tqdm.write(f"{title} | {done}/{num_images} images | {rate:.1f} img/s | ETA {eta}")


def precision_of(wanted: str | None) -> str | None:
    """Return the precision for accelerate; "auto" becomes "bf16" where the device multiplies in it, "no" elsewhere."""
    if wanted != "auto":
        return wanted
    return "bf16" if multiplies_in_bf16(launched_device()) else "no"


def launched_device() -> torch.device:
    """The kind of device that accelerate will choose: its Accelerator, which knows, takes the precision."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if name := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def multiplies_in_bf16(device: torch.device) -> bool | None:
    """Whether the device has products in bf16, which others put together from many instructions; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return None


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradients that are not finite."""


class NonFiniteGuard:
    """Decide whether an optimizer step may be taken, and end a run that has gone wrong.

    Args:
        max_in_a_row: number of consecutive bad steps that are skipped before the run ends. 0 ends it at the first one;
            a few are normal under fp16, where the loss scale is found by overflowing.

    Attributes:
        num_skipped: bad steps so far.
    """

    def __init__(self, max_in_a_row: int = 0):
        self.max_in_a_row = max_in_a_row
        self.num_skipped = 0
        self._in_a_row = 0

    def check(self, step: int, is_finite: bool, names: Sequence[str]) -> bool:
        """Judge one step.

        Args:
            step: for the message.
            is_finite: whether loss and gradient norm are finite; must be the same on all processes.
            names: the images of the batch, to find the culprit by.

        Returns:
            Whether the optimizer step may be taken.

        Raises:
            NonFiniteError: more than `max_in_a_row` steps in a row were not finite.
        """
        if is_finite:
            self._in_a_row = 0
            return True
        self.num_skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self.max_in_a_row:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise NonFiniteError(
                f"loss or gradients are not finite at step {step} ({self._in_a_row} in a row, {self.max_in_a_row} "
                f"allowed), images {', '.join(map(str, names[:8]))}{more}. Lower the learning rate or the precision's "
                f"risk (bf16 or fp32 instead of fp16), or look at these images"
            )
        return False


# The lowest limit that the guard sets for a short run: a fitted start may lose some of its fit for nearly as many steps
# and come back.
SHORTEST_RISE = 20


class DivergedError(RuntimeError):
    """The loss has been above its first value for too long."""


class RisingLossGuard:
    """End a run whose loss rises above where it began and stays there.

    Args:
        max_in_a_row: number of consecutive steps with a loss above the first one's that end a run; 0 lets it go on.
        num_steps: length of the run. Half of it is the limit where that is less than `max_in_a_row`, but at least
            `SHORTEST_RISE`: the rate falls in the second half, where a loss that has risen may come back.
        first, in_a_row: of a run that goes on, what `state` was.
        factor: how many times the first loss still passes; above 1 where a run begins so well that its first steps at
            the full rate may lose some of it.
        harmless: loss up to which none counts as risen. A run that begins near zero, as from blocks that nearly are the
            teacher's layers, rises to many times that and is still a good one.
    """

    def __init__(
        self,
        max_in_a_row: int,
        *,
        num_steps: int,
        first: float | None = None,
        in_a_row: int = 0,
        factor: float = 1.0,
        harmless: float = 0.0,
    ):
        self.max_in_a_row = min(max_in_a_row, max(SHORTEST_RISE, num_steps // 2))
        self._first, self._in_a_row, self.factor, self.harmless = first, in_a_row, factor, harmless

    @property
    def state(self) -> dict[str, float | int | None]:
        """The loss that the run began with, None before its first step, and how many in a row were above it."""
        return {"first": self._first, "in_a_row": self._in_a_row}

    def check(self, step: int, loss: float, lr: float) -> None:
        """Judge one step.

        Args:
            step: for the message.
            loss: the same on all processes; one that is not finite is not judged, that is `NonFiniteGuard`'s.
            lr: learning rate of this step, for the message.

        Raises:
            DivergedError: the last `max_in_a_row` losses were all above `factor` times the first.
        """
        if not math.isfinite(loss):
            return
        if self._first is None:
            self._first = loss
        self._in_a_row = self._in_a_row + 1 if loss > max(self.factor * self._first, self.harmless) else 0
        if self.max_in_a_row and self._in_a_row >= self.max_in_a_row:
            times = "" if self.factor == 1 else f"{self.factor:g} times "
            raise DivergedError(
                f"the loss is {loss:.3g} at step {step} and has been above {times}the {self._first:.3g} that it began "
                f"with for {self._in_a_row} steps: lower learning_rate, which is {lr:.3g} at this step, to a third for "
                f"a start, or raise warmup_steps; max_rising_steps 0 lets the run go on"
            )


class IntervalLog:
    """Average the losses over intervals and print one line for each, without waiting for the device in between.

    Args:
        accelerator: losses are averaged over its processes; its main process prints.
        num_steps: length of the run.
        images_per_step: images of one optimizer step, over all processes, where `update` is not told.
        log_every: length of an interval in steps; the last one may be shorter.

    Attributes:
        history: one JSON-able record per interval: step, the mean of each loss, lr, images_per_second, and seconds, the
            time spent in the loop so far, earlier sessions included, what was done while `paused` left out.
    """

    def __init__(self, accelerator: Accelerator, *, num_steps: int, images_per_step: int, log_every: int):
        if log_every < 1:
            raise ValueError(f"log_every must be at least 1, got {log_every}")
        self.accelerator = accelerator
        self.num_steps, self.images_per_step, self.log_every = num_steps, images_per_step, log_every
        self.history: list[dict[str, Any]] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seconds = 0.0
        self._restart_clock()

    def update(
        self, step: int, losses: dict[str, Tensor], *, lr: float, num_images: int | None = None
    ) -> dict[str, Any] | None:
        """Take in one step; at the end of an interval, print its line. Collective then: all processes call it.

        Args:
            step: number of finished steps, this one included.
            losses: scalar tensors on any device; the same names on all processes. A loss that is absent from some steps
                is averaged over the others.
            lr: learning rate of this step.
            num_images: of this step, over all processes.

        Returns:
            The record of the interval, for the trackers, if one ended.
        """
        for name, value in losses.items():
            value = value.detach().to(self.accelerator.device, torch.float32, non_blocking=True)
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._interval_steps += 1
        self._interval_images += self.images_per_step if num_images is None else num_images
        if step % self.log_every != 0 and step != self.num_steps:
            return None

        sums = self._synchronize()  # before the clock is read: until now the device may have been behind
        seconds = time.perf_counter() - self._start
        self._seconds += seconds
        rate = self._interval_steps / seconds
        record = {
            "step": step,
            **{name: total / self._counts[name] for name, total in sums.items()},
            "lr": lr,
            "images_per_second": self._interval_images / seconds,
            "seconds": self._seconds,
        }
        self.history.append(record)
        if self.accelerator.is_main_process:
            tqdm.write(self._line(record, list(sums), eta=(self.num_steps - step) / rate))
        self._sums, self._counts = {}, {}
        self._restart_clock()
        return record

    @property
    def seconds(self) -> float:
        """Time spent in the loop until now, as in `history`."""
        return self._seconds + time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for something that is no training, such as an evaluation."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # the steps so far may still be under way
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - began

    def state_dict(self) -> dict[str, Any]:
        """Return history and interval under way as JSON, for a checkpoint. Collective: all processes call it."""
        return {
            "history": list(self.history),
            "sums": self._synchronize(),
            "counts": dict(self._counts),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. The first line's img/s counts the steps of this session only."""
        device = self.accelerator.device
        self.history = list(state["history"])
        self._sums = {
            name: torch.tensor(total, dtype=torch.float32, device=device) for name, total in state["sums"].items()
        }
        self._counts = dict(state["counts"])
        self._seconds = state["seconds"]
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._interval_steps = self._interval_images = 0
        self._start = time.perf_counter()

    def _synchronize(self) -> dict[str, float]:
        """Sums of the interval, averaged over the processes: one collective and one transfer for all of them."""
        if not self._sums:
            return {}
        stacked = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="mean")
        return dict(zip(self._sums, stacked.tolist(), strict=True))

    def _line(self, record: dict[str, Any], names: list[str], eta: float) -> str:
        parts = [
            f"step {record['step']}/{self.num_steps}",
            *(f"{name} {record[name]:.5g}" for name in names),
            f"lr {record['lr']:.3g}",
            f"{record['images_per_second']:.1f} img/s",
            f"ETA {timedelta(seconds=round(eta))}",
        ]
        if memory := peak_memory_bytes(self.accelerator.device):
            parts.append(f"memory {memory / 1e9:.2f} GB")
        return " | ".join(parts)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Say what a result was computed with, naming neither machine nor user.

    Returns:
        "device": name of the GPU; or of the processor, whether it multiplies in bf16, which its name does not tell, and
        the number of threads. "versions": of Python and of the libraries that the result depends on, as far as they are
        installed as packages.
    """
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "datasets", "raptor_hf"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # raptor_hf run from its sources
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "versions": versions}
    threads = torch.get_num_threads()
    bf16 = " with bf16" if multiplies_in_bf16(device) else ""
    device = f"{_processor_name()}{bf16}, {threads} {'thread' if threads == 1 else 'threads'}"
    return {"device": device, "versions": versions}


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory held so far: by tensors on a GPU, by this process on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def usable_workers(num_workers: int) -> int:
    """Number of loader processes: as many as wanted, but no more than cores, where more only cost memory."""
    return min(num_workers, usable_cores())


def warn_if_single_thread(logger: logging.Logger, accelerator: Accelerator) -> None:
    """Tell a CPU user about idle cores: `accelerate launch` without a configuration sets OMP_NUM_THREADS=1."""
    num_cores = usable_cores()
    idle = num_cores // accelerator.num_processes > 1 and torch.get_num_threads() == 1
    if accelerator.device.type == "cpu" and accelerator.is_main_process and idle:
        logger.warning(
            "computing with 1 thread per process on %d cores: launch with --config_file training/accelerate/cpu.yaml "
            "or set OMP_NUM_THREADS",
            num_cores,
        )


def warn_if_slow_precision(logger: logging.Logger, accelerator: Accelerator, teacher_dtype: str | None = None) -> None:
    """Tell a user of bf16 that the device has no products in it: x86 CPUs take about ten times as long as in fp32 then.

    Args:
        logger: that warns.
        accelerator: with its mixed_precision.
        teacher_dtype: of a setting of that name.
    """
    device = accelerator.device
    if multiplies_in_bf16(device) is not False or not accelerator.is_main_process:
        return
    name, other = ("CPU", "no") if device.type == "cpu" else ("GPU", "fp16 or no")
    advice = {"mixed_precision": other, "teacher_dtype": "float32"}
    for setting, value in (("mixed_precision", accelerator.mixed_precision), ("teacher_dtype", teacher_dtype)):
        if value in ("bf16", "bfloat16"):
            logger.warning(
                "%s is %s, in which this %s does not multiply, so that it may take many times as long; it could be %s",
                *(setting, value, name, advice[setting]),
            )
