"""Which search predicts fidelity: each partition is trained once, and a judge that orders them as R^2 has rank 1."""

import json

import numpy as np
import pytest

from training.studies import phase_choice

LAYERS = 5


def costs_and_distance() -> tuple[list[list[float]], list[list[float]]]:
    layers = np.arange(LAYERS)
    lengths = layers - layers[:, None]
    costs = [[float(length**2) for length in row[start:]] for start, row in enumerate(lengths)]
    distance = abs(lengths) * np.where(np.minimum(layers, layers[:, None]) < 3, 0.1, 5.0)
    return costs, distance.tolist()


def test_the_page_ranks_partitions_by_their_fidelity_and_says_what_predicts_it(tmp_path, monkeypatch):
    costs, distance = costs_and_distance()
    trained = []

    def train(flags, folder):
        trained.append(flags)
        repeats = [int(n) for n in flags[flags.index("--block_repeats") + 1 :][:2]] if "--block_repeats" in flags else 0
        if not repeats:
            folder.mkdir(parents=True)
            record = {"blocks": [[1, 2], [3, 4, 5]], "costs": costs, "distance": distance}
            (folder / "phases.json").write_text(json.dumps(record))
            repeats = [2, 3]
        cost = sum((n - 1) ** 2 for n in repeats)
        return {"mean_r2": 1 - 0.01 * cost, "last_r2": 0.5, "seconds": 1.0}

    monkeypatch.setattr(phase_choice, "train", train)
    monkeypatch.setattr(
        "sys.argv",
        ["phase_choice", str(tmp_path / "page"), "--name", "a teacher", "--run", "config.yaml --num_blocks 2"]
        + ["--runs_dir", str(tmp_path / "runs"), "--num_random", "3"],
    )
    phase_choice.main()
    results = json.loads((tmp_path / "page" / "results.json").read_text())
    found = {row["phases"]: row for row in results["partitions"]}
    assert len(found) == len(results["partitions"]) == len(trained)
    assert (
        results["rank_correlation"]["cost"] == pytest.approx(1, abs=0.3)
        and "fitted" in results["partitions"][0]["found_by"]
    )
    assert results["rank_correlation"]["distance"] < results["rank_correlation"]["cost"]
    assert [row["mean_r2"] for row in results["partitions"]] == sorted(
        (r["mean_r2"] for r in found.values()), reverse=True
    )
    text = (tmp_path / "page" / "table.md").read_text()
    assert str(tmp_path) not in text and "a teacher" in text
    assert (tmp_path / "page" / "figure.png").stat().st_size > 5000
