"""Write a student as files for other runtimes, and measure how far they agree with it.

    python training/export.py --model model_cards/digits-k3 --dataset digits --precisions float32 int8_dynamic int4
    python training/export.py --model runs/k3 --formats onnx pt2 executorch coreml --output_dir runs/k3_files

Every file stores the weights of a block once. ONNX and .pt2 files take any batch and image size, the others any batch
of one size. Costs seconds for each file on one core, and minutes for ExecuTorch. Expect float32 to differ by less than
1e-4, and int8 to agree with the student on all but a few images in a thousand.
"""

from raptor_settings.export import SUFFIXES, ExportSettings
from raptor_settings.parse import parse_settings
from raptor_settings.resources import find_model

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(ExportSettings)

import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import raptor_hf
from raptor_hf.configuration_raptor import RaptorConfig, as_pair
from raptor_hf.data.images import ImageSet, check_image_size, load_image_processor, multiples_near, open_images
from raptor_hf.data.loaders import ImageLoader, check_readable, eval_loader
from raptor_hf.export.agreement import Agreement, open_file
from raptor_hf.export.programs import output_names, parameter_bytes, save_pt2
from raptor_hf.recipes.files import remove, write_json
from raptor_hf.recipes.models import model_of
from raptor_hf.recipes.settings import check_output_dir, user_errors
from raptor_hf.teacher import Teacher, load_teacher

logger = logging.getLogger("export")

# what has to be installed to write a format
PACKAGES = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "executorch": ("executorch", "torchao"),
    "coreml": ("coremltools",),
}


def main() -> None:
    settings = parse_settings(ExportSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        check_packages(settings.formats)
        with model_of("model", settings.model):
            model = load_student(settings.model, settings.variant)
        teacher = None if settings.teacher is None else open_teacher(settings.teacher)
        check_size(settings.image_size, model)
        calibration, test = open_loaders(settings, model)
        folder = Path(settings.output_dir)
        check_output_dir(folder)
    names, size = output_names(model), parameter_bytes(model)
    records = []
    # in the folder itself, where a whole file takes the place of an earlier one at once
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        for kind, precision in settings.files():
            path = folder / f"model_{precision}{SUFFIXES[kind]}"
            written = Path(scratch) / path.name
            write(model, kind, precision, written, settings.image_size, calibration, Path(scratch))
            remove(path)
            written.rename(path)
            stored = size_of(path)
            records.append({"file": path.name, "format": kind, "precision": precision, "bytes": stored})
            records[-1]["of_the_parameters"] = stored / size
            logger.info("wrote %s, %.2f MB, %.2f of the parameters' bytes", path.name, stored / 1e6, stored / size)
    result = {
        "parameter_bytes": size,
        "outputs": names,
        "files": records,
        **what_goes_in_and_out(settings.model, model),
    }
    if test is not None:
        result |= measure(model, teacher, test, folder, records)
    write_json(folder / "export.json", result)
    print(f"saved to {folder}: export.json and {', '.join(record['file'] for record in records)}")


def check_packages(formats: Sequence[str]) -> None:
    """Refuse formats that cannot be written here.

    Raises:
        ValueError: a format's packages are not installed.
    """
    for kind in formats:
        missing = [name for name in PACKAGES.get(kind, ()) if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"formats has {kind!r}, which needs more packages: pip install {' '.join(missing)}")


def load_student(name: str, variant: str | None) -> PreTrainedModel:
    """Load a model, as the class that it was saved as, or as that of a head."""
    source = find_model(name)
    config = RaptorConfig.from_pretrained(source)
    heads = getattr(config, "head_variants", None) or {}
    owners = [kind for kind, variants in heads.items() if variant in variants] or config.architectures or [None]
    if not (isinstance(owners[0], str) and owners[0] in raptor_hf.__all__):
        raise ValueError(
            f"model is {name!r}, whose config.json names {owners[0]} as its class; it must be a student of raptor_hf, "
            "as distill.py saves it at the end of a run"
        )
    options = {} if variant is None else {"variant": variant}
    return getattr(raptor_hf, owners[0]).from_pretrained(source, dtype=torch.float32, **options).eval()


def open_teacher(name: str) -> Teacher:
    """Load the model that files are compared with, too."""
    with model_of("teacher", name):
        teacher = load_teacher(name)
    if teacher.classifier is None:
        raise ValueError(f"teacher is {name!r}, which has no classifier to agree with")
    return teacher


def check_size(image_size: list[int] | None, model: PreTrainedModel) -> None:
    """Refuse a size of images that does not divide into patches."""
    for side, patch in zip(image_size or (), as_pair(model.config.patch_size), strict=False):
        if side % patch:
            near = multiples_near(side, patch)
            raise ValueError(f"image_size is {image_size}; {side} must be a multiple of the patch, such as {near}")


def open_loaders(settings: ExportSettings, model: PreTrainedModel) -> tuple[list[Tensor] | None, ImageLoader | None]:
    """Batches to calibrate with, of a size, and the loader of the images that are measured; None without a data set."""
    if settings.dataset is None:
        return None, None
    processor = load_image_processor(settings.model)
    if settings.image_size is not None:
        height, width = settings.image_size
        processor.size, processor.crop_size = {"shortest_edge": max(height, width)}, {"height": height, "width": width}
    check_image_size(processor, model.config.patch_size, model.config.num_channels)

    def loader(images: ImageSet, limit: int | None) -> ImageLoader:
        return eval_loader(images, processor, batch_size=settings.batch_size, limit=limit)

    test_images = open_images(settings.dataset, settings.test_split)
    check_readable(test_images, processor, limit=settings.test_images)
    calibration = None
    if any(precision in ("int8_static", "int4") for _, precision in settings.files()):
        images = open_images(settings.dataset, settings.calibration_split)
        batches = loader(images, settings.calibration_images)
        calibration = [batch["pixel_values"] for batch in batches]
    return calibration, loader(test_images, settings.test_images)


def what_goes_in_and_out(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """Return what a file needs to run elsewhere: the processor's settings, and the labels' names; null without."""
    try:
        processor = load_image_processor(name).to_dict()
    except FileNotFoundError:
        processor = None
    labels = model.config.id2label if "logits" in output_names(model) else {}
    return {"image_processor": processor, "labels": [labels[index] for index in sorted(labels)] or None}


def write(
    model: PreTrainedModel,
    kind: str,
    precision: str,
    path: Path,
    image_size: list[int] | None,
    calibration: list[Tensor] | None,
    scratch: Path,
) -> None:
    """Write one file; `scratch` keeps the ONNX file in float32, which all others are made from."""
    size = None if image_size is None else tuple(image_size)
    if kind == "pt2":
        save_pt2(model, path, size)
    elif kind == "onnx":
        # here, for the packages are no dependencies of the recipes
        from raptor_hf.export.onnx_files import quantize_onnx, save_onnx

        source = scratch / "float32.onnx"
        if not source.exists():
            save_onnx(model, source, size)
        if precision == "float32":
            shutil.copyfile(source, path)
        else:
            quantize_onnx(source, path, precision, calibration)
    else:
        from raptor_hf.export.mobile import save_coreml, save_executorch

        size = size or as_pair(model.config.image_size)
        if kind == "coreml":
            save_coreml(model, path, size, precision)
        else:
            save_executorch(model, path, size, precision, calibration)


@torch.no_grad()
def measure(
    model: PreTrainedModel, teacher: Teacher | None, test: ImageLoader, folder: Path, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Run all files on all images; its agreement with the student, and with the teacher, goes into its record.

    Returns:
        The number of images, and the agreement of the student itself with the teacher.
    """
    runs = [open_file(folder / record["file"]) for record in records]
    with_student, with_teacher = [Agreement() for _ in runs], [Agreement() for _ in runs]
    own, count = Agreement(), 0
    for batch in test:
        images = batch["pixel_values"]
        count += len(images)
        expected = model(images)[0]
        truth = None if teacher is None else teacher.logits(teacher.trajectory(images)[:, -1])
        if truth is not None:
            own.update(expected, truth)
        for run, student_score, teacher_score in zip(runs, with_student, with_teacher, strict=True):
            if run is not None:
                actual = run(images)[0]
                student_score.update(actual, expected)
                if truth is not None:
                    teacher_score.update(actual, truth)
    for run, record, student_score, teacher_score in zip(runs, records, with_student, with_teacher, strict=True):
        if run is None:
            continue
        record |= student_score.compute()
        if teacher is not None:
            record["teacher_agreement"] = teacher_score.compute()["agreement"]
        scores = {name: value for name, value in record.items() if isinstance(value, float)}
        logger.info("%s: %s", record["file"], ", ".join(f"{name} {value:.5g}" for name, value in scores.items()))
    return {"num_images": count} | ({} if teacher is None else {"teacher_agreement": own.compute()["agreement"]})


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder, which a Core ML package is."""
    return sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted") from None
