"""metrics.json is written and read by one schema, old files included."""

import json
from pathlib import Path

import pytest

from raptor_hf.recipes.run_metrics import (
    Fidelity,
    PatchFidelity,
    ProbeRecord,
    StepsFidelity,
    StudentMetrics,
    TeacherMetrics,
)
from tests.support.published_run import metrics, probe

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[2] / "model_cards").glob("*/metrics.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_files_of_older_versions_come_back_as_they_are_but_for_the_version(folder, tmp_path):
    before = json.loads((folder / "metrics.json").read_text())
    schema = TeacherMetrics if "accuracy" in before else StudentMetrics
    schema.read(folder).write(tmp_path)
    after = json.loads((tmp_path / "metrics.json").read_text())
    assert after.pop("version") == 1 == before.pop("version", 1)
    for record in after.get("probes", {}).values():
        # fields that were added since are null
        for name in [name for name, value in record.items() if value is None]:
            if name not in next(iter(before["probes"].values())):
                del record[name]
    assert {name: value for name, value in before.items() if value is not None} == after
    schema.read(tmp_path)


def test_what_is_written_is_what_is_read(tmp_path):
    written = StudentMetrics(
        seed=3,
        run_id="a1",
        fidelity=Fidelity(
            r2=[0.5, None],
            cosine={"cls": [1.0, 0.5], "registers": None},
            agreement=0.25,
            patches=PatchFidelity(cosine=0.5, teacher_stability=0.25),
            by_steps={"4": StepsFidelity(block_repeats=[2, 1, 1], macs=7, r2=0.5)},
        ),
        fidelity_by_size={"16 x 16": Fidelity(r2=[0.25, 0.5])},
        probes={"ade20k": ProbeRecord.from_dict(probe("mean_iou", "semantic-segmentation", [0.4, None]))},
        others={"note": ["kept"]},
    )
    written.write(tmp_path)
    assert StudentMetrics.read(tmp_path) == written
    assert json.loads((tmp_path / "metrics.json").read_text())["note"] == ["kept"]


def test_numbers_that_are_not_defined_are_null(tmp_path):
    StudentMetrics(fidelity=Fidelity(r2=[float("nan"), 1.0])).write(tmp_path)
    assert StudentMetrics.read(tmp_path).fidelity.r2 == [None, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fidelity": {"r2": "high"}}, "fidelity.r2 is 'high'; it must be a list"),
        ({"fidelity": {"r2": [0.5, "x"]}}, r"fidelity.r2\[1\] is 'x'; it must be a number"),
        ({"seed": True}, "seed is True; it must be a whole number"),
        ({"parameters": {"student": 1.5}}, "parameters.student is 1.5; it must be a whole number"),
        ({"probes": {"a": {"task": "depth-estimation"}}}, "probes.a.dataset is missing"),
        ({"teacher": []}, "teacher is a list of 0; it must be an object"),
        ({"version": 2}, "version is 2; this raptor_hf reads versions up to 1"),
    ],
)
def test_a_field_of_another_type_is_named_with_its_file(changes, message, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics() | changes))
    with pytest.raises(ValueError, match=f"metrics.json: {message}"):
        StudentMetrics.read(tmp_path)


def test_a_folder_without_numbers_is_that_of_no_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.json: it is not the folder of a run that has finished"):
        StudentMetrics.read(tmp_path)


def test_deeply_nested_files_are_refused_at_any_depth(tmp_path):
    for depth in (40, 900, 100_000):
        (tmp_path / "metrics.json").write_text('{"a":' * depth + "1" + "}" * depth)
        with pytest.raises(ValueError, match="nested too deeply"):
            StudentMetrics.read(tmp_path)
