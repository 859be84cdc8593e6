"""Is this prediction wrong, is this image foreign? The path through the layers beside max-softmax, energy and k-NN.

    python -m training.studies.confidence --models model_cards/digits-teacher model_cards/digits-k3 \
        --outliers cifar10-test.parquet --num_outliers 1000 --output_dir out

Writes table.md, results.json and figure.png. Everything is fitted on training images alone; where a model has no
classifier, a linear probe is cross-fitted on them. Costs one forward pass of every image, and minutes of fitting.
"""

from raptor_settings.parse import parse_settings

from .settings import ConfidenceSettings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(ConfidenceSettings)

import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.data.loaders import eval_loader
from raptor_hf.dynamics.confidence import PathScores, area_under_risk, gather_paths, nearest_similarity, path_of
from raptor_hf.figures import saved
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment
from raptor_hf.recipes.settings import user_errors
from raptor_hf.teacher import Teacher, load_teacher

from .conclusions import markdown_table
from .learning_rates import without_paths

logger = logging.getLogger("confidence")

NEIGHBOURS = (1, 10, 50)
RIVALS = ("max-softmax", "energy", *(f"{k}-NN" for k in NEIGHBOURS))
OURS = ("path", "path + max-softmax")
# of the probe's logistic regression on standardised features, in the unit of scikit-learn's C
PROBE_C = 0.01
# the goal: AUROC in percent points over the best rival
GOAL = 3.0

Paths = dict[str, Tensor]


def main() -> None:
    settings = parse_settings(ConfidenceSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        sets = {"train": (settings.train, "train", None, settings.num_train)}
        sets["test"] = (settings.test, settings.test_split, None, settings.num_test)
        for entry in settings.outliers:
            name, _, column = entry.partition(":")
            split = "test" if name == "digits" else "train"
            sets[Path(name).stem] = (name, split, column or None, settings.num_outliers)
        results = {}
        for name in settings.models:
            model = load_teacher(name)
            paths = {key: paths_of(model, name, *where, settings) for key, where in sets.items()}
            seeds = [measure(model, paths, seed, settings) for seed in settings.seeds]
            results[Path(name).name] = summary(seeds)
            logger.info("%s: done", Path(name).name)
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = without_paths([text for text in sys.argv[1:] if text != settings.cache_dir])
    command = ["python", "-m", "training.studies.confidence", *(text for text in arguments if text != "--cache_dir")]
    record = {"title": settings.title, "command": shlex.join(command), "seeds": settings.seeds, "models": results}
    record |= describe_environment(torch.device("cpu"))
    write_json(folder / "results.json", record)
    write_text_atomically(folder / "table.md", page(record))
    plot(record, folder / "figure.png")
    print(f"saved to {folder}: table.md, results.json, figure.png")


def paths_of(
    model: Teacher,
    name: str,
    dataset: str,
    split: str,
    column: str | None,
    limit: int | None,
    settings: ConfidenceSettings,
) -> Paths:
    """The paths of a set of images, with their labels where it has them, from the cache if they are there."""
    file = None
    if settings.cache_dir is not None:
        parts = (Path(name).name, Path(dataset).stem, split, str(limit), settings.mixed_precision)
        file = Path(settings.cache_dir) / f"{'-'.join(parts)}.safetensors"
        if file.is_file():
            return load_file(file)
    images = open_images(dataset, split, image_column=column)
    processor = load_image_processor(settings.models[0])
    found, labels = [], []
    for batch in eval_loader(images, processor, batch_size=settings.batch_size, limit=limit):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
            states = model.trajectory(batch["pixel_values"])
        found.append(path_of(model, states))
        labels.append(batch.get("labels", torch.full((len(states),), -1)))
    paths = gather_paths(found) | {"labels": torch.cat(labels)}
    logger.info("%s: %d images of %s", Path(name).name, len(paths["labels"]), Path(dataset).stem)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in paths.items()}, file)
    return paths


def measure(model: Teacher, paths: Mapping[str, Paths], seed: int, settings: ConfidenceSettings) -> dict[str, Any]:
    """Accuracy, and AUROC and AURC of every score, of one seed."""
    count = len(paths["train"]["labels"])
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = chosen[: round(settings.train_share * count)]
    train = {name: tensor[chosen] for name, tensor in paths["train"].items()}
    if model.classifier is None:
        read = fit_probe(train["features"][:, -1], train["labels"])
        own = torch.empty(*train["features"].shape[:2], int(train["labels"].max()) + 1)
        folds = StratifiedKFold(settings.folds, shuffle=True, random_state=seed)
        for rest, part in folds.split(train["labels"], train["labels"]):
            probe = fit_probe(train["features"][rest, -1], train["labels"][rest])
            own[part] = probe(train["features"][part].float())
    else:
        read = torch.no_grad()(model.classifier)
        own = read(train["features"].float())
    scores = PathScores(train, own, train["labels"])
    usual = own[:, -1].log_softmax(1).amax(1)

    def score(some: Paths) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scores of being right, and of being known."""
        answers = read(some["features"].float())
        last = answers[:, -1]
        rivals = {"max-softmax": last.log_softmax(1).amax(1), "energy": last.logsumexp(1)}
        nearest = nearest_similarity(some["features"][:, -1], train["features"][:, -1], NEIGHBOURS)
        rivals |= {f"{k}-NN": values for k, values in zip(NEIGHBOURS, nearest.T, strict=True)}
        familiarity = scores.familiarity(some)
        both = familiarity + (rivals["max-softmax"] - usual.mean()) / usual.std()
        known = rivals | {"path": familiarity, "path + max-softmax": both}
        return rivals | {"path": scores.correctness(some, answers)}, known

    test = paths["test"]
    is_right = read(test["features"][:, -1].float()).argmax(1) == test["labels"]
    errors, known = score(test)
    found = {
        "accuracy": is_right.float().mean().item(),
        "training accuracy": (own[:, -1].argmax(1) == train["labels"]).float().mean().item(),
        "wrong": int((~is_right).sum()),
        "errors": {name: auroc(values[is_right], values[~is_right]) for name, values in errors.items()},
        "AURC": {name: area_under_risk(values, is_right) for name, values in errors.items()},
    }
    for name in paths.keys() - {"train", "test"}:
        foreign = score(paths[name])[1]
        found[f"foreign: {name}"] = {key: auroc(known[key], foreign[key]) for key in known}
    return found


def fit_probe(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Logistic regression on standardised features, (N, F) -> the function from (..., F) to scores (..., C)."""
    features = features.float()
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    model = LogisticRegression(C=PROBE_C, max_iter=200).fit(((features - mean) / std).numpy(), labels.numpy())
    weight, bias = (torch.from_numpy(x).float() for x in (model.coef_, model.intercept_))
    return lambda x: ((x - mean) / std) @ weight.T + bias


def auroc(higher: Tensor, lower: Tensor) -> float:
    """How often one of `higher` is above one of `lower`."""
    truth = np.r_[np.ones(len(higher)), np.zeros(len(lower))]
    return float(roc_auc_score(truth, torch.cat([higher, lower]).double().numpy()))


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of every number."""

    def over(values: list[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {key: over([value[key] for value in values]) for key in values[0]}
        return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}

    return over(seeds)


def tasks_of(result: Mapping[str, Any]) -> list[str]:
    """What AUROC is measured of: errors, then the foreign sets in order of their names."""
    return ["errors", *sorted(name for name in result if name.startswith("foreign"))]


def gains(result: Mapping[str, Any], task: str) -> dict[str, tuple[float, float, str]]:
    """Of each of our scores, AUROC in points over the best rival and over max-softmax, and which rival that is."""
    means = {name: 100 * value["mean"] for name, value in result[task].items()}
    best = max(RIVALS, key=means.get)
    return {
        name: (means[name] - means[best], means[name] - means["max-softmax"], best) for name in OURS if name in means
    }


def page(record: dict[str, Any]) -> str:
    """The page, in Markdown."""
    parts = [f"# {record['title']}", f"    {record['command']}", "![AUROC of every score](figure.png)"]
    for name, result in record["models"].items():
        accuracy, own = (result[key] for key in ("accuracy", "training accuracy"))
        words = (
            f"Accuracy {percent(accuracy)} %, {result['wrong']['mean']:.0f} test images wrong; on the training images, "
        )
        words += f"as the scores see them, {percent(own)} %."
        parts += [f"## {name}", words, table(result), verdict(result)]
    return "\n\n".join(parts) + "\n"


def table(result: Mapping[str, Any]) -> str:
    """AUROC of errors and foreign images in percent, and AURC in thousandths, by score."""
    tasks = tasks_of(result)
    titles = ["score", "errors, AUROC", "errors, AURC", *(f"{task}, AUROC" for task in tasks[1:])]
    rows = []
    for name in (*RIVALS, *OURS):
        cells = [percent(result["errors"][name]) if name in result["errors"] else "-"]
        cells.append(percent(result["AURC"][name], 1000) if name in result["AURC"] else "-")
        rows.append([name, *cells, *(percent(result[task][name]) for task in tasks[1:])])
    return markdown_table(titles, rows)


def percent(value: Mapping[str, float], scale: float = 100) -> str:
    return f"{scale * value['mean']:.1f} ± {scale * value['std']:.1f}"


def verdict(result: Mapping[str, Any]) -> str:
    """What the table says about the goal, in a sentence for each task."""
    lines = []
    for task in tasks_of(result):
        for name, (over_best, over_softmax, best) in gains(result, task).items():
            met = "reached" if over_best >= GOAL else "missed"
            lines.append(
                f"- {task}, {name}: {over_best:+.1f} points over the best rival, {best} (goal of +{GOAL:.0f} {met}); "
                f"{over_softmax:+.1f} over max-softmax" + ("." if over_softmax >= 0 else ", which is worse.")
            )
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> Figure:
    """AUROC of every score, a panel for each model."""
    figure = Figure(figsize=(5.2 * len(record["models"]), 3.8), layout="constrained")
    colours = ["#999999", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#0072b2", "#d55e00"]
    for axes, (name, result) in zip(
        np.atleast_1d(figure.subplots(1, len(record["models"]), sharey=True)), record["models"].items(), strict=True
    ):
        tasks = tasks_of(result)
        for index, (score, colour) in enumerate(zip((*RIVALS, *OURS), colours, strict=True)):
            places = [place for place, task in enumerate(tasks) if score in result[task]]
            values = [result[tasks[place]][score] for place in places]
            axes.errorbar(
                [place + 0.09 * (index - 3) for place in places],
                [100 * value["mean"] for value in values],
                [100 * value["std"] for value in values],
                fmt="D" if score in OURS else "o",
                color=colour,
                mec="0.3",
                label=score,
            )
        axes.set_xticks(range(len(tasks)), [task.replace("foreign: ", "foreign:\n") for task in tasks], fontsize=8)
        axes.axhline(50, color="0.8", lw=1)
        axes.set(title=name, ylabel="AUROC, percent")
    axes.legend(fontsize=7)
    return saved(figure, path, dpi=150)


if __name__ == "__main__":
    main()
