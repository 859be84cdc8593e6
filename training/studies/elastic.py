"""An elastic student at several depths and with early exit, beside what one would run instead.

    python -m training.studies.elastic training/configs/study/digits_elastic_speed.yaml

Writes table.md, results.json and figure.png: accuracy, agreement with the teacher, multiply-accumulates, bytes of
weights and the time of a batch, taken in turn in one process, for the student at every depth, its teacher, the teacher
cut after as many layers, other students, and each of them with its linear layers in int8. Early exit is calibrated on
one half of the images and measured on the other, both ways.
"""

from raptor_settings.parse import parse_settings

from .settings import ElasticSettings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(ElasticSettings)

import copy
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from transformers import AutoModelForImageClassification, PreTrainedModel

from raptor_hf import RaptorForImageClassification
from raptor_hf.configuration_raptor import EXIT_CRITERIA
from raptor_hf.conversion import to_dinov2
from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.data.loaders import eval_loader
from raptor_hf.distillation.inputs import class_match
from raptor_hf.elastic import calibrate_exit
from raptor_hf.families import FAMILIES, find_backbone
from raptor_hf.figures import saved
from raptor_hf.hub.card_words import device_words
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment
from raptor_hf.recipes.settings import user_errors
from raptor_hf.teacher import load_teacher, macs

from ..benchmarks.measuring import Comparison, alternate
from .conclusions import markdown_table
from .learning_rates import without_paths

WARMUP = 3


@dataclass(frozen=True)
class Contender:
    """A model that classifies images, and how it is called.

    Args:
        name: what the table calls it.
        series: what it is one of, for the figure.
        model: of transformers.
        arguments: of every call.
        macs: multiply-accumulates per image, None where they are not counted.
        weights: bytes.
    """

    name: str
    series: str
    model: PreTrainedModel
    arguments: Mapping[str, Any] = field(default_factory=dict)
    macs: int | None = None
    weights: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, (B, num_labels)."""
        return self.model(images, **self.arguments).logits


@torch.no_grad()
def main() -> None:
    settings = parse_settings(ElasticSettings)
    with user_errors():
        teacher = AutoModelForImageClassification.from_pretrained(settings.teacher).eval()
        student = RaptorForImageClassification.from_pretrained(settings.student).eval()
        images, labels = read_images(settings)
        contenders = list_contenders(teacher, student, settings)
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
    rows = measure([costed(contender, images) for contender in contenders], images, labels, settings)
    exits = [measure_exit(student, criterion, images, labels, settings) for criterion in EXIT_CRITERIA]
    record = {
        "title": settings.title,
        "command": shlex.join(["python", "-m", "training.studies.elastic", *without_paths(sys.argv[1:])]),
        "num_images": len(images),
        "batch_size": settings.batch_size,
        "num_steps": student.config.num_hidden_layers,
        "max_disagreement": settings.max_disagreement,
        "rows": rows,
        "early_exit": exits,
        **describe_environment(torch.device("cpu")),
    }
    write_json(folder / "results.json", record)
    write_text_atomically(folder / "table.md", table(record))
    plot_speed(record, folder / "figure.png")
    print(f"saved to {folder}: table.md, results.json and figure.png")


def read_images(settings: ElasticSettings) -> tuple[Tensor, Tensor]:
    """All images of the split, (N, C, H, W), and their classes of the teacher's classifier, (N,)."""
    found, processor = open_images(settings.dataset, settings.test_split), load_image_processor(settings.teacher)
    batches = list(eval_loader(found, processor, batch_size=100))
    labels = class_match(load_teacher(settings.teacher), found)(torch.cat([batch["labels"] for batch in batches]))
    return torch.cat([batch["pixel_values"] for batch in batches]), labels


def list_contenders(
    teacher: PreTrainedModel, student: RaptorForImageClassification, settings: ElasticSettings
) -> list[Contender]:
    """Everything that is compared, without its costs; the teacher is the first."""
    found = [Contender("teacher", "teacher", teacher)]
    for depth in settings.depths:
        if depth < teacher.config.num_hidden_layers:
            found.append(Contender(f"teacher's first {depth} layers", "teacher's first layers", cut(teacher, depth)))
    for depth in settings.depths:
        found.append(Contender(f"elastic, {depth} steps", "elastic", student, {"num_steps": depth}))
    try:
        unrolled = {depth: to_dinov2(student, num_steps=depth) for depth in settings.depths}
    except ValueError as error:
        print(f"not compared as plain DINOv2: {error}")
        unrolled = {}
    for depth, model in unrolled.items():
        found.append(Contender(f"elastic as plain DINOv2, {depth} layers", "elastic as plain DINOv2", model))
    for name, _, path in (rival.rpartition(" = ") for rival in settings.rivals or ()):
        model = RaptorForImageClassification.from_pretrained(path).eval()
        found.append(Contender(name, name.rpartition(", ")[0] or name, model))
    if settings.int8:
        found += [
            replace(one, name=f"{one.name}, int8", series=f"{one.series}, int8", model=in_int8(one.model))
            for one in found
        ]
    return found


def cut(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """A copy that ends after its first layers, its norm and its head on what these give."""
    model = copy.deepcopy(model)
    backbone = find_backbone(model)
    del backbone.get_submodule(FAMILIES[backbone.config.model_type].layers)[depth:]
    return model


def in_int8(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the weights of all linear layers in int8, and their inputs quantised at each call."""
    with warnings.catch_warnings(action="ignore"):  # it is deprecated, and what a CPU has
        return quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def costed(contender: Contender, images: Tensor) -> Contender:
    """With bytes of weights and, of floating-point models, multiply-accumulates."""
    quantised = [module for module in contender.model.modules() if isinstance(module, torch.ao.nn.quantized.Linear)]
    weights = sum(parameter.nbytes for parameter in contender.model.parameters())
    weights += sum(layer.weight().nelement() + layer.bias().nbytes for layer in quantised)
    return replace(contender, weights=weights, macs=None if quantised else macs(contender, images))


def measure(
    contenders: Sequence[Contender], images: Tensor, labels: Tensor, settings: ElasticSettings
) -> list[dict[str, Any]]:
    """Scores of every contender, and the time of a batch beside that of the first."""
    known = labels >= 0
    classes = [torch.cat([one(batch).argmax(dim=1) for batch in images.split(100)]) for one in contenders]
    batch = images[: settings.batch_size]
    seconds = alternate(
        [partial(one, batch) for one in contenders],
        repeats=settings.repeats,
        warmup=WARMUP,
        device=torch.device("cpu"),
    )
    return [
        {
            "name": one.name,
            "series": one.series,
            "macs": one.macs,
            "weights": one.weights,
            "accuracy": share(found[known] == labels[known]),
            "agreement": share(found == classes[0]),
            "seconds": statistics.median(own),
            **Comparison(seconds[0].tolist(), own).to_dict(),
        }
        for one, found, own in zip(contenders, classes, seconds.tolist(), strict=True)
    ]


def measure_exit(
    student: RaptorForImageClassification, criterion: str, images: Tensor, labels: Tensor, settings: ElasticSettings
) -> dict[str, Any]:
    """Early exit by one criterion: what images take and lose that it was not calibrated on, and the time they take."""
    halves = torch.arange(len(images)) % 2
    steps, kept, right, right_whole, pairs = [], [], [], [], [[], []]
    for half in (0, 1):
        calibrate_exit(student, images[halves != half].split(100), criterion, settings.max_disagreement)
        own, truth = images[halves == half], labels[halves == half]
        early = partial(student, exit_criterion=criterion)
        outputs = [early(batch) for batch in own.split(settings.batch_size)]
        found = torch.cat([output.logits.argmax(dim=1) for output in outputs])
        whole = torch.cat([student(batch).logits.argmax(dim=1) for batch in own.split(settings.batch_size)])
        steps.append(torch.cat([output.num_steps for output in outputs]))
        kept.append(found == whole)
        right.append((found == truth)[truth >= 0])
        right_whole.append((whole == truth)[truth >= 0])
        # all full batches: how many images go on differs from batch to batch
        batches = [batch for batch in own.split(settings.batch_size) if len(batch) == settings.batch_size] or [own]
        times = alternate(
            [partial(run, model, batches) for model in (student, early)],
            repeats=settings.repeats,
            warmup=WARMUP,
            device=torch.device("cpu"),
        )
        for pair, own_times in zip(pairs, times.tolist(), strict=True):
            pair += [seconds / len(batches) for seconds in own_times]
    return {
        "criterion": criterion,
        "threshold": student.config.exit_thresholds[criterion],
        "mean_steps": torch.cat(steps).float().mean().item(),
        "agreement_with_all_steps": share(torch.cat(kept)),
        "accuracy": share(torch.cat(right)),
        "accuracy_with_all_steps": share(torch.cat(right_whole)),
        "seconds": statistics.median(pairs[1]),
        **Comparison(*pairs).to_dict(),
    }


def run(model: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> None:
    """All batches, for their time alone."""
    for batch in batches:
        model(batch)


def share(values: Tensor) -> float:
    return values.float().mean().item()


def table(record: Mapping[str, Any]) -> str:
    """The Markdown page."""
    rows = [
        [
            row["name"],
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['agreement']:.1f}",
            f"{row['macs'] / 1e6:.1f}" if row["macs"] else "-",
            f"{row['weights'] / 1e6:.2f}",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['speedup']:.2f} [{row['speedup_quartiles'][0]:.2f}, {row['speedup_quartiles'][1]:.2f}]",
        ]
        for row in record["rows"]
    ]
    exits = [
        [
            row["criterion"],
            f"{row['mean_steps']:.2f}",
            f"{100 * (1 - row['mean_steps'] / record['num_steps']):.0f}",
            f"{100 * (row['accuracy'] - row['accuracy_with_all_steps']):+z.1f}",
            f"{100 * row['agreement_with_all_steps']:.1f}",
            f"{100 * (1 - 1 / row['speedup']):.0f}",
        ]
        for row in record["early_exit"]
    ]
    size = record["batch_size"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    titles = ("model", "accuracy (%)", "agreement with the teacher (%)", "MACs (M)", "weights (MB)")
    parts = (
        f"# {record['title']}",
        f"    {record['command']}",
        f"{record['num_images']} images; on {device_words(record['device'])}; {versions}.",
        f"Milliseconds are the median of a batch of {size}, all models in turn in one process; the speed is the median "
        "over these turns of the teacher's time by the model's, with its quartiles.",
        markdown_table((*titles, f"ms, batch of {size}", "speed"), rows),
        "![speed and accuracy](figure.png)",
        f"**Early exit** from {record['num_steps']} steps. The threshold is calibrated on one half of the images, of "
        f"which {100 * record['max_disagreement']:g} % may change their class, and measured on the other, both ways; "
        f"times are those of batches of {size}, in turn with all steps.",
        markdown_table(
            ("criterion", "mean steps", "steps saved (%)", "accuracy (points)", "agreement (%)", "time saved (%)"),
            exits,
        ),
    )
    return "\n\n".join(parts) + "\n"


def plot_speed(record: Mapping[str, Any], path: Path) -> Figure:
    """Draws accuracy against the time of a batch, of what was timed in turn."""
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in record["rows"]:
        series.setdefault(row["series"], []).append(row)
    whole = [name for name in series if not name.endswith(", int8")]
    for name, rows in series.items():
        # in int8 with the colour of the same in floating point
        style = ("o" if name in whole else "s") + ("-" if name in whole else ":") * (len(rows) > 1)
        points = sorted((1e3 * row["seconds"], 100 * row["accuracy"]) for row in rows)
        color = f"C{whole.index(name.removesuffix(', int8')) % 10}"
        axes.plot(*zip(*points, strict=True), style, label=name, color=color, markersize=5)
    axes.set(
        xlabel=f"milliseconds, batch of {record['batch_size']}", ylabel="accuracy, test images (%)", xlim=(0, None)
    )
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    axes.spines[["top", "right"]].set_visible(False)
    return saved(figure, path, dpi=150)


if __name__ == "__main__":
    main()
