"""Where students lose to their teacher: photographs against pixels, cls against patches, by class and by size.

    python -m training.studies.dense_gap training/configs/study/dense_gap.yaml

Every model is probed as training/probe.py does, by the settings of its configurations. Models that are the first
layers of another share its pass over the images. What is measured stays in `runs_dir`: the same command, given again,
measures what is missing, then writes table.md, results.json and figure.png. What the study costs and gives stands in
its config.
"""

from raptor_settings.parse import parse_settings

from .settings import DenseGapSettings, slug, split_probes, split_variants

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(DenseGapSettings)

import dataclasses
import logging
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from matplotlib.figure import Figure
from raptor_settings.probe import ProbeSettings
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from raptor_hf.data.loaders import EpochOrder, Steps
from raptor_hf.figures import mean_and_deviation, saved
from raptor_hf.metrics import MeanIoU
from raptor_hf.probing import initialize_head, load_backbone, scheduled_rate
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment, logged, precision_of, set_learning_rate
from raptor_hf.recipes.probe_inputs import Inputs, open_inputs
from raptor_hf.recipes.run_metrics import read_json
from raptor_hf.recipes.settings import user_errors
from raptor_hf.teacher import count_parameters, macs

from .conclusions import markdown_table

logger = logging.getLogger("dense_gap")

# of the image: between segments of one size and those of the next; 0.1 % is one patch of 14 pixels at 448
SEGMENT_SHARES = (0.001, 0.01, 0.1)
SEGMENT_NAMES = ("< 0.1 %", "0.1 - 1 %", "1 - 10 %", "> 10 %")
# images whose predictions are upsampled at a time: maps of more fit into no cache
MAPS_AT_ONCE = 2


def main() -> None:
    settings = parse_settings(DenseGapSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        plan = {probe: plan_models(settings, flags) for probe, flags in split_probes(settings.probes)}
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
    records = []
    for probe, models in plan.items():
        place = Path(settings.runs_dir) / slug(probe)
        place.mkdir(parents=True, exist_ok=True)
        for group in shared_passes(models, place):
            for name, record in measure(group):
                write_json(place / f"{slug(name)}.json", {"model": name, "probe": probe, **record})
                logger.info("%s: %s", probe, name)
        own = [read_json(place / f"{slug(name)}.json") for name in models]
        with user_errors():
            check_one_size(probe, own)
        records += own
    for record in records:
        if settings.class_names and "classes" in record["scores"]:
            record["scores"]["classes"] = settings.class_names
    command = shlex.join(["python", "-m", "training.studies.dense_gap", *sys.argv[1:]])
    write_json(folder / "results.json", {"title": settings.title, "command": command, "records": records})
    write_text_atomically(folder / "table.md", page(settings.title, command, records))
    plot_gaps(records, folder / "figure.png")
    print(f"saved to {folder}: table.md, results.json and figure.png")


def plan_models(settings: DenseGapSettings, probe: list[str]) -> dict[str, ProbeSettings]:
    """The settings of probe.py for all models, by their names.

    Args:
        settings: of the study.
        probe: a configuration of probe.py, and flags.

    Raises:
        ValueError: probe.py refuses them.
    """
    return {
        name: parse_settings(ProbeSettings, [*probe, *flags], exit_on_error=False)
        for name, flags in split_variants(settings.models)
    }


def check_one_size(probe: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Refuses to compare models that saw images of different sizes, as they do by default, each by its own processor.

    Args:
        probe: its name.
        records: of all models.

    Raises:
        ValueError: the sizes differ.
    """
    sizes = {record["model"]: record["image_size"] for record in records}
    if len({tuple(size) for size in sizes.values()}) > 1:
        listed = ", ".join(f"{model}: {height} x {width}" for model, (height, width) in sizes.items())
        raise ValueError(
            f"`probes` has {probe!r} with images of several sizes ({listed}); it must give all models one; add "
            "--image_size and --resize_size, and remove the records of the models that saw another one from `runs_dir`"
        )


def shared_passes(models: Mapping[str, ProbeSettings], place: Path) -> Iterable[dict[str, ProbeSettings]]:
    """The models that have no record yet, those together that are the first layers of one."""
    groups: dict[tuple[str, bool], dict[str, ProbeSettings]] = {}
    for name, settings in models.items():
        if not (place / f"{slug(name)}.json").exists():
            groups.setdefault((settings.model, settings.reinitialize), {})[name] = settings
    return groups.values()


def measure(models: Mapping[str, ProbeSettings]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What heads read in the first layers of one model, for every number of layers; one pass over the images.

    Args:
        models: settings that differ in num_layers alone, by name.

    Yields:
        A name and its record, as soon as the heads of that model are scored.
    """
    settings = next(iter(models.values()))
    accelerator = Accelerator(mixed_precision=precision_of(settings.mixed_precision))
    wanted = [own.num_layers for own in models.values()]
    deepest = None if None in wanted else max(wanted)
    inputs = open_inputs(dataclasses.replace(settings, num_layers=deepest), accelerator)
    depths = [depth or inputs.backbone.model.config.num_hidden_layers for depth in wanted]
    train, test = (
        pool(inputs, logged(batches, title, count, accelerator), depths, accelerator)
        for batches, title, count in (
            (inputs.plain_batches, "training images", inputs.num_train_images),
            (inputs.test_batches, "test images", inputs.num_test_images),
        )
    )
    score = score_segmentation if settings.task == "semantic-segmentation" else score_classification
    for index, (name, own) in enumerate(models.items()):
        backbone = load_backbone(own.model, num_layers=own.num_layers, reinitialize=own.reinitialize).model
        image = torch.zeros(1, backbone.config.num_channels, *inputs.image_size)
        yield (
            name,
            {
                "task": own.task,
                "image_size": list(inputs.image_size),
                "num_images": [inputs.num_train_images, inputs.num_test_images],
                "parameters": count_parameters(backbone),
                "macs": macs(backbone, image),
                "seeds": own.seeds,
                "scores": score(inputs, own, *((features[index], labels) for features, labels in (train, test))),
                **describe_environment(torch.device("cpu")),
            },
        )


@torch.no_grad()
def pool(
    inputs: Inputs, batches: Iterable[Mapping[str, Any]], depths: Sequence[int], accelerator: Accelerator
) -> tuple[list[Tensor], Tensor]:
    """Features of all images after so many layers each, and the final norm; and their labels."""
    model, labels = inputs.backbone.model, []
    features: list[list[Tensor]] = [[] for _ in depths]
    kept = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    for batch in batches:
        with accelerator.autocast():
            states = model(batch["pixel_values"], output_hidden_states=True).hidden_states
            for own, depth in zip(features, depths, strict=True):
                own.append(inputs.probe.model.features(model.layernorm(states[depth])).to(kept))
        labels.append(batch["labels"])
    return [torch.cat(own) for own in features], torch.cat(labels)


def train(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[list[int]], Tensor],
    num_images: int,
    seed: int,
    settings: ProbeSettings,
) -> None:
    """Trains a head in the steps of probe.py.

    Args:
        parameters: of the head, changed in place.
        loss: of the images of these rows.
        num_images: N.
        seed: of the order of the images.
        settings: of the optimization.
    """
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    order, steps = EpochOrder(num_images, seed), Steps(num_images, settings.batch_size, settings.last_batch)
    num_steps = settings.epochs * steps.per_epoch
    names = ("schedule", "warmup_steps", "start_fraction", "final_fraction")
    schedule = {name: getattr(settings, name) for name in names}
    for step in range(num_steps):
        lr = scheduled_rate(step, num_steps=num_steps, base_lr=settings.learning_rate, **schedule)
        set_learning_rate(optimizer, lr)
        loss([order(position) for position in steps.positions(step)]).backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()


def score_classification(
    inputs: Inputs, settings: ProbeSettings, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]
) -> dict[str, dict[str, Any]]:
    """Accuracies of a linear head, of k-NN and of logistic regression, on cls, on the mean patch and on both."""
    config = inputs.backbone.model.config
    parts = {"mean patch": slice(-config.hidden_size, None)}
    if config.has_cls:
        parts = {"cls": slice(0, config.hidden_size), **parts, "both": slice(None)}
    scores = {}
    for part, columns in parts.items():
        x, test_x = (features[:, columns].float() for features, _ in (train_set, test_set))
        y, test_y = train_set[1], test_set[1]
        neighbours = KNeighborsClassifier(min(settings.knn_k, len(x)), metric="cosine", weights="distance").fit(x, y)
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
        scores[part] = {
            "linear": [
                linear_accuracy(x, y, test_x, test_y, config.initializer_range, seed, settings)
                for seed in settings.seeds
            ],
            "k-NN": neighbours.score(test_x, test_y),
            "logistic regression": regression.score(test_x, test_y),
        }
    return scores


def linear_accuracy(
    x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, deviation: float, seed: int, settings: ProbeSettings
) -> float:
    """Accuracy on test features of a linear head that starts with weights of this deviation."""
    weight = torch.randn(int(y.max()) + 1, x.shape[1], generator=torch.Generator().manual_seed(seed)) * deviation
    head = [weight.requires_grad_(), torch.zeros(len(weight), requires_grad=True)]
    train(head, lambda rows: F.cross_entropy(F.linear(x[rows], *head), y[rows]), len(x), seed, settings)
    return (F.linear(test_x, *head).argmax(1) == test_y).double().mean().item()


def score_segmentation(
    inputs: Inputs, settings: ProbeSettings, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """IoU of every class, and the share of pixels that are right in segments of each size, of a head per seed."""
    probe, (features, labels) = inputs.probe, train_set
    sizes = segment_sizes(test_set[1].numpy())
    known = test_set[1] < len(inputs.class_names)
    scores: dict[str, Any] = {name: [] for name in ("mean_iou", "per_class_iou", "right_by_size")}
    scores |= {
        "classes": inputs.class_names,
        "pixels_by_size": np.bincount(sizes[known.numpy()], minlength=len(SEGMENT_NAMES)).tolist(),
    }
    scores["pixels"] = torch.bincount(test_set[1][known], minlength=len(inputs.class_names)).tolist()

    def loss(rows: list[int]) -> Tensor:
        return probe(features[rows], inputs.image_size, labels[rows], settings.loss_stride)[0]

    for seed in settings.seeds:
        initialize_head(probe, seed)
        train(list(probe.head.parameters()), loss, len(features), seed, settings)
        iou, right = MeanIoU(len(inputs.class_names)), np.zeros(len(SEGMENT_NAMES))
        for first in range(0, len(sizes), MAPS_AT_ONCE):
            rows = slice(first, first + MAPS_AT_ONCE)
            with torch.no_grad():
                maps = probe.predict(test_set[0][rows], inputs.image_size).argmax(1)
            iou.update(maps, test_set[1][rows])
            right += np.bincount(sizes[rows][(maps == test_set[1][rows]).numpy()], minlength=len(right))
        computed = iou.compute()
        scores["mean_iou"].append(computed["mean_iou"])
        scores["per_class_iou"].append(computed["per_class_iou"])
        shares = zip(right, scores["pixels_by_size"], strict=True)
        scores["right_by_size"].append([share / count if count else None for share, count in shares])
    return scores


def segment_sizes(masks: np.ndarray) -> np.ndarray:
    """The size of the segment that a pixel is of, as an index of `SEGMENT_NAMES`.

    A segment is a set of pixels of one class that touch at their sides.

    Args:
        masks: class of every pixel, (N, H, W), integers.
    """
    sizes = np.empty(masks.shape, np.uint8)
    for mask, own in zip(masks, sizes, strict=True):
        for label in np.unique(mask):
            segments, _ = scipy.ndimage.label(mask == label)
            areas = np.bincount(segments.ravel()) / mask.size
            inside = segments > 0
            own[inside] = np.digitize(areas, SEGMENT_SHARES)[segments[inside]]
    return sizes


def page(title: str, command: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    probes = list(dict.fromkeys(record["probe"] for record in records))
    by_probe = {probe: [record for record in records if record["probe"] == probe] for probe in probes}
    first = records[0]
    words = f"All on {first['device']}. Heads of {len(first['seeds'])} seeds, means and standard deviations; the first "
    words += "model is what the others are compared with. "
    words += " ".join(
        f"{probe}: {own[0]['num_images'][0]:,} training and {own[0]['num_images'][1]:,} test images."
        for probe, own in by_probe.items()
    )
    parts = [f"# {title}", words, f"    {command}", "![Where the gap lies](figure.png)", "## All probes"]
    parts.append(overview(by_probe))
    parts.append("\n".join(f"- {line}" for line in conclusions(by_probe)))
    for probe, own in by_probe.items():
        if own[0]["task"] == "semantic-segmentation":
            parts += [f"## By class and by size: {probe}", *dense_tables(own)]
        else:
            parts += [f"## cls against patches: {probe}", parts_table(own)]
    return "\n\n".join(parts) + "\n"


def percent(values: float | Sequence[float]) -> str:
    """A share, or the mean of several with their deviation, in per cent."""
    if isinstance(values, float | int):
        return f"{100 * values:.1f}"
    mean, deviation = mean_and_deviation(values)
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def headline(record: Mapping[str, Any]) -> list[float]:
    """The number that a probe is about, of all seeds."""
    scores = record["scores"]
    return scores["mean_iou"] if record["task"] == "semantic-segmentation" else list(scores.values())[-1]["linear"]


def overview(by_probe: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A row for each model: its size, and the headline of all probes."""
    models = next(iter(by_probe.values()))
    names = {"semantic-segmentation": "mean IoU (%)", "image-classification": "accuracy (%)"}
    titles = ["model", "parameters", *(f"{probe}: {names[own[0]['task']]}" for probe, own in by_probe.items())]
    rows = [
        [record["model"], f"{record['parameters'] / 1e6:.2f} M"]
        + [percent(headline(own[index])) for own in by_probe.values()]
        for index, record in enumerate(models)
    ]
    return markdown_table(titles, rows)


def parts_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Accuracies by the tokens that a head reads."""
    columns = [(part, method) for part, scores in records[0]["scores"].items() for method in scores]
    titles = ["model", *(f"{part}: {method} (%)" for part, method in columns)]
    return markdown_table(
        titles,
        [
            [record["model"], *(percent(record["scores"][part][method]) for part, method in columns)]
            for record in records
        ],
    )


def dense_tables(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """IoU of the classes, and what is right in segments by their size; in the heads, the shares of pixels."""
    tables = []
    scores = records[0]["scores"]
    for key, names, pixels in (
        ("per_class_iou", scores["classes"], scores["pixels"]),
        ("right_by_size", SEGMENT_NAMES, scores["pixels_by_size"]),
    ):
        titles = ["model", *(f"{name} ({100 * n / sum(pixels):.1f} %)" for name, n in zip(names, pixels, strict=True))]
        rows = [[record["model"], *(written(value) for value in means(record, key))] for record in records]
        tables.append(markdown_table(titles, rows))
    tables.insert(1, "Pixels that are right (%), by the share of the image that their segment takes:")
    return tables


def written(share: float) -> str:
    """A share in per cent, or a dash for what is not there."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def means(record: Mapping[str, Any], key: str) -> np.ndarray:
    """Means over the seeds of one list of scores; NaN of a class that is not there."""
    return np.array(record["scores"][key], float).mean(0)


def conclusions(by_probe: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """For each model but the first, what it keeps of the first one's scores, and where it loses most."""
    lines = []
    last = {own[0]["task"]: own for own in by_probe.values()}
    photographs, pixels = last.get("image-classification"), last.get("semantic-segmentation")
    for index, record in enumerate(next(iter(by_probe.values()))):
        if index == 0:
            continue
        kept = []
        for part, scores in photographs[index]["scores"].items() if photographs else ():
            whole = statistics.fmean(photographs[0]["scores"][part]["linear"])
            kept.append(f"{statistics.fmean(scores['linear']) / whole:.0%} of the accuracy from {part}")
        line = f"**{record['model']}** keeps "
        if pixels:
            whole = statistics.fmean(headline(pixels[0]))
            kept.append(f"{statistics.fmean(headline(pixels[index])) / whole:.0%} of the mean IoU")
            lost = means(pixels[0], "per_class_iou") - means(pixels[index], "per_class_iou")
            order = [i for i in np.argsort(-np.abs(lost)) if not math.isnan(lost[i])]
            classes = pixels[0]["scores"]["classes"]
            kept[-1] += "; IoU changes most on " + ", ".join(f"{classes[i]} ({-100 * lost[i]:+.1f})" for i in order[:3])
            kept[-1] += " and least on " + ", ".join(f"{classes[i]} ({-100 * lost[i]:+.1f})" for i in order[:-3:-1])
        lines.append(line + ", ".join(kept) + ".")
    return lines


def plot_gaps(records: Sequence[Mapping[str, Any]], path: Path) -> Figure:
    """Of the last probe of each task: accuracy by tokens, pixels right by size of segment, and IoU by class."""
    last = {record["task"]: record["probe"] for record in records}
    own = {task: [record for record in records if record["probe"] == probe] for task, probe in last.items()}
    figure = Figure(figsize=(11.0, 8.0), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.2))
    if photographs := own.get("image-classification"):
        axes = figure.add_subplot(grid[0, 0])
        parts = list(photographs[0]["scores"])
        for index, record in enumerate(photographs):
            values = [100 * statistics.fmean(record["scores"][part]["linear"]) for part in parts]
            axes.plot(parts, values, "o-", color=f"C{index}", label=record["model"], ms=4)
        axes.set(ylabel="accuracy of a linear head (%)", title=photographs[0]["probe"])
        if "semantic-segmentation" not in own:
            axes.legend(fontsize=7, frameon=False)
    if pixels := own.get("semantic-segmentation"):
        axes = figure.add_subplot(grid[0, 1])
        for index, record in enumerate(pixels):
            values = 100 * means(record, "right_by_size")
            axes.plot(SEGMENT_NAMES, values, "o-", color=f"C{index}", label=record["model"], ms=4)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
        axes.set(ylabel="pixels that are right (%)", xlabel="segment's share of the image", title=pixels[0]["probe"])
        axes = figure.add_subplot(grid[1, :])
        values = 100 * np.array([means(record, "per_class_iou") for record in pixels])
        lost = values - values[0]
        limit = np.nanmax(np.abs(lost)) or 1
        image = axes.imshow(lost, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            dark = abs(lost[row, column]) > 0.6 * limit
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
        scores = pixels[0]["scores"]
        axes.set_xticks(range(len(scores["classes"])), scores["classes"], rotation=30, ha="right")
        axes.set_yticks(range(len(pixels)), [record["model"] for record in pixels])
        figure.colorbar(image, ax=axes, label="IoU against the first model (points)", shrink=0.8)
    return saved(figure, path, dpi=130)


if __name__ == "__main__":
    main()
