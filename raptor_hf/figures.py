"""Draws the paper's analyses with matplotlib's object-oriented API: no pyplot, no global state."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from .phases import Partition, as_distance_matrix

# of the kinds of distance that `SimilarityAccumulator` measures
DISTANCE_LABELS = {
    "cosine": "distance 1 \N{MINUS SIGN} cos (cls, mean patch)",
    "mse": "mean squared difference of all tokens",
    "cka": "distance 1 \N{MINUS SIGN} CKA (cls, mean patch)",
}


def plot_phases(
    distance: np.ndarray,
    partition: Partition,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
    label: str = DISTANCE_LABELS["cosine"],
) -> Figure:
    """Draws the distances between layers as a heat map, and the blocks of a partition on it.

    Contiguous partitions are drawn as one square per phase; fragmented ones as a strip beside the map with the block of
    every layer. Up to 16 layers the distances are written in the cells.

    Args:
        distance: (L, L) between layers.
        partition: of the same L layers.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
        title: above the map.
        label: of the colour bar, what the distance is.

    Raises:
        ValueError: if the matrix holds no distances, or the partition has another number of layers.
    """
    distance = as_distance_matrix(distance)
    num_layers = len(distance)
    if num_layers != partition.num_layers:
        raise ValueError(f"distance has {num_layers} layers, partition has {partition.num_layers}; they must agree")
    side = 6.0 if num_layers <= 16 else 7.0
    figure = Figure(figsize=(side * (1.15 if partition.is_contiguous else 1.22), side), layout="constrained")
    axes = figure.add_subplot()
    edges = (0.5, num_layers + 0.5)
    image = axes.imshow(distance, cmap="viridis_r", vmin=0, extent=(*edges, *edges[::-1]), interpolation="nearest")
    ticks = FixedLocator(range(1, num_layers + 1)) if num_layers <= 32 else MaxNLocator(12, integer=True, min_n_ticks=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticks)
        axis.set_label_text("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title or "")
    if num_layers <= 16:
        _write_values(axes, distance, image)
    if partition.is_contiguous:
        _outline_phases(axes, partition)
    else:
        _add_block_strip(axes, partition)
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.03 if partition.is_contiguous else 0.09)
    bar.outline.set_visible(False)
    return saved(figure, path, dpi=200, tight=True)


def plot_fidelity(
    fidelity: Mapping[str, Any],
    partition: Partition | None = None,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draws how near a student is to its teacher, layer by layer: R^2 and cosine above; below, the relative error
    ||student - teacher|| / ||teacher||.

    Args:
        fidelity: as in metrics.json: "r2" and "relative_epsilon", L numbers each, and "cosine" by token group.
        partition: of the L layers; where the block changes, a line is drawn.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
        title: above the figure.
    """
    layers = np.arange(1, len(fidelity["r2"]) + 1)
    figure = Figure(figsize=(7.0, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    # markers at the upper end, 1, are drawn whole
    upper.plot(layers, fidelity["r2"], "o-", color="black", label="R\N{SUPERSCRIPT TWO}, all tokens", clip_on=False)
    for group, values in fidelity["cosine"].items():
        if values is not None:
            upper.plot(layers, values, ".--", label=f"cosine, {group}", clip_on=False)
    upper.axhline(1, color="0.8", linewidth=1, zorder=0)
    upper.set_ylabel("student against teacher")
    upper.legend(frameon=False, fontsize=9)
    lower.plot(layers, fidelity["relative_epsilon"], "o-", color="crimson")
    lower.set(xlabel="layer", ylabel="relative error")
    lower.set_ylim(bottom=0)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        for boundary in _block_changes(partition):
            axes.axvline(boundary + 0.5, color="0.6", linewidth=1, linestyle=":", zorder=0)
    figure.suptitle(title or "")
    return saved(figure, path, dpi=150, tight=True)


def plot_depths(
    fidelity: Mapping[str, Any], teacher_macs: int, path: str | os.PathLike[str] | None = None, title: str | None = None
) -> Figure:
    """Draws what an elastic student reaches at every number of steps, against its multiply-accumulates.

    Args:
        fidelity: as in metrics.json, with "by_steps", and of the teacher "teacher_accuracy" or None.
        teacher_macs: multiply-accumulates of the teacher per image; where its accuracy is known, it is drawn beside.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
        title: above the figure.
    """
    rows = sorted(fidelity["by_steps"].items(), key=lambda row: int(row[0]))
    cost = [row["macs"] / 1e6 for _, row in rows]
    scores = {"R\N{SUPERSCRIPT TWO} of the final state": [row["r2"] for _, row in rows]}
    if rows[0][1]["student_accuracy"] is not None:
        scores["accuracy (%)"] = [100 * row["student_accuracy"] for _, row in rows]
    elif rows[0][1]["agreement"] is not None:
        scores["agreement with the teacher (%)"] = [100 * row["agreement"] for _, row in rows]
    figure = Figure(figsize=(7.0, 2.6 * len(scores)), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(len(scores), squeeze=False)[:, 0], scores.items(), strict=True):
        axes.plot(cost, values, "o-", color="black", label="one student, its numbers of steps")
        for (steps, _), x, y in zip(rows, cost, values, strict=True):
            axes.annotate(steps, (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
        if label.startswith("accuracy") and fidelity["teacher_accuracy"] is not None:
            axes.plot(teacher_macs / 1e6, 100 * fidelity["teacher_accuracy"], "*", color="crimson", label="teacher")
            axes.legend(frameon=False, fontsize=9)
        axes.set(xlabel="multiply-accumulates per image (millions)", ylabel=label, xlim=(0, None))
        axes.margins(y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title or "")
    return saved(figure, path, dpi=150, tight=True)


def plot_losses(
    histories: Mapping[int, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draws the loss curves of the stages side by side, on a logarithmic scale, with the learning rate below.

    Args:
        histories: for each stage its log records, with "step", "lr", "loss" and possibly "block_J".
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
    """
    stages = {stage: records for stage, records in histories.items() if records}
    figure = Figure(figsize=(5.0 * max(1, len(stages)), 4.6), layout="constrained")
    grid = figure.subplots(2, max(1, len(stages)), squeeze=False, sharex="col", height_ratios=(3, 1))
    for (stage, records), (upper, lower) in zip(stages.items(), grid.T, strict=False):
        steps = [record["step"] for record in records]
        parts = [name for name in records[0] if name.startswith("block_")]
        for name in parts or ["loss"]:
            label = name.replace("_", " ") if parts else "mean over steps"  # numbered as in the log
            # a run that logged once has a dot and no line
            marker = "o" if len(steps) == 1 else None
            upper.plot(steps, [record[name] for record in records], marker=marker, label=label)
        upper.set(title=f"stage {stage}", ylabel="loss", yscale="log")
        upper.legend(frameon=False, fontsize=9)
        lower.plot(steps, [record["lr"] for record in records], color="0.4", marker=marker)
        lower.set(xlabel="optimizer step", ylabel="learning rate")
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
    return saved(figure, path, dpi=150, tight=True)


def plot_cost(
    records: Sequence[Mapping[str, Any]],
    metric: str,
    unit: tuple[str, float, int],
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws the scores of models against their parameters, with the standard deviation over seeds.

    Args:
        records: one per model: name, parameters, and values, name of a metric to its numbers. The first one is the
            reference, drawn as a line across.
        metric: which of the values.
        unit: how to write it: label, factor, digits.
        path: where to save the figure; None saves nothing.
    """
    label, factor, _ = unit
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    shown = [record for record in records if record["values"].get(metric)]
    for index, record in enumerate(shown):
        mean, deviation = mean_and_deviation(factor * np.asarray(record["values"][metric], dtype=float))
        x = record["parameters"] / 1e6
        if index == 0:
            axes.axhline(mean, color="0.75", linewidth=1, zorder=0)
        axes.errorbar(x, mean, deviation, fmt="o", capsize=3, color=f"C{index % 10}", label=record["name"])
    axes.set(xlabel="parameters of the backbone (M)", ylabel=label, xlim=(0, None))
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    axes.spines[["top", "right"]].set_visible(False)
    return saved(figure, path, dpi=150)


def plot_predictions(
    task: str,
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    path: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Shows images with their truth and a probe's predictions.

    Args:
        task: "image-classification", "semantic-segmentation" or "depth-estimation".
        images: (N, H, W, 3) in [0, 1].
        labels: classes (N,) or (N, H, W), 255 where no class is given; or depth in metres (N, H, W), 0 where unknown.
        predictions: classes or depth, of any height and width.
        path: where to save the figure; None saves nothing.
        class_names: of the classes.
    """
    count = len(images)
    if task == "image-classification":
        figure = Figure(figsize=(1.5 * count, 2.1), layout="constrained")
        for axes, image, label, predicted in zip(
            figure.subplots(1, count, squeeze=False)[0], images, labels, predictions, strict=True
        ):
            axes.imshow(image)
            axes.set_title(
                f"{class_names[predicted]}\ntruth: {class_names[label]}",
                fontsize=8,
                color="black" if predicted == label else "tab:red",
            )
            axes.set_axis_off()
    else:
        figure = Figure(figsize=(1.6 * count + 1.2, 5.2), layout="constrained")
        grid = figure.subplots(3, count, squeeze=False)
        is_depth = task == "depth-estimation"
        known = labels > 0 if is_depth else labels != 255
        shown = np.where(known, labels, np.nan)
        used = labels[known] if known.any() else np.zeros(1)
        low, high = (float(used.min()), float(used.max())) if is_depth else (-0.5, len(class_names) - 0.5)
        colors = matplotlib.colormaps["viridis_r"]
        if not is_depth:
            colors = matplotlib.colormaps["tab20" if len(class_names) <= 20 else "nipy_spectral"].resampled(
                len(class_names)
            )
        for row, maps in enumerate((images, shown, predictions)):
            for axes, values in zip(grid[row], maps, strict=True):
                drawn = axes.imshow(values, cmap=colors, vmin=low, vmax=high, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
            grid[row][0].set_ylabel(("image", "truth", "probe")[row])
        bar = figure.colorbar(drawn, ax=grid[1:], fraction=0.05, label="depth (m)" if is_depth else "class")
        if not is_depth and len(class_names) <= 20:
            bar.set_ticks(range(len(class_names)), labels=class_names)
    return saved(figure, path, dpi=120)


def saved(figure: Figure, path: str | os.PathLike[str] | None, *, dpi: int, tight: bool = False) -> Figure:
    """Saves a figure, as PNG unless the suffix names another format; None saves nothing.

    Args:
        figure: any.
        path: of the file; its folder exists.
        dpi: dots per inch.
        tight: whether empty margins are cut off.
    """
    if path is not None:
        figure.savefig(path, dpi=dpi, bbox_inches="tight" if tight else None)
    return figure


def mean_and_deviation(values: Any) -> tuple[Any, Any]:
    """Mean and sample standard deviation over the first axis, the seeds; 0 where there is one seed only."""
    values = np.asarray(values, dtype=np.float64)
    return values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def _block_changes(partition: Partition | None) -> list[int]:
    """Layers after which the block changes."""
    if partition is None:
        return []
    owners = partition.layer_to_block
    return [layer for layer in range(1, len(owners)) if owners[layer] != owners[layer - 1]]


def _write_values(axes: Axes, distance: np.ndarray, image: AxesImage) -> None:
    """Writes every distance in its cell."""
    for (row, column), value in np.ndenumerate(distance):
        color = _ink(image.to_rgba(value))
        axes.text(column + 1, row + 1, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=color)


def _outline_phases(axes: Axes, partition: Partition) -> None:
    """Draws a square around every phase."""
    # All white halos first: squares touch, and a halo must not cut a neighbour's line.
    for color, width in (("white", 4.5), ("crimson", 2.5)):
        for start, end in partition.phases:
            square = Rectangle((start + 0.5, start + 0.5), end - start, end - start, fill=False, clip_on=False)
            square.set(edgecolor=color, linewidth=width, joinstyle="miter")
            axes.add_patch(square)


def _add_block_strip(axes: Axes, partition: Partition) -> None:
    """Draws the block of every layer beside the map, coloured and numbered from 1."""
    blocks = np.array(partition.layer_to_block)
    palette = matplotlib.colormaps["tab10" if partition.num_blocks <= 10 else "tab20"]
    colors = palette(blocks % palette.N)
    strip = axes.inset_axes((1.015, 0.0, 0.04, 1.0))
    strip.imshow(colors[:, None], extent=(0, 1, len(blocks) + 0.5, 0.5), aspect="auto", interpolation="nearest")
    if len(blocks) <= 32:
        for layer, (block, color) in enumerate(zip(blocks, colors, strict=True), start=1):
            strip.text(0.5, layer, str(block + 1), ha="center", va="center", fontsize=8, color=_ink(color))
    strip.set(xticks=[], yticks=[], xlabel="block")
    strip.spines[:].set_visible(False)
    strip.set_in_layout(False)  # the layout engine would push the map out of the figure; the padding makes the room


def _ink(background: Sequence[float]) -> str:
    """Black or white, whichever reads better on an RGBA colour (luma of ITU-R BT.601)."""
    return "black" if np.dot(background[:3], (0.299, 0.587, 0.114)) > 0.42 else "white"
