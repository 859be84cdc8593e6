"""The sweep of learning rates over teachers: what it calls best, and what it leaves out."""

import json
from types import SimpleNamespace

import pytest

from raptor_hf.recipes.loop import DivergedError, NonFiniteError, NonFiniteGuard, RisingLossGuard
from training.studies import learning_rates
from training.studies.learning_rates import best_rate, measure, without_paths


def test_the_best_rate_is_that_of_the_highest_score_and_none_that_diverged():
    assert best_rate([0.005, 0.01, 0.02], [0.5, 0.7, 0.6]) == 0.01
    assert best_rate([0.005, 0.01, 0.02], [0.5, 0.4, None]) == 0.005
    with pytest.raises(ValueError, match="every run diverged"):
        best_rate([0.1, 0.2], [None, None])


def test_a_run_that_is_there_is_read_and_one_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    scores = {"fidelity": {"r2": [0.5, 0.7]}, "seconds": {"stage2": 3.0}}
    (tmp_path / "metrics.json").write_text(json.dumps(scores))
    assert measure("", 0.01, tmp_path) == {"mean_r2": 0.6, "last_r2": 0.7, "seconds": 3.0}
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "metrics.json").write_text(json.dumps(scores | {"fidelity": {"r2": [0.5, -60.0]}}))
    assert measure("", 0.04, tmp_path / "far")["mean_r2"] is None
    with pytest.raises(DivergedError) as risen:
        RisingLossGuard(1, num_steps=10, first=2.0).check(5, 3.0, lr=0.1)
    with pytest.raises(NonFiniteError) as not_finite:
        NonFiniteGuard().check(5, False, ["an image"])
    for kind, error in (("diverged", risen), ("diverged", not_finite), ("other", "no such teacher")):
        stderr = f"distill.py: error: {getattr(error, 'value', error)}"
        done = SimpleNamespace(returncode=1, stderr=stderr)
        monkeypatch.setattr(learning_rates.subprocess, "run", lambda *args, done=done, **options: done)
        if kind == "diverged":
            assert measure("config.yaml", 0.01, tmp_path / "diverged")["mean_r2"] is None
        else:
            with pytest.raises(RuntimeError, match="no such teacher"):
                measure("config.yaml", 0.01, tmp_path / "failed")


def test_results_name_no_machines_paths():
    assert without_paths(["--teacher", "/data/vits14", "digits_k3.yaml"]) == ["--teacher", "vits14", "digits_k3.yaml"]
