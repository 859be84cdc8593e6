"""Inside a teacher and its student, step by step: what is read, which tokens cause it, and whose states will do.

    python -m training.studies.inside --teacher model_cards/digits-teacher --student model_cards/digits-k3 \
        --output_dir out

Writes table.md, results.json, curves.png and maps.png: the logit and the tuned lens, states swapped between the models
beside epsilon, tokens patched between images, and attention with its rollout. Costs about a hundred forward passes of
both models for every image.
"""

from raptor_settings.parse import parse_settings

from .settings import InsideSettings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(InsideSettings)

import logging
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from raptor_hf.accumulators import Curve
from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.data.loaders import eval_loader
from raptor_hf.dynamics.explorer import denormalized
from raptor_hf.dynamics.lens import TunedLens, artefacts, attention_maps, readings, rollout
from raptor_hf.dynamics.motion import to_plain
from raptor_hf.dynamics.patching import CausalPatching, StateSwap
from raptor_hf.figures import saved
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment
from raptor_hf.recipes.settings import user_errors
from raptor_hf.teacher import Teacher, load_teacher

from .conclusions import markdown_table
from .learning_rates import without_paths

logger = logging.getLogger("inside")

ROLES = ("teacher", "student")
COLOURS = {"teacher": "#0072b2", "student": "#d55e00"}
# images whose attention is drawn
NUM_SHOWN = 4


def main() -> None:
    settings = parse_settings(InsideSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        # of these alone attention has weights; its maps are drawn
        models = [load_teacher(name, attn_implementation="eager") for name in (settings.teacher, settings.student)]
        processor = load_image_processor(settings.teacher)
        loaders = [
            eval_loader(open_images(name, split), processor, batch_size=settings.batch_size, limit=settings.num_images)
            for name, split in ((settings.train, "train"), (settings.test, settings.test_split))
        ]
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lenses = tuned_lenses(models, loaders[0])
        results = measure(models, loaders[1], lenses)
        record = {
            "title": settings.title,
            "command": shlex.join(["python", "-m", "training.studies.inside", *without_paths(sys.argv[1:])]),
            "num_images": settings.num_images,
            "explained": {role: lens.explained for role, lens in zip(ROLES, lenses, strict=True)},
            **results,
            **describe_environment(torch.device("cpu")),
        }
        record = to_plain(record)
        write_json(folder / "results.json", record)
        write_text_atomically(folder / "table.md", page(record))
        plot_curves(record, folder / "curves.png")
        pixel_values = next(iter(loaders[1]))["pixel_values"][:NUM_SHOWN]
        photographs = denormalized(pixel_values, processor.image_mean, processor.image_std)
        plot_maps(models, pixel_values, photographs, folder / "maps.png")
    print(f"saved to {folder}: table.md, results.json, curves.png, maps.png")


def tuned_lenses(models: Sequence[Teacher], batches: Iterable[Any]) -> list[Any]:
    """The tuned lens of each model, fitted on its own states."""
    sums = [TunedLens(model.num_layers, model.hidden_size) for model in models]
    for batch in batches:
        for model, own in zip(models, sums, strict=True):
            own.update(model.trajectory(batch["pixel_values"]))
    return [own.fit() for own in sums]


@torch.no_grad()
def measure(models: Sequence[Teacher], batches: Iterable[Any], lenses: Sequence[Any]) -> dict[str, Any]:
    """Everything that the page says, as results and curves."""
    teacher, student = models
    patching = {role: CausalPatching(model) for role, model in zip(ROLES, models, strict=True)}
    swaps = {"teacher": StateSwap(teacher, student), "student": StateSwap(student, teacher)}
    same: dict[str, list[Tensor]] = {}
    outliers: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for batch in batches:
        states = [model.trajectory(batch["pixel_values"]) for model in models]
        swaps["teacher"].update(*states)
        swaps["student"].update(*states[::-1])
        for role, model, own, lens in zip(ROLES, models, states, lenses, strict=True):
            patching[role].update(own, own.roll(1, 0))
            outliers[role].append(artefacts(own, model.tokens).float().mean(-1))
            if model.classifier is not None:
                answer = model.logits(own[:, -1]).argmax(-1)[:, None]
                for kind, read in (("logit", own), ("tuned", lens.apply(own))):
                    same.setdefault(f"{role}, {kind} lens", []).append(readings(model, read).argmax(-1) == answer)
        logger.info("%d images", sum(map(len, outliers["teacher"])))
    return {
        "lens": {name: curve_of(values) for name, values in same.items()},
        "swap": {role: swap.compute() for role, swap in swaps.items()},
        "patching": {role: own.compute() for role, own in patching.items()},
        "artefacts": {role: curve_of(values) for role, values in outliers.items()},
    }


def curve_of(values: Sequence[Tensor]) -> Curve:
    """Mean and spread over images of batches (B, L + 1)."""
    every = torch.cat(list(values)).double()
    return Curve(every.mean(0), every.std(0), len(every))


def page(record: dict[str, Any]) -> str:
    """The page, in Markdown."""
    parts = [f"# {record['title']}", f"{record['num_images']} test images.", f"    {record['command']}"]
    parts += ["![Lenses, swaps and patching over depth](curves.png)"]
    parts += ["## A state of one model in the place of the other's", swap_words(), swap_table(record)]
    parts += ["## What a head reads at every state", lens_words(record), lens_table(record)]
    parts += ["## Which tokens carry the difference of two images", patching_words(record), patching_table(record)]
    parts += ["## Attention", "Attention of the last step, and rolled out to the embeddings, mean over heads."]
    parts += ["![Attention and its rollout](maps.png)", artefact_words(record)]
    return "\n\n".join(parts) + "\n"


def swap_words() -> str:
    return (
        "The student's state at step l runs on in the teacher, and the other way round. Epsilon is the relative error "
        "of that state, the distance that of the last state which comes of it; beside it, that of random noise "
        "as large as the error, token by token. Agreement is with the model's own answers."
    )


def swap_table(record: dict[str, Any]) -> str:
    titles = ["step", "epsilon"]
    for role, other in (("teacher", "student"), ("student", "teacher")):
        titles += [f"{other}'s state in the {role}: distance", "of noise"]
        titles += ["agreement", "with noise"] if record["swap"][role]["agreement"] else []
    rows = []
    for step, epsilon in enumerate(record["swap"]["teacher"]["epsilon"]["mean"]):
        cells = [str(step), f"{epsilon:.3f}"]
        for role in ROLES:
            own = record["swap"][role]
            cells += [f"{own[name]['mean'][step]:.3f}" for name in ("distance", "random_distance")]
            if own["agreement"]:
                cells += [f"{own[name]['mean'][step]:.1%}" for name in ("agreement", "random_agreement")]
        rows.append(cells)
    return markdown_table(titles, rows)


def lens_words(record: dict[str, Any]) -> str:
    if not record["lens"]:
        words = "The models have no classifier. "
    else:
        words = (
            "How often the classifier's answer in a state, as it is (logit) or after a map fitted to the last state "
        )
        words += "(tuned), is that of the last state. "
    return words + "Explained is the share of the last state's variance that the map gives, on the images of its fit."


def lens_table(record: dict[str, Any]) -> str:
    titles = ["step", *record["lens"], *(f"explained, {role}" for role in ROLES)]
    rows = [
        [str(step), *(f"{curve['mean'][step]:.1%}" for curve in record["lens"].values())]
        + [f"{record['explained'][role][step]:.3f}" for role in ROLES]
        for step in range(len(record["explained"]["teacher"]))
    ]
    return markdown_table(titles, rows)


def patching_words(record: dict[str, Any]) -> str:
    pairs = record["patching"]["teacher"]["effect"]["num_images"]
    has_scores = record["patching"]["teacher"]["flipped"] is not None
    what = (
        "the difference of the scores of the two predicted classes" if has_scores else "the way between their features"
    )
    return (
        f"Tokens of another image take the place of an image's own at one step: the share of {what} that comes with "
        f"them, mean over {pairs} pairs" + (" of different predictions." if has_scores else ".")
    )


def patching_table(record: dict[str, Any]) -> str:
    groups = record["patching"]["teacher"]["groups"][:-1]
    titles = ["step", *(f"{role}: {group}" for role in ROLES for group in groups)]
    rows = [
        [str(step)]
        + [
            f"{record['patching'][role]['effect']['mean'][step][index]:.2f}"
            for role in ROLES
            for index in range(len(groups))
        ]
        for step in range(len(record["explained"]["teacher"]))
    ]
    return markdown_table(titles, rows)


def artefact_words(record: dict[str, Any]) -> str:
    shares = {role: max(curve["mean"]) for role, curve in record["artefacts"].items()}
    steps = {role: record["artefacts"][role]["mean"].index(share) for role, share in shares.items()}
    return "Patches of an outlying norm, at the step with most: " + "; ".join(
        f"{role} {shares[role]:.2%} (step {steps[role]})" for role in ROLES
    )


def plot_curves(record: dict[str, Any], path: Path) -> Figure:
    """Swaps, lenses and patching over depth, both models beside each other."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 4 if record["lens"] else 3)
    for role, other in (("teacher", "student"), ("student", "teacher")):
        own = record["swap"][role]
        label = f"{other}'s state in the {role}"
        axes[0].plot(own["distance"]["mean"], "o-", ms=3, color=COLOURS[role], label=label)
        axes[0].plot(own["random_distance"]["mean"], ":", color=COLOURS[role], label=f"noise as large, {role}")
    axes[0].plot(record["swap"]["teacher"]["epsilon"]["mean"], "--", color="0.4", label="epsilon, of the state itself")
    axes[0].set(ylabel="relative distance of the last state", ylim=(0, None), title="Swapped states")
    axes[0].legend(fontsize=7)
    for role, panel in zip(ROLES, axes[1:3], strict=True):
        own = record["patching"][role]
        for index, (group, style) in enumerate(zip(own["groups"][:-1], ("o-", "s:", "^--"), strict=False)):
            values = [row[index] for row in own["effect"]["mean"]]
            panel.plot(values, style, ms=3, color=COLOURS[role], label=group)
        panel.set(ylabel="share of the difference", title=f"Patched tokens, {role}", ylim=(-0.1, 1.1))
        panel.legend(fontsize=7)
    for name, curve in record["lens"].items():
        role, kind = name.split(", ")
        axes[3].plot(curve["mean"], "o-" if "tuned" in kind else ":", ms=3, color=COLOURS[role], label=name)
    if record["lens"]:
        axes[3].set(ylabel="agreement with the last state", title="Lenses", ylim=(0, 1.05))
        axes[3].legend(fontsize=7)
    for panel in axes:
        panel.set_xlabel("step")
    return saved(figure, path, dpi=150)


def plot_maps(models: Sequence[Teacher], pixel_values: Tensor, photographs: Tensor, path: Path) -> Figure:
    """Images, and where each model's summary token looks: at the last step, and rolled out to the embeddings."""
    columns = []
    for role, model in zip(ROLES, models, strict=True):
        maps = attention_maps(model, pixel_values)
        for name, values in (("last step", maps[:, -1].mean(1)), ("rollout", rollout(maps)[:, -1])):
            patches = model.tokens.slices["patches"]
            rows = values[:, 0] if model.has_cls else values[:, patches].mean(1)
            columns.append((f"{role}, {name}", rows[:, patches]))
    side = round(columns[0][1].shape[1] ** 0.5)
    figure = Figure(figsize=(1.7 * (1 + len(columns)), 1.75 * len(photographs)), layout="constrained")
    grid = figure.subplots(len(photographs), 1 + len(columns), squeeze=False)
    for row, photograph in zip(grid, photographs, strict=True):
        row[0].imshow(photograph)
    for column, (title, rows) in enumerate(columns, start=1):
        grid[0, column].set_title(title, fontsize=9)
        for row, values in zip(grid, rows, strict=True):
            row[column].imshow(values.reshape(side, side), cmap="cividis")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return saved(figure, path, dpi=150)


if __name__ == "__main__":
    main()
