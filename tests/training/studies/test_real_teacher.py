"""The study of a student beside its teacher: what it measures of fidelity and of the maps of a decoder."""

import pytest
import torch

from raptor_hf.conversion import student_from_teacher
from raptor_hf.phases import Partition
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import DIM, NUM_LAYERS, images, tiny_dinov2
from training.studies.real_teacher import alike, command_of, compare, saliency, table


@pytest.fixture(scope="module")
def decoder():
    generator = torch.Generator().manual_seed(0)
    widths, weights = (DIM, 8, 6, 4), {}
    for index, (width, next_width) in enumerate(zip(widths, widths[1:], strict=False), start=1):
        weights[f"upconv{index}.weight"] = torch.randn(width, next_width, 4, 4, generator=generator) / width**0.5
        weights[f"upconv{index}.bias"] = torch.zeros(next_width)
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            weights[f"bn{index}.{name}"] = torch.full((next_width,), value)
    weights["final_conv.weight"] = torch.randn(1, 4, 1, 1, generator=generator)
    weights["final_conv.bias"] = torch.zeros(1)
    return weights


@pytest.fixture(scope="module")
def batches():
    pixels = images()
    side = min(pixels.shape[2:])
    return [{"pixel_values": pixels[..., :side, :side]}]


def test_the_untied_student_has_the_teachers_states_and_maps(decoder, batches):
    teacher = Teacher(tiny_dinov2())
    untied = Partition.from_boundaries(list(range(1, NUM_LAYERS)), NUM_LAYERS)
    student = Teacher(student_from_teacher(teacher, untied, init="middle").eval())
    row, shown = compare(teacher, student, batches, decoder)
    assert row["r2"] == pytest.approx([1.0] * NUM_LAYERS, abs=1e-5)
    assert row["maps"]["correlation_worst"] == pytest.approx(1, abs=1e-4)
    assert row["maps"]["absolute_difference"] == pytest.approx(0, abs=1e-5)
    assert row["shuffled"]["correlation_mean"] < 0.999
    torch.testing.assert_close(shown[1], shown[2], atol=1e-5, rtol=0)


def test_a_map_follows_the_place_of_its_patches(decoder):
    patches = torch.zeros(1, 16, DIM)
    patches[0, 5] = 10.0  # row 1, column 1 of 4 x 4
    difference = (saliency(patches, 4, decoder) - saliency(torch.zeros(1, 16, DIM), 4, decoder)).abs()[0]
    rows, columns = (difference.sum(axis) for axis in (1, 0))
    for weights in (rows, columns):
        centre = (weights * torch.arange(112)).sum() / weights.sum()
        assert 28 < centre < 56  # the patch's own 28 pixels, though its reach is wider
    assert difference[90:].max() == 0 and difference[:, 90:].max() == 0


def test_likeness_is_correlation_and_mean_difference():
    first = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[0.0, 1.0], [2.0, 3.0]]])
    second = torch.stack([first[0] + 1, 3 - first[1]])
    scores = alike(first, second)
    assert scores["correlation_mean"] == pytest.approx(0, abs=1e-9) and scores["correlation_worst"] == pytest.approx(-1)
    assert scores["absolute_difference"] == pytest.approx((1 + 2) / 2)


def test_the_page_says_size_blocks_and_time():
    row = {"dataset": "photographs", "size": 112, "r2": [0.5], "r2_mean": 0.5, "r2_last": 0.4}
    record = {"title": "A study", "parameters": {"teacher": 4_000_000, "student": 1_000_000}, "blocks": [[1, 2], [3]]}
    record |= {"seconds": {"stage2": 120.0, "evaluation": 600.0}, "trained_on": "a CPU", "command": "python x"}
    text = table(record | {"rows": [row | {"cosine_last": {"patches": 0.9}}]})
    assert "layers [1-2][3-3], 1.00 M of 4.00 M parameters (25%), trained in 2 minutes on a CPU" in text
    assert "| photographs | 112 | 0.500 | 0.400 | - | 0.900 |" in text


def test_the_command_names_no_machines_paths():
    words = command_of(["--student", "/home/someone/runs/k3", "--teacher", "../models/vit", "--sizes", "112"]).split()
    assert words[3:] == ["--student", "k3", "--teacher", "vit", "--sizes", "112"]
