"""What the figures of a run show."""

import pytest

from raptor_hf.figures import plot_depths, plot_fidelity, plot_losses

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


def test_an_elastic_student_is_a_curve_over_its_cost_beside_the_teacher():
    row = {"r2": 0.5, "agreement": 0.75, "student_accuracy": 0.25}
    by_steps = {"12": row | {"macs": 3_000_000, "r2": 0.9}, "4": row | {"macs": 1_000_000}}
    r2, accuracy = plot_depths({"by_steps": by_steps, "teacher_accuracy": 0.5}, teacher_macs=2_000_000).axes
    assert r2.lines[0].get_xydata().tolist() == [[1, 0.5], [3, 0.9]]
    assert accuracy.lines[0].get_xydata().tolist() == [[1, 25], [3, 25]]
    assert accuracy.lines[1].get_xydata().tolist() == [[2, 50]]
    blind = {name: scores | {"student_accuracy": None} for name, scores in by_steps.items()}
    _, agreement = plot_depths({"by_steps": blind, "teacher_accuracy": None}, teacher_macs=2_000_000).axes
    assert agreement.lines[0].get_ydata().tolist() == [75, 75] and "agreement" in agreement.get_ylabel()
