"""The recipe that writes files for other runtimes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from raptor_settings.export import FORMATS, ExportSettings

from raptor_hf import RaptorForImageClassification
from raptor_hf.data.images import load_image_processor
from tests.support.tiny_raptors import tiny_model
from training import export

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"formats": ["onxx"]}, "formats is .*; it must hold some of onnx, pt2, executorch, coreml"),
        ({"precisions": []}, "precisions is .*; it must hold some of float32, int8_dynamic"),
        ({"formats": ["pt2"], "precisions": ["int4"]}, "pt2 must have one of them: pt2 has float32"),
        ({"precisions": ["int8_static"]}, "dataset is none; precision int8_static must have images"),
        ({"image_size": [224]}, "image_size is .*; it must be a height and a width"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ExportSettings(**({"model": "runs/k3"} | changes))


def test_each_format_writes_the_precisions_that_it_has():
    settings = ExportSettings(model="runs/k3", formats=["pt2", "onnx"], precisions=["int4", "float32"])
    assert settings.files() == [("pt2", "float32"), ("onnx", "float32"), ("onnx", "int4")]


def test_precisions_of_the_settings_are_those_of_the_formats():
    onnx_files = pytest.importorskip("raptor_hf.export.onnx_files", exc_type=ImportError)
    from raptor_hf.export import mobile

    assert FORMATS == {
        "onnx": ("float32", *onnx_files.ONNX_PRECISIONS),
        "pt2": ("float32",),
        "executorch": mobile.EXECUTORCH_PRECISIONS,
        "coreml": mobile.COREML_PRECISIONS,
    }


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="formats has 'coreml', .*: pip install coremltools"):
        export.check_packages(["pt2", "coreml"])


@pytest.mark.slow
def test_recipe_writes_files_and_what_they_agree_on(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    fields = {"block_repeats": (2,), "image_size": 8, "patch_size": 2, "num_labels": 10, "depth_conditioning": "scale"}
    model = tiny_model(RaptorForImageClassification, **fields)
    model.save_pretrained(tmp_path / "model")
    load_image_processor(str(ROOT / "model_cards" / "digits-k3")).save_pretrained(tmp_path / "model")
    output = tmp_path / "files"
    flags = {
        "--model": [tmp_path / "model"],
        "--teacher": [ROOT / "model_cards" / "digits-teacher"],
        "--dataset": ["digits"],
        "--test_images": [64],
        "--formats": ["onnx", "pt2"],
        "--precisions": ["float32", "int8_static"],
        "--output_dir": [output],
    }
    argv = [str(part) for flag, values in flags.items() for part in (flag, *values)]
    monkeypatch.setattr(sys, "argv", ["export.py", *argv])
    export.main()
    found = json.loads((output / "export.json").read_text())
    assert found["num_images"] == 64 and found["outputs"] == ["logits"] and 0 <= found["teacher_agreement"] <= 1
    by_name = {record["file"]: record for record in found["files"]}
    assert set(by_name) == {"model_float32.onnx", "model_int8_static.onnx", "model_float32.pt2"}
    assert by_name.keys() | {"export.json"} == {path.name for path in output.iterdir()}
    for name, record in by_name.items():
        assert record["bytes"] == (output / name).stat().st_size
        exact = record["precision"] == "float32"
        assert record["largest_difference"] < 1e-4 if exact else 1e-4 < record["largest_difference"]
        assert record["agreement"] == 1 if exact else record["agreement"] > 0.8
        if exact:
            assert record["teacher_agreement"] == found["teacher_agreement"]
    assert torch.equal(model.classifier.weight, export.load_student(str(tmp_path / "model"), None).classifier.weight)
