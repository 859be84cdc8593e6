"""The same command given again: what a distillation takes from its folder, refuses, keeps and evaluates anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf.data import images as image_module
from raptor_hf.recipes.checkpoint import CheckpointError
from raptor_hf.teacher import Teacher
from tests.support.tiny_models import tiny_dinov2
from training import distill

ROOT = Path(__file__).parents[2]
SHORT = {
    "dataset": "digits",
    "train_split": "train[:32]",
    "test_split": "test[:12]",
    "num_blocks": 2,
    "phase_images": 16,
    "num_bootstraps": 0,
    "stage1_steps": 3,
    "stage2_steps": 3,
    "batch_size": 8,
    "eval_batch_size": 12,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "log_every": 3,
    "checkpoint_every": 2,
    "input_noise": 0.1,
    "normalize_loss": True,
}
# what a probe of the student adds to metrics.json
PROBE = {
    "task": "image-classification",
    "dataset": "digits",
    "split": "test",
    "metric": "accuracy",
    "seeds": [0],
    "last": {"accuracy": [0.5]},
    "best": {"epoch": [1], "accuracy": [0.5]},
    "higher_is_better": True,
    "num_images": 12,
    "epochs": 1,
    "steps": 4,
    "batch_size": 8,
    "learning_rate": 0.01,
    "image_size": [8, 8],
    "head_parameters": 330,
    "command": "training/probe.py",
}


def save_teacher(folder: Path, seed: int = 0) -> Path:
    options = {"num_labels": 10, "hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    tiny_dinov2(**options, seed=seed).save_pretrained(folder)
    half, size = [0.5, 0.5, 0.5], {"height": 8, "width": 8}
    processor = BitImageProcessorPil(size={"shortest_edge": 8}, crop_size=size, image_mean=half, image_std=half)
    processor.save_pretrained(folder)
    return folder


def flags(settings: dict) -> list[str]:
    pairs = [(name, value if isinstance(value, bool) else str(value)) for name, value in settings.items()]
    return [part for name, value in pairs for part in ([f"--{name}"] if value is True else [f"--{name}", value])]


@pytest.fixture
def teacher(tmp_path) -> Path:
    return save_teacher(tmp_path / "teacher")


@pytest.fixture
def run(monkeypatch, tmp_path, teacher):
    """The command line in this process, without figures."""
    digits = image_module._load_digits()
    monkeypatch.setattr(image_module, "_load_digits", lambda: digits)
    for plot in ("plot_phases", "plot_fidelity", "plot_losses"):
        monkeypatch.setattr(distill.figures, plot, lambda *args, **kwargs: None)

    def run(name: str = "run", **changes) -> Path:
        settings = SHORT | {"teacher": teacher, "output_dir": tmp_path / name} | changes
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["distill.py", *flags(settings)])
            distill.main()
        return tmp_path / name

    return run


@pytest.fixture
def stopped(run, monkeypatch):
    """A run that is interrupted before this step of stage 1, counted from 1."""

    def stopped(step: int, name: str = "run", **changes) -> None:
        backward = distill.Run.backward

        def interrupt(self, stage, *args):
            if (stage, self.step + 1) == (1, step):
                raise KeyboardInterrupt
            return backward(self, stage, *args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(distill.Run, "backward", interrupt)
            run(name, **changes)

    return stopped


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [1, 3], ids=["without a checkpoint", "with a checkpoint"])
def test_resume_reads_the_phases_and_ends_in_the_same_bits(run, stopped, monkeypatch, step, tmp_path):
    whole = run("whole")
    stopped(step)
    monkeypatch.setattr("raptor_hf.distillation.partition.find_partition", None)
    folder = run()
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert metrics(folder)["seconds"]["phases"] > 0


def test_finished_run_changes_nothing_and_keeps_what_was_added(run, monkeypatch):
    folder = run()
    # as after a probe: numbers of a head, and fields of it in the configuration
    probed = metrics(folder) | {"probes": {"digits": {"last": {"accuracy": [0.5]}}}}
    (folder / "metrics.json").write_text(json.dumps(probed))
    config = json.loads((folder / "config.json").read_text()) | {"num_segmentation_labels": 7}
    (folder / "config.json").write_text(json.dumps(config))
    before = contents(folder)
    monkeypatch.setattr(distill.Run, "evaluate", None)
    assert contents(run()) == before


def test_another_test_split_is_evaluated_with_the_same_weights(run, monkeypatch):
    folder = run(eval_every=3)
    before, weights = metrics(folder), (folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text()) | {"num_segmentation_labels": 7}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(before | {"probes": {"digits": PROBE}}))
    monkeypatch.setattr(distill.Run, "backward", None)
    run(test_split="test[12:24]", eval_every=3)
    after = metrics(folder)
    assert after["fidelity"]["r2"] != before["fidelity"]["r2"] and after["run_id"] == before["run_id"]
    assert after["evaluated_on"]["split"] == "test[12:24]" and after["probes"]["digits"].items() >= PROBE.items()
    assert [entry["stage"] for entry in after["evaluations"]] == [2]  # the others are of the former images
    assert (folder / "model.safetensors").read_bytes() == weights
    assert json.loads((folder / "config.json").read_text()) == config


FITTED = {"init": "fitted", "fit_images": 16, "depth_conditioning": "low_rank", "branch_shifts": True}
GATHERED = FITTED | {"partition": "fitted", "unit_gains": True}


@pytest.mark.parametrize(
    "changes",
    [
        GATHERED | {"num_attention_heads": 3},
        FITTED | {"train_block": 1, "stage2_steps": 0},
        GATHERED | {"train_block": 0, "stage2_steps": 0},
    ],
    ids=["gathered units", "one block trained", "one block trained, gathered units"],
)
def test_what_a_fit_made_of_the_blocks_is_kept(run, stopped, monkeypatch, changes):
    whole = run("whole", **changes)
    stopped(3, **changes)
    folder = run(**changes)
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (whole / "model.safetensors").read_bytes()
    assert metrics(folder)["fidelity"] == metrics(whole)["fidelity"]
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == (8 if "num_attention_heads" in changes else None)
    assert config["num_attention_heads"] == changes.get("num_attention_heads", 2)
    monkeypatch.setattr(distill.Run, "backward", None)
    run(**changes, test_split="test[12:24]")
    assert (folder / "model.safetensors").read_bytes() == weights


def test_trained_weights_are_on_the_disk_before_the_evaluation(run, monkeypatch, tmp_path):
    def fail(self, **kwargs):
        raise IndexError("index -1 is out of bounds")

    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(distill.Run, "evaluate", fail)
        run(eval_every=3)
    folder = tmp_path / "run"
    assert (folder / "checkpoints" / "step-00000003").is_dir() and not (folder / "metrics.json").exists()
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(distill.Run, "evaluate", fail)
        run()
    assert (folder / "model.safetensors").is_file() and not (folder / "metrics.json").exists()
    expected = run("whole")
    assert (run() / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_phases_edited_by_hand_are_taken_until_something_was_trained(run, stopped, tmp_path, capsys):
    stopped(1)
    file = tmp_path / "run" / "phases.json"
    found = json.loads(file.read_text())
    other = [[1], [2, 3, 4]] if found["blocks"] != [[1], [2, 3, 4]] else [[1, 2], [3, 4]]
    file.write_text(json.dumps(found | {"blocks": other}))
    stopped(3)  # after a checkpoint
    assert json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "info.json").read_text())
    file.write_text(json.dumps(found))
    with pytest.raises(SystemExit) as refused:
        run()
    assert refused.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"phases.json has the blocks {found['blocks']}; they must be {other}" in error
    file.write_text(json.dumps(found | {"blocks": other}))
    assert metrics(run())["blocks"] == other


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is no partition"),
        ("[]", "is no partition"),
        ('{"blocks": [[1], [1]], "method": "m", "objective": null, "variance": [1, 1, 1, 1, 1]}', "is no partition"),
        ('{"blocks": [[1], [2]], "method": "m", "objective": null, "variance": [1, 1, 1]}', "is of 2 layers"),
        ('{"blocks": [[1, 2, 3, 4]], "method": "m", "objective": null, "variance": [1, 1, 1, 1, 1]}', "has 1 blocks"),
    ],
)
def test_phases_that_cannot_be_are_refused_in_one_line(run, stopped, tmp_path, capsys, content, message):
    stopped(1)
    (tmp_path / "run" / "phases.json").write_text(content)
    with pytest.raises(SystemExit) as refused:
        run()
    assert refused.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("step", [1, 3], ids=["after the phases", "after a checkpoint"])
def test_replaced_teacher_is_noticed_and_its_return_too(run, stopped, teacher, capsys, step):
    stopped(step)
    save_teacher(teacher, seed=1)
    with pytest.raises(SystemExit) as refused:
        run()
    assert refused.value.code == 2
    assert "teacher changed since this run began: its fingerprint is" in capsys.readouterr().err.splitlines()[-1]
    save_teacher(teacher, seed=0)
    run()


def test_interrupted_override_leaves_no_file_of_the_former_run(run, stopped, tmp_path):
    former = contents(run())
    stopped(1, learning_rate=0.5, override=True)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"resolved.yaml", "phases.json", "figures"}
    assert contents(tmp_path / "run.replaced-1").items() >= former.items()


def test_all_files_of_a_run_carry_its_id(run):
    folder = run()
    run_id = (folder / "resolved.yaml").read_text().splitlines()[0].removeprefix("# run_id: ")
    info = json.loads((folder / "checkpoints" / "step-00000006" / "info.json").read_text())["progress"]
    for record in (metrics(folder), json.loads((folder / "phases.json").read_text()), info):
        assert record["run_id"] == run_id
        assert record["fingerprints"].keys() == {"teacher", "images"}
    assert metrics(folder)["teacher"]["fingerprint"] == metrics(folder)["fingerprints"]["teacher"]


def test_damaged_checkpoints_are_told_before_any_image_is_read(run, stopped, tmp_path, monkeypatch):
    stopped(3)
    for path in (tmp_path / "run" / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(b"")
    monkeypatch.setattr(Teacher, "trajectory", None)
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        run()


def launch(tmp_path: Path, *options: str, name: str = "run", **environment: str) -> subprocess.CompletedProcess:
    script = [*options, "training/distill.py"]
    arguments = flags(SHORT | {"teacher": tmp_path / "teacher", "output_dir": tmp_path / name})
    path = os.pathsep.join((str(ROOT), str(ROOT / "training")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    command = [sys.executable, "-m", "accelerate.commands.launch", *script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def test_launch_with_eager_dynamo_saves_the_weights_of_a_plain_one(run, teacher, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = load_file(run("plain") / "model.safetensors")
    torch.set_num_threads(threads)
    result = launch(tmp_path, "--cpu", "--num_processes", "1", "--dynamo_backend", "eager", name="eager")
    assert result.returncode == 0, result.stdout + result.stderr
    saved = load_file(tmp_path / "eager" / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.allclose(saved[name], expected[name], atol=1e-5) for name in expected)


def test_processes_that_do_not_know_of_each_other_train_nothing(teacher, tmp_path):
    result = launch(tmp_path, "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    assert result.returncode != 0
    assert "num_processes is 2 in the launcher, but each process runs alone" in result.stderr
    assert not (tmp_path / "run").exists()


def test_weights_of_another_run_are_written_over(run, tmp_path):
    folder = run()
    expected = (folder / "model.safetensors").read_bytes()
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "metrics.json").unlink()
    assert (run() / "model.safetensors").read_bytes() == expected
