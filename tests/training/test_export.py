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


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """The recipe's command line in this process, on a tiny student, to a folder that has a file already."""
    tiny_model(RaptorForImageClassification, num_labels=3, patch_size=2, image_size=8).save_pretrained(tmp_path / "k1")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model_float32.pt2").write_text("of before")

    def run(*flags: str, model: str = "k1") -> list[str]:
        arguments = [
            "--model",
            str(tmp_path / model),
            "--formats",
            "pt2",
            "--output_dir",
            str(tmp_path / "files"),
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
        export.main()
        return sorted(path.name for path in (tmp_path / "files").iterdir())

    return run


def test_a_file_of_before_stays_until_the_new_one_is_whole(exported, tmp_path, monkeypatch, capsys):
    before = tmp_path / "files" / "model_float32.pt2"
    with pytest.raises(SystemExit):
        exported("--image_size", "8", "7")
    assert "image_size is [8, 7]; 7 must be a multiple of the patch, such as 6 or 8" in capsys.readouterr().err

    def half_written(model, path, size):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save_pt2", half_written)
    with pytest.raises(KeyboardInterrupt):
        exported()
    assert [path.name for path in before.parent.iterdir()] == [before.name] and before.read_text() == "of before"
    monkeypatch.setattr(export, "save_pt2", lambda model, path, size: path.write_text("whole"))
    assert exported() == ["export.json", "model_float32.pt2"] and before.read_text() == "whole"


def test_a_folder_without_a_whole_student_is_told_in_one_line(exported, tmp_path, capsys):
    student = tmp_path / "k1"
    config = json.loads((student / "config.json").read_text())
    for architectures in (None, ["ViTModel"]):
        (student / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        with pytest.raises(SystemExit):
            exported()
        assert f"model is '{student}', whose config.json names" in capsys.readouterr().err
    (student / "config.json").write_text(json.dumps(config))
    (student / "model.safetensors").write_bytes((student / "model.safetensors").read_bytes()[:100])
    with pytest.raises(SystemExit):
        exported()
    assert f"model is '{student}', whose files cannot be read (SafetensorError" in capsys.readouterr().err


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
