"""Files are replaced whole or not at all, and weights are told apart by their content."""

import errno

import pytest
import torch

from raptor_hf import RaptorModel
from raptor_hf.recipes import files
from raptor_hf.recipes.files import fingerprint_tensors, written_beside
from tests.support.tiny_raptors import tiny_model


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_model_that_does_not_fit_on_the_disk_leaves_the_older_one(tmp_path):
    tiny_model(RaptorModel).save_pretrained(tmp_path)
    before = content(tmp_path)
    with pytest.raises(OSError, match="No space"), written_beside(tmp_path) as place:
        tiny_model(RaptorModel, seed=1).save_pretrained(place)
        (place / "config.json").write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert content(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_a_disk_that_fills_up_in_a_new_folder_leaves_no_empty_file(tmp_path):
    with pytest.raises(OSError, match="No space"), written_beside(tmp_path / "new") as place:
        (place / "config.json").write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list((tmp_path / "new").iterdir())


def test_files_take_their_places_with_the_configuration_last(tmp_path, monkeypatch):
    order, replace = [], files.os.replace

    def watched(source, target):
        order.append(target.name)
        replace(source, target)

    (tmp_path / ".writing").mkdir()  # left by a run that was killed
    (tmp_path / ".writing" / "old").write_text("old")
    monkeypatch.setattr(files.os, "replace", watched)
    with written_beside(tmp_path) as place:
        for name in ("config.json", "model.safetensors", "a.py"):
            (place / name).write_text(name)
    assert order == ["a.py", "model.safetensors", "config.json"]
    assert content(tmp_path) == {name: name.encode() for name in order}


def test_a_fingerprint_is_of_names_types_shapes_and_values_and_of_nothing_else():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    expected = fingerprint_tensors(tensors)
    assert len(expected) == 64
    transposed = tensors["a"].T.contiguous().T
    assert fingerprint_tensors({"b": tensors["b"], "a": transposed}) == expected
    for other in (
        tensors | {"a": tensors["a"] + 1e-6},
        tensors | {"a": tensors["a"].reshape(3, 2)},
        tensors | {"b": tensors["b"].half()},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
    ):
        assert fingerprint_tensors(other) != expected
