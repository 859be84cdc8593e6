"""The recipe that analyses dynamics: its report, its settings, its verdicts, and that processes share the work."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.accumulators import Curve
from raptor_hf.conversion import student_from_teacher
from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.dynamics.extrapolation import ExtrapolationResult
from raptor_hf.dynamics.findings import (
    Thresholds,
    findings,
    judge_extrapolation,
    judge_jumps,
    judge_swap,
    replacement_gaps,
    score_name,
    thirds,
)
from raptor_hf.dynamics.interventions import EditResult, layer_edits
from raptor_hf.dynamics.motion import SpeedJumps
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.metrics import TopKAccuracy
from raptor_hf.phases import Partition
from raptor_hf.recipes.settings import parse_settings
from raptor_hf.teacher import load_teacher, untrained
from training import analyze
from training.analyze import AnalyzeSettings, Study, measure_shares, open_models, shares_embeddings

ROOT = Path(__file__).parents[2]
DIGITS_TEACHER = ROOT / "model_cards" / "digits-teacher"
QUICK = {
    "model": str(DIGITS_TEACHER),
    "dataset": "digits",
    "num_images": 40,
    "batch_size": 20,
    "rank_stride": 1,
    "reservoir_images": 30,
    "intervention_images": 20,
    "noise_sizes": [0.1, 0.3],
    "max_single_edits": 3,
    "edits_per_seed": 2,
    "edit_seeds": [0],
    "max_edited": 2,
    "time_repeats": 0,
}
FIGURES = ("directions", "motion", "ranks", "epsilon", "class_angles", "projection", "perturbation", "edits", "dmd")


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    """Blocks that are copies of the teacher's layers: untrained, but of its embeddings and classifier."""
    folder = tmp_path_factory.mktemp("student")
    teacher = load_teacher(DIGITS_TEACHER)
    student_from_teacher(teacher, (2, 3, 7), init="middle").save_pretrained(folder)
    RaptorImageProcessor.from_teacher(load_image_processor(str(DIGITS_TEACHER))).save_pretrained(folder)
    return str(folder)


def run(monkeypatch, output_dir, **changes):
    """The command line, in this process."""
    argv = ["analyze.py"]
    for name, value in (QUICK | {"output_dir": str(output_dir)} | changes).items():
        if value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            argv += [f"--{name}", *map(str, values)]
    monkeypatch.setattr("sys.argv", argv)
    analyze.main()


def make_study(**changes):
    settings = AnalyzeSettings(**QUICK | {"output_dir": "unused"} | changes)
    images = open_images("digits", "test")
    processor = load_image_processor(str(DIGITS_TEACHER))
    accelerator = Accelerator(cpu=True)
    return Study(settings, accelerator, open_models(settings, accelerator.device), images, processor)


def measured(study):
    study.find_partition()
    study.stream()
    study.experiment()
    return study.results()


def test_report_compares_teacher_student_and_untrained_network(student_folder, tmp_path, monkeypatch):
    output = tmp_path / "report"
    run(
        monkeypatch,
        output,
        compare=[student_folder],
        untrained=True,
        names=["teacher", "student", "untrained"],
        time_repeats=1,
        rank_stride=2,
    )
    assert sorted(path.name for path in output.iterdir()) == ["figures", "numbers.json", "report.md"]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    text, numbers = (output / "report.md").read_text(), json.loads((output / "numbers.json").read_text())
    figures = {path.stem for path in (output / "figures").iterdir()}
    assert figures == {*FIGURES, "depth"}
    for figure in figures:
        assert (output / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        caption = text.split(f"(figures/{figure}.png)")[1].split("\n\n")[1]
        assert len(caption) > 80 and caption.endswith(".")
    assert "Phases [1-2][3-5][6-12] (of the student)" in text
    assert re.search(r"The streamed analysis of all models costs \d+% of the forward passes", text)
    assert "Ranks and spectrum are those of one in 2 images, 20 in number" in text
    assert "Ranks take one in 2 images, linear models about half of them" in text
    num_compared = numbers["models"][0]["class_angles"]["within"]["num_images"]
    assert 20 < num_compared <= 30 and f"silhouette, of {num_compared} images" in text
    assert numbers["images"] == "digits test, shuffled"
    assert numbers["num_images"] == 40 and numbers["intervention_images"] == 20
    teacher, student, untrained = numbers["models"]
    assert [m["fidelity"] is None for m in (teacher, student, untrained)] == [True, False, True]
    assert teacher["accuracy"] > 0.9 > 0.5 > untrained["accuracy"]
    assert len(teacher["dynamics"]["gamma"]["cls"]["mean"]) == 13
    assert teacher["dynamics"]["gamma"]["cls"]["mean"][-1] == pytest.approx(1, abs=1e-4)
    assert {f["title"] for f in numbers["findings"]} >= {"S-curve of directions", "rank collapse", "self-correction"}
    for finding in numbers["findings"]:
        evidence = finding["verdicts"]["teacher"]["evidence"]
        (row,) = (line for line in text.splitlines() if line.startswith(f"| **{finding['title']}** |"))
        assert row.endswith(f"| {evidence} |")
    first_lines = text.split("\n\n")[1].splitlines()
    assert first_lines[0].startswith("- teacher: a dinov2_with_registers model of 12 layers, 96 wide with 3 heads")
    assert any("The paper's findings are of DINOv2 ViT-B/14" in line for line in first_lines[1:])


def test_a_report_is_replaced_whole_and_other_folders_are_left_alone(tmp_path, monkeypatch):
    quick = {"max_single_edits": 1, "max_edited": 1, "num_images": 20, "noise_sizes": [0.1], "reservoir_images": 2}
    run(monkeypatch, tmp_path / "a", **quick)
    stale = tmp_path / "a" / "figures" / "stale.png"
    stale.write_bytes(b"")
    before = (tmp_path / "a" / "report.md").read_text()
    run(monkeypatch, tmp_path / "a", **quick)
    assert not stale.exists() and (tmp_path / "a" / "report.md").read_text() == before
    # one model without students: its phases are found, and there is no epsilon
    assert "(normalized)" in before and not (tmp_path / "a" / "figures" / "epsilon.png").exists()
    # two images are too few for angles within classes
    assert "| **angular basins** | - |" in before and not (tmp_path / "a" / "figures" / "class_angles.png").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "b", **quick)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["thesis.tex"]


def test_processes_that_share_the_images_measure_what_one_does(student_folder, monkeypatch):
    changes = {"compare": [student_folder], "names": ["teacher", "student"], "noise_sizes": [1e-6]}
    whole = make_study(**changes)
    expected = measured(whole)
    parts = [make_study(**changes) for _ in range(2)]
    for index, part in enumerate(parts):
        monkeypatch.setattr(type(part.accelerator), "process_index", index, raising=False)
        monkeypatch.setattr(type(part.accelerator), "num_processes", 2, raising=False)
        part.reduce = lambda accumulators: None
        part.find_partition()
        with monkeypatch.context() as context:
            context.setattr(analyze.Reservoir, "merge", lambda self, accelerator: None)
            part.stream()
    for name, streams in whole.streams.items():
        for whole_part, *shares in zip(
            streams.accumulators(), *(part.streams[name].accumulators() for part in parts), strict=True
        ):
            total = sum(share.sums() for share in shares)
            torch.testing.assert_close(total, whole_part.sums(), rtol=1e-4, atol=1e-2)
            assert not torch.allclose(shares[0].sums(), whole_part.sums(), rtol=0.1)
    assert [a.name for a in expected] == ["teacher", "student"]


def test_students_are_known_by_their_embeddings(student_folder):
    teacher, student = load_teacher(DIGITS_TEACHER), load_teacher(student_folder)
    fresh = untrained(teacher)
    assert shares_embeddings(student, teacher)
    assert not shares_embeddings(fresh, teacher) and not shares_embeddings(teacher, teacher)


def test_first_images_of_a_set_that_is_sorted_by_class_are_of_many_classes():
    images = open_images("digits", "test")
    by_class = dataclasses.replace(images, dataset=images.dataset.sort(images.label_column))
    mixed, again = analyze.shuffled(by_class, 0), analyze.shuffled(by_class, 0)
    labels = mixed.dataset[images.label_column]
    assert len(set(by_class.dataset[images.label_column][:20])) == 1 and len(set(labels[:20])) > 5
    assert list(labels) == list(again.dataset[images.label_column])
    assert sorted(labels) == sorted(images.dataset[images.label_column])
    assert mixed.name(3) == "row 3 of digits test, shuffled"


def test_a_single_process_needs_no_device_that_holds_float64():
    alone = types.SimpleNamespace(accelerator=types.SimpleNamespace(num_processes=1))  # which cannot reduce
    accumulator = TopKAccuracy(topk=(1,))
    accumulator.update(torch.eye(3), torch.tensor([0, 1, 1]))
    Study.reduce(alone, [accumulator])
    assert accumulator.compute()["accuracy"] == pytest.approx(2 / 3)


def test_labels_that_are_no_classes_of_the_model_are_not_used():
    images = open_images("digits", "test")
    nameless = dataclasses.replace(analyze.shuffled(images, 0), class_names=None)
    # without names of the classes there is only their range to go by
    for num_classes, known, in_range in ((10, True, True), (9, False, False), (12, False, True)):
        model = types.SimpleNamespace(classifier=nn.Linear(4, num_classes))
        assert analyze.knows_labels(images, model) == known
        assert analyze.knows_labels(nameless, model) == in_range
    assert not analyze.knows_labels(images, types.SimpleNamespace(classifier=None))
    unlabelled = dataclasses.replace(images, label_column=None)
    assert not analyze.knows_labels(unlabelled, types.SimpleNamespace(classifier=nn.Linear(4, 10)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"depth_factor": float("nan")}, "depth_factor is nan"),
        ({"noise_sizes": [0.1, -1.0]}, "noise_sizes"),
        ({"edit_seeds": []}, "edit_seeds"),
        ({"names": ["a"], "untrained": True}, "names is .*2 different names"),
        ({"names": ["a", "a"], "untrained": True}, "2 different names"),
        ({"compare": ["x"] * 6}, "7 models are too many"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AnalyzeSettings(**QUICK | {"output_dir": "x"} | changes)


def test_models_of_one_name_or_another_depth_and_phases_that_do_not_fit_are_refused(tmp_path):
    config = Dinov2WithRegistersConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 3 layers and .* 12"):
        make_study(compare=[str(tmp_path)])
    with pytest.raises(ValueError, match="are called"):
        make_study(compare=[str(DIGITS_TEACHER)])
    with pytest.raises(ValueError, match="block_repeats"):
        make_study(block_repeats=[4, 4])


def test_the_config_of_the_digits_is_valid():
    settings = parse_settings(AnalyzeSettings, [str(ROOT / "training" / "configs" / "analyze" / "digits.yaml")])
    assert settings.untrained and settings.names == ["teacher", "student, 3 blocks", "untrained"]


def test_verdicts_follow_the_numbers():
    (analysis,) = measured(make_study(max_single_edits=1, max_edited=1, num_images=20, noise_sizes=[0.1]))

    def verdict(title, **changes):
        dynamics = dataclasses.replace(analysis.dynamics, **changes)
        judged = findings([dataclasses.replace(analysis, dynamics=dynamics)])
        return next(f for f in judged if f.title == title).verdicts[analysis.name].holds

    def curves(values):
        return {group: Curve(torch.tensor(values), torch.zeros(len(values)), 20) for group in analysis.dynamics.gamma}

    s_curve = (1 / (1 + torch.exp(-(torch.arange(13.0) - 6)))).tolist()
    assert verdict("S-curve of directions", gamma=curves(s_curve))
    assert not verdict("S-curve of directions", gamma=curves(torch.linspace(0, 1, 13).sqrt().tolist()))
    assert verdict("cls turns late", angular_speed=curves([0.1] * 9 + [0.5] * 3))
    assert not verdict("cls turns late", angular_speed=curves([0.5] * 12))
    late = Curve(torch.tensor([0.2] * 9 + [0.4, 0.6, 0.8, 0.9]), torch.zeros(13), 20)
    early = Curve(late.mean.flip(0).neg() + 1, late.std, 20)
    assert verdict("coherence rises late", coherence=late) and not verdict("coherence rises late", coherence=early)
    slow = curves([0.1] * 12) | {"patches": Curve(torch.full((12,), 0.2), torch.zeros(12), 20)}
    assert verdict("registers are slow", angular_speed=slow) and not verdict(
        "registers are slow", angular_speed=curves([0.1] * 12)
    )
    assert score_name([analysis]) == "accuracy" and thirds([1, 1, 5, 2, 2]) == (1, pytest.approx(8 / 3), 2)
    never = findings([analysis], Thresholds(contraction=0.0, silhouette=2.0))
    holds = {f.title: f.verdicts[analysis.name].holds for f in never}
    assert not holds["self-correction"] and not holds["angular basins"]


def test_a_speed_jump_of_one_kind_of_token_must_outdo_the_number_of_kinds():
    def holds(*p_values):
        groups = ("cls", "registers", "patches")
        jumps = {group: SpeedJumps(0.2, 0.1, p) for group, p in zip(groups, p_values, strict=False)}
        return judge_jumps(types.SimpleNamespace(jumps=jumps), None, Thresholds()).holds

    assert holds(0.5, 0.016, 0.5) and not holds(0.5, 0.04, 0.5) and not holds(0.04, 0.04, 0.04)
    assert holds(0.04) and holds() is None


def test_one_layer_that_matters_does_not_make_all_layers_stand_in_for_their_phase():
    partition = Partition.from_boundaries([2, 5], 12)
    edits = [edit for relation in ("within", "across") for edit in layer_edits(partition, "replace", relation, 1)]

    def judged(score):
        values = torch.tensor([score(edit.pairs[0][0], edit.relation == "within") for edit in edits])
        result = EditResult(edits, Curve(values, torch.zeros(len(values)), 20), None, None)
        return result, judge_swap(types.SimpleNamespace(edits=result), None, Thresholds())

    # layer 1 suffers from any substitute, and nearly all of its substitutes are of other phases
    result, verdict = judged(lambda layer, within: (0.35 + 0.3 * within) if layer == 1 else 0.965)
    summary = result.summary("cosine")
    assert summary["replace", "within", 1].low > summary["replace", "across", 1].high
    assert not verdict.holds and "above 0 for 1 of 12, largest +0.300, of layer 1" in verdict.evidence
    # nor does it where the others lean its way by chance
    tilt = {
        2: 0.01,
        3: -0.009,
        4: 0.008,
        5: -0.008,
        6: 0.007,
        7: 0.006,
        8: 0.005,
        9: -0.01,
        10: 0.001,
        11: 0.001,
        12: -0.004,
    }
    assert not judged(lambda layer, within: (0.5 + 0.6 * within) if layer == 1 else 0.9 + within * tilt[layer])[1].holds
    # nor a difference of a fraction of an image
    assert not judged(lambda layer, within: 0.9 + 0.002 * within)[1].holds
    gaps = replacement_gaps(result, "cosine")
    assert list(gaps) == list(range(1, 13)) and gaps[1] == pytest.approx(0.3) and gaps[7] == pytest.approx(0)
    assert judged(lambda layer, within: 0.5 + 0.03 * layer + 0.05 * within)[1].holds
    assert not judged(lambda layer, within: 0.5 + 0.03 * layer - 0.05 * within)[1].holds
    lone = EditResult(edits[:1], Curve(torch.ones(1), torch.zeros(1), 20), None, None)
    assert judge_swap(types.SimpleNamespace(edits=lone), None, Thresholds()).holds is None


def test_a_prediction_that_lasts_while_its_state_drifts_is_called_so():
    def judged(cosine, agreement=1.0):
        cosine, agreement, angle, accuracy = (
            Curve(torch.tensor([before, after]), torch.zeros(2), 20)
            for before, after in ((1.0, cosine), (1.0, agreement), (0.1, 0.1), (0.1, 0.1))
        )
        result = ExtrapolationResult([3, 6], "hold", cosine, angle, angle, agreement, accuracy)
        speed = {"patches": Curve(torch.ones(3), torch.zeros(3), 20)}
        edits = types.SimpleNamespace(accuracy=accuracy)
        model = types.SimpleNamespace(
            extrapolation=[result], edits=edits, dynamics=types.SimpleNamespace(angular_speed=speed)
        )
        return judge_extrapolation(model, None, Thresholds())

    drifting = judged(0.9)
    assert drifting.holds and drifting.evidence.endswith("(stable prediction, drifting state)")
    assert "final states 1.000 and 0.900" in drifting.evidence
    assert judged(0.99).holds and "drifting" not in judged(0.99).evidence
    # an untrained network is as accurate after any number of steps
    chance = judged(0.5, agreement=0.3)
    assert chance.holds is False and "drifting" not in chance.evidence


def test_cost_is_the_median_of_ratios_taken_in_turn():
    calls = []
    tasks = {name: (lambda name=name: calls.append(name)) for name in ("forward", "a", "b")}
    result = measure_shares(tasks, 3)
    assert calls == ["forward", "a", "b"] * 4
    assert result["shares"].keys() == {"a", "b"} and result["total"] > 0 and result["repeats"] == 3


def differences(one, two, path=""):
    """Where two records of numbers differ by more than rounding, with what stands there."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [d for name in one for d in differences(one[name], two[name], f"{path}/{name}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [d for i, pair in enumerate(zip(one, two, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    numbers = isinstance(one, int | float) and isinstance(two, int | float)
    return [] if (one == pytest.approx(two, rel=1e-3, abs=1e-3) if numbers else one == two) else [(path, one, two)]


@pytest.mark.slow
def test_two_launched_processes_report_the_numbers_of_one(student_folder, tmp_path):
    options = QUICK | {"compare": [student_folder], "intervention_images": 30}
    flags = [
        part
        for name, value in options.items()
        for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    reports = []
    for config in ("cpu", "cpu2"):
        folder = tmp_path / config
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        config_file = ["--config_file", f"training/accelerate/{config}.yaml"]
        command = [*launch, *config_file, "training/analyze.py", *flags, "--output_dir", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300, env=environment)
        reports.append(json.loads((folder / "numbers.json").read_text()))
    one, two = reports
    assert one["num_images"] == two["num_images"] == 40
    assert one["intervention_images"] == two["intervention_images"] == 30
    for ours, theirs in zip(one["models"], two["models"], strict=True):
        for model in (ours, theirs):
            del model["perturbation"]  # every process draws its own noise
            # of two that are conjugate, any may come first
            model["operators"] = [[abs(complex(*z)) for z in o["eigenvalues"]] for o in model["operators"]]
        assert differences(ours, theirs) == []


@pytest.mark.slow
def test_analysis_of_trajectories_costs_at_most_half_of_the_forward_passes():
    study = make_study(time_repeats=15, batch_size=40, rank_stride=AnalyzeSettings.rank_stride)
    study.find_partition()
    assert study.timing()["total"] <= 0.5
