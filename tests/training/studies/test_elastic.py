"""The study of what an elastic student saves: what is compared, what it costs, and what the page says."""

import dataclasses

import pytest
import torch
from torch import nn

from raptor_hf.conversion import student_from_teacher
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import images, randomize, tiny_dinov2
from training.studies import elastic
from training.studies.settings import ElasticSettings

LAYERS = 4


@pytest.fixture(scope="module")
def teacher():
    return tiny_dinov2(num_labels=3).eval()


@pytest.fixture(scope="module")
def student(teacher):
    student = student_from_teacher(teacher, (3, 1), depth_conditioning="low_rank", step_scaling=True)
    return randomize(student, 1).eval()


@pytest.fixture
def settings():
    return ElasticSettings(
        title="A study",
        student="student",
        teacher="teacher",
        dataset="digits",
        depths=[2, 4],
        max_disagreement=0.1,
        output_dir="out",
        batch_size=8,
        repeats=2,
    )


def test_teacher_cut_short_is_its_norm_and_head_on_an_earlier_state(teacher):
    pixels, whole = images(), Teacher(teacher)
    for depth in (1, 3, LAYERS):
        with torch.no_grad():
            expected = whole.logits(whole.trajectory(pixels)[:, depth])
            torch.testing.assert_close(elastic.cut(teacher, depth)(pixels).logits, expected)
    assert len(teacher.base_model.encoder.layer) == LAYERS


def test_contenders_are_the_models_in_both_precisions(teacher, student, settings):
    contenders = elastic.list_contenders(teacher, student, settings)
    names = [one.name for one in contenders]
    own = [
        *("teacher", "teacher's first 2 layers", "elastic, 2 steps", "elastic, 4 steps"),
        *("elastic as plain DINOv2, 2 layers", "elastic as plain DINOv2, 4 layers"),
    ]
    assert names == own + [f"{name}, int8" for name in own]
    only = elastic.list_contenders(teacher, student, dataclasses.replace(settings, int8=False))
    assert [one.name for one in only] == own
    by_name = dict(zip(names, contenders, strict=True))
    with torch.no_grad():
        for depth in (2, 4):
            unrolled = by_name[f"elastic as plain DINOv2, {depth} layers"](images())
            torch.testing.assert_close(unrolled, by_name[f"elastic, {depth} steps"](images()), rtol=1e-3, atol=1e-4)
    assert not torch.equal(by_name["elastic, 2 steps"](images()), by_name["elastic, 4 steps"](images()))


def test_students_that_are_no_plain_model_are_compared_as_they_are(teacher, settings, capsys):
    size = {"num_attention_heads": 4, "head_dim": 8}
    student = student_from_teacher(teacher, (3, 1), depth_conditioning="low_rank", step_scaling=True, **size)
    contenders = elastic.list_contenders(teacher, student, dataclasses.replace(settings, int8=False))
    assert [one.series for one in contenders] == ["teacher", "teacher's first layers", "elastic", "elastic"]
    assert "num_attention_heads=4, of head_dim=8, cannot become DINOv2" in capsys.readouterr().out


def test_weights_in_int8_are_a_byte_each_and_all_others_as_they_were(teacher):
    linear = [module for module in teacher.modules() if isinstance(module, nn.Linear)]
    before = sum(parameter.nbytes for parameter in teacher.parameters())
    whole = elastic.costed(elastic.Contender("teacher", "teacher", teacher), images())
    small = elastic.costed(elastic.Contender("small", "teacher", elastic.in_int8(teacher)), images())
    assert whole.weights == before and whole.macs > 0 and small.macs is None
    assert small.weights == before - 3 * sum(layer.weight.numel() for layer in linear)
    half = elastic.costed(elastic.Contender("half", "teacher", elastic.cut(teacher, 2)), images())
    assert half.weights < whole.weights and half.macs < whole.macs


@torch.no_grad()
def test_scores_are_those_of_the_predictions_and_times_those_beside_the_teacher(teacher, student, settings):
    pixels = torch.randn(24, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = teacher(pixels).logits.argmax(1)
    labels[:4] = -1  # images without a class count for agreement alone
    contenders = elastic.list_contenders(teacher, student, dataclasses.replace(settings, int8=False))
    rows = elastic.measure(contenders, pixels, labels, settings)
    assert rows[0]["accuracy"] == rows[0]["agreement"] == rows[0]["speedup"] == 1
    for row, one in zip(rows, contenders, strict=True):
        same = one(pixels).argmax(1) == teacher(pixels).logits.argmax(1)
        assert row["agreement"] == pytest.approx(same.float().mean().item())
        assert row["accuracy"] == pytest.approx(same[4:].float().mean().item())
        assert row["seconds"] > 0


@pytest.mark.parametrize("criterion", elastic.EXIT_CRITERIA)
@torch.no_grad()
def test_early_exit_is_measured_on_images_that_it_was_not_calibrated_on(student, settings, criterion, monkeypatch):
    pixels = torch.randn(40, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    seen, calibrate = [], elastic.calibrate_exit

    def spy(model, batches, *arguments):
        seen.append(torch.cat(tuple(batches)))
        return calibrate(model, batches, *arguments)

    monkeypatch.setattr(elastic, "calibrate_exit", spy)
    labels = student(pixels).logits.argmax(1)
    row = elastic.measure_exit(student, criterion, pixels, labels, settings)
    assert torch.equal(seen[0], pixels[1::2]) and torch.equal(seen[1], pixels[::2])
    assert row["accuracy_with_all_steps"] == 1 and row["accuracy"] == row["agreement_with_all_steps"]
    assert 1 <= row["mean_steps"] <= LAYERS and row["seconds"] > 0


def test_page_says_what_was_saved(tmp_path):
    row = {"series": "elastic", "macs": 5_000_000, "weights": 1_500_000, "accuracy": 0.98, "agreement": 0.97}
    row |= {"seconds": 0.02, "speedup": 2.0, "speedup_quartiles": [1.5, 2.5]}
    early = {"criterion": "head_margin", "mean_steps": 3.0, "agreement_with_all_steps": 0.995, "accuracy": 0.97}
    early |= {"accuracy_with_all_steps": 0.98, "seconds": 0.01, "speedup": 1.25}
    record = {"title": "A study", "command": "python x", "num_images": 500, "batch_size": 32, "num_steps": 12}
    record |= {"max_disagreement": 0.005, "device": "a processor, 1 thread", "versions": {"python": "3.11"}}
    record |= {
        "rows": [row | {"name": "elastic, 4 steps"}, row | {"name": "int8", "series": "elastic, int8", "macs": None}],
        "early_exit": [early],
    }
    page = elastic.table(record)
    assert "| elastic, 4 steps | 98.0 | 97.0 | 5.0 | 1.50 | 20.0 | 2.00 [1.50, 2.50] |" in page
    assert "| int8 | 98.0 | 97.0 | - |" in page
    assert "| head_margin | 3.00 | 75 | -1.0 | 99.5 | 20 |" in page and "0.5 % may change" in page
    elastic.plot_speed(record, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
