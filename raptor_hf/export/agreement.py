"""Runs exported files, and compares their outputs with those of the model that they were made from.

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
    """Open a file as a function from images, (B, C, H, W), to output tensors; None for Core ML, which runs elsewhere.

    Args:
        path: of a file of this package, .onnx, .pt2 or .pte.
        num_threads: of onnxruntime; None takes OMP_NUM_THREADS, or else all cores.

    Raises:
        ImportError: the runtime of the file is not installed.
        Exception: the runtime cannot read the file; each has errors of its own.
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
    """Compares outputs with those that they should be, batch by batch.

    It measures the share of equal labels for logits, (B, C) or (B, C, H, W), and the mean cosine for tokens, (B, T, D).
    For both it measures the largest absolute difference, and the Euclidean norm of the difference relative to that of
    the expected output.
    """

    def __init__(self) -> None:
        self.same = self.count = 0.0
        self.largest = self.squares = self.reference_squares = 0.0
        self.is_cosine = False

    @torch.no_grad()
    def update(self, actual: Tensor, expected: Tensor) -> None:
        """Add a batch.

        Args:
            actual: output of the file.
            expected: output that it should be, of the same shape.

        Raises:
            RuntimeError: the shapes do not match.
        """
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
        """Return "agreement" or "cosine", "largest_difference" and "relative_difference", which JSON can hold.

        Raises:
            ValueError: there was no batch.
        """
        if not self.count:
            raise ValueError("no outputs were compared; call update with at least one batch")
        return {
            "cosine" if self.is_cosine else "agreement": self.same / self.count,
            "largest_difference": self.largest,
            "relative_difference": (self.squares / self.reference_squares) ** 0.5,
        }
