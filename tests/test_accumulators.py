"""Running sums over processes, and on a device without float64, which is simulated."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from raptor_hf import accumulators
from raptor_hf.accumulators import Accumulator, MomentAccumulator
from raptor_hf.distillation.task import LayerVariance
from raptor_hf.dynamics.dmd import DMDAccumulator, DMDErrors
from raptor_hf.dynamics.motion import DynamicsAccumulator, to_plain
from raptor_hf.dynamics.ranks import SpectrumAccumulator
from raptor_hf.metrics import DepthErrors, FidelityAccumulator, MeanIoU, TopKAccuracy
from raptor_hf.similarity import SimilarityAccumulator
from raptor_hf.tokens import TokenLayout

LAYERS, DIM, TOKENS = 4, 6, TokenLayout(2)


class AppleTensor(torch.Tensor):
    """A CPU tensor that says it is elsewhere: on "meta", the one device that every build of torch knows."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype, device="meta")

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_apple_gpu(func, args, kwargs)


class AppleGPU(TorchDispatchMode):
    """Makes new tensors of "meta" such ones, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_apple_gpu(func, args, kwargs)


def on_apple_gpu(func, args, kwargs):
    """Computes on the CPU; like Apple's GPUs it refuses every float64, and mixes with no CPU tensor but a number."""
    kwargs = dict(kwargs or {})
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    is_here = any(isinstance(x, AppleTensor) for x in tensors)
    if is_here and any(not isinstance(x, AppleTensor) and x.ndim for x in tensors):
        raise RuntimeError(f"{func} mixes devices")
    if kwargs.get("device") is not None:
        is_here = torch.device(kwargs["device"]).type == "meta"
        kwargs["device"] = "cpu"
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, AppleTensor) else x, (args, kwargs))
    result = func(*args, **kwargs)
    if not is_here:
        return result
    if any(x.dtype == torch.float64 for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    return tree_map(lambda x: AppleTensor(x) if isinstance(x, torch.Tensor) else x, result)


def pair(seed=0):
    """Two trajectories, (B, L + 1, T, D), float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, LAYERS + 1, 8, DIM, generator=generator).cumsum(2).unbind(0)


def dmd_errors():
    fitted = DMDAccumulator(DIM, [(0, 2), (2, LAYERS)])
    fitted.update(pair(seed=1)[0])
    return DMDErrors(fitted.fit(ridge=1e-2), TOKENS)


CASES = {
    "accuracy": (TopKAccuracy, lambda: (torch.randn(6, 7), torch.randint(7, (6,)))),
    "mean_iou": (lambda: MeanIoU(4), lambda: (torch.randint(4, (3, 5, 5)), torch.randint(4, (3, 5, 5)))),
    "depth": (lambda: DepthErrors(eigen_crop=False), lambda: (torch.rand(3, 4, 4) + 1, torch.rand(3, 4, 4) + 1)),
    "fidelity": (lambda: FidelityAccumulator(LAYERS, TOKENS), pair),
    "variance": (lambda: LayerVariance(LAYERS, DIM), lambda: pair()[:1]),
    "cosine": (lambda: SimilarityAccumulator(LAYERS, TOKENS, num_bootstraps=3), lambda: pair()[:1]),
    "mse": (lambda: SimilarityAccumulator(LAYERS, TOKENS, "mse"), lambda: pair()[:1]),
    "cka": (lambda: SimilarityAccumulator(LAYERS, TOKENS, "cka"), lambda: pair()[:1]),
    "motion": (lambda: DynamicsAccumulator(LAYERS, TOKENS), lambda: pair()[:1]),
    "ranks": (lambda: SpectrumAccumulator(LAYERS, DIM), lambda: pair()[:1]),
    "dmd": (lambda: DMDAccumulator(DIM, [(0, LAYERS)]), lambda: pair()[:1]),
    "dmd_errors": (dmd_errors, lambda: pair()[:1]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_device_without_float64_gives_the_sums_of_the_cpu(name, monkeypatch):
    monkeypatch.setattr(accumulators, "has_float64", lambda device: torch.device(device).type != "meta")
    build, make = CASES[name]
    torch.manual_seed(0)
    batch = make()
    ours, expected = build(), build()
    with AppleGPU():
        ours.update(*map(AppleTensor, batch))
    expected.update(*batch)
    assert ours.sums().device.type == "cpu" and ours.sums().dtype == torch.float64
    torch.testing.assert_close(ours.sums(), expected.sums(), rtol=1e-12, atol=1e-12)
    if name != "dmd":
        torch.testing.assert_close(to_plain(ours.compute()), to_plain(expected.compute()), rtol=1e-9, atol=1e-9)


def test_the_simulated_device_refuses_float64():
    with pytest.raises(TypeError, match="float64"):
        AppleTensor(torch.ones(2)).double()
    with pytest.raises(TypeError, match="float64"), AppleGPU():
        torch.zeros(2, dtype=torch.float64, device="meta")
    assert AppleTensor(torch.ones(2)).cpu().double().dtype == torch.float64


def test_only_apple_gpus_lack_float64():
    assert [accumulators.has_float64(device) for device in ("cpu", "cuda", "mps")] == [True, True, False]


def test_one_process_merges_without_touching_the_device():
    accumulator = MomentAccumulator({"a": ()})
    accumulator.add("a", torch.tensor([1.0, 3.0]))
    # no reduce and no device here: asking for either fails
    accumulator.merge(SimpleNamespace(num_processes=1))
    assert accumulator.curve("a").mean == 2.0


def test_processes_merge_to_the_sum_of_their_sums():
    class Two:
        num_processes, device = 2, "cpu"

        def reduce(self, sums, reduction):
            assert reduction == "sum"
            return sums + other.sums()

    accumulator, other = (MomentAccumulator({"a": ()}) for _ in range(2))
    accumulator.add("a", torch.tensor([1.0, 3.0]))
    other.add("a", torch.tensor([8.0]))
    accumulator.merge(Two())
    assert (accumulator.curve("a").mean, accumulator.curve("a").num_images) == (4.0, 3)


def test_sums_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"sums has shape \(2, 3\), but this Accumulator keeps 3 x 2 sums"):
        Accumulator((3, 2)).load_sums(torch.zeros(2, 3))
