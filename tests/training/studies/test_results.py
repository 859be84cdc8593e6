"""The recipe that gathers runs into one table."""

import json

import pytest

from training.studies import results
from training.studies.results import ResultsSettings, read_runs, retained, spread, summary, table


def make_run(folder, accuracies, parameters=10, rmse=None):
    folder.mkdir(parents=True)
    source = {"dataset": "digits", "split": "test", "seeds": list(range(len(accuracies)))}
    probes = {"digits": {"metric": "accuracy", "higher_is_better": True, "last": {"accuracy": accuracies}}}
    probes["digits"] |= source | {"task": "image-classification"}
    if rmse is not None:
        probes["depth"] = source | {
            "task": "depth-estimation",
            "metric": "rmse",
            "higher_is_better": False,
            "last": {"rmse": [rmse]},
        }
    metrics = {"probes": probes, "parameters": {"student": parameters}, "macs": {"student": 2 * parameters}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "model.safetensors").write_bytes(b"0" * 2_500_000)


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "teacher", [0.8, 0.9, 1.0], parameters=100, rmse=0.5)
    for seed, accuracy in enumerate((0.8, 0.84)):
        make_run(tmp_path / "student" / f"seed-{seed}", [accuracy], parameters=25, rmse=1.0)
    return tmp_path


def row(text: str, name: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return dict(zip(lines[0], next(line for line in lines if line[0] == name), strict=True))


def test_table_has_mean_spread_retained_and_cost_of_every_row(runs):
    rows = {"teacher": str(runs / "teacher"), "student": str(runs / "student" / "seed-*")}
    records = [summary(name, read_runs(name, pattern), None) for name, pattern in rows.items()]
    student = row(table("A title", "a command", records, has_figure=False), "student")
    assert student["digits: accuracy (%)"] == "82.0 ± 2.8"  # the sample deviation of 80 and 84
    assert student["digits: retained (%)"] == "91.1"  # 82 / 90
    assert student["depth: retained (%)"] == "50.0"  # twice the error
    assert student["parameters (M)"] == "0.00 (25%)" and student["MACs (M)"] == "0.00 (25%)"
    assert student["on disk (MB)"] == "2.50"


def test_command_writes_table_numbers_and_figure(runs, monkeypatch, capsys):
    config = runs / "config.yaml"
    config.write_text(
        f"title: Some results\noutput_dir: {runs}/out\nrows:\n  - teacher = {runs}/teacher\n"
        f"  - student = {runs}/student/seed-*\n"
    )
    monkeypatch.setattr("sys.argv", ["results.py", str(config)])
    results.main()
    numbers = json.loads((runs / "out" / "results.json").read_text())
    assert [record["values"]["digits/accuracy"] for record in numbers["rows"]] == [[0.8, 0.9, 1.0], [0.8, 0.84]]
    assert (runs / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (runs / "out" / "table.md").read_text() in capsys.readouterr().out


def test_a_head_that_is_not_asked_for_is_left_out(runs):
    values = summary("teacher", read_runs("teacher", str(runs / "teacher")), ["depth"])["values"]
    assert set(values) == {"depth/rmse"}


def test_what_no_run_has_stays_empty(runs):
    make_run(runs / "no depth", [0.5])
    records = [summary(name, read_runs(name, str(runs / name)), None) for name in ("teacher", "no depth")]
    assert row(table("t", "c", records, has_figure=False), "no depth")["depth: RMSE (m)"] == ""
    assert retained(records[1], records[0], "depth/rmse") == "" and spread(None, 1, 1) == ""


@pytest.mark.parametrize(("metrics", "message"), [(None, "metrics.json"), ({"macs": {}}, "not probed")])
def test_a_run_that_cannot_count_is_named_instead_of_left_out(runs, metrics, message):
    folder = runs / "student" / "seed-2"
    folder.mkdir()
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises((FileNotFoundError, ValueError), match=f"seed-2.*{message}"):
        read_runs("student", str(runs / "student" / "seed-*"))


def test_a_head_that_no_run_has_is_refused(runs, monkeypatch, capsys):
    rows = f"teacher = {runs}/teacher"
    argv = ["results.py", "--title", "t", "--output_dir", str(runs), "--rows", rows, "--variants", "depht"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="2"):
        results.main()
    assert "'depht'" in (error := capsys.readouterr().err) and "'depth', 'digits'" in error


def test_a_row_without_runs_is_named(runs, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["results.py", "--title", "t", "--output_dir", str(runs), "--rows", f"ghost = {runs}/no*/such"]
    )
    with pytest.raises(SystemExit, match="2"):
        results.main()
    assert "'ghost'" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [[], ["teacher"], ["a=b"], ["a = b c"]])
def test_rows_are_names_and_patterns(rows):
    with pytest.raises(ValueError, match="rows"):
        ResultsSettings(title="t", rows=rows, output_dir="o")
