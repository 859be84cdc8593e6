"""What exported files compute, beside the model that they were made from.

run = open_file("model_int8.onnx")
agreement = Agreement()
agreement.update(run(images)[0], model(images)[0])
agreement.compute()["agreement"]        # share of labels that are the same
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[Tensor], list[Tensor]]


def open_file(path: str | Path, num_threads: int | None = None) -> Run | None:
    """A function from images (B, C, H, W) to the output tensors of a file; None for Core ML, which runs elsewhere.

    Args:
        path: of a file of this package, .onnx, .pt2 or .pte.
        num_threads: of onnxruntime; None takes OMP_NUM_THREADS, or else all cores.
    """
    suffix = Path(path).suffix
    if suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: [torch.from_numpy(o) for o in session.run(None, {"pixel_values": images.numpy()})]
    if suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda images: list(program(images))
    if suffix == ".pte":
        from executorch.runtime import Runtime

        loaded = Runtime.get().load_program(path)
        method = loaded.load_method("forward")
        # the method lives as long as its program
        return lambda images, loaded=loaded: [output.clone() for output in method.execute([images])]
    return None


class Agreement:
    """Running comparison of an output with the one that it should be.

    Of logits, (B, C) or (B, C, H, W), the share of labels that are the same; of tokens, (B, T, D), their mean cosine;
    of all, the largest absolute difference, and the relative one in the Euclidean norm.
    """

    def __init__(self) -> None:
        self.same = self.count = 0.0
        self.largest = self.squares = self.reference_squares = 0.0
        self.is_cosine = False

    @torch.no_grad()
    def update(self, actual: Tensor, expected: Tensor) -> None:
        """Add a batch: what a file gives, and what it should."""
        actual, expected = actual.double(), expected.double()
        gap = actual - expected
        self.largest = max(self.largest, gap.abs().max().item())
        self.squares += gap.square().sum().item()
        self.reference_squares += expected.square().sum().item()
        self.is_cosine = expected.ndim == 3
        if self.is_cosine:
            alike = torch.cosine_similarity(actual, expected, dim=-1)
        else:
            alike = (actual.argmax(dim=1) == expected.argmax(dim=1)).double()
        self.same += alike.sum().item()
        self.count += alike.numel()

    def compute(self) -> dict[str, float]:
        """For JSON: "agreement" or "cosine", "largest_difference" and "relative_difference"."""
        return {
            "cosine" if self.is_cosine else "agreement": self.same / self.count,
            "largest_difference": self.largest,
            "relative_difference": (self.squares / self.reference_squares) ** 0.5,
        }
