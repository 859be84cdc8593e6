"""The page of the benchmark: targets met and missed, and tables that are tables, from made-up records."""

import json
import re
from pathlib import Path

import pytest

from tests.support.benchmark_records import (
    all_records,
    forward_record,
    forward_row,
    training_record,
    training_row,
)
from training.benchmarks import report
from training.benchmarks.benchmark import fidelity_results
from training.benchmarks.report import Target, page, targets_of
from training.benchmarks.settings import PARTS
from training.studies import conclusions

SMALL = "training step, digits (8 px, D=96), times the reference"
VIT_S = "training step, ViT-S/14, 224 px, times the reference"
SAVED = "saved activations, of the reference's"
MFU = "MFU, ViT-S/14, batch 8"
LOSSES = "relative difference of the losses"
FORWARD = '"mlp" forward, of the teacher\'s time'


def targets(**records: dict) -> dict[str, Target]:
    return {target.name: target for target in targets_of(records)}


def tables(text: str) -> list[list[str]]:
    """Lines of the tables of a page."""
    return [match.group().splitlines() for match in re.finditer(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)]


@pytest.mark.parametrize(
    "measured, at_least, verdict",
    [
        (1.1, True, "met"),
        (1.2, True, "met"),
        (0.99, True, "missed by 10.0%"),
        (1.1, False, "met"),
        (0.2, False, "met"),
        (1.375, False, "missed by 25.0%"),
        (1.101, False, "missed by 0.1%"),
    ],
)
def test_a_verdict_says_which_way_a_goal_was_missed_and_by_how_much_of_it(measured, at_least, verdict):
    assert Target("speed", measured, goal=1.1, at_least=at_least, where="a row").verdict == verdict


@pytest.mark.parametrize(
    "name, changes, measured",
    [
        (VIT_S, {"speedup": 1.05}, 1.05),
        (SAVED, {"saved_bytes": {"reference": 1000, "ours": 1300}}, 1.3),
        (MFU, {"mfu": {"reference": 0.7, "ours": 0.6}}, 0.6),
        (LOSSES, {"loss_difference": 2e-3}, 2e-3),
    ],
)
def test_the_worst_row_counts_and_is_named(name, changes, measured):
    worst = training_row(ffn_type="swiglu", stage="1, autoregressive", **changes)
    good = targets(training=training_record(training_row(), training_row()))
    bad = targets(training=training_record(training_row(), worst, training_row()))
    assert good[name].is_met and not bad[name].is_met
    assert bad[name].measured == pytest.approx(measured)
    assert bad[name].where == "ViT-S/14, 224 px, batch 8, swiglu, stage 1, autoregressive, float32"


def test_sizes_have_goals_of_their_own():
    record = training_record(*(training_row(size=size, speedup=1.2) for size in ("digits", "vits14", "vitb14")))
    found = targets(training=record)
    assert not found[SMALL].is_met and found[VIT_S].is_met
    assert found[SMALL].verdict == "missed by 7.7%"


def test_neither_bf16_nor_compiled_rows_speak_to_targets_of_equal_mathematics():
    slow = {"speedup": 0.5, "loss_difference": 0.1}
    rows = training_row(), training_row(precision="bfloat16", **slow), training_row(compiled=True, **slow)
    assert all(target.is_met for target in targets(training=training_record(*rows)).values())


def test_the_plain_student_alone_is_to_be_as_fast_as_the_teacher():
    slow = {"ratio": 1.5}
    rows = forward_row(), forward_row(student="mlp, low_rank", **slow), forward_row(compiled=True, **slow)
    assert targets(forward=forward_record(*rows))[FORWARD].measured == 1.02
    missed = targets(forward=forward_record(*rows, forward_row(size="vitb14", batch_size=1, **slow)))[FORWARD]
    assert not missed.is_met and missed.where == "ViT-B/14, 224 px, batch 1, mlp, float32"


def test_a_gpu_has_goals_of_its_own_whatever_it_is_called():
    half = {"precision": "bfloat16", "size": "vitb14", "batch_size": 64, "speedup": 6.0}
    gpu = {"device_type": "cuda", "device": "NVIDIA H100 80GB HBM3"}
    training = training_record(training_row(), training_row(**half), **gpu)
    forward = forward_record(
        forward_row(ratio=1.2),
        forward_row(ratio=1.1, batch_size=1, precision="bfloat16"),
        forward_row(ratio=0.9, compiled=True),
        **gpu,
    )
    verdicts = {name: target.verdict for name, target in targets(training=training, forward=forward).items()}
    assert verdicts == {
        LOSSES: "met",
        "bf16 training step, times the fp32 reference": "met",
        "MFU, ViT-B/14, batch 64": "met",
        '"mlp" forward, both compiled, of the teacher\'s time': "met",
        '"mlp" latency, batch 1, of the teacher\'s': "missed by 10.0%",
    }


def test_what_was_not_measured_has_no_target():
    assert targets() == {}
    record = training_record(training_row(size="digits"))
    assert set(targets(training=record)) == {SMALL, SAVED, LOSSES}


def test_every_table_of_the_page_has_as_many_cells_in_every_line_as_titles():
    found = tables(page(all_records(), {"fidelity_digits": {"comparisons": []}}))
    assert len(found) == 6
    for lines in found:
        assert len({line.count("|") for line in lines}) == 1 and len(lines) > 2
        assert re.fullmatch(r"\|(---:?\|)+", lines[1])


def test_blocks_of_the_page_are_apart():
    text = page(all_records())
    # a table right under a line of text would be part of the paragraph, a line under a table a row of it
    for line, following in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        assert not line or not following or (line.startswith("|") and following.startswith("|"))


def test_the_page_says_where_it_was_measured_and_what_was_left_out():
    text = page(all_records())
    assert text.count("Measured on a processor, 2 threads; python 3.12.1, torch 2.13.0.") == 4
    assert "Left out for their length: vitb14, batch 64, float32: about 99 s a call." in text
    assert "imagenet-sample.parquet: not measured, data/imagenet-sample.parquet is not there." in text


def test_the_page_holds_figures_in_the_units_it_names():
    text = page(all_records(), {name: {"comparisons": []} for name in ("fidelity_cifar10", "fidelity_digits")})
    (step,) = (line for line in text.splitlines() if line.startswith("| ViT-S/14, 224 px | 8 | mlp | 2 |"))
    assert step.endswith("| float32 | 1.20 [1.19, 1.21] | 4.0 | 70% | 84% | 2000.0 | 0.70 | 3e-07 |")
    assert "one variable at a time from L=12, B=8;" in text
    assert "[cifar10](fidelity_cifar10/table.md), [digits](fidelity_digits/table.md)" in text
    assert f"| {VIT_S} | met | ViT-S/14, 224 px, batch 8, mlp, stage 2, float32 | 1.2 | ≥ 1.1 |" in text


@pytest.mark.parametrize("part", all_records())
def test_a_part_alone_makes_a_page(part):
    text = page({part: all_records()[part]})
    assert text.startswith("# Speed\n") and text.count("Measured on") == 1
    assert ("## Targets" in text) == (part in ("forward", "training"))


def test_time_to_fidelity_is_a_target_and_a_seed_that_never_arrives_a_miss():
    entry = {"reference": "published", "score": "r2_last", "variant": "ours", "goal": 0.2, "targets": [0.9, 0.9]}
    arrived = entry | {"seconds_ratio": [0.1, 0.2], "reached": 2}
    late = entry | {"seconds_ratio": [0.1, None], "reached": 1}
    plain = entry | {"goal": None, "seconds_ratio": [1.0, 1.0], "reached": 2}
    texts = [page({}, {"fidelity_digits": {"comparisons": [plain, own]}}) for own in (arrived, late)]
    assert "met | digits | 0.15 | ≤ 0.2" in texts[0] and "inf | ≤ 0.2" in texts[1]
    assert "missed" in texts[1] and all(text.count("time to the last-layer R²") == 1 for text in texts)


def test_every_score_that_a_study_compares_times_of_has_a_name():
    assert report.SCORES.keys() == conclusions.SCORES.keys()


def test_the_page_names_the_notes_beside_it_only_where_they_are():
    assert "(measured_once.md)" in page({}, has_notes=True) and "measured_once" not in page({})


def test_the_committed_page_is_that_of_the_committed_numbers():
    folder = Path(__file__).parents[3] / "training" / "results" / "benchmark"
    records = {part: json.loads((folder / f"{part}.json").read_text()) for part in PARTS}
    expected = page(records, fidelity_results(folder), has_notes=True)
    assert (folder / "README.md").read_text(encoding="utf-8") == expected
