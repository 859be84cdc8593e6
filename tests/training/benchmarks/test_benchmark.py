"""The command of the benchmark: what it refuses, leaves out, measures forward, and keeps of earlier runs."""

import contextlib
import importlib
import io
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.benchmark_records import all_records, forward_row, training_row
from training.benchmarks.settings import PARTS, SHAPES

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_register_tokens": 2}


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("training.benchmarks.benchmark")


@pytest.fixture
def bench(script, monkeypatch):
    """The command with a size "tiny"."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setitem(script.report.NAMES, "tiny", "tiny (8 px, D=32)")
    return script


@pytest.fixture
def command(bench, monkeypatch, tmp_path):
    """Runs the command with flags; the page that it writes."""

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, "--output_dir", str(tmp_path)])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            bench.main()
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert printed.getvalue() == text + "\n"
        return text

    return call


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"parts": ["forward", "backward"]},
            "parts is .*'backward'.*; it must hold some of forward, training, growth",
        ),
        ({"parts": []}, "parts is"),
        ({"sizes": ["vitl14"]}, "sizes is .*'vitl14'.*some of digits, vits14, vitb14"),
        ({"dtypes": ["float16"]}, "dtypes is .*'float16'"),
        ({"batch_sizes": [8, 0]}, "batch_sizes is"),
        ({"batch_sizes": []}, "batch_sizes is"),
        ({"repeats": 2}, "repeats is 2"),
        ({"warmup": 0}, "warmup 0"),
        ({"num_threads": 0}, "num_threads is 0"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_by_name(script, fields, message):
    with pytest.raises(ValueError, match=message):
        script.BenchmarkSettings(**fields)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused_in_one_line(command, capsys, tmp_path, device):
    with pytest.raises(SystemExit):
        command("--device", device)
    assert f"error: device is '{device}', which cannot be used here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def planner(bench, monkeypatch):
    """Makes a planner of a machine of 10^9 FLOP/s, on which an image of the tiny size takes a millisecond."""
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench, "count_flops", lambda function: 10**6)
    return lambda **settings: bench.Planner(bench.BenchmarkSettings(**settings), CPU)


def test_a_row_has_fewer_repeats_where_it_would_take_long_but_three(planner):
    few = planner(max_row_seconds=1.0, repeats=15)
    # 20 ms of overhead, and 1.4 ms per pass and image
    assert few.repeats("tiny", 1, "float32", passes=1, calls=2) == 15
    assert few.repeats("tiny", 10, "float32", passes=4, calls=2) == 6  # of 76 ms each, two calls
    assert few.repeats("tiny", 1000, "float32", passes=1, calls=4) == 3
    assert few.left_out == []


def test_a_call_that_takes_too_long_is_left_out_and_said_to_be(planner):
    strict = planner(max_call_seconds=5.0)
    assert strict.repeats("tiny", 64, "float32", passes=4, calls=2) == 15
    assert strict.repeats("tiny", 1000, "float32", passes=4, calls=2) is None
    assert strict.left_out == ["tiny, batch 1000, float32: about 6 s a call"]


def test_what_is_left_out_is_not_run_and_the_page_says_so(bench, monkeypatch, command):
    monkeypatch.setattr(bench.training, "build_steps", None)
    flags = ("--parts", "training", "--sizes", "tiny", "--batch_sizes", "1", "2", "--max_call_seconds", "0.001")
    text = command(*flags)
    assert "Left out for their length: tiny, batch 1, float32: about 0 s a call; tiny, batch 2, float32" in text
    assert "## Targets" not in text


def test_one_command_measures_a_part_and_writes_its_page(bench, monkeypatch, command, tmp_path):
    for module in (bench, bench.training):
        monkeypatch.setattr(module, "matmul_peak", lambda device, dtype: 1e10)
        monkeypatch.setattr(module, "count_flops", lambda function: 10**6)
    text = command("--parts", "training", "--sizes", "tiny", "--batch_sizes", "1", "--repeats", "3")
    record = json.loads((tmp_path / "training.json").read_text())
    kinds = [(row["ffn_type"], row["stage"], row["precision"]) for row in record["training"]]
    assert kinds == [("mlp", "2", "float32"), ("swiglu", "2", "float32"), ("mlp", "2", "bfloat16")]
    assert record["device_type"] == "cpu" and record["versions"]["torch"]
    assert text.count("| tiny (8 px, D=32) | 1 |") == 3 and "| relative difference of the losses | met |" in text


def test_stage_1_is_measured_at_batches_and_both_stages_in_bf16(script):
    cases = script.training_cases("digits", 8, "float32", CPU)
    assert [(case.ffn_type, case.stage, case.precision, case.compile) for case in cases] == [
        ("mlp", "2", "float32", False),
        ("swiglu", "2", "float32", False),
        ("swiglu", "1, annealing", "float32", False),
        ("swiglu", "1, autoregressive", "float32", False),
        ("mlp", "2", "bfloat16", False),
    ]
    gpu = script.training_cases("digits", 8, "bfloat16", torch.device("cuda"))
    assert {case.precision for case in gpu} == {"bfloat16"} and [case.compile for case in gpu][-1]


def test_the_page_keeps_the_parts_of_earlier_runs(bench, monkeypatch, command, tmp_path):
    records = all_records()
    (tmp_path / "growth.json").write_text(json.dumps(records["growth"]))
    (tmp_path / "fidelity_digits").mkdir()
    (tmp_path / "fidelity_digits" / "results.json").write_text('{"comparisons": []}')
    for part in ("training", "forward"):
        monkeypatch.setitem(bench.RUNS, part, lambda settings, device, part=part: records[part])
    assert "## Forward pass" not in command("--parts", "training")
    text = command("--parts", "forward")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Targets", "## Forward pass", "## Training step", "## Growth", "## Time to fidelity"]
    assert "fidelity_digits/table.md" in text
    # a part that is measured again replaces what was there
    monkeypatch.setitem(bench.RUNS, "training", lambda *_: records["training"] | {"training": [training_row()]})
    assert command("--parts", "training").count("training step, digits") == 0


@pytest.mark.parametrize("batch_sizes, compiled", [((1, 8, 64), 8), ((4,), 4), ((64, 8), 64)])
def test_students_are_compiled_at_the_batch_in_the_middle(bench, monkeypatch, batch_sizes, compiled):
    asked = []

    def compare_forward(size: str, batch_size: int, **options) -> list[dict]:
        asked.append((batch_size, options["compiled"]))
        return [forward_row()]

    monkeypatch.setattr(bench.forward, "compare_forward", compare_forward)
    settings = bench.BenchmarkSettings(sizes=["tiny"], compiled_sizes=["tiny"], batch_sizes=[*batch_sizes])
    bench.run_forward(settings, CPU)
    assert [batch for batch, is_compiled in asked if is_compiled] == [compiled]
    assert [batch for batch, is_compiled in asked if not is_compiled] == [*batch_sizes]


def test_forward_rows_are_ratios_to_the_teacher(bench):
    options = {"device": CPU, "dtype": torch.bfloat16, "compiled": False, "repeats": 3, "warmup": 1}
    rows = bench.forward.compare_forward("tiny", 2, **options)
    assert [row["student"] for row in rows] == list(bench.forward.STUDENTS)
    for row in rows:
        low, high = row["ratio_quartiles"]
        assert 0 < low <= row["ratio"] <= high
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"]) and row["precision"] == "bfloat16"


def test_the_plain_student_has_the_teachers_shape(bench):
    forward = bench.forward
    images = forward.images_of("tiny", 1)
    teacher, student = (partial(forward.build("tiny", name), images) for name in ("teacher", "mlp"))
    assert bench.count_flops(teacher) == bench.count_flops(student)


def test_every_part_that_can_be_asked_for_can_be_run(bench):
    assert tuple(bench.RUNS) == PARTS
