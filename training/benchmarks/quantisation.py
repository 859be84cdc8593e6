"""What quantisation costs: labels that a student shares with its teacher, before and after.

device.py calls this file and writes what it finds. Where there is no classifier, a decoder's maps are compared, pixel
by pixel: whether both find a pixel salient.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification

from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.data.loaders import eval_loader
from raptor_hf.export.agreement import open_file
from raptor_hf.export.onnx_files import ONNX_PRECISIONS, quantize_onnx, save_onnx
from raptor_hf.export.programs import parameter_bytes
from training.studies.real_teacher import saliency

CALIBRATION_IMAGES, BATCH_SIZE = 128, 25


@torch.no_grad()
def compare_precisions(
    student_name: str, teacher_name: str, dataset: str, *, decoder: str | None = None, num_images: int | None = None
) -> list[dict[str, Any]]:
    """Write the ONNX files of a student in all precisions and run them on test images.

    Args:
        student_name: folder of the student, with its image processor.
        teacher_name: folder of its teacher.
        dataset: as `open_images` takes it, with the splits "train", to calibrate on, and "test".
        decoder: file of the weights of `saliency`, for a teacher without a classifier.
        num_images: of the test images; None takes all.

    Returns:
        A JSON-able row per precision, float32 first: "bytes" of the file, "agreement" with the teacher, the share of
        labels or pixels that are the same, "with_student" the same with the student in PyTorch.
    """
    auto_class = AutoModel if decoder else AutoModelForImageClassification
    names = student_name, teacher_name
    student, teacher = (auto_class.from_pretrained(name, dtype=torch.float32).eval() for name in names)
    processor = load_image_processor(student_name)
    read = labels if decoder is None else Salient(load_file(decoder), student.config.patch_size)

    def batches(split: str, limit: int | None) -> Any:
        images = open_images(dataset, split)
        return eval_loader(images, processor, batch_size=BATCH_SIZE, limit=limit)

    with tempfile.TemporaryDirectory() as folder:
        paths = {"float32": Path(folder) / "float32.onnx"}
        save_onnx(student, paths["float32"])
        for precision in ONNX_PRECISIONS:
            paths[precision] = Path(folder) / f"{precision}.onnx"
            calibration = (batch["pixel_values"] for batch in batches("train", CALIBRATION_IMAGES))
            quantize_onnx(paths["float32"], paths[precision], precision, calibration)
        runs = {precision: open_file(path) for precision, path in paths.items()}
        sizes = {precision: path.stat().st_size for precision, path in paths.items()}
    same = {precision: [0, 0] for precision in runs}
    count = images = 0
    for batch in batches("test", num_images):
        pixel_values = batch["pixel_values"]
        truth = read(teacher(pixel_values)[0], pixel_values)
        own = read(student(pixel_values)[0], pixel_values)
        count, images = count + truth.numel(), images + len(pixel_values)
        for precision, run in runs.items():
            found = read(run(pixel_values)[0], pixel_values)
            same[precision][0] += (found == truth).sum().item()
            same[precision][1] += (found == own).sum().item()
    facts = {"num_images": images, "what": "labels" if decoder is None else "pixels"}
    facts |= {"parameter_bytes": parameter_bytes(student)}
    return [
        {"precision": precision, "bytes": sizes[precision], "agreement": with_teacher / count}
        | {"with_student": with_student / count, **facts}
        for precision, (with_teacher, with_student) in same.items()
    ]


def labels(logits: Tensor, images: Tensor) -> Tensor:
    """Classes, (B,)."""
    return logits.argmax(dim=1)


class Salient:
    """Which pixels a decoder finds salient in the tokens after the final norm, (B, 112, 112), of square images."""

    def __init__(self, weights: dict[str, Tensor], patch_size: int) -> None:
        self.weights, self.patch_size = weights, patch_size

    def __call__(self, tokens: Tensor, images: Tensor) -> Tensor:
        side = images.shape[-1] // self.patch_size
        return saliency(tokens[:, -side * side :], side, self.weights) > 0.5
