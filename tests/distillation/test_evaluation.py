"""What a run prints of its fidelity."""

import pytest

from raptor_hf.distillation.evaluation import print_table


@pytest.mark.parametrize(("r2", "advises"), [([0.9, 0.1], False), ([0.9, -60.0], True)])
def test_a_student_worse_than_the_mean_of_the_teacher_says_what_to_change(r2, advises, capsys):
    scores = dict.fromkeys(("agreement", "teacher_accuracy", "student_accuracy"))
    fidelity = {
        "r2": r2,
        "epsilon": [1.0, 1.0],
        "relative_epsilon": [0.1, 0.1],
        "cosine": {"cls": [0.9, 0.8]},
        **scores,
    }
    fidelity |= scores
    sizes = {"teacher": 10, "student": 4}
    print_table({"fidelity": fidelity, "parameters": sizes, "macs": sizes})
    assert ("lower learning_rate" in capsys.readouterr().out) == advises
