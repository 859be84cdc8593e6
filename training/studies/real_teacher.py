"""A student beside its teacher on photographs that it has not seen: fidelity by size, and the teacher's own task.

    python -m training.studies.real_teacher --student runs/vits14_k3 --teacher path/to/teacher \
        --datasets caltech101-test.parquet --decoder saliency_head.safetensors --output_dir out

Writes table.md, results.json, fidelity.png, features.png and, with a decoder, maps.png: the saliency that it reads in
the last state of both models. Costs a minute for every 500 photographs of 112 pixels on one core.
"""

from raptor_settings.parse import parse_settings

from .settings import RealTeacherSettings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(RealTeacherSettings)

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.data.loaders import eval_loader
from raptor_hf.dynamics.explorer import denormalized, feature_colours
from raptor_hf.dynamics.motion import directions
from raptor_hf.families import FAMILIES
from raptor_hf.figures import saved
from raptor_hf.metrics import FidelityAccumulator
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment
from raptor_hf.recipes.run_metrics import StudentMetrics
from raptor_hf.recipes.settings import user_errors
from raptor_hf.teacher import Teacher, load_teacher

from .conclusions import markdown_table
from .learning_rates import without_paths

logger = logging.getLogger("real_teacher")

# the shorter side before the crop, in units of the crop's side, as in the usual 256 and 224
RESIZE = 8 / 7
# photographs and steps whose features are drawn
NUM_SHOWN, NUM_STEPS = 3, 7


def main() -> None:
    settings = parse_settings(RealTeacherSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        teacher, student = load_teacher(settings.teacher), load_teacher(settings.student)
        decoder = None if settings.decoder is None else load_file(settings.decoder)
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        metrics = StudentMetrics.read(settings.student)
    rows, pictures, features = [], None, None
    for dataset in settings.datasets:
        for side in settings.sizes:
            processor = processor_of(settings.teacher, side)
            images = open_images(dataset, "train")
            batches = eval_loader(images, processor, batch_size=settings.batch_size, limit=settings.num_images)
            row, shown = compare(teacher, student, batches, decoder)
            name = Path(dataset).stem
            rows.append({"dataset": name, "size": side, **row})
            logger.info("%s at %d px: mean R2 %.3f, last %.3f", name, side, row["r2_mean"], row["r2_last"])
            pictures = pictures or (shown and (shown, processor))
            if features is None and side == max(settings.sizes):
                features = next(iter(batches))["pixel_values"][:NUM_SHOWN], processor
    parameters = {"teacher": teacher.num_parameters, "student": student.num_parameters}
    record = {"title": settings.title, "parameters": parameters, "blocks": metrics.blocks, "seconds": metrics.seconds}
    record |= {
        "command": command_of(sys.argv[1:]),
        "trained_on": metrics.device,
        "rows": rows,
        **describe_environment(torch.device("cpu")),
    }
    write_json(folder / "results.json", record)
    write_text_atomically(folder / "table.md", table(record))
    plot_fidelity(rows, metrics.blocks, folder / "fidelity.png")
    plot_features(teacher, student, *features, folder / "features.png")
    if pictures:
        plot_maps(*pictures, folder / "maps.png")
    print(f"saved to {folder}: table.md, results.json and figures")


def command_of(arguments: Sequence[str]) -> str:
    """The command that writes the page; of paths outside of the working directory only the names."""
    return shlex.join(["python", "-m", "training.studies.real_teacher", *without_paths(list(arguments))])


def processor_of(model: str, side: int) -> BaseImageProcessor:
    """The model's image processor for images of another size, a square of `side` pixels."""
    processor = load_image_processor(model)
    processor.size = {"shortest_edge": round(side * RESIZE)}
    processor.crop_size = {"height": side, "width": side}
    return processor


@torch.no_grad()
def compare(
    teacher: Teacher, student: Teacher, batches: Any, decoder: dict[str, Tensor] | None
) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor] | None]:
    """Fidelity on all batches and, with a decoder, how alike the maps are that it reads in the last states.

    Returns:
        The numbers; images and the teacher's and the student's maps of the first batch, or None without a decoder.
    """
    fidelity = FidelityAccumulator(teacher.num_layers, teacher.tokens, teacher.hidden_size)
    maps: list[list[Tensor]] = [[], []]
    shown = None
    for batch in batches:
        pixel_values = batch["pixel_values"]
        states = [model.trajectory(pixel_values) for model in (teacher, student)]
        fidelity.update(*states)
        if decoder is None:
            continue
        side = pixel_values.shape[-1] // teacher.patch_size
        for own, model, trajectory in zip(maps, (teacher, student), states, strict=True):
            own.append(saliency(patches_of(model, trajectory[:, -1]), side, decoder))
        shown = shown or (pixel_values, maps[0][0], maps[1][0])
    scores = fidelity.compute()
    row = {
        "num_images": sum(map(len, maps[0])) or None,
        "r2": scores.r2.tolist(),
        "r2_mean": scores.r2.mean().item(),
        "r2_last": scores.r2[-1].item(),
        "cosine_last": {name: value[-1].item() for name, value in scores.cosine.items() if value is not None},
    }
    if decoder is not None:
        first, second = (torch.cat(own) for own in maps)
        row |= {"maps": alike(first, second), "shuffled": alike(first, second.roll(1, 0))}
    return row, shown


def patches_of(model: Teacher, state: Tensor) -> Tensor:
    """The patch tokens of a state after the model's final norm, (B, P, D)."""
    norm = model.model.get_submodule(FAMILIES[model.family].final_norm)
    return norm(state)[:, model.tokens.slices["patches"]]


def saliency(patches: Tensor, side: int, weights: dict[str, Tensor]) -> Tensor:
    """Reads a map in patch tokens: three transposed convolutions with batch norm and ReLU, and one of 1 x 1.

    Args:
        patches: after the final norm, (B, side * side, D).
        side: of the square of patches.
        weights: `upconvI`, `bnI` for I = 1, 2, 3 and `final_conv`, by PyTorch's names.

    Returns:
        (B, 112, 112), from 0 to 1.
    """
    weights = {name: tensor.float() for name, tensor in weights.items()}
    maps = patches.mT.reshape(len(patches), -1, side, side)
    for index in (1, 2, 3):
        maps = F.conv_transpose2d(maps, weights[f"upconv{index}.weight"], weights[f"upconv{index}.bias"], 2, 1)
        norm = [weights[f"bn{index}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        maps = F.relu(F.batch_norm(maps, *norm))
    maps = F.conv2d(maps, weights["final_conv.weight"], weights["final_conv.bias"])
    return F.interpolate(maps, size=(112, 112), mode="bilinear", align_corners=False).sigmoid()[:, 0]


def alike(first: Tensor, second: Tensor) -> dict[str, float]:
    """How alike two sets of maps, (N, H, W), are: correlation over the pixels of each pair, and mean difference."""
    pairs = zip(first.flatten(1), second.flatten(1), strict=True)
    correlations = np.array([np.corrcoef(a, b)[0, 1] for a, b in pairs])
    return {
        "correlation_mean": float(np.nanmean(correlations)),
        "correlation_median": float(np.nanmedian(correlations)),
        "correlation_worst": float(np.nanmin(correlations)),
        "absolute_difference": (first - second).abs().mean().item(),
    }


def table(record: dict[str, Any]) -> str:
    """The page."""
    titles = ["photographs", "px", "mean R²", "last R²", "cosine, cls", "cosine, patches"]
    has_maps = all("maps" in row for row in record["rows"])
    titles += ["maps: correlation", "median", "worst", "difference", "shuffled"] if has_maps else []
    rows = []
    for row in record["rows"]:
        cosine = row["cosine_last"]
        cells = [row["dataset"], str(row["size"]), f"{row['r2_mean']:.3f}", f"{row['r2_last']:.3f}"]
        cells += [f"{cosine['cls']:.3f}" if "cls" in cosine else "-", f"{cosine['patches']:.3f}"]
        if has_maps:
            maps = row["maps"]
            cells += [f"{maps[f'correlation_{name}']:.3f}" for name in ("mean", "median", "worst")]
            cells += [f"{maps['absolute_difference']:.3f}", f"{row['shuffled']['correlation_mean']:.3f}"]
        rows.append(cells)
    own, whole = record["parameters"]["student"], record["parameters"]["teacher"]
    blocks = "".join(f"[{layers[0]}-{layers[-1]}]" for layers in record["blocks"])
    training = sum(seconds for name, seconds in record["seconds"].items() if name != "evaluation")
    words = f"Student of {len(record['blocks'])} blocks, layers {blocks}, {own / 1e6:.2f} M of {whole / 1e6:.2f} M "
    words += f"parameters ({own / whole:.0%}), trained in {training / 60:.0f} minutes on {record['trained_on']}."
    parts = [f"# {record['title']}", words, f"    {record['command']}", markdown_table(titles, rows)]
    parts += ["![Fidelity by layer](fidelity.png)", "![Features over depth, teacher above student](features.png)"]
    parts += ["![What the teacher's decoder reads in both](maps.png)"] if has_maps else []
    return "\n\n".join(parts) + "\n"


def plot_fidelity(rows: list[dict[str, Any]], blocks: list[list[int]], path: Path) -> Figure:
    """R² of every layer, a line for each set of photographs and size."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(range(1, len(row["r2"]) + 1), row["r2"], "o-", ms=4, label=f"{row['dataset']}, {row['size']} px")
    for block in blocks[:-1]:
        axes.axvline(block[-1] + 0.5, color="0.7", lw=1, ls=":")
    lowest = min(0.0, *(min(row["r2"]) for row in rows))
    axes.set(xlabel="layer", ylabel="R² of the student's state", ylim=(lowest, 1.02))
    axes.legend(fontsize=8)
    return saved(figure, path, dpi=150)


def plot_features(
    teacher: Teacher, student: Teacher, pixel_values: Tensor, processor: BaseImageProcessor, path: Path
) -> Figure:
    """Patches over depth, in three principal components of the teacher's as colours: teacher above student."""
    first = teacher.tokens.num_prefix_tokens
    states = [model.trajectory(pixel_values).float() for model in (teacher, student)]
    colours = feature_colours([directions(trajectory)[:, :, first:] for trajectory in states])
    steps = np.linspace(0, teacher.num_layers, NUM_STEPS).round().astype(int)
    photographs = denormalized(pixel_values, processor.image_mean, processor.image_std)
    side = pixel_values.shape[-1] // teacher.patch_size
    figure = Figure(figsize=(1.2 * (len(steps) + 1), 2.5 * len(photographs)), layout="constrained")
    grid = figure.subplots(2 * len(photographs), len(steps) + 1, squeeze=False)
    for index, photograph in enumerate(photographs):
        for row, own in enumerate(colours):
            for column, step in enumerate(steps, start=1):
                axes = grid[2 * index + row, column]
                axes.imshow(own[index, step].reshape(side, side, 3))
                if index == row == 0:
                    axes.set_title(f"step {step}" if step else "embedding", fontsize=9)
        grid[2 * index, 0].imshow(photograph)
        grid[2 * index + 1, 0].axis("off")
        for row, title in enumerate(("teacher", "student")):
            grid[2 * index + row, 1].set_ylabel(title, fontsize=9)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return saved(figure, path, dpi=150)


def plot_maps(
    shown: tuple[Tensor, Tensor, Tensor], processor: BaseImageProcessor, path: Path, count: int = 8
) -> Figure:
    """Photographs above what the decoder reads in the teacher's and in the student's last state."""
    images, *maps = (tensor[:count] for tensor in shown)
    figure = Figure(figsize=(1.5 * len(images), 4.8), layout="constrained")
    grid = figure.subplots(3, len(images), squeeze=False)
    for column, image in enumerate(denormalized(images, processor.image_mean, processor.image_std)):
        grid[0, column].imshow(image)
        for row, own in enumerate(maps, start=1):
            grid[row, column].imshow(own[column], cmap="cividis", vmin=0, vmax=1)
    for row, title in enumerate(("photograph", "teacher", "student")):
        grid[row, 0].set_ylabel(title)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return saved(figure, path, dpi=150)


if __name__ == "__main__":
    main()
