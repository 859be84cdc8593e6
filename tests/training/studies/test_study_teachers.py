"""The recipe that compares teachers and the students they give."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoModelForImageClassification

from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.phases import Partition, phase_contrast
from raptor_hf.recipes.settings import parse_settings
from training.studies.teachers import layer_similarity

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "training" / "configs"
TEACHER_FLAGS = "--steps 3 --warmup_steps 1 --patch_size 4 --hidden_size 24 --num_layers 4 --batch_size 16"
TEACHER_FLAGS += " --train_split train[:200] --test_split test[:60]"
STUDENT_FLAGS = "--stage2_steps 2 --warmup_steps 1 --batch_size 8 --phase_images 16 --num_bootstraps 0 --num_blocks 2"
STUDENT_FLAGS += " --fit_images 16 --test_split test[:60]"
WRITE_METRICS = "import pathlib, sys; pathlib.Path(sys.argv[1], 'metrics.json').write_text('{}')"


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("training.studies.study_teachers")


@pytest.fixture
def settings(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in configurations are relative to the repository
    return recipe.TeacherStudySettings(
        title="A study",
        study="stochastic_depth",
        teacher_base="training/configs/teacher/digits.yaml",
        student_base="training/configs/distill/digits_k3.yaml",
        variants=["p = 0 --drop_path_rate 0", "p = 0.5 --drop_path_rate 0.5"],
        output_dir=str(tmp_path / "results"),
        teachers_dir=str(tmp_path / "teachers"),
        runs_dir=str(tmp_path / "students"),
        teacher_flags=TEACHER_FLAGS,
        student_flags=STUDENT_FLAGS,
        seeds=[3, 5],
    )


@pytest.fixture
def in_this_process(recipe, monkeypatch):
    """Runs the planned commands here, which spares importing torch for each; returns what was run, as it runs."""
    scripts = []

    def run_one(run, environment, children):
        script = Path(run.command[1])
        scripts.append((script.name, run.variant, run.seed))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", run.command[1:])
            importlib.import_module(f"training.{script.stem}").main()
        return 0, "done"

    monkeypatch.setattr(importlib.import_module("training.studies.study"), "run_one", run_one)
    return scripts


def arguments_of(settings):
    """The command line of settings."""
    arguments = ["study_teachers.py"]
    for name, value in dataclasses.asdict(settings).items():
        values = value if isinstance(value, list) else [value]
        # a value that begins with dashes would be taken for a flag
        arguments += [f"--{name}", *(f" {value}" if str(value).startswith("--") else str(value) for value in values)]
    return arguments


def test_plan_is_every_teacher_with_every_seed_and_a_student_of_each(recipe, settings):
    pairs = recipe.plan_pairs(settings)
    order = [("p = 0", 3), ("p = 0.5", 3), ("p = 0", 5), ("p = 0.5", 5)]
    assert [(pair.variant, pair.seed) for pair in pairs] == order
    assert [pair.teacher_settings.drop_path_rate for pair in pairs[:2]] == [0.0, 0.5]
    for pair in pairs:
        assert pair.student.settings.teacher == pair.teacher.folder.as_posix()
        assert pair.student.settings.seed == pair.teacher_settings.seed == pair.seed
        assert (pair.teacher_settings.steps, pair.student.settings.stage2_steps) == (3, 2)
        assert pair.student.settings.init == "fitted"  # of the base
        assert [Path(run.command[1]).is_file() for run in (pair.teacher, pair.student)] == [True, True]
    assert len({run.folder for pair in pairs for run in (pair.teacher, pair.student)}) == 8
    assert pairs[1].teacher.folder.parts[-3:] == ("teachers", "p-0-5", "seed-3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ["wrong --drop_path 0.1"]}, "'wrong'.*unknown flag.*did you mean --drop_path_rate"),
        ({"variants": ["wrong --drop_path_rate 1"]}, "'wrong'.*below 1"),
        ({"student_flags": "--stage2_steps 0"}, "'p = 0'.*nothing to train"),
        ({"variants": ["a --steps 4", "b --steps 5"]}, r"drop_path_rate \[0.05, 0.05\].*each rate once"),
    ],
)
def test_flags_that_cannot_work_are_found_before_anything_runs(recipe, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe.plan_pairs(dataclasses.replace(settings, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": 0}, "jobs is 0"),
        ({"seeds": []}, r"seeds is \[\]"),
        ({"seeds": [1, 1]}, "each once"),
        ({"variants": []}, "variants"),
        ({"variants": ["p = 1 --steps 2", "P 1 --steps 2"]}, "more than punctuation"),
        ({"runs_dir": "x", "teachers_dir": "x"}, "both 'x'"),
        ({"study": "training_time"}, "'p = 0'.*begin with"),
        ({"study": "training_time", "variants": ["untrained --steps 0"]}, "exactly one must be converged"),
    ],
)
def test_settings_refuse_what_cannot_work(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **changes)


def test_student_of_a_failed_teacher_is_not_run_and_the_others_are(recipe, settings):
    pairs, code = [], {True: "raise SystemExit('out of luck')", False: WRITE_METRICS}
    for pair in recipe.plan_pairs(settings):
        runs = {}
        for kind, run in (("teacher", pair.teacher), ("student", pair.student)):
            run.folder.mkdir(parents=True)
            fails = kind == "teacher" and (pair.variant, pair.seed) == ("p = 0", 3)
            command = [sys.executable, "-c", code[fails], str(run.folder)]
            runs[kind] = dataclasses.replace(run, command=command)
        pairs.append(dataclasses.replace(pair, **runs))
    failed = recipe.run_pairs(pairs, settings)
    assert [(run.variant, run.seed) for run in failed] == [("p = 0, teacher", 3)]
    assert [pair.student.is_done for pair in pairs] == [False, True, True, True]
    assert not (pairs[0].student.folder / "log.txt").exists()


def test_study_trains_teachers_then_students_and_reports_what_their_folders_hold(
    recipe, settings, tmp_path, monkeypatch, capsys, in_this_process
):
    monkeypatch.setattr("sys.argv", arguments_of(settings))
    recipe.main()
    scripts = [(name, seed) for name, _, seed in in_this_process]
    assert scripts == [(name, seed) for seed in (3, 5) for name in ("train_teacher.py", "distill.py") for _ in range(2)]

    results = json.loads((tmp_path / "results" / "results.json").read_text())
    runs = results["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [
        ("p = 0", 3),
        ("p = 0", 5),
        ("p = 0.5", 3),
        ("p = 0.5", 5),
    ]
    student, teacher = tmp_path / "students" / "p-0-5" / "seed-5", tmp_path / "teachers" / "p-0-5" / "seed-5"
    phases, metrics = (json.loads((student / name).read_text()) for name in ("phases.json", "metrics.json"))
    assert metrics["teacher"]["name"] == str(teacher)
    assert runs[3]["similarity"] == layer_similarity(phases["distance"])
    assert runs[3]["contrast"] == phase_contrast(phases["distance"], Partition.from_dict(phases))
    assert runs[3]["r2_last"] == metrics["fidelity"]["r2"][-1]
    assert runs[3]["student_accuracy"] == metrics["fidelity"]["student_accuracy"]
    assert runs[3]["teacher_accuracy"] == json.loads((teacher / "metrics.json").read_text())["accuracy"]
    assert runs[3]["retained"] == runs[3]["student_accuracy"] / runs[3]["teacher_accuracy"]
    assert len(results["claims"]) == 6 and len(results["verdict"]) == 7
    page = (tmp_path / "results" / "table.md").read_text()
    assert "| p = 0.5 |" in page and "python -m training.studies.study_teachers" in page
    assert all(f"- {sentence}" in page for sentence in results["verdict"])
    assert (tmp_path / "results" / "figure.png").read_bytes().startswith(b"\x89PNG")

    # given again, it only writes the results; a study of training time shares what has the same name and flags
    recipe.main()
    assert len(in_this_process) == 8 and json.loads((tmp_path / "results" / "results.json").read_text()) == results
    variants = ["untrained --steps 0", "converged --drop_path_rate 0"]
    other = dataclasses.replace(settings, study="training_time", variants=variants, seeds=[3])
    monkeypatch.setattr("sys.argv", arguments_of(other))
    recipe.main()
    assert len(in_this_process) == 12
    renamed = dataclasses.replace(other, variants=["converged --drop_path_rate 0.5"])
    monkeypatch.setattr("sys.argv", arguments_of(renamed))
    with pytest.raises(SystemExit):
        recipe.main()
    assert "belongs to a run with other settings" in capsys.readouterr().err and len(in_this_process) == 12


def test_results_of_what_is_finished_are_written_after_an_interrupt(
    recipe, settings, tmp_path, monkeypatch, in_this_process
):
    run_all, calls = recipe.run_all, []

    def interrupted(runs, jobs):
        calls.append(1)
        if len(calls) == 3:  # the teachers of the second seed
            raise KeyboardInterrupt
        return run_all(runs, jobs)

    monkeypatch.setattr(recipe, "run_all", interrupted)
    monkeypatch.setattr("sys.argv", arguments_of(dataclasses.replace(settings, variants=settings.variants[:1])))
    with pytest.raises(KeyboardInterrupt):
        recipe.main()
    (run,) = json.loads((tmp_path / "results" / "results.json").read_text())["runs"]
    assert (run["variant"], run["seed"]) == ("p = 0", 3)


def test_teacher_is_measured_on_its_own_training_and_test_images(recipe, tmp_path, monkeypatch):
    flags = [*TEACHER_FLAGS.split(), "--train_split", "train[:40]", "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["train_teacher.py", str(CONFIGS / "teacher" / "digits.yaml"), *flags])
    importlib.import_module("training.train_teacher").main()
    measures = recipe.measure_teacher(
        parse_settings(recipe.TeacherSettings, [str(CONFIGS / "teacher" / "digits.yaml"), *flags], exit_on_error=False)
    )

    model, processor = AutoModelForImageClassification.from_pretrained(tmp_path), load_image_processor(str(tmp_path))
    for name, split in (("train", "train[:40]"), ("test", "test[:60]")):
        images = open_images("digits", split)
        pictures, labels = zip(*(images.decode(index) for index in range(images.num_images)), strict=True)
        with torch.no_grad():
            output = model(**processor(images=list(pictures), return_tensors="pt"), output_hidden_states=True)
        labels = torch.tensor(labels)
        assert measures[name]["accuracy"] == pytest.approx((output.logits.argmax(1) == labels).float().mean().item())
        assert measures[name]["loss"] == pytest.approx(F.cross_entropy(output.logits, labels).item(), rel=1e-4)
    first, *others = output.hidden_states  # of the test images
    expected = [1 - ((first - state) ** 2).sum() / ((state - state.mean(dim=(0, 1))) ** 2).sum() for state in others]
    assert measures["copy_r2"].tolist() == pytest.approx([value.item() for value in expected], rel=1e-4)


@pytest.mark.parametrize("images", ["digits", "cifar10"])
def test_committed_studies_are_planned_and_share_the_converged_teachers(recipe, monkeypatch, images):
    monkeypatch.chdir(ROOT)
    plans = {}
    for study in ("stochastic_depth", "training_time"):
        path = CONFIGS / "study" / f"{images}_{study}.yaml"
        made = parse_settings(recipe.TeacherStudySettings, [str(path)], exit_on_error=False)
        assert made.study == study and Path(made.output_dir).name == f"{images}_{study}"
        assert f"-m training.studies.study_teachers training/configs/study/{path.name}" in path.read_text()
        plans[study] = {(pair.variant, pair.seed): pair for pair in recipe.plan_pairs(made)}
        assert len(plans[study]) == 3 * len(made.variants)
        first, *others = (pair.student.settings for pair in plans[study].values() if pair.seed == 0)
        own = {"teacher": "any", "output_dir": "any"}  # the budget is equal
        assert all(dataclasses.replace(first, **own) == dataclasses.replace(other, **own) for other in others)
    rates = [pair.teacher_settings.drop_path_rate for pair in plans["stochastic_depth"].values()]
    assert rates == [0, 0.1, 0.3, 0.5, 0.7] * 3
    shared = plans["stochastic_depth"].keys() & plans["training_time"].keys()
    assert len(shared) == 3
    for key in shared:
        first, second = (plans[study][key] for study in plans)
        assert (first.teacher.settings, first.student.settings) == (second.teacher.settings, second.student.settings)
    assert [pair.teacher_settings.steps for pair in plans["training_time"].values()][0] == 0


@pytest.mark.slow
def test_study_runs_as_the_command_that_its_config_names(recipe, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", arguments_of(dataclasses.replace(settings, seeds=[0])))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe.main()
    assert len(json.loads((tmp_path / "results" / "results.json").read_text())["runs"]) == 2
