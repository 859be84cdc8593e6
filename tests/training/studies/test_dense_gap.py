"""The study of where students lose to their teacher: its numbers are those of probe.py, and its page says where."""

import dataclasses
import json

import numpy as np
import pytest
from raptor_settings.parse import parse_settings
from raptor_settings.probe import ProbeSettings
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from tests.support.tiny_models import tiny_dinov2
from training import probe
from training.studies.dense_gap import DenseGapSettings, check_one_size, main, measure, page, segment_sizes

FLAGS = "--augment none --epochs 2 --learning_rate 1e-2 --warmup_steps 1 --batch_size 8 --eval_batch_size 8 --seeds 3 4"
DIGITS = (
    f"--task image-classification --variant a --dataset digits --train_split train[:40] --test_split test[:40] {FLAGS}"
)
SCENES = "--task semantic-segmentation --variant b --dataset scenes --dataset_config segmentation-16 --image_size 16 "
SCENES += f"--train_split train[:16] --test_split test[:12] --last_batch keep {FLAGS}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gap") / "teacher"
    tiny_dinov2(hidden_size=16, num_attention_heads=2, image_size=8, patch_size=2).save_pretrained(folder)
    half, size = [0.5, 0.5, 0.5], {"height": 8, "width": 8}
    processor = BitImageProcessorPil(size={"shortest_edge": 8}, crop_size=size, image_mean=half, image_std=half)
    processor.save_pretrained(folder)
    return folder


def settings_of(flags: str, teacher) -> ProbeSettings:
    arguments = [*flags.split(), "--model", str(teacher), "--output_dir", "unused"]
    return parse_settings(ProbeSettings, arguments, exit_on_error=False)


@pytest.mark.parametrize(("flags", "metric"), [(DIGITS, "accuracy"), (SCENES, "mean_iou")])
def test_scores_of_all_seeds_are_those_of_the_probe(teacher, tmp_path, monkeypatch, flags, metric):
    own = dict(measure({"teacher": settings_of(flags, teacher)}))["teacher"]
    monkeypatch.setattr(
        "sys.argv", ["probe.py", *flags.split(), "--model", str(teacher), "--output_dir", str(tmp_path)]
    )
    monkeypatch.setattr(probe, "draw_predictions", lambda *arguments: None)
    probe.main()
    expected = json.loads((tmp_path / "probe.json").read_text())["last"][metric]
    assert len(expected) == 2
    assert (own["scores"]["both"]["linear"] if metric == "accuracy" else own["scores"]["mean_iou"]) == expected


def test_first_layers_that_share_a_pass_score_as_alone(teacher):
    whole = settings_of(DIGITS, teacher)
    cut = dataclasses.replace(whole, num_layers=2)
    together, alone = dict(measure({"whole": whole, "cut": cut})), dict(measure({"cut": cut}))
    assert together["cut"] == alone["cut"] and together["cut"]["parameters"] < together["whole"]["parameters"]
    assert together["cut"]["scores"] != together["whole"]["scores"]


def test_a_pixel_has_the_size_of_its_segment():
    mask = np.zeros((1, 40, 50), int)  # 2,000 pixels: bounds of 2, 20 and 200
    mask[0, 0, 0] = 1  # alone
    mask[0, 2:4, 2:7] = 1  # ten that touch
    mask[0, 4, 7] = 1  # touches them at a corner only
    mask[0, 10:20, :10] = 2  # a hundred
    sizes = segment_sizes(mask)[0]
    assert sizes[0, 0] == sizes[4, 7] == 0 and (sizes[2:4, 2:7] == 1).all() and (sizes[10:20, :10] == 2).all()
    assert (sizes[mask[0] == 0] == 3).all()


def record(model: str, probe: str, scores: dict) -> dict:
    task = "semantic-segmentation" if "mean_iou" in scores else "image-classification"
    fields = {"model": model, "probe": probe, "task": task, "image_size": [224, 224], "num_images": [10, 5]}
    return fields | {"parameters": 2_000_000, "seeds": [0, 1], "device": "a CPU", "scores": scores}


def test_the_page_says_what_is_kept_and_where_most_is_lost():
    def photographs(accuracy):
        return {part: {"linear": [accuracy] * 2, "k-NN": 0.5, "logistic regression": 0.5} for part in ("cls", "both")}

    def pixels(*iou):
        classes = {"classes": ["sky", "pole", "car", "tree", "cat"], "pixels": [60, 10, 10, 20, 0]}
        sizes = {"right_by_size": [[0.1, 0.2, 0.3, 0.4]] * 2, "pixels_by_size": [10, 20, 30, 40]}
        return classes | sizes | {"mean_iou": [sum(iou) / 4] * 2, "per_class_iou": [[*iou, None]] * 2}

    records = [record("whole", "photos, 8 px", photographs(0.8)), record("student", "photos, 8 px", photographs(0.6))]
    records += [
        record("whole", "street", pixels(0.9, 0.5, 0.7, 0.7)),
        record("student", "street", pixels(0.9, 0.2, 0.6, 0.7)),
    ]
    text = page("A gap", "python x", records)
    assert "| student | 2.00 M | 60.0 ± 0.0 | 60.0 ± 0.0 |" in text
    assert "**student** keeps 75% of the accuracy from cls, 75% of the accuracy from both, 86% of the mean IoU" in text
    assert "IoU changes most on pole (-30.0), car (-10.0)" in text
    assert "| model | sky (60.0 %) | pole (10.0 %)" in text and "| whole | 90.0 | 50.0 | 70.0 | 70.0 | - |" in text


def test_what_was_measured_is_not_measured_again(teacher, tmp_path, monkeypatch, capsys):
    arguments = ["dense_gap.py", "--title", "T", "--models", f"whole --model {teacher} --output_dir unused"]
    arguments += [f"cut --model {teacher} --output_dir unused --num_layers 1", "--probes"]
    arguments += [f"a = digits {DIGITS}", f"b = scenes_segmentation {SCENES}"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--runs_dir", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    files = {name: (tmp_path / "out" / name).read_bytes() for name in ("table.md", "results.json", "figure.png")}
    monkeypatch.setattr("training.studies.dense_gap.measure", None)
    main()
    assert files == {name: (tmp_path / "out" / name).read_bytes() for name in files}
    assert len(json.loads(files["results.json"])["records"]) == 4


def test_models_are_yielded_one_by_one_so_that_an_interrupted_study_keeps_them(teacher):
    scored = measure({"whole": settings_of(DIGITS, teacher), "cut": settings_of(f"{DIGITS} --num_layers 1", teacher)})
    name, first = next(scored)
    assert name == "whole" and len(first["scores"]["both"]["linear"]) == 2
    assert next(scored)[0] == "cut" and next(scored, None) is None


def test_models_that_saw_images_of_different_sizes_are_not_compared():
    records = [record("whole", "photos", {}), record("student", "photos", {}) | {"image_size": [112, 112]}]
    check_one_size("photos", records[:1])
    with pytest.raises(ValueError, match=r"'photos'.*whole: 224 x 224, student: 112 x 112.*add --image_size"):
        check_one_size("photos", records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": ["a"]}, "probes are .*each must be"),
        ({"probes": ["a = x", "A = y"]}, "their folders"),
        ({"models": ["a --model x", "A --model y"]}, "their folders"),
    ],
)
def test_a_plan_that_cannot_be_kept_apart_is_refused(changes, message):
    fields = {
        "title": "T",
        "models": ["a --model x"],
        "probes": ["a = digits"],
        "output_dir": "out",
        "runs_dir": "runs",
    }
    with pytest.raises(ValueError, match=message):
        DenseGapSettings(**fields | changes)
