"""The recipe that compares variants of a distillation over seeds, and its figures."""

import dataclasses
import importlib
import json
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from raptor_settings.parse import read_yaml

from raptor_hf.recipes.run_metrics import StudentMetrics
from raptor_hf.recipes.settings import parse_settings, save_settings
from training.studies import figures
from training.studies.children import exit_on_sigterm
from training.studies.frontier import Point

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "training" / "configs"
WRITE_METRICS = (
    "import os, pathlib, sys; pathlib.Path(sys.argv[1], 'metrics.json').write_text(os.environ['OMP_NUM_THREADS'])"
)


@pytest.fixture(scope="module")
def study():
    return importlib.import_module("training.studies.study")


@pytest.fixture
def settings(study, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in configurations are relative to the repository
    return study.StudySettings(
        title="A study",
        base="training/configs/distill/digits_k3.yaml",
        common_flags="--batch_size 16 --num_bootstraps 0",
        variants=["first one --init first", "+ low rank --init middle --conditioning_rank 2"],
        seeds=[3, 5],
        output_dir=str(tmp_path / "results"),
        runs_dir=str(tmp_path / "runs"),
        figure="ladder",
    )


def record(variant, seed, r2_last, accuracy=0.5, **changes):
    return {
        "variant": variant,
        "seed": seed,
        "overrides": {},
        "r2_last": r2_last,
        "r2_mean": r2_last / 2,
        "agreement": accuracy,
        "student_accuracy": accuracy,
        "teacher_accuracy": 0.99,
        "parameters": {"teacher": 4_000_000, "student": 1_000_000},
        "macs": {"teacher": 10_000_000, "student": 12_000_000},
        "training_steps": 100,
        "training_seconds": 61.0,
        "evaluations": [],
        "batch_size": 16,
        "mixed_precision": "no",
        "blocks": [[1, 2], [3, 4]],
        "device": "a processor, 1 thread",
        "versions": {"python": "3.11", "torch": "2.0"},
    } | changes


def fake_runs(study, settings, code):
    """The planned runs with a program of a few milliseconds for distill.py; it gets the run's folder."""
    runs = []
    for run in study.plan_runs(settings):
        run.folder.mkdir(parents=True)
        runs.append(dataclasses.replace(run, command=[sys.executable, "-c", code, str(run.folder)]))
    return runs


def test_plan_is_every_variant_with_every_seed_and_its_flags_win(study, settings):
    runs = study.plan_runs(settings)
    assert [(run.seed, run.variant) for run in runs] == [
        (3, "first one"),
        (3, "+ low rank"),
        (5, "first one"),
        (5, "+ low rank"),
    ]
    assert [run.settings.init for run in runs[:2]] == ["first", "middle"]
    assert {run.settings.batch_size for run in runs} == {16}
    assert [run.settings.conditioning_rank for run in runs] == [8, 2, 8, 2]
    assert {run.settings.normalize_loss for run in runs} == {True}  # of the base
    assert len({run.folder for run in runs}) == 4 and runs[0].folder.parts[-2:] == ("first-one", "seed-3")


def test_variant_with_fewer_seeds_has_the_first_ones(study, settings):
    runs = study.plan_runs(dataclasses.replace(settings, seeds=[3, 5, 8], num_seeds=[1, 3]))
    assert [(run.variant, run.seed) for run in runs] == [
        ("first one", 3),
        ("+ low rank", 3),
        ("+ low rank", 5),
        ("+ low rank", 8),
    ]


def test_flag_that_distill_refuses_is_found_before_anything_runs(study, settings):
    for flags, message in (
        ("--initt first", "'wrong'.*unknown flag.*did you mean --init"),
        ("--batch_size 0", "above 0"),
    ):
        wrong = dataclasses.replace(settings, variants=[f"wrong {flags}"])
        with pytest.raises(ValueError, match=message):
            study.plan_runs(wrong)
    for figure in ("convergence", "time_to_fidelity"):
        with pytest.raises(ValueError, match="'first one' has eval_every 0"):
            study.plan_runs(dataclasses.replace(settings, figure=figure))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": 0}, "jobs is 0"),
        ({"seeds": []}, r"seeds is \[\]"),
        ({"seeds": [1, 1]}, "each once"),
        ({"variants": []}, "variants"),
        ({"variants": ["k=2 --num_blocks 2", "K 2 --num_blocks 2"]}, "more than punctuation"),
        ({"figure": "trade_off"}, "series, label"),
        ({"figure": "partitions"}, "series, label"),
        ({"figure": "frontier"}, "series, label"),
        ({"published": [1.0]}, "published has 1 numbers; it must have one per variant, 2"),
        ({"num_seeds": [1]}, r"num_seeds is \[1\]; it must have one number per variant, 2, each between 1 and .*, 2"),
        ({"num_seeds": [0, 1]}, "each between 1"),
        ({"num_seeds": [1, 3]}, "each between 1"),
        ({"baselines": ["a.json"]}, 'baselines belong to the figure "frontier", not to "ladder"'),
        ({"goals": [0.5]}, 'goals belong to the figure "time_to_fidelity"'),
        ({"figure": "time_to_fidelity", "goals": [0.5, 0.2]}, "one number above 0 per variant but the last, 1"),
        ({"figure": "time_to_fidelity", "goals": [0.0]}, "above 0"),
        ({"figure": "time_to_fidelity", "variants": ["one --init first"]}, "give at least 2"),
        ({"figure": "time_to_fidelity", "jobs": 2}, "jobs is 2; .* compares seconds, so it must be 1"),
    ],
)
def test_settings_refuse_what_cannot_work(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **changes)


def test_finished_runs_are_not_repeated_and_jobs_share_the_cores(study, settings, monkeypatch):
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda _: range(7), raising=False)
    runs = fake_runs(study, settings, WRITE_METRICS)
    (runs[1].folder / "metrics.json").write_text("kept")
    assert study.run_all(runs, jobs=2) == []
    assert [(run.folder / "metrics.json").read_text() for run in runs] == ["3", "kept", "3", "3"]
    assert not (runs[1].folder / "log.txt").exists()


def test_failed_run_shows_the_end_of_its_log_and_the_others_go_on(study, settings, caplog):
    runs = fake_runs(study, settings, WRITE_METRICS)
    code = "print('first line', *['filler'] * 14, sep=chr(10)); raise SystemExit('out of luck')"
    runs[0] = dataclasses.replace(runs[0], command=[sys.executable, "-uc", code])
    runs[2] = dataclasses.replace(runs[2], command=[sys.executable, "-c", "pass"])  # ends well and leaves no metrics
    caplog.set_level("INFO")
    failed = study.run_all(runs, jobs=1)
    assert [(run.variant, run.seed) for run in failed] == [("first one", 3), ("first one", 5)]
    assert "first one, seed 3: FAILED with status 1" in caplog.text and "out of luck" in caplog.text
    assert "first line" not in caplog.text  # the last 15 lines alone
    assert [run.is_done for run in runs] == [False, True, False, True]


def test_log_tail_shows_progress_bars_in_their_last_state(study, tmp_path):
    (tmp_path / "log").write_text("a\n\n 1%|\r 2%|\r 3%|\nb\r\n")
    assert study.tail(tmp_path / "log", 2) == "     3%|\n    b"


def test_table_has_mean_and_sample_deviation_of_the_seeds(study, settings):
    values = [0.5, 0.7, 0.9]
    runs = [record("first one", seed, value, accuracy=value) for seed, value in enumerate(values)]
    runs += [record("+ low rank", 0, 0.25, accuracy=None, device="a processor, 1 threads")]  # of an older version
    settings = dataclasses.replace(settings, published=[3.9, 72.7], published_name="paper")
    page = study.table(settings, study.by_variant(runs), "python -m training.studies.study x.yaml", "A caption.")
    (first,) = (line for line in page.splitlines() if line.startswith("| first one"))
    (second,) = (line for line in page.splitlines() if line.startswith("| + low rank"))
    assert np.std(values, ddof=1) == pytest.approx(0.2)
    assert "| 0.700 ± 0.200 | 0.350 ± 0.100 | 70.0 ± 20.0 | 70.0 ± 20.0 | 1.00 (25%) | 12.00 (120%) | 100 |" in first
    assert first.endswith("| 3.9 |") and second.endswith("| 72.7 |")
    assert "| 0.250 | 0.125 | - | - |" in second
    for text in (
        "python -m training.studies.study x.yaml",
        "1 run at a time on: a processor, 1 thread. python",
        "torch 2.0",
        "A caption.",
        "(figure.png)",
    ):
        assert text in page


def test_caption_says_which_changes_are_within_the_spread_over_seeds(study):
    variants = {
        "low": [record("low", 0, 0.10, 0.2), record("low", 1, 0.14, 0.2)],
        "high": [record("high", 0, 0.80, 0.5), record("high", 1, 0.82, 0.9)],
        "same": [record("same", 0, 0.70, 0.7), record("same", 1, 0.95, 0.7)],
    }
    caption = study.ladder_caption(variants)
    assert "high: R² +0.690, accuracy +50.0 points;" in caption
    # sd of (0.70, 0.95) is 0.177, of (0.80, 0.82) 0.014
    assert "same: R² +0.015 (within the spread over seeds, 0.177)" in caption
    assert "R² of the last layer goes from 0.120 to 0.825 and accuracy from 20.0 % to 70.0 %" in caption


def test_caption_says_when_the_best_variant_had_passed_the_end_of_another(study):
    def runs(name, curve):
        evaluations = [{"step": 10 * index, "r2_last": r2, "r2_mean": r2} for index, r2 in enumerate(curve)]
        return [record(name, seed, curve[-1], evaluations=evaluations) for seed in (0, 1)]

    caption = study.convergence_caption(
        {"slow": runs("slow", [0, 0.1, 0.2, 0.3]), "fast": runs("fast", [0, 0.2, 0.4, 0.8])}
    )
    assert '"fast" is nearest to the teacher: last-layer R² 0.800' in caption
    assert '"slow" ends at 0.300, -0.500 from it; "fast" was there at its evaluation after 20 steps.' in caption


def test_caption_compares_series_at_the_same_label(study):
    cheap = {"parameters": {"teacher": 8, "student": 4}, "macs": {"teacher": 8, "student": 8}}
    dear = {"parameters": {"teacher": 8, "student": 5}, "macs": {"teacher": 8, "student": 10}}
    runs = [
        record("none, k=2", 0, 0.5, **cheap),
        record("none, k=3", 0, 0.6, **cheap),
        record("rank, k=3", 0, 0.7, **dear),
    ]
    caption = study.trade_off_caption(study.by_variant(runs))
    assert caption == (
        "R² of the last layer, rank against none: k=3 +0.100 (+25% parameters, +25% multiply-accumulates)."
    )


def test_series_without_a_label_in_common_are_compared_at_the_nearest_size(study):
    costs = [{"teacher": 100, "student": cost} for cost in (10, 20, 22)]
    small, large, untied = ({"parameters": cost, "macs": cost} for cost in costs)
    runs = [record("Raptor, k=2", 0, 0.5, **small), record("Raptor, k=3", 0, 0.6, **large)]
    runs.append(record("untied, 4 layers", 0, 0.7, **untied))
    assert study.trade_off_caption(study.by_variant(runs)) == (
        "R² of the last layer, untied against Raptor: 4 layers against k=3, the nearest in size, +0.100 "
        "(+10% parameters, +10% multiply-accumulates)."
    )


def test_single_series_has_a_caption_of_its_points(study):
    runs = [record("untied, 3 layers", 0, 0.5), record("untied, 4 layers", 0, 0.6)]
    assert study.trade_off_caption(study.by_variant(runs)) == (
        "R² of the last layer, untied: 3 layers 0.500; 4 layers 0.600."
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("ladder", ("a", "b")),
        ("convergence", ("a", "b")),
        ("trade_off", ("a, k=2", "a, k=3")),
        ("partitions", ("a, k=2", "b, k=2")),
        ("frontier", ("a, k=2", "a, k=3")),
        ("time_to_fidelity", ("a", "b")),
        ("depths", ("a, 4 steps", "b")),
    ],
)
def test_results_hold_every_run_and_a_figure_of_each_kind(study, settings, tmp_path, kind, names):
    scores = {"r2_last": 0.5, "r2_mean": 0.4, "student_accuracy": 0.5}
    evaluations = [{"step": step, "seconds": 2.0 * step, **scores} for step in (5, 10)]
    runs = [record(name, seed, 0.5, evaluations=evaluations) for name in names for seed in (0, 1)]
    settings = dataclasses.replace(settings, figure=kind, variants=[f"{name} --init first" for name in names])
    study.write_results(settings, runs, tmp_path, "the command")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["runs"] == runs and written["command"] == "the command"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "| a" in (tmp_path / "table.md").read_text()
    assert ("comparisons" in written) is (kind in ("partitions", "time_to_fidelity"))


def test_baselines_are_read_before_anything_runs_and_shown(study, settings, tmp_path, monkeypatch, capsys):
    rows = [{"name": f"first {n} layers", "parameters": 10**6, "values": {"x/accuracy": [0.5, 0.5]}} for n in (3, 4)]
    (tmp_path / "probes.json").write_text(json.dumps({"rows": rows}))
    variants = ["a, k=2 --num_blocks 2", "a, k=3 --num_blocks 3"]
    settings = dataclasses.replace(
        settings, figure="frontier", variants=variants, baselines=[f"{tmp_path}/probes.json = *3*"]
    )
    big = {"teacher": 4_000_000, "student": 1_200_000}
    runs = [record("a, k=2", seed, 0.5) for seed in (0, 1)]
    runs += [record("a, k=3", seed, 0.6, parameters=big) for seed in (0, 1)]
    study.write_results(settings, runs, tmp_path, "the command")
    compared = json.loads((tmp_path / "results.json").read_text())["comparisons"]
    assert [(entry["point"], entry["score"]) for entry in compared] == [("first 3 layers", "student_accuracy")]

    with pytest.raises(ValueError, match=r"baselines has '.*probes.json = 5': no name matches '5'"):
        study.read_baselines([f"{tmp_path}/probes.json = 5"])
    arguments = [
        f"--{name}={getattr(settings, name)}" for name in ("title", "base", "output_dir", "runs_dir", "figure")
    ]
    monkeypatch.setattr("sys.argv", ["study.py", *arguments, "--variants", *variants, "--baselines", "nowhere.json"])
    with pytest.raises(SystemExit):
        study.main()
    assert "nowhere.json" in capsys.readouterr().err


def test_evaluations_of_the_second_stage_count_the_steps_of_the_first(study):
    entry = {"stage": 2, "step": 5, "r2": [0.2, 0.4]}
    assert study.evaluation_of(entry, 100) == {"step": 105, "r2_last": 0.4, "r2_mean": pytest.approx(0.3)}
    timed = entry | {"stage": 1, "seconds": 3.5, "agreement": 0.9, "student_accuracy": None}
    assert study.evaluation_of(timed, 100)["step"] == 5
    assert study.evaluation_of(timed, 100)["seconds"] == 3.5


def test_variant_without_a_finished_run_keeps_its_place(study, settings, tmp_path):
    settings = dataclasses.replace(
        settings, figure="time_to_fidelity", variants=["a --x", "b --x", "c --x"], goals=[0.25, 0.75]
    )
    evaluations = [{"step": step, "seconds": step, "r2_last": 0.5, "student_accuracy": 0.5} for step in (5, 10)]
    runs = [record(name, 0, 0.5, evaluations=evaluations) for name in ("b", "c")]
    study.write_results(settings, runs, tmp_path, "the command")
    compared = json.loads((tmp_path / "results.json").read_text())["comparisons"]
    assert {entry["goal"] for entry in compared if entry["variant"] == "c"} == {0.75}


def test_figures_draw_means_and_deviations_over_seeds():
    scores = {
        "low": {"r2_last": [0.1, 0.3], "r2_mean": [0.2, 0.2], "agreement": [None], "student_accuracy": [0.5, 0.7]},
        "high": {"r2_last": [0.6, 0.8], "r2_mean": [0.9, 0.9], "agreement": [None], "student_accuracy": [0.9, 0.9]},
    }
    left, right = figures.plot_ladder(scores, teacher_accuracy=0.99).axes
    assert len(left.containers) == 1  # without a head of the teacher there is no agreement
    line, _, (bars,) = left.containers[0]
    assert line.get_ydata() == pytest.approx([60, 90])
    assert bars.get_segments()[0][:, 1] == pytest.approx(60 + 100 * np.std([0.5, 0.7], ddof=1) * np.array([-1, 1]))
    assert right.containers[0][0].get_ydata() == pytest.approx([0.2, 0.7])

    curve = [{"step": 1, "r2_last": 0.2, "r2_mean": 0.1}, {"step": 2, "r2_last": 0.4, "r2_mean": 0.3}]
    other = [{"step": 1, "r2_last": 0.4, "r2_mean": 0.1}, {"step": 2, "r2_last": 0.6, "r2_mean": 0.3}]
    last, _ = figures.plot_convergence({"a": [curve, other]}).axes
    assert last.lines[0].get_xydata() == pytest.approx(np.array([[1, 0.3], [2, 0.5]]))

    points = [{"label": "k=2", "parameters": 5, "macs": 30, "r2_last": [0.4, 0.6], "r2_mean": [0.7]}]
    panels = figures.plot_trade_off({"none": points}, teacher_parameters=20, teacher_macs=30).axes
    drawn = [tuple(panel.containers[0][0].get_xydata()[0]) for panel in panels]
    assert drawn == [pytest.approx(point) for point in ((25, 0.5), (100, 0.5), (25, 0.7), (100, 0.7))]


def test_partitions_figure_has_a_dot_per_draw_and_the_mean_of_the_found_ones():
    found, drawn = {"r2_last": [0.8, 0.9], "student_accuracy": [0.5, 0.5]}, {"r2_last": [0.1, 0.1, 0.3]}
    figure = figures.plot_partitions({"k=2": {"max-cut": found, "random": drawn | {"student_accuracy": [0.4] * 3}}})
    fidelity, accuracy = figure.axes
    dots = [line.get_xydata() for line in fidelity.lines]
    assert [points[:, 1].tolist() for points in dots] == [[0.8, 0.9], [0.1, 0.1, 0.3]]
    assert len({tuple(point) for point in dots[1]}) == 3  # equal draws do not hide one another
    assert fidelity.collections[0].get_segments()[0][:, 1] == pytest.approx([0.85, 0.85])
    assert accuracy.lines[0].get_ydata() == pytest.approx([50, 50])


def test_frontier_figure_draws_series_baselines_and_what_dominates():
    def point(series, label, parameters, **values):
        return Point(f"{series}, {label}", series, label, parameters, values)

    points = [
        point("a", "k=2", 10**6, r2_last=[0.4, 0.6], student_accuracy=[0.8]),
        point("a", "k=3", 3 * 10**6, r2_last=[0.8], student_accuracy=[0.7]),
    ]
    probed = Point("cut", "cut", "", 2 * 10**6, {"student_accuracy": [0.9]}, is_probed=True)
    fidelity, accuracy = figures.plot_frontier(points, [probed], teacher_accuracy=0.95).axes
    assert fidelity.containers[0][0].get_xydata() == pytest.approx(np.array([[1, 0.5], [3, 0.8]]))
    assert len(fidelity.containers) == 1 and len(accuracy.containers) == 2  # the probed one has no fidelity
    drawn = {line.get_label(): line for line in accuracy.lines}
    assert drawn["Pareto frontier"].get_xydata() == pytest.approx(np.array([[1, 80], [2, 90]]))
    assert drawn["accuracy of the teacher"].get_ydata() == pytest.approx([95, 95])
    assert accuracy.containers[1].get_label() == "cut (trained probe)"


def test_time_to_fidelity_figure_has_seeds_means_and_the_ends_to_reach():
    def run(*pairs):
        entries = [{"step": 5 * i, "seconds": s, "r2_last": r2} for i, (s, r2) in enumerate(pairs, start=1)]
        return {"evaluations": entries}

    slow, fast = [run((10, 0.2), (20, 0.4)), run((12, 0.2), (24, 0.6))], [run((3, 0.7))]
    by_seconds, by_steps = figures.plot_time_to_fidelity({"slow": slow, "none": [], "fast": fast}).axes
    drawn = {line.get_label(): line for line in by_seconds.lines}
    assert drawn["slow"].get_xydata() == pytest.approx(np.array([[11, 0.2], [22, 0.5]]))
    assert drawn["end of slow"].get_ydata() == pytest.approx([0.5, 0.5]) and "end of fast" not in drawn
    assert {line.get_label(): line for line in by_steps.lines}["slow"].get_xdata() == pytest.approx([5, 10])


def test_convergence_figure_refuses_seeds_that_cannot_be_averaged():
    evaluation = {"r2_last": 0.1, "r2_mean": 0.1}
    for seeds in ([[]], [[{"step": 1, **evaluation}], [{"step": 2, **evaluation}]]):
        with pytest.raises(ValueError, match=r"curves\['a'\] has evaluations at steps"):
            figures.plot_convergence({"a": seeds})


@pytest.mark.parametrize(
    ("name", "num_runs"),
    [
        ("digits_ladder", 15),
        ("cifar10_ladder", 15),
        ("digits_conditioning", 27),
        ("digits_init", 6),
        ("digits_partitions", 69),
        ("cifar10_partitions", 69),
        ("digits_frontier", 36),
        ("cifar10_frontier", 45),
        ("digits", 15),
        ("digits_elastic", 19),
        ("digits_options", 17),
        ("digits_untied", 6),
        ("time_to_fidelity_digits", 9),
        ("time_to_fidelity_cifar10", 9),
    ],
)
def test_studies_are_planned_without_error(study, monkeypatch, name, num_runs):
    monkeypatch.chdir(ROOT)
    settings = parse_settings(study.StudySettings, [str(CONFIGS / "study" / f"{name}.yaml")], exit_on_error=False)
    runs = study.plan_runs(settings)
    assert len(runs) == num_runs
    if name == "digits_frontier":  # shares runs
        assert Path(settings.runs_dir).name == "digits_conditioning"
    else:
        assert Path(settings.output_dir).name == Path(settings.runs_dir).name
    if settings.figure == "partitions":  # every draw is another seed, and nothing else differs
        kinds = {run.settings.partition for run in runs}
        assert kinds == {"normalized", "random_contiguous", "random_fragmented"}
        shared = {
            dataclasses.replace(run.settings, output_dir="any", seed=0, num_blocks=1, partition="cut") for run in runs
        }
        assert len(shared) == 1
    if settings.figure == "ladder":  # each rung changes one thing
        rungs = [dataclasses.asdict(run.settings) | {"output_dir": ""} for run in runs if run.seed == 0]
        changed = [{key for key in low if low[key] != high[key]} for low, high in zip(rungs, rungs[1:], strict=False)]
        assert changed == [{"teacher_forcing"}, {"depth_conditioning"}, {"cls_weighting"}, {"stage2_steps"}]


@pytest.mark.slow
def test_study_of_real_runs_reports_them_and_the_failing_one(study, settings, tmp_path, monkeypatch, capsys):
    arguments = [f"--{key}={value}" for key, value in (("title", "A study"), ("base", settings.base))]
    arguments += [
        "--output_dir",
        settings.output_dir,
        "--runs_dir",
        settings.runs_dir,
        "--figure",
        "ladder",
        "--seeds",
        "0",
    ]
    arguments += [
        "--common_flags",
        " --stage2_steps 2 --warmup_steps 1 --batch_size 8 --phase_images 8 --num_bootstraps 0 --mixed_precision no",
    ]
    arguments += ["--variants", "works --init middle", "no such split --train_split nonsense"]
    monkeypatch.setattr("sys.argv", ["study.py", *arguments])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="1 of 2 runs failed: no such split, seed 0"):
        study.main()
    (run,) = json.loads((tmp_path / "results" / "results.json").read_text())["runs"]
    metrics = json.loads((tmp_path / "runs" / "works" / "seed-0" / "metrics.json").read_text())
    r2 = metrics["fidelity"]["r2"]
    assert run["r2_last"] == r2[-1] and run["r2_mean"] == statistics.fmean(r2)
    assert run["parameters"] == metrics["parameters"] and run["training_steps"] == 2
    assert run["mixed_precision"] == "no" and run["overrides"]["batch_size"] == 8 and "seed" not in run["overrides"]

    # the same command with other flags must not take the finished run for its own
    monkeypatch.setattr("sys.argv", ["study.py", *arguments, "--common_flags", " --stage2_steps 4 --warmup_steps 1"])
    with pytest.raises(SystemExit):
        study.main()
    assert "belongs to a run with other settings" in capsys.readouterr().err


def test_sigterm_ends_the_runs_under_way_and_starts_no_other(study, settings, monkeypatch):
    code = "import os, sys, time; open(sys.argv[1] + '/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    runs = fake_runs(study, settings, code)
    files = [run.folder / "pid" for run in runs]

    def terminate() -> None:
        while not all(file.exists() and file.read_text() for file in files[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    former = signal.getsignal(signal.SIGTERM)
    exit_on_sigterm()
    threading.Thread(target=terminate, daemon=True).start()
    try:
        with pytest.raises(SystemExit) as stopped:
            study.run_all(runs, jobs=2)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not any(psutil.pid_exists(int(file.read_text())) for file in files[:2])
    assert not any(file.exists() for file in files[2:])


def test_folder_into_which_another_run_writes_is_left_to_it(study, settings, caplog, monkeypatch):
    runs = fake_runs(study, settings, WRITE_METRICS)
    (runs[0].folder / "log.txt").write_text("of the other run")
    busy = {runs[0].folder: "another run (process 7, since today)"}
    monkeypatch.setattr(study, "find_writer", busy.get)
    caplog.set_level("INFO")
    assert study.run_all(runs, jobs=1) == [runs[0]]
    assert "NOT STARTED, as another run (process 7, since today) writes into" in caplog.text
    assert (runs[0].folder / "log.txt").read_text() == "of the other run"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num_blocks 13", "variant 'wrong': num_blocks is 13; it must be between 1 and the teacher's 12 layers"),
        ("--teacher nowhere/at/all", "variant 'wrong': .*nowhere/at/all"),
    ],
)
def test_impossible_variant_is_found_before_the_first_starts(study, settings, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runs = study.plan_runs(dataclasses.replace(settings, variants=["right", f"wrong {flags}"]))
    with pytest.raises((ValueError, OSError), match=message):
        study.check_students(runs)


def test_numbers_of_other_settings_or_another_run_are_not_believed(study, settings):
    run = study.plan_runs(settings)[0]
    run.folder.mkdir(parents=True)
    save_settings(run.folder / "resolved.yaml", run.settings, "this")
    metrics = {"run_id": "this", "evaluated_on": {"split": "test", "num_images": None}}

    def is_done(**changes) -> bool:
        (run.folder / "metrics.json").write_text(json.dumps(metrics | changes))
        return run.is_done

    assert is_done() and is_done(run_id=None) and is_done(evaluated_on=None)
    assert not is_done(run_id="other") and not is_done(evaluated_on={"split": "test", "num_images": 7})
    wanted = run.settings.num_blocks or len(run.settings.block_repeats)
    blocks = [[layer] for layer in range(1, wanted + 2)]
    with pytest.raises(ValueError, match=f"has {wanted + 1} blocks|has blocks of"):
        study.check_numbers(run, StudentMetrics.from_dict({"blocks": blocks}))


PAGES = [
    path
    for path in sorted((ROOT / "training" / "results").rglob("results.json"))
    if "common_flags" in json.loads(path.read_text())
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_a_committed_page_says_which_settings_its_runs_had(path):
    """Where a configuration has changed since, every run of a page that starts from it names the setting it had."""
    results, page = json.loads(path.read_text()), (path.parent / "table.md").read_text()
    assert f"Base {results['base']}, for all variants `{results['common_flags'].strip()}`" in page
    then, now = results["base_settings"], read_yaml(ROOT / results["base"])
    changed = {name for name in {*then, *now} - {"output_dir", "log_every"} if then.get(name) != now.get(name)}
    for run in results["runs"]:
        assert changed <= run["overrides"].keys(), (
            f"{results['base']} has changed: measure {path.parent.name} again, or write the values that it had into "
            "the flags of the study and of its page"
        )
