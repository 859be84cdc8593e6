"""What was tried to make a step cheaper: each candidate is the same step, but for what its name says."""

import importlib
from pathlib import Path

import pytest
import torch

from tests.training.benchmarks.test_training import CPU, TINY

ROOT = Path(__file__).parents[3]


@pytest.fixture
def candidates(monkeypatch):
    module = importlib.import_module("training.benchmarks.candidates")
    monkeypatch.setitem(importlib.import_module("training.benchmarks.training").SHAPES, "tiny", TINY)
    # compiling takes a minute
    eager = {name: entry for name, entry in module.CANDIDATES.items() if "compiled" not in name}
    monkeypatch.setattr(module, "CANDIDATES", eager)
    return module


def test_every_candidate_computes_the_same_loss(candidates):
    case = candidates.TrainingCase("tiny", 8, "mlp", "2", CPU)
    expected = candidates._plain(case)()
    for name, (make, _) in candidates.CANDIDATES.items():
        step = make(case)
        tolerance = 0.02 if "bf16" in name else 1e-5
        assert step() == pytest.approx(expected, rel=tolerance), name


def test_candidates_differ_from_the_step_in_what_they_say(candidates):
    case = candidates.TrainingCase("tiny", 8, "mlp", "2", CPU)
    steps = {name: make(case) for name, (make, _) in candidates.CANDIDATES.items()}
    by_word = {word: next(step for name, step in steps.items() if word in name) for word in ("Muon", "not fused")}
    assert [group.get("fused") for group in by_word["not fused"].optimizer.param_groups] == [None]
    assert type(by_word["Muon"].optimizer).__name__ == "MuonWithAdamW"
    teacher = next(step for name, step in steps.items() if name == "teacher in bf16").teacher
    assert next(teacher.parameters()).dtype == torch.bfloat16


def test_rows_say_how_fast_and_how_large_each_candidate_is(candidates):
    rows = candidates.compare_candidates(candidates.TrainingCase("tiny", 8, "mlp", "2", CPU), repeats=3, warmup=1)
    assert [row["candidate"] for row in rows] == list(candidates.CANDIDATES)
    saved = {row["candidate"]: row["saved_ratio"] for row in rows}
    assert saved["Muon instead of AdamW"] == 1 and saved["each block's activations recomputed"] is None
    assert saved["LayerScale and depth scale on the outputs, not in the weights"] > 1
    assert all(row["speedup"] > 0 for row in rows)
