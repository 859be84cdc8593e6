"""What readers take from the figures by colour, legend and tick: that these mean the same throughout a report."""

import dataclasses

import numpy as np
import torch

from raptor_hf.accumulators import Curve
from raptor_hf.dynamics.experiment_figures import plot_perturbation
from raptor_hf.dynamics.figures import STYLES, plot_epsilon
from raptor_hf.dynamics.interventions import PerturbationResult
from raptor_hf.metrics import FidelityAccumulator
from raptor_hf.tokens import TokenLayout


def fidelity(num_registers=0):
    accumulator = FidelityAccumulator(3, TokenLayout(num_registers), 4)
    states = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    accumulator.update(states, states + 0.1)
    return accumulator.compute()


def perturbation(angles):
    """Noise after one layer, of one size, that has these angles (in degrees) over depth."""
    angle = Curve(torch.deg2rad(torch.tensor(angles))[None, None], torch.zeros(1, 1, len(angles)), 5)
    rate = Curve(torch.ones(1, 1), torch.zeros(1, 1), 5)
    return PerturbationResult([0], [0.1], angle, angle, rate, rate, None)


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_a_student_has_the_colour_of_its_place_among_all_models():
    figure = plot_epsilon({"teacher": None, "untrained": None, "a": fidelity(), "b": fidelity()})
    colors = [line.get_color() for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 3]
    assert colors == [STYLES[2][0], STYLES[3][0]]
    (legend,) = figure.legends
    assert legend_texts(legend) == ["a", "b"]
    assert [line.get_color() for line in legend.get_lines()] == colors


def test_kinds_of_tokens_are_named_once_each():
    for registers, groups in ((0, {"cls", "patches"}), (2, {"cls", "registers", "patches"})):
        figure = plot_epsilon({"teacher": None, "a": fidelity(registers), "b": fidelity(registers)})
        names = legend_texts(figure.axes[2].get_legend())
        assert set(names) == groups and len(names) == len(groups)


def test_angles_of_noise_have_ticks_within_a_decade():
    figure = plot_perturbation({"teacher": perturbation([17.0, 12.0, 9.0, 6.0]), "b": perturbation([16.0] * 4)})
    figure.draw_without_rendering()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    np.testing.assert_allclose(ticks, [7, 10, 15])
    labels = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert labels == ["7", "10", "15"]


def test_models_without_predictions_have_no_panel_for_them():
    result = perturbation([17.0, 12.0])
    shown = [axes.get_xlabel() for axes in plot_perturbation({"a": result}).axes if axes.get_visible()]
    assert not any("size of the noise" in label for label in shown)
    judged = dataclasses.replace(result, unchanged=Curve(torch.ones(1, 1), torch.zeros(1, 1), 5))
    shown = [axes.get_xlabel() for axes in plot_perturbation({"a": result, "b": judged}).axes if axes.get_visible()]
    assert sum("size of the noise" in label for label in shown) == 1
