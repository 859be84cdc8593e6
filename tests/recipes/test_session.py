"""What recipes do around their loops: claiming a folder, saving, and reading back what was saved."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel

from raptor_hf.conversion import student_from_teacher
from raptor_hf.data.loaders import TooManyFailuresError
from raptor_hf.hub.heads import save_head
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.recipes import files, session
from raptor_hf.recipes.checkpoint import CheckpointError
from raptor_hf.recipes.files import fingerprint_tensors, flush
from raptor_hf.recipes.fingerprints import fingerprint_dataset, fingerprint_model
from raptor_hf.recipes.lock import LOCK_FILE
from raptor_hf.recipes.loop import NonFiniteError, is_step_finite
from raptor_hf.recipes.session import Session, check_launch, holds_backbone, run_program, save_model, whole_weights
from raptor_hf.recipes.settings import read_run_id
from tests.support.tiny_models import tiny_dinov2

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    output_dir: str
    learning_rate: float = 0.1
    test_split: str = "test"
    override: bool = False
    mixed_precision: str | None = None
    tracker: str | None = None
    keep_checkpoints: int = 2


def begin(folder: Path, fingerprints: dict[str, str] | None = None, **changes) -> Session:
    settings = replace(Settings(str(folder)), **changes)
    session = Session("test", settings)
    session.claim(settings, 0, fingerprints)
    return session


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 3)
    return model, torch.optim.AdamW(model.parameters())


def test_run_keeps_its_id_and_another_run_has_another(tmp_path):
    first, again, other = begin(tmp_path / "a"), begin(tmp_path / "a", test_split="val"), begin(tmp_path / "b")
    assert first.run_id == again.run_id == read_run_id(tmp_path / "a") != other.run_id
    overridden = begin(tmp_path / "a", learning_rate=0.5, override=True)
    assert overridden.run_id == read_run_id(tmp_path / "a") != first.run_id
    assert read_run_id(tmp_path / "a.replaced-1") == first.run_id


def test_override_moves_the_whole_former_run_aside(tmp_path):
    folder = tmp_path / "run"
    for number, rate in enumerate((0.1, 0.2, 0.3)):
        session = begin(folder, learning_rate=rate, override=True)
        assert {path.name for path in folder.iterdir()} == {"resolved.yaml", LOCK_FILE}
        (folder / "metrics.json").write_text(f"{number}")
        (folder / "checkpoints").mkdir()
        session.close()
    assert [(tmp_path / f"run.replaced-{n}" / "metrics.json").read_text() for n in (1, 2)] == ["0", "1"]
    assert (tmp_path / "run.replaced-1" / "checkpoints").is_dir() and (folder / "metrics.json").read_text() == "2"


def test_override_does_not_move_what_the_run_reads(tmp_path):
    begin(tmp_path / "run").close()
    (tmp_path / "run" / "teacher").mkdir()
    settings = Settings(str(tmp_path / "run"), learning_rate=0.5, override=True)
    with pytest.raises(ValueError, match="from which this run reads .*teacher"):
        Session("test", settings).claim(settings, inputs=[str(tmp_path / "run" / "teacher")])
    assert (tmp_path / "run" / "teacher").is_dir()


def test_refused_folder_is_left_as_it_was(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model of unknown settings"):
        begin(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_run_goes_on_with_the_same_inputs_only(tmp_path):
    session = begin(tmp_path, {"teacher": "aaa", "images": "bbb"})
    model, optimizer = model_and_optimizer()
    session.save(1, model, optimizer, {"step": 1})
    with pytest.raises(ValueError, match="teacher changed since this run began: .* is ccc; it must be aaa"):
        begin(tmp_path, {"teacher": "ccc", "images": "bbb"})
    again = begin(tmp_path, {"teacher": "aaa", "images": "bbb"})
    assert again.progress["step"] == again.resume(model, optimizer)["step"] == 1
    assert again.progress["run_id"] == session.run_id


def test_damaged_checkpoints_are_found_before_the_work(tmp_path):
    session = begin(tmp_path)
    model, optimizer = model_and_optimizer()
    session.save(1, model, optimizer, {"step": 1})
    (tmp_path / "checkpoints" / "step-00000002").write_text("a file")
    assert begin(tmp_path).progress["step"] == 1
    (tmp_path / "checkpoints" / "step-00000001" / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        begin(tmp_path)


def test_checkpoint_takes_the_place_of_a_file_of_its_name(tmp_path):
    session = begin(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-00000001", "tmp-step-00000001", "step-00000009"):
        (tmp_path / "checkpoints" / name).write_text("a file")
    session.save(1, *model_and_optimizer(), {"step": 1})
    assert begin(tmp_path).progress["step"] == 1


def test_result_of_another_run_is_not_taken_for_this_run_s(tmp_path):
    session = begin(tmp_path)
    result = tmp_path / "metrics.json"
    assert session.read_result() is None
    for content in ("", "[]", "{}", json.dumps({"run_id": "other", "split": "test"})):
        result.write_text(content)
        assert session.read_result() is None
    result.write_text(json.dumps({"run_id": session.run_id, "split": "test"}))
    assert session.read_result(split="test")["split"] == "test"
    assert session.read_result(split="val") is None and session.read_result(needs="model*.safetensors") is None


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["none", "eager dynamo", "DDP", "FSDP", "DDP in eager dynamo"])
def test_saved_folder_holds_the_model_under_any_wrapper(tmp_path, process_group, wrapper):
    model = tiny_dinov2()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = model
    if wrapper == "FSDP":
        wrapped = fully_shard(wrapped, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    if "DDP" in wrapper:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    if "dynamo" in wrapper:
        wrapped = torch.compile(wrapped, backend="eager")
    save_model(tmp_path, whole_weights(wrapped), model, RaptorImageProcessor())
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_weights_that_do_not_fit_or_are_not_finite_are_not_saved(tmp_path):
    model = tiny_dinov2()
    weights = whole_weights(model)
    name = next(iter(weights))
    for wrong, message in (
        ({f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, "do not fit the model"),
        ({key: tensor for key, tensor in weights.items() if key != name}, "do not fit the model"),
        (weights | {name: weights[name][..., :1]}, "do not fit the model"),
        (weights | {name: weights[name] * torch.nan}, "not finite"),
    ):
        with pytest.raises(RuntimeError, match=f"{message}.*nothing was saved"):
            save_model(tmp_path, wrong, model, RaptorImageProcessor())
        assert not list(tmp_path.iterdir())


def test_model_that_was_written_otherwise_is_not_called_saved(tmp_path, monkeypatch):
    model = tiny_dinov2()
    save = type(model).save_pretrained

    def lose(self, folder, state_dict):
        save(self, folder, state_dict={name: state_dict[name] for name in list(state_dict)[1:]})

    monkeypatch.setattr(type(model), "save_pretrained", lose)
    with pytest.raises(RuntimeError, match="come back different in .*; nothing was saved"):
        save_model(tmp_path, whole_weights(model), model, RaptorImageProcessor())
    assert not (tmp_path / "model.safetensors").exists()


def test_backbone_is_known_again_with_and_without_a_head(tmp_path):
    student = student_from_teacher(tiny_dinov2(num_labels=3), (3, 1), init="middle")
    weights = whole_weights(student)
    assert not holds_backbone(tmp_path, weights, "raptor")
    save_model(tmp_path, weights, student, RaptorImageProcessor())
    assert holds_backbone(tmp_path, weights, "raptor")
    save_head(student, tmp_path, "other")  # its own head leaves the file of the backbone
    assert holds_backbone(tmp_path, weights, "raptor")
    saved = load_file(tmp_path / "model.safetensors")
    name = next(name for name in saved if "blocks" in name)
    save_file(saved | {name: saved[name] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    assert not holds_backbone(tmp_path, weights, "raptor")
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    assert not holds_backbone(tmp_path, weights, "raptor")


def test_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    model = tiny_dinov2()
    save_model(tmp_path, whole_weights(model), model, RaptorImageProcessor())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = tiny_dinov2(seed=1)

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RaptorImageProcessor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path, whole_weights(other), other, RaptorImageProcessor())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    alone = SimpleNamespace(num_processes=1)
    check_launch(alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(SimpleNamespace(num_processes=2, mixed_precision="no"))
    with pytest.raises(ValueError, match="num_processes is 2 in the launcher, but each process runs alone"):
        check_launch(alone)


def test_processes_of_different_precision_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(session, "gather_object", lambda own: [*own, "bf16"])
    check_launch(SimpleNamespace(num_processes=2, mixed_precision="bf16"))
    with pytest.raises(ValueError, match="auto, which is bf16 and no on the devices of these processes; give one"):
        check_launch(SimpleNamespace(num_processes=2, mixed_precision="no"))


@pytest.mark.parametrize(
    "error, status",
    [
        (NonFiniteError("loss or gradients\nare not finite"), 1),
        (TooManyFailuresError("101 images cannot be read"), 1),
        (CheckpointError("every checkpoint is damaged"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_run_that_has_to_stop_says_why_in_one_line(capsys, monkeypatch, error, status):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["training/distill.py"])
    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == status and len(lines) == 1
    if status == 1:
        assert lines[0] == f"distill.py: error: {' '.join(str(error).split())}"


def test_fault_of_the_program_keeps_its_stack():
    def main():
        raise KeyError("fault")

    with pytest.raises(KeyError, match="fault"):
        run_program(main)


def test_under_a_loss_scale_only_the_loss_counts():
    plain = SimpleNamespace(num_processes=1, scaler=None)
    scaled = SimpleNamespace(num_processes=1, scaler=object())
    finite, infinite = torch.tensor(1.0), torch.tensor(torch.inf)
    assert is_step_finite(plain, finite, True) and not is_step_finite(plain, finite, False)
    assert is_step_finite(scaled, finite, False) and not is_step_finite(scaled, infinite, True)


def test_folder_that_cannot_be_opened_is_not_flushed_and_a_file_is(tmp_path, monkeypatch):
    def refuse(path, flags):  # as Windows does with folders
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    flush(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError):
        flush(tmp_path / "file")


def test_fingerprint_of_a_model_is_that_of_its_weights():
    assert fingerprint_model(tiny_dinov2()) == fingerprint_model(tiny_dinov2())
    assert fingerprint_model(tiny_dinov2()) != fingerprint_model(tiny_dinov2(seed=1))
    changed = tiny_dinov2()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0].add_(1e-6)
    assert fingerprint_model(changed) != fingerprint_model(tiny_dinov2())
    assert fingerprint_tensors({"a": torch.ones(2)}) != fingerprint_tensors({"b": torch.ones(2)})


def test_fingerprint_of_images_is_that_of_their_content(tmp_path):
    def images(*contents: bytes, labels=None):
        rows = {"image": [{"bytes": content, "path": None} for content in contents]}
        return SimpleNamespace(dataset=Dataset.from_dict(rows | ({"label": labels} if labels else {})), title="t")

    first = fingerprint_dataset(images(b"a", b"b"))
    assert first == fingerprint_dataset(images(b"a", b"b"))
    others = [images(b"a", b"c"), images(b"a"), images(b"b", b"a"), images(b"a", b"b", labels=[0, 1])]
    assert len({first, *map(fingerprint_dataset, others)}) == 5
    path = tmp_path / "0.png"
    path.write_bytes(b"a")
    rows = Dataset.from_dict({"image": [{"bytes": None, "path": str(path)}]})
    before = fingerprint_dataset(SimpleNamespace(dataset=rows, title="t"))
    path.write_bytes(b"another")
    os.utime(path, (0, 0))
    assert fingerprint_dataset(SimpleNamespace(dataset=rows, title="t")) != before


def test_recipes_import_where_resource_and_fcntl_are_missing_as_on_windows():
    code = """
import sys
import accelerate, datasets, torch, transformers  # on Linux some of their packages need both
import raptor_hf
sys.modules.update(dict.fromkeys(("resource", "fcntl")))
from raptor_hf.recipes import checkpoint, files, loop, session
assert loop.peak_memory_bytes(torch.device("cpu")) is None
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "training"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
