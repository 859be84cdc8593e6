"""The two studies that look inside: their pages say what their numbers say."""

import json
import sys

import pytest
import torch

from training.studies import confidence, inside


def run(module, monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["study", *flags])
    module.main()


def test_a_verdict_is_over_the_best_rival_and_over_max_softmax():
    def seed(path: float) -> dict:
        errors = {name: 0.70 for name in confidence.RIVALS} | {"energy": 0.80, "path": path}
        return {"errors": errors, "foreign: x": errors | {"path + max-softmax": 0.9}}

    result = confidence.summary([seed(0.70), seed(0.74), seed(0.72)])
    assert result["errors"]["path"] == {"mean": pytest.approx(0.72), "std": pytest.approx(0.02)}
    over_best, over_softmax, best = confidence.gains(result, "errors")["path"]
    assert (over_best, over_softmax) == (pytest.approx(-8), pytest.approx(2)) and best == "energy"
    text = confidence.verdict(result)
    assert "- errors, path: -8.0 points over the best rival, energy (goal of +3 missed); +2.0 over max-softmax." in text
    assert "+10.0 points over the best rival, energy (goal of +3 reached)" in text


def test_a_probe_is_cross_fitted_on_labels_that_it_has_not_seen():
    features = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > 0).long() + (features[:, 1] > 1).long()
    probe = confidence.fit_probe(features[:200], labels[:200])
    assert (probe(features[200:]).argmax(1) == labels[200:]).float().mean() > 0.7


def test_auroc_counts_pairs():
    higher, lower = torch.tensor([0.9, 0.4, 0.6]), torch.tensor([0.5, 0.4])
    pairs = (higher[:, None] > lower).double() + 0.5 * (higher[:, None] == lower)
    assert confidence.auroc(higher, lower) == pytest.approx(pairs.mean().item())


@pytest.mark.slow
def test_the_page_of_a_student_inside_has_every_step(monkeypatch, tmp_path):
    flags = ["--teacher", "model_cards/digits-teacher", "--student", "model_cards/digits-k3", "--num_images", "48"]
    run(inside, monkeypatch, *flags, "--output_dir", str(tmp_path))
    record = json.loads((tmp_path / "results.json").read_text())
    page = (tmp_path / "table.md").read_text()
    last = record["swap"]["teacher"]
    assert last["distance"]["mean"][-1] == pytest.approx(last["epsilon"]["mean"][-1], rel=1e-4)
    assert [row[-1] for row in record["patching"]["student"]["effect"]["mean"]] == pytest.approx([1.0] * 13, abs=1e-3)
    assert all(curve["mean"][-1] == 1 for curve in record["lens"].values())
    assert all(f"\n| {step} | " in page for step in range(13)) and (tmp_path / "maps.png").is_file()


@pytest.mark.slow
def test_the_page_of_confidence_is_the_same_from_its_cache(monkeypatch, tmp_path):
    flags = ["--models", "model_cards/digits-teacher", "--outliers", "digits", "--seeds", "0", "--num_test", "200"]
    for folder in ("first", "second"):
        run(
            confidence,
            monkeypatch,
            *flags,
            "--cache_dir",
            str(tmp_path / "cache"),
            "--output_dir",
            str(tmp_path / folder),
        )
    first, second = ((tmp_path / folder / "results.json").read_text() for folder in ("first", "second"))
    assert json.loads(first)["models"] == json.loads(second)["models"]
    scores = json.loads(first)["models"]["digits-teacher"]["foreign: digits"]
    # the foreign images are test images too
    assert all(abs(value["mean"] - 0.5) < 0.06 for value in scores.values())
    assert "cache" not in (tmp_path / "first" / "table.md").read_text()
