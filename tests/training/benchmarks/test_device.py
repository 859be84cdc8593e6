"""The benchmark of small devices: what is measured is what the page says, and mapped weights are the model's."""

import json
import sys
import time

import pytest
import torch

from raptor_hf import RaptorForImageClassification, RaptorModel
from raptor_hf.data.images import load_image_processor
from tests.support.tiny_raptors import tiny_images, tiny_model
from training.benchmarks import device_page
from training.benchmarks.measuring import alternate

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from training.benchmarks import device, quantisation  # noqa: E402

FACTS = {"device": "a CPU", "versions": {"torch": "2"}}


def agreement_row(precision: str, agreement: float) -> dict:
    facts = {"name": "tiny", "bytes": 1_000_000, "parameter_bytes": 4_000_000, "num_images": 500, "what": "labels"}
    return facts | {"precision": precision, "agreement": agreement, "with_student": 0.99}


@pytest.mark.parametrize("agreement, verdict", [(0.996, "met"), (0.994, "missed")])
def test_page_says_whether_quantisation_costs_more_than_half_a_point(agreement, verdict):
    rows = [agreement_row("float32", 1.0), agreement_row("int4", agreement)]
    page = device_page.page({"agreement": {"agreement": rows, **FACTS}})
    assert f"points lost; {verdict}, the worst is tiny in int4 with {100 * (1 - agreement):.2f}" in page
    assert f"| {agreement:.2%} | +{100 * (1 - agreement):.2f} | 99.00% |" in page


def test_clock_of_the_processor_does_not_see_a_function_sleep():
    seconds = alternate(
        [lambda: time.sleep(0.05)], repeats=3, warmup=0, device=torch.device("cpu"), clock=time.process_time
    )
    assert (seconds < 0.02).all()


@pytest.mark.parametrize("page_out", [False, True], ids=["kept", "dropped"])
def test_mapped_model_computes_from_the_pages_of_its_file(page_out, tmp_path):
    own = tiny_model(RaptorModel, depth_conditioning="low_rank")
    device.save_weights(own, tmp_path)
    model = device.mapped_model(tmp_path)
    if page_out:
        device.drop_pages(model)
    with torch.no_grad():
        assert torch.equal(model(tiny_images()).last_hidden_state, own(tiny_images()).last_hidden_state)


def test_pairs_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="part agreement must have as many of each"):
        device.DeviceSettings(parts=["agreement"], students=["a", "b"], teachers=["c", "d"], datasets=["digits"])


@pytest.mark.slow
def test_benchmark_measures_every_file_and_writes_its_page(tmp_path, monkeypatch):
    argv = ["--sizes", "digits", "--batch_sizes", "2", "--repeats", "3", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["device", *argv])
    device.main()
    rows = json.loads((tmp_path / "latency.json").read_text())["latency"]
    by_case = {(row["model"], row["runtime"]): row for row in rows}
    assert list(by_case) == [(model, runtime) for model in device.MODELS for runtime in device.RUNTIMES]
    assert by_case["teacher", "torch"]["ratio"] == 1
    for model in device.MODELS:
        # float32, then int8 and a graph, which is much of so small a file
        assert by_case[model, "onnx int8"]["bytes"] < 0.6 * by_case[model, "onnx"]["bytes"]
    assert by_case["student", "onnx"]["bytes"] < 0.5 * by_case["teacher", "onnx"]["bytes"]
    assert all(row["start_seconds"] > 0 and row["peak_bytes"] > 0 and row["seconds"] > 0 for row in rows)
    streamed = json.loads((tmp_path / "streamed.json").read_text())["streamed"]
    assert [row["num_processes"] for row in streamed] == [1, 2, 1] and all(row["ratio"] > 0 for row in streamed)
    started = json.loads((tmp_path / "start.json").read_text())["start"]
    assert [row["runtime"] for row in started] == ["onnx", "onnx int8"]
    # a process that imports onnxruntime takes longer than one call
    assert all(row["student_seconds"] > by_case["student", row["runtime"]]["seconds"] for row in started)
    merged = json.loads((tmp_path / "merged.json").read_text())["merged"]
    assert [row["dtype"] for row in merged] == ["float32", "bfloat16"] and all(row["ratio"] > 0 for row in merged)
    page = (tmp_path / "README.md").read_text()
    assert "## Size, memory, start and latency" in page and page.count("| digits (8 px, D=96) |") == 8 + 3 + 2 + 2


@pytest.mark.slow
def test_agreement_of_the_float32_file_is_the_student_s_own(tmp_path):
    fields = {"block_repeats": (2,), "image_size": 8, "patch_size": 2, "num_labels": 10}
    tiny_model(RaptorForImageClassification, **fields).save_pretrained(tmp_path)
    load_image_processor("model_cards/digits-k3").save_pretrained(tmp_path)
    rows = quantisation.compare_precisions(str(tmp_path), str(tmp_path), "digits", num_images=50)
    assert [row["precision"] for row in rows] == ["float32", "int8_dynamic", "int8_static", "int4"]
    assert rows[0]["agreement"] == rows[0]["with_student"] == 1 and {row["num_images"] for row in rows} == {50}
    # teacher and student are the same here
    assert all(row["agreement"] == row["with_student"] > 0.7 for row in rows)
    sizes = [row["bytes"] for row in rows]
    assert sizes[0] > sizes[1] and sizes[0] > sizes[3]
