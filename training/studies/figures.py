"""Figures of studies: variants of a distillation side by side, over seeds."""

import itertools
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raptor_hf.figures import mean_and_deviation, saved

from .conclusions import Record
from .depths import depths_of, is_elastic
from .frontier import Point, pareto

# how the axes call the scores, and the factor to their unit
AXES = {
    "r2_last": ("R\N{SUPERSCRIPT TWO}, last layer", 1),
    "student_accuracy": ("accuracy, test images (%)", 100),
}


def plot_ladder(
    scores: Mapping[str, Mapping[str, Sequence[float | None]]],
    path: str | os.PathLike[str] | None = None,
    teacher_accuracy: float | None = None,
) -> Figure:
    """Draws an ablation ladder: accuracies and R^2 of every rung, mean and standard deviation over seeds.

    Args:
        scores: for every rung, from the lowest, the values of all seeds under "r2_last" and "r2_mean" and, as
            fractions, "agreement" and "student_accuracy"; these two may be None, for teachers without a head.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
        teacher_accuracy: as a fraction; a dashed line.
    """
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = (
        (left, "student_accuracy", "accuracy of the student", 100, "o-", "C0"),
        (left, "agreement", "agreement with the teacher", 100, "s--", "C1"),
        (right, "r2_last", "last layer", 1, "o-", "C2"),
        (right, "r2_mean", "mean of all layers", 1, "s--", "C3"),
    )
    for index, (axes, key, label, unit, style, color) in enumerate(lines):
        if any(value is None for rung in scores.values() for value in rung[key]):
            continue
        # side by side, or error bars would hide one another
        positions = np.arange(len(scores)) + (0.06 if index % 2 else -0.06)
        statistics = [mean_and_deviation(np.multiply(unit, rung[key])) for rung in scores.values()]
        means, deviations = zip(*statistics, strict=True)
        axes.errorbar(positions, means, deviations, fmt=style, color=color, capsize=3, markersize=5, label=label)
    if teacher_accuracy is not None:
        left.axhline(100 * teacher_accuracy, color="0.5", linestyle=":", linewidth=1.2, label="accuracy of the teacher")
    left.set_ylabel("top-1, test images (%)")
    right.set_ylabel("R\N{SUPERSCRIPT TWO} of the student's states")
    right.axhline(1, color="0.8", linewidth=1, zorder=0)
    for axes in (left, right):
        axes.set_xticks(range(len(scores)), [textwrap.fill(name, 12) for name in scores], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, loc="best")
    return saved(figure, path, dpi=200, tight=True)


def plot_convergence(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draws the fidelity of variants while they train: mean over seeds, in a band of one standard deviation.

    Args:
        curves: for every variant, for every seed, its evaluations: "step", "r2_last" and "r2_mean".
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.

    Raises:
        ValueError: if the seeds of a variant were evaluated at different steps, or a variant never was.
    """
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = {"r2_last": "last layer", "r2_mean": "mean of all layers"}
    for (key, title), axes in zip(titles.items(), panels, strict=True):
        for index, (name, seeds) in enumerate(curves.items()):
            steps = [[entry["step"] for entry in evaluations] for evaluations in seeds]
            if not steps[0] or any(other != steps[0] for other in steps):
                raise ValueError(f"curves[{name!r}] has evaluations at steps {steps}; all seeds need the same ones")
            values = np.array([[entry[key] for entry in evaluations] for evaluations in seeds])
            means, deviations = mean_and_deviation(values)
            axes.plot(steps[0], means, "o-", color=f"C{index}", markersize=3.5, label=name)
            lower, upper = means - deviations, means + deviations
            axes.fill_between(steps[0], lower, upper, color=f"C{index}", alpha=0.2, linewidth=0)
        axes.axhline(1, color="0.8", linewidth=1, zorder=0)
        axes.set(xlabel="optimizer step", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("R\N{SUPERSCRIPT TWO} of the student's states")
    # beside the curves, which may be anywhere
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return saved(figure, path, dpi=200, tight=True)


def plot_trade_off(
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    teacher_parameters: float,
    teacher_macs: float,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws R^2 against parameters and against multiply-accumulates, mean and standard deviation over seeds.

    Args:
        series: for every line its points: "label", "parameters", "macs", and the values of all seeds under "r2_last"
            and "r2_mean".
        teacher_parameters: 100 % of the axis of parameters.
        teacher_macs: 100 % of the axis of multiply-accumulates.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
    """
    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    costs = (("parameters", teacher_parameters, "parameters"), ("macs", teacher_macs, "multiply-accumulates"))
    rows = (("r2_last", "last layer"), ("r2_mean", "mean of all layers"))
    for (row, (key, title)), (column, (cost, teacher_cost, cost_name)) in itertools.product(
        enumerate(rows), enumerate(costs)
    ):
        axes = grid[row, column]
        for index, (name, points) in enumerate(series.items()):
            positions = [100 * point[cost] / teacher_cost for point in points]
            means, deviations = zip(*(mean_and_deviation(point[key]) for point in points), strict=True)
            color = f"C{index}"
            axes.errorbar(positions, means, deviations, fmt="o-", color=color, capsize=3, markersize=5, label=name)
            for point, position, mean in zip(points, positions, means, strict=True):
                # on alternating sides, as the points of two series may nearly meet
                place = {"xytext": (-5, 4), "ha": "right"} if index % 2 == 0 else {"xytext": (5, -10), "ha": "left"}
                place |= {"textcoords": "offset points", "fontsize": 8, "color": color}
                axes.annotate(point["label"], (position, mean), **place)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
        if row == 1:
            axes.set_xlabel(f"{cost_name} (% of the teacher's)")
        if column == 0:
            axes.set_ylabel(f"R\N{SUPERSCRIPT TWO}, {title}")
    grid[0, 0].legend(frameon=False, fontsize=9, loc="lower right")
    return saved(figure, path, dpi=200, tight=True)


def plot_partitions(
    draws: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draws what every partition gives, one dot per run: a group of columns per label, a column per kind.

    Args:
        draws: for every label, such as "k=2", and every kind of partition the values of all runs under "r2_last" and,
            as fractions, "student_accuracy". The mean of the first kind is drawn as a line across the others.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
    """
    scores = _shared_scores([scores for kinds in draws.values() for scores in kinds.values()])
    figure = Figure(figsize=(5.0 * len(scores), 4.2), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        name, factor = AXES[score]
        for group, kinds in enumerate(draws.values()):
            for column, (kind, values) in enumerate(kinds.items()):
                heights = factor * np.asarray(values[score])
                center = group + 0.8 * ((column + 0.5) / len(kinds) - 0.5)
                # side by side in the order of the draws, as equal ones would hide one another
                positions = center + 0.5 / len(kinds) * (np.arange(len(heights)) / max(1, len(heights) - 1) - 0.5)
                label = kind if group == 0 else None
                axes.plot(positions, heights, "o", color=f"C{column}", markersize=4, alpha=0.75, label=label)
                if column == 0:
                    label = f"{kind}, mean" if group == 0 else None
                    axes.hlines(heights.mean(), group - 0.4, group + 0.4, color="C0", linewidth=1.2, label=label)
        axes.set_xticks(range(len(draws)), list(draws))
        axes.set(ylabel=name, xlabel="number of blocks" if all(label.startswith("k=") for label in draws) else "")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return saved(figure, path, dpi=200, tight=True)


def plot_frontier(
    points: Sequence[Point],
    baselines: Sequence[Point] = (),
    teacher_accuracy: float | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws fidelity and accuracy against parameters, mean and standard deviation over seeds, with the Pareto frontier.

    Args:
        points: of the study, each series a line.
        baselines: of other studies; hollow where the accuracy is that of a trained probe.
        teacher_accuracy: as a fraction; a dotted line.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
    """
    scores = _shared_scores([point.values for point in points])
    figure = Figure(figsize=(5.2 * len(scores), 4.8), layout="constrained")
    series: dict[str, list[Point]] = {}
    for point in (*points, *baselines):
        series.setdefault(point.series, []).append(point)
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        axis_name, factor = AXES[score]
        for index, (name, line) in enumerate(series.items()):
            _plot_series(axes, index, name, [point for point in line if score in point.values], score)
        best = pareto([*points, *baselines], score)
        steps = [point.parameters / 1e6 for point in best], [factor * point.mean(score) for point in best]
        axes.plot(*steps, drawstyle="steps-post", color="0.75", linewidth=4, zorder=0, label="Pareto frontier")
        if score == "student_accuracy" and teacher_accuracy is not None:
            level = factor * teacher_accuracy
            axes.axhline(level, color="0.5", linestyle=":", linewidth=1.2, label="accuracy of the teacher")
        axes.set(xlabel="parameters (M)", ylabel=axis_name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08)
    handles = {handle.get_label(): handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return saved(figure, path, dpi=200, tight=True)


def _plot_series(axes: Axes, index: int, name: str, line: Sequence[Point], score: str) -> None:
    """One series of the frontier, with a label at every point."""
    if not line:
        return
    factor, is_probed, color = AXES[score][1], line[0].is_probed, f"C{index}"
    x = [point.parameters / 1e6 for point in line]
    statistics = [mean_and_deviation(factor * np.asarray(point.values[score])) for point in line]
    means, deviations = zip(*statistics, strict=True)
    style = {"fmt": "o-", "color": color, "capsize": 3, "markersize": 5, "linewidth": 1}
    style |= {"label": f"{name} (trained probe)", "markerfacecolor": "none"} if is_probed else {"label": name}
    axes.errorbar(x, means, deviations, **style)
    for point, position, mean in zip(line, x, means, strict=True):
        # on alternating sides, as the points of two series may nearly meet
        place = {"xytext": (-4, 5), "ha": "right"} if index % 2 else {"xytext": (4, -11), "ha": "left"}
        axes.annotate(point.label, (position, mean), **place, textcoords="offset points", fontsize=7.5, color=color)


def plot_depths(
    variants: Mapping[str, Sequence[Record]],
    teacher_accuracy: float | None,
    teacher_macs: int,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws what students reach against their multiply-accumulates: elastic ones as lines, those of one depth as dots.

    Args:
        variants: the runs of each, as study.py records them; "dedicated, 4 steps" is a dot of the series "dedicated".
            Elastic ones after the first are thin lines of one name.
        teacher_accuracy: as a fraction, None where it has no classifier.
        teacher_macs: multiply-accumulates of the teacher.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
    """
    has_accuracy = teacher_accuracy is not None
    figure = Figure(figsize=(10.0 if has_accuracy else 5.0, 4.0), layout="constrained")
    panels = list(figure.subplots(1, 1 + has_accuracy, squeeze=False)[0])
    scores = [("r2", AXES["r2_last"]), ("student_accuracy", AXES["student_accuracy"])][: len(panels)]
    if has_accuracy:
        panels[1].plot(teacher_macs / 1e6, 100 * teacher_accuracy, "*", color="crimson", markersize=10, label="teacher")
    series: dict[str, list[Any]] = {}
    for name, runs in variants.items():
        line = name if is_elastic(runs) else name.rpartition(", ")[0] or name
        series.setdefault(line, []).extend(depths_of(runs).values())
    others = [name for name, runs in variants.items() if is_elastic(runs)][1:]
    names = [name for name in series if name not in others]
    for name, depths in series.items():
        depths = sorted(depths, key=lambda depth: depth.macs)
        style = {"fmt": "o-" if name in variants else "s", "capsize": 3, "label": name}
        if name in others:
            label = "elastic, other settings" if name == others[0] else None
            style = {"fmt": "-", "color": "0.6", "linewidth": 0.8, "label": label, "zorder": 0}
        else:
            style["color"] = f"C{names.index(name) % 10}"
        for axes, (score, (_, unit)) in zip(panels, scores, strict=True):
            known = [depth for depth in depths if None not in getattr(depth, score)]
            if known:
                points = [mean_and_deviation(np.multiply(unit, getattr(depth, score))) for depth in known]
                means, deviations = zip(*points, strict=True)
                cost = [depth.macs / 1e6 for depth in known]
                axes.errorbar(cost, means, deviations if name not in others else None, **style)
    for axes, (_, (label, _)) in zip(panels, scores, strict=True):
        axes.set(xlabel="multiply-accumulates per image (M)", xlim=(0, None), ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    # the last panel has the teacher, too
    handles = dict(zip(*reversed(panels[-1].get_legend_handles_labels()), strict=True))
    panels[0].legend(handles.values(), handles.keys(), frameon=False, fontsize=9)
    return saved(figure, path, dpi=200, tight=True)


def plot_time_to_fidelity(
    variants: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draws fidelity and accuracy against seconds of training and, below, against steps: seeds thin, their mean thick.

    Args:
        variants: for every variant the records of its runs, with "evaluations" of "step", "seconds", "r2_last" and, as
            a fraction, "student_accuracy"; all runs of one variant at the same steps. A dashed line is drawn where each
            but the last one ends. R^2 below 0, where training starts, is not shown.
        path: where to save the figure, as PNG unless its suffix names another format; None saves nothing.
    """
    curves = {name: [run["evaluations"] for run in runs] for name, runs in variants.items() if runs}
    scores = _shared_scores([entry for runs in curves.values() for entries in runs for entry in entries])
    figure = Figure(figsize=(5.0 * len(scores), 6.8), layout="constrained")
    grid = figure.subplots(2, len(scores), squeeze=False, sharey="col")
    rows = (("seconds", "seconds of training"), ("step", "optimizer step"))
    for (row, (cost, cost_name)), (column, score) in itertools.product(enumerate(rows), enumerate(scores)):
        axes, (axis_name, factor) = grid[row, column], AXES[score]
        for index, (name, runs) in enumerate(curves.items()):
            x = np.array([[entry[cost] for entry in entries] for entries in runs])
            y = factor * np.array([[entry[score] for entry in entries] for entries in runs])
            for seed_x, seed_y in zip(x, y, strict=True):
                axes.plot(seed_x, seed_y, color=f"C{index}", linewidth=0.7, alpha=0.4)
            axes.plot(x.mean(axis=0), y.mean(axis=0), "o-", color=f"C{index}", markersize=3, label=name)
            if index < len(curves) - 1:
                style = {"color": f"C{index}", "linestyle": "--", "linewidth": 1, "zorder": 0}
                axes.axhline(y[:, -1].mean(), **style, label=f"end of {name}")
        if score == "r2_last":
            axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.05))
        axes.set(xlabel=cost_name, ylabel=axis_name)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return saved(figure, path, dpi=200, tight=True)


def _shared_scores(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores that all of these have; those that have an axis."""
    return [score for score in AXES if all(scores.get(score) is not None for scores in values)]
