"""What the figures of a run show."""

import pytest

from raptor_hf.figures import plot_fidelity, plot_losses

RECORD = {"step": 6, "loss": 2.0, "block_0": 1.0, "block_1": 3.0, "lr": 1e-3}


def test_losses_of_a_single_interval_are_dots():
    upper, lower = plot_losses({1: [RECORD], 2: []}).axes
    assert len(upper.lines) == 2 and len(lower.lines) == 1
    assert all(line.get_marker() == "o" for line in (*upper.lines, *lower.lines))
    upper, _ = plot_losses({1: [RECORD, RECORD | {"step": 12}]}).axes
    assert not any(line.get_marker() == "o" for line in upper.lines)


def test_blocks_are_numbered_as_in_the_log():
    upper, _ = plot_losses({1: [RECORD]}).axes
    assert [line.get_label() for line in upper.lines] == ["block 0", "block 1"]
    assert [line.get_ydata()[0] for line in upper.lines] == [RECORD["block_0"], RECORD["block_1"]]


@pytest.mark.parametrize("layers", [1, 4])
def test_markers_of_a_perfect_student_are_drawn_whole(layers):
    perfect = {"r2": [1.0] * layers, "relative_epsilon": [0.0] * layers, "cosine": {"patches": [1.0] * layers}}
    upper = plot_fidelity(perfect).axes[0]
    curves = [line for line in upper.lines if len(line.get_xdata()) == layers and line.get_marker() in ("o", ".")]
    assert len(curves) == 2 and not any(line.get_clip_on() for line in curves)
