"""Draws the experiments that act on a model, and the linear models of its phases; all models share their axes."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..figures import saved
from ..phases import Partition
from .dmd import DMDSpanErrors, SpanOperator
from .extrapolation import EarlyExitResult, ExtrapolationResult
from .figures import STYLES, _add_legend, _draw_boundaries
from .interventions import EditResult, PerturbationResult
from .motion import DEGREES

SCORES = {"accuracy": "accuracy (%)", "agreement": "agreement with itself (%)", "cosine": "cosine to its final states"}


def plot_perturbation(
    results: Mapping[str, PerturbationResult],
    boundaries: Sequence[int] = (),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws how noise develops: its angle over depth for every layer it enters at, rates, and predictions kept.

    Args:
        results: by model, for the same layers and sizes.
        boundaries: last layers of the phases but the last.
        path: where to save the figure; None saves nothing.
    """
    first = next(iter(results.values()))
    size = len(first.sizes) // 2
    num_columns = max(3, len(results))
    figure = Figure(figsize=(3.5 * num_columns + 0.6, 6.4), layout="constrained")
    grid = figure.subplots(2, num_columns, squeeze=False)
    colors = ScalarMappable(Normalize(0, max(first.layers)), "viridis")
    for axes in grid[0, 1 : len(results)]:
        axes.sharey(grid[0, 0])
    for axes, (name, result) in zip(grid[0], results.items(), strict=False):
        for j, layer in enumerate(result.layers):
            angles = np.asarray(result.angle.mean[j, size]) * DEGREES
            axes.plot(range(len(angles)), angles, color=colors.to_rgba(layer), linewidth=1.3)
            axes.plot(layer, angles[layer], ".", color=colors.to_rgba(layer), markersize=7)
        axes.set(title=name, xlabel="layer", yscale="log")
        # often less than a decade: powers of ten alone would be one tick or none
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        _draw_boundaries(axes, boundaries)
    for axes in grid[0, len(results) :]:
        axes.set_visible(False)
    grid[0, 0].set_ylabel(f"angle to the unperturbed tokens (degrees)\nnoise of {first.sizes[size]:g} times the norm")
    figure.colorbar(colors, ax=grid[0, : len(results)], label="layer of the noise", fraction=0.03, pad=0.01)
    for index, (result, (color, marker)) in enumerate(zip(results.values(), STYLES, strict=False)):
        for axes, curve in ((grid[1, 0], result.rate), (grid[1, 1], result.relative_rate)):
            means, stds = np.asarray(curve.mean[:, size]), np.asarray(curve.std[:, size])
            # side by side, or whiskers would hide one another
            layers = np.array(result.layers) + 0.15 * (index - (len(results) - 1) / 2)
            axes.errorbar(layers, means, stds, color=color, marker=marker, markersize=4, linewidth=1.2)
        if result.unchanged is not None:
            shares = 100 * np.asarray(result.unchanged.mean)
            # whiskers span the layers at which the noise may enter
            spread = np.abs(np.stack([shares.min(0), shares.max(0)]) - shares.mean(0))
            grid[1, 2].errorbar(
                result.sizes, shares.mean(0), spread, color=color, marker=marker, markersize=4, capsize=2, linewidth=1.2
            )
    for axes, label in ((grid[1, 0], "angle"), (grid[1, 1], "relative distance")):
        axes.axhline(1, color="0.6", linewidth=1)
        axes.set(xlabel="layer of the noise", ylabel=f"factor per layer,\n{label}")
        _draw_boundaries(axes, boundaries)
    grid[1, 2].set(xlabel="size of the noise (share of the norm)", ylabel="predictions unchanged (%)", xscale="log")
    grid[1, 2].set_xticks(first.sizes, [f"{value:g}" for value in first.sizes])
    grid[1, 2].minorticks_off()
    grid[1, 2].spines[["top", "right"]].set_visible(False)
    # without a classifier no model has predictions
    num_panels = 3 if any(result.unchanged is not None for result in results.values()) else 2
    for axes in grid[1, num_panels:]:
        axes.set_visible(False)
    _add_legend(figure, results)
    return saved(figure, path, dpi=110)


def plot_edits(
    results: Mapping[str, EditResult],
    partition: Partition,
    metric: str,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws the scores of models with layers replaced or swapped, within phases and across them.

    Args:
        results: by model.
        partition: the phases; squares on the maps.
        metric: "accuracy", "agreement" or "cosine", which every result has.
        path: where to save the figure; None saves nothing.
    """
    num_columns = max(2, len(results))
    unit = 1 if metric == "cosine" else 100
    figure = Figure(figsize=(3.6 * num_columns + 0.8, 7.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    panels = upper.subplots(1, num_columns, squeeze=False)[0]
    low = min(unit * float(getattr(result, metric).mean.min()) for result in results.values())
    image = None
    for axes, (name, result) in zip(panels, results.items(), strict=False):
        image = _draw_replacements(axes, result, partition, metric, (max(0.0, low) if unit == 100 else low, unit), unit)
        axes.set(title=name, xlabel="layer put in its place", ylabel="layer replaced")
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    upper.colorbar(image, ax=panels, label=SCORES[metric], fraction=0.03, pad=0.01)
    bars = lower.subplots(1, 2, sharey=True)
    for axes, kind in zip(bars, ("replace", "swap"), strict=True):
        numbers = sorted({edit.num_edits for result in results.values() for edit in result.edits})
        for index, (result, (color, marker)) in enumerate(zip(results.values(), STYLES, strict=False)):
            summary = result.summary(metric)
            for relation, shift in (("within", -0.04), ("across", 0.04)):
                offset = 0.22 * (index - (len(results) - 1) / 2) + shift
                intervals = {n: summary[kind, relation, n] for n in numbers if (kind, relation, n) in summary}
                means = np.array([unit * interval.mean for interval in intervals.values()])
                ends = np.array([[unit * i.low, unit * i.high] for i in intervals.values()]).reshape(-1, 2).T
                face = color if relation == "within" else "white"
                axes.errorbar(
                    [n + offset for n in intervals],
                    means,
                    np.abs(ends - means),
                    fmt=marker,
                    color=color,
                    markerfacecolor=face,
                    capsize=2,
                    markersize=6,
                )
        axes.set(xlabel=f"{'layers replaced' if kind == 'replace' else 'pairs of layers swapped'}", xticks=numbers)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    bars[0].set_ylabel(SCORES[metric])
    relations = [
        Line2D([], [], color="black", marker="o", linestyle="", markerfacecolor=face, label=name)
        for name, face in (("within a phase", "black"), ("across phases", "white"))
    ]
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=name)
        for name, (color, marker) in zip(results, STYLES, strict=False)
    ]
    lower.legend(handles=[*handles, *relations], loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return saved(figure, path, dpi=110)


def _draw_replacements(
    axes: Axes, result: EditResult, partition: Partition, metric: str, limits: tuple[float, float], unit: float
):
    values = np.full((partition.num_layers, partition.num_layers), np.nan)
    for edit, value in zip(result.edits, getattr(result, metric).mean.tolist(), strict=True):
        if edit.kind == "replace" and edit.num_edits == 1:
            ((layer, substitute),) = edit.pairs
            values[layer - 1, substitute - 1] = unit * value
    edges = (0.5, partition.num_layers + 0.5)
    image = axes.imshow(values, extent=(*edges, *edges[::-1]), vmin=limits[0], vmax=limits[1], cmap="viridis")
    axes.set_facecolor("0.9")  # the diagonal, where nothing is replaced
    if partition.is_contiguous:
        for start, end in partition.phases:
            corner, side = (start + 0.5, start + 0.5), end - start
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="crimson", linewidth=2))
    ticks = range(1, partition.num_layers + 1, 1 + partition.num_layers // 16)
    axes.set(xticks=ticks, yticks=ticks)
    axes.tick_params(length=0, labelsize=8)
    return image


def plot_dmd(
    results: Mapping[str, tuple[Sequence[DMDSpanErrors], Sequence[SpanOperator]]],
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws how far one linear map per phase predicts, for cls and patches, and its eigenvalues: a column per phase.

    Args:
        results: by model, the errors and the operators of the same spans.
        path: where to save the figure; None saves nothing.
    """
    errors, _ = next(iter(results.values()))
    groups = [group for group in ("cls", "patches") if group in errors[0].cosine_error["dmd"]]
    figure = Figure(figsize=(3.3 * len(errors) + 0.6, 2.5 * len(groups) + 3.7), layout="constrained")
    grid = figure.subplots(len(groups) + 1, len(errors), squeeze=False, height_ratios=[*[2.4] * len(groups), 3.2])
    for (spans, operators), (color, marker) in zip(results.values(), STYLES, strict=False):
        for column, (span, operator) in enumerate(zip(spans, operators, strict=True)):
            for axes, group in zip(grid[:-1, column], groups, strict=True):
                for kind, style in (("dmd", "-"), ("identity", ":")):
                    means = np.asarray(span.cosine_error[kind][group].mean)
                    steps = range(1, len(means) + 1)
                    axes.plot(steps, means, style, color=color, marker=marker, markersize=4, linewidth=1.3)
                # 0.02 is what the literature calls faithful
                axes.axhline(0.02, color="0.8", linewidth=1, zorder=0)
            values = operator.eigenvalues.numpy()
            grid[-1, column].plot(
                values.real, values.imag, marker, color=color, markersize=3.5, alpha=0.7, markeredgewidth=0
            )
    for column, span in enumerate(errors):
        start, end = span.span
        grid[0, column].set_title(f"layers {start + 1} to {end}" if end > start + 1 else f"layer {end}")
        grid[-1, column].add_patch(Circle((0, 0), 1, fill=False, edgecolor="0.6", linewidth=1))
        grid[-1, column].set(xlabel="real part of eigenvalue", aspect="equal")
        for axes in grid[:-1, column]:
            axes.set(
                xlabel="steps ahead", yscale="log", xticks=range(1, len(span.cosine_error["dmd"][groups[0]].mean) + 1)
            )
            axes.minorticks_off()
    values = np.concatenate([o.eigenvalues.numpy() for _, operators in results.values() for o in operators])
    sides = (min(-1.1, values.real.min()), max(1.1, values.real.max() + 0.1)), 1.1 * max(1, np.abs(values.imag).max())
    for axes in grid[-1]:
        axes.set(xlim=sides[0], ylim=(-sides[1], sides[1]))
    for row in grid[:-1]:
        low, high = (limit(axes.get_ylim()[i] for axes in row) for i, limit in ((0, min), (1, max)))
        for axes in row:
            axes.set_ylim(low, high)
    for axes, group in zip(grid[:-1, 0], groups, strict=True):
        axes.set_ylabel(f"{group}: 1 \N{MINUS SIGN} cosine")
    grid[-1, 0].set_ylabel("imaginary part of eigenvalue")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    kinds = [Line2D([], [], color="black", linestyle=s, label=n) for s, n in (("-", "linear"), (":", "state itself"))]
    _add_legend(figure, results, kinds)
    return saved(figure, path, dpi=110)


def plot_depth(
    extrapolations: Mapping[str, Sequence[ExtrapolationResult]],
    exits: Mapping[str, Sequence[EarlyExitResult]],
    metric: str,
    num_layers: int,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws models run for fewer and more steps, and stopped early where they have settled.

    Args:
        extrapolations: by model, one result per pace.
        exits: by model, one result per rule.
        metric: "accuracy", "agreement" or "cosine", which every result has.
        num_layers: L, the trained number of steps; a vertical line.
        path: where to save the figure; None saves nothing.
    """
    unit = 1 if metric == "cosine" else 100
    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    grid = figure.subplots(2, 3)
    for results, (color, marker) in zip(extrapolations.values(), STYLES, strict=False):
        for result in results:
            options = {"color": color, "linewidth": 1.3}
            options |= (
                {"linestyle": "-", "marker": marker} if result.pace == "hold" else {"linestyle": ":", "marker": "."}
            )
            for axes, name, factor in (
                (grid[0, 0], metric, unit),
                (grid[0, 1], "cosine", 1),
                (grid[0, 2], "last_speed", DEGREES),
            ):
                axes.plot(result.num_steps, factor * np.asarray(getattr(result, name).mean), markersize=3.5, **options)
    labels = (
        SCORES[metric].replace("itself", "the reference"),
        "cosine to the reference",
        "turn in the last step (degrees)",
    )
    for axes, label in zip(grid[0], labels, strict=True):
        axes.axvline(num_layers, color="0.6", linewidth=1, linestyle=(0, (1, 1.5)), zorder=0)
        axes.set(xlabel="steps", ylabel=label)
    for results, (color, marker) in zip(exits.values(), STYLES, strict=False):
        for axes, result in zip(grid[1], results, strict=False):
            order = np.argsort(np.asarray(result.num_steps.mean))
            axes.plot(
                np.asarray(result.num_steps.mean)[order],
                unit * np.asarray(getattr(result, metric).mean)[order],
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1.3,
            )
            axes.set_title(f"stopped by {result.rule.replace('_', ' ')}", fontsize=10)
        for result, style in zip(results, ("-", "--"), strict=False):
            steps = np.asarray(result.num_steps.mean)
            grid[1, 2].plot(result.thresholds, steps, style, color=color, marker=marker, markersize=3.5, linewidth=1.2)
    for axes in grid[1, :2]:
        axes.set(xlabel="steps taken, mean over images", ylabel=SCORES[metric])
    label = "threshold (speed, solid, in radians;\nsecond difference, dashed)"
    grid[1, 2].set(xlabel=label, ylabel="steps taken, mean over images", xscale="log")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    paces = [
        Line2D([], [], color="black", label="first steps, then the last layer again"),
        Line2D([], [], color="black", linestyle=":", marker=".", label="spread over the depth"),
    ]
    _add_legend(figure, extrapolations, paces)
    return saved(figure, path, dpi=110)
