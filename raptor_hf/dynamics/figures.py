"""Draws how trajectories move: models on the same images share their axes, and lines mark the phases.

Every function takes its results by model, saves a PNG if it is given a path, and returns the figure. Bands and error
bars are one standard deviation over images.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from torch import Tensor

from ..accumulators import Curve
from ..figures import saved
from ..metrics import Fidelity
from .basins import ClassAngles, Projection
from .motion import DEGREES, Dynamics
from .ranks import Spectra

STYLES = (("C0", "o"), ("C1", "s"), ("0.45", "^"), ("C3", "D"), ("C4", "v"), ("C5", "P"))
# field of `Dynamics` -> label of the axis with its unit, factor to that unit, layer of the first value
QUANTITIES = {
    "norm": ("norm of the tokens", 1.0, 0),
    "gamma": ("cosine to the final state", 1.0, 0),
    "update_norm": ("size of the update\n(share of the norm)", 1.0, 1),
    "angular_speed": ("angular speed\n(degrees per layer)", DEGREES, 1),
    "second_difference": ("second difference\n(share of the norm)", 1.0, 1),
    "angular_second_difference": ("second difference\nof directions", 1.0, 1),
    "turning": ("cosine of\nsuccessive updates", 1.0, 1),
    "angular_turning": ("cosine of successive\nangular updates", 1.0, 1),
}


def plot_quantities(
    results: Mapping[str, Dynamics],
    quantities: Sequence[str],
    boundaries: Sequence[int] = (),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws quantities over depth: a row for each, a column for each group of tokens, a line for each model.

    Args:
        results: by model.
        quantities: names of `QUANTITIES`.
        boundaries: last layers of the phases but the last; vertical lines.
        path: where to save the figure; None saves nothing.
    """
    groups = list(next(iter(results.values())).gamma)
    figure = Figure(figsize=(3.3 * len(groups) + 0.6, 2.1 * len(quantities) + 0.5), layout="constrained")
    grid = figure.subplots(len(quantities), len(groups), squeeze=False, sharex=True, sharey="row")
    for row, name in zip(grid, quantities, strict=True):
        label, factor, first = QUANTITIES[name]
        if name in ("norm", "update_norm"):
            row[0].set_yscale("log")  # of the whole row
            row[0].yaxis.set_major_formatter(ScalarFormatter())
        for axes, group in zip(row, groups, strict=True):
            for (_, result), (color, marker) in zip(results.items(), STYLES, strict=False):
                _draw_curve(axes, getattr(result, name)[group], first, color, marker, factor)
            _draw_boundaries(axes, boundaries)
        row[0].set_ylabel(label)
    for axes, group in zip(grid[0], groups, strict=True):
        axes.set_title(group)
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    _add_legend(figure, results)
    return saved(figure, path, dpi=110)


def plot_ranks(
    results: Mapping[str, tuple[Spectra, Curve]],
    boundaries: Sequence[int] = (),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws ranks of the updates over depth, the coherence of the patches, and the spectrum of the last update.

    Args:
        results: by model, the ranks and the coherence.
        boundaries: last layers of the phases but the last.
        path: where to save the figure; None saves nothing.
    """
    figure = Figure(figsize=(10.5, 6.0), layout="constrained")
    grid = figure.subplots(2, 3)
    for (spectra, coherence), (color, marker) in zip(results.values(), STYLES, strict=False):
        for axes, name in zip(grid[:, 0], ("stable", "effective"), strict=True):
            curves = getattr(spectra, f"{name}_rank")
            _draw_curve(axes, curves["angular"], 1, color, marker)
            _draw_curve(axes, curves["raw"], 1, color, None, band=False)
        for axes, name in zip(grid[:, 1], ("stable", "effective"), strict=True):
            pooled = getattr(spectra, f"pooled_{name}_rank")
            layers = np.arange(1, len(pooled["raw"]) + 1)
            axes.plot(layers, pooled["angular"], color=color, marker=marker, markersize=4, linewidth=1.3)
            axes.plot(layers, pooled["raw"], color=color, linestyle=":", linewidth=1.3)
        _draw_curve(grid[0, 2], coherence, 0, color, marker)
        last = spectra.spectrum["angular"][-1]
        grid[1, 2].plot(np.arange(1, len(last) + 1), last.cumsum(0), color=color, linewidth=1.5)
    names = ("stable rank", "effective rank")
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.set(ylabel=f"{name} of the update", title="each image, over its tokens")
    for axes, name in zip(grid[:, 1], names, strict=True):
        axes.set(ylabel=f"{name} of the update", title="all images together")
    grid[0, 2].set(ylabel="coherence of the patches", title="mean cosine to their mean")
    grid[1, 2].set(ylabel="cumulative share", xlabel="singular value", ylim=(0, 1.02))
    grid[1, 2].set_title("spectrum, angular update of the last layer", fontsize=10)
    for axes in (*grid[:, :2].flat, grid[0, 2]):
        _draw_boundaries(axes, boundaries)
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
    grid[1, 2].spines[["top", "right"]].set_visible(False)
    kinds = [
        Line2D([], [], color="black", marker="o", markersize=4, label="angular updates"),
        Line2D([], [], color="black", linestyle=":", label="raw updates"),
    ]
    _add_legend(figure, results, kinds)
    return saved(figure, path, dpi=110)


def plot_class_angles(
    results: Mapping[str, ClassAngles],
    boundaries: Sequence[int] = (),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws angles within and between classes, and the silhouette, over depth: a row for each summary of an image.

    Args:
        results: by model.
        boundaries: last layers of the phases but the last.
        path: where to save the figure; None saves nothing.
    """
    num_summaries = next(iter(results.values())).within.mean.shape[1]
    rows = ("cls", "mean patch")[-num_summaries:]
    figure = Figure(figsize=(8.4, 2.6 * num_summaries + 0.6), layout="constrained")
    grid = figure.subplots(num_summaries, 2, squeeze=False, sharex=True, sharey="col")
    for index, (left, right) in enumerate(grid):
        for result, (color, marker) in zip(results.values(), STYLES, strict=False):
            for curve, style in ((result.within, "-"), (result.between, "--")):
                values = curve.mean[:, index] * DEGREES
                left.plot(range(len(values)), values, style, color=color, marker=marker, markersize=4, linewidth=1.3)
            _draw_curve(right, _column(result.silhouette, index), 0, color, marker)
        left.set_ylabel(f"{rows[index]}\nangle (degrees)")
        right.set_ylabel("silhouette")
        for axes in (left, right):
            _draw_boundaries(axes, boundaries)
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    kinds = [Line2D([], [], color="black", linestyle=s, label=n) for s, n in (("-", "within"), ("--", "between"))]
    _add_legend(figure, results, kinds)
    return saved(figure, path, dpi=110)


def plot_projection(
    samples: Mapping[str, tuple[Projection, Tensor, bool]],
    labels: Tensor | None,
    class_names: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    max_trajectories: int = 60,
) -> Figure:
    """Draws the directions of a sample of images in a plane, from layer to layer, coloured by class.

    Args:
        samples: by model: the plane, the vectors (N, L + 1, D), and whether the plane is the first model's.
        labels: class of each image, (N,); None draws all in one colour.
        class_names: by class; None writes the numbers.
        path: where to save the figure; None saves nothing.
        max_trajectories: lines for so many images; all images have a dot where they end.
    """
    figure = Figure(figsize=(3.7 * len(samples) + 0.3, 4.2), layout="constrained")
    panels = figure.subplots(1, len(samples), squeeze=False)[0]
    classes = [0] if labels is None else labels.unique().tolist()
    colors = {label: f"C{index % 10}" for index, label in enumerate(classes)}
    projected = {name: plane.apply(vectors) for name, (plane, vectors, _) in samples.items()}
    shared_points = torch.cat([projected[name] for name, (_, _, shared) in samples.items() if shared])
    for axes, (name, (_, _, shared)) in zip(panels, samples.items(), strict=True):
        points = projected[name]
        of_image = [classes[0]] * len(points) if labels is None else labels.tolist()
        for index, (line, label) in enumerate(zip(points, of_image, strict=True)):
            if index < max_trajectories:
                axes.plot(*line.T, color=colors[label], linewidth=0.6, alpha=0.5)
            axes.plot(*line[-1], ".", color=colors[label], markersize=5)
        start = points[:, 0].mean(0)
        axes.plot(*start, "k*", markersize=11, zorder=5)
        axes.set(title=name, xlabel=f"first axis ({'shared' if shared else 'its own'})", ylabel="second axis")
        own = shared_points if shared else points
        centre = (own.amin((0, 1)) + own.amax((0, 1))) / 2
        reach = 1.05 * float((own - centre).abs().max())
        limits = [(float(middle) - reach, float(middle) + reach) for middle in centre]
        axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
        axes.spines[["top", "right"]].set_visible(False)
    if labels is not None and len(classes) <= 20:
        handles = [
            Line2D([], [], color=color, marker=".", linestyle="", markersize=9)
            for color in (colors[label] for label in classes)
        ]
        names = [str(label) if class_names is None else class_names[label] for label in classes]
        figure.legend(handles, names, loc="outside lower center", ncols=min(10, len(names)), frameon=False, fontsize=9)
    return saved(figure, path, dpi=110)


def plot_epsilon(
    results: Mapping[str, Fidelity | None],
    boundaries: Sequence[int] = (),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws epsilon of the block-recurrent hypothesis per layer, relative and absolute, and the cosines behind it.

    Args:
        results: by model, None for those that are no students, whose colours stay theirs.
        boundaries: last layers of the phases but the last.
        path: where to save the figure; None saves nothing.
    """
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    kinds: dict[str, Line2D] = {}
    for result, (color, marker) in zip(results.values(), STYLES, strict=False):
        if result is None:
            continue
        layers = np.arange(1, len(result.epsilon) + 1)
        options = {"color": color, "markersize": 4, "linewidth": 1.3}
        panels[0].plot(layers, result.relative_epsilon, marker=marker, **options)
        panels[1].plot(layers, result.epsilon, marker=marker, **options)
        for (group, cosine), style in zip(result.cosine.items(), ("-", ":", "--"), strict=True):
            if cosine is not None:
                panels[2].plot(layers, cosine, style, **options)
                kinds[group] = Line2D([], [], color="black", linestyle=style, label=group)
    panels[0].set_ylabel("relative \N{GREEK SMALL LETTER EPSILON} (share of the norm)")
    panels[1].set_ylabel("\N{GREEK SMALL LETTER EPSILON} (norm over tokens and features)")
    panels[2].set_ylabel("cosine to the teacher")
    for axes in panels:
        _draw_boundaries(axes, boundaries)
        axes.set_xlabel("layer")
    for axes in panels[:2]:
        axes.set_ylim(bottom=0)
    panels[2].legend(handles=list(kinds.values()), frameon=False, fontsize=8)
    _add_legend(figure, results)
    return saved(figure, path, dpi=110)


def _draw_curve(
    axes: Axes,
    curve: Curve,
    first: int,
    color: str,
    marker: str | None,
    factor: float = 1.0,
    band: bool = True,
) -> None:
    mean, std = factor * np.asarray(curve.mean), factor * np.asarray(curve.std)
    layers = np.arange(first, first + len(mean))
    if axes.get_yscale() == "log":
        mean = np.where(mean > 0, mean, np.nan)  # registers of an untrained network begin at 0
    axes.plot(layers, mean, color=color, marker=marker, markersize=4, linewidth=1.3, linestyle="-" if marker else ":")
    if band:
        axes.fill_between(layers, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)


def _draw_boundaries(axes: Axes, boundaries: Sequence[int]) -> None:
    for boundary in boundaries:
        axes.axvline(boundary + 0.5, color="0.6", linewidth=1, linestyle=(0, (1, 1.5)), zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Figure, results: Mapping[str, object], more: Sequence[Line2D] = ()) -> None:
    """Names the models that have a result, each in its own colour, and what else there is."""
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, label=name)
        for (name, result), (color, marker) in zip(results.items(), STYLES, strict=False)
        if result is not None
    ]
    figure.legend(handles=[*handles, *more], loc="outside upper center", ncols=6, frameon=False, fontsize=9)


def _column(curve: Curve, index: int) -> Curve:
    return Curve(curve.mean[:, index], curve.std[:, index], curve.num_images)
