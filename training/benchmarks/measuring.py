"""Measuring tools: times taken alternately, saved activations, FLOPs, and what the machine can reach.

    reference, ours = alternate([reference_step, our_step], repeats=20, warmup=3, device=device)
    Comparison(reference.tolist(), ours.tolist()).speedup        # median over the pairs
    count_flops(our_step) / np.median(ours) / matmul_peak(device, torch.float32)    # MFU

Absolute times say little on a machine that others use, too. So everything is compared with something that runs in the
same process, in turn with it, and repetition by repetition.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Comparison:
    """Times of a thing beside those of a reference, paired by repetition.

    Args:
        reference_seconds: of the reference, one per repetition.
        seconds: of the thing, as many.

    Raises:
        ValueError: no repetitions, not equally many, or a time that is not positive.
    """

    reference_seconds: list[float]
    seconds: list[float]

    def __post_init__(self) -> None:
        if not self.seconds or len(self.reference_seconds) != len(self.seconds):
            raise ValueError(
                f"there are {len(self.reference_seconds)} reference_seconds and {len(self.seconds)} seconds; they must "
                "be pairs, at least one"
            )
        if not min(*self.reference_seconds, *self.seconds) > 0:
            raise ValueError(f"seconds must be positive, not {self.reference_seconds} and {self.seconds}")

    @property
    def ratio(self) -> float:
        """Median over the pairs of seconds / reference_seconds; below 1 is faster than the reference."""
        return float(np.median(1 / self._speedups))

    @property
    def speedup(self) -> float:
        """Median over the pairs of reference_seconds / seconds; above 1 is faster than the reference."""
        return float(np.median(self._speedups))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the speed-ups of the pairs."""
        low, high = np.percentile(self._speedups, (25, 75))
        return float(low), float(high)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios of the pairs."""
        low, high = self.quartiles
        return 1 / high, 1 / low

    @property
    def _speedups(self) -> np.ndarray:
        return np.asarray(self.reference_seconds) / np.asarray(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the speed-up and its quartiles."""
        return {"speedup": self.speedup, "speedup_quartiles": list(self.quartiles)}


def alternate(
    functions: Sequence[Callable[[], Any]],
    *,
    repeats: int,
    warmup: int,
    device: torch.device,
    clock: Callable[[], float] | None = None,
) -> np.ndarray:
    """Times functions in turn, so that whatever slows the machine down for a while meets all of them.

    Every other repetition goes through them backwards: none is always the one that finds the caches of the same
    neighbour. Garbage is collected before, not while timing.

    Args:
        functions: without arguments; called `warmup` + `repeats` times each.
        repeats: repetitions that are timed.
        warmup: repetitions before these.
        device: what the functions run on; a GPU is waited for before and after each.
        clock: in seconds; None takes `time.perf_counter`. `time.process_time`, of functions of one thread, is blind to
            whatever else runs on the machine.

    Returns:
        Seconds, (len(functions), repeats).

    Raises:
        ValueError: no functions, or a number of repetitions out of range.
    """
    if not functions or repeats < 1 or warmup < 0:
        raise ValueError(
            f"there are {len(functions)} functions, repeats is {repeats} and warmup {warmup}; there must be at least "
            "one function, 1 and 0"
        )
    clock = clock or time.perf_counter
    seconds = np.zeros((len(functions), repeats))
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for repeat in range(-warmup, repeats):
            order = range(len(functions)) if repeat % 2 == 0 else reversed(range(len(functions)))
            for index in order:
                _synchronize(device)
                began = clock()
                functions[index]()
                _synchronize(device)
                if repeat >= 0:
                    seconds[index, repeat] = clock() - began
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def saved_bytes(function: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass while a function runs: its saved activations.

    Each storage counts once, however many views of it are saved, and whole. What a gradient checkpoint keeps is not
    seen: it holds its inputs outside autograd.

    Args:
        function: a forward pass; of a function that runs several, with backward passes in between, all are summed.
        exclude: tensors whose storages do not count, such as parameters and inputs.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    # held until the end: the address of a storage that is let go may be that of the next one
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in storages.values())


# with gradients: FlopCounterMode fails on views of parameters that are made without
@torch.enable_grad()
def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of everything that a function does, forward and backward: matrix products, attention and convolutions.

    A multiply-accumulate is two. What is computed anew, by gradient checkpoints or in fused attention's backward pass,
    counts only where the function itself runs it again. Compiled functions are not seen: count the eager ones.

    Args:
        function: whatever is to be counted; run once, with attention through `scaled_dot_product_attention` or
            written out.
    """
    # the fused attention of CPUs is not counted; written out, it is matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matmul_peak(device: torch.device, dtype: torch.dtype, *, size: int | None = None, seconds: float = 0.3) -> float:
    """FLOP/s that matrix products reach here and now, with the threads and the precision of matmuls as they are set.

    The best of several shapes and of all repetitions: what a step is measured against is what the machine can do when
    nothing disturbs it.

    Args:
        device: where.
        dtype: of the matrices.
        size: side of the square product, of which the other shapes are halves and doubles; None takes 1,024 on a CPU,
            8,192 on a GPU.
        seconds: about how long to try, over all shapes.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    best = 0.0
    shapes = [(size, size, size), (2 * size, size // 2, 2 * size), (size // 2, 2 * size, size // 2)]
    for rows, inner, columns in shapes:
        left, right = (torch.randn(*shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
        product = torch.empty(rows, columns, device=device, dtype=dtype)
        least = _least_seconds(lambda a=left, b=right, c=product: torch.mm(a, b, out=c), device, seconds / len(shapes))
        best = max(best, 2 * rows * inner * columns / least)
    return best


def _least_seconds(function: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Least seconds of a call among those within a time, at least one, after a warm-up."""
    calls = 10 if device.type == "cuda" else 1  # a single short one would also time the wait for the GPU
    function()
    least, deadline = math.inf, time.perf_counter() + seconds
    while True:
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            function()
        _synchronize(device)
        least = min(least, (time.perf_counter() - began) / calls)
        if time.perf_counter() > deadline:
            return least


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
