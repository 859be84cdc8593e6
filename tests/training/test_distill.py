"""The distillation recipe, end to end, with tiny teachers of handwritten digits."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset
from raptor_settings.distill import DistillSettings
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    pipeline,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf import RaptorConfig, RaptorModel
from raptor_hf.data import images as image_module
from raptor_hf.data.images import ImageSet, load_image_processor, open_images
from raptor_hf.data.loaders import TooManyFailuresError, train_loader
from raptor_hf.distillation.inputs import disk_space
from raptor_hf.distillation.student import make_student, trial_partition
from raptor_hf.distillation.task import DistillationTask
from raptor_hf.modeling_raptor import RaptorBlock
from raptor_hf.phases import Partition, cheapest_phases, find_phases
from raptor_hf.recipes import loop
from raptor_hf.recipes.loop import DivergedError, NonFiniteError
from raptor_hf.recipes.settings import parse_settings
from raptor_hf.teacher import Teacher, load_teacher, macs
from tests.support.tiny_models import hidden_states, tiny_dinov2
from training import distill

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "training" / "configs" / "distill").glob("*.yaml"))
# those of the other recipes have other settings
CONFIGS = [path for path in YAMLS if {"num_blocks", "block_repeats"} & yaml.safe_load(path.read_text()).keys()]
SHORT = {
    "dataset": "digits",
    "train_split": "train[:48]",
    "test_split": "test[:24]",
    "block_repeats": [3, 1],
    "phase_images": 16,
    "num_bootstraps": 0,
    "stage1_steps": 6,
    "stage2_steps": 6,
    "batch_size": 8,
    "eval_batch_size": 10,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "log_every": 3,
    "checkpoint_every": 4,
}
PROMISED = {
    "phases",
    "parameters",
    "macs",
    "fidelity",
    "fidelity_by_size",
    "seconds",
    "images_per_second",
    "seed",
    "device",
    "mixed_precision",
    "versions",
}
BESIDE = {"version", "backbone", "teacher", "blocks", "unreadable_images", "evaluations"}
BESIDE |= {"run_id", "fingerprints", "evaluated_on"}


def save_teacher(folder: Path, *, crop: int = 8, **fields) -> Path:
    """A teacher of 8 x 8 images in 16 patches, 4 layers, 16 wide, with its image processor."""
    options = {"num_labels": 10, "hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    tiny_dinov2(**options | fields).save_pretrained(folder)
    half, size = [0.5, 0.5, 0.5], {"height": crop, "width": crop}
    BitImageProcessorPil(size={"shortest_edge": crop}, crop_size=size, image_mean=half, image_std=half).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teachers") / "digits")


@pytest.fixture(scope="session")
def digits() -> dict[str, Dataset]:
    return image_module._load_digits()


@pytest.fixture(autouse=True)
def one_thread():
    """The subprocesses here compute with one thread, and so must what is compared with them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(**settings) -> list[str]:
    arguments = []
    for name, value in settings.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


@pytest.fixture
def run(monkeypatch, tmp_path, teacher, digits):
    """The command line in this process; without figures, which would take most of the time, unless asked for."""
    monkeypatch.setattr(image_module, "_load_digits", lambda: digits)
    plots = ("plot_phases", "plot_fidelity", "plot_losses", "plot_depths")

    def run(name: str = "run", *, figures: bool = False, **changes) -> Path:
        settings = SHORT | {"teacher": teacher, "output_dir": tmp_path / name} | changes
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["distill.py", *flags(**settings)])
            for plot in () if figures else plots:
                patch.setattr(distill.figures, plot, lambda *args, **kwargs: None)
            distill.main()
        return tmp_path / name

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def losses(folder: Path) -> dict[str, list[tuple]]:
    """The logged losses, without times."""
    stages = json.loads((folder / "losses.json").read_text())
    parts = ("step", "loss", "block_0", "block_1")
    return {stage: [[record.get(part) for part in parts] for record in log] for stage, log in stages.items()}


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state after a step."""
    state = load_file(folder / "checkpoints" / f"step-{step:08d}" / "state.safetensors")
    return {name: tensor for name, tensor in state.items() if not name.startswith("rng.")}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Of the weights; but for the biases of the keys, which softmax ignores: their gradients are rounding noise."""
    assert first.keys() == second.keys()
    differences = []
    for name in first:
        difference = (first[name] - second[name]).abs()
        if name.endswith("qkv.bias"):
            difference = torch.cat(difference.chunk(3)[::2])
        differences.append(difference.max().item())
    return max(differences)


def pixels(folder: Path, images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, labels = zip(*(images.decode(index) for index in range(images.num_images)), strict=True)
    batch = load_image_processor(str(folder))(images=list(pictures), return_tensors="pt")["pixel_values"]
    return batch, torch.tensor(labels)


def test_folder_loads_in_transformers_and_is_as_faithful_as_it_says(run, teacher, tmp_path):
    folder = run(figures=True, block_repeats=None, num_blocks=2, num_bootstraps=4)
    found = metrics(folder)
    assert found.keys() == PROMISED | BESIDE

    images = open_images("digits", "test[:24]")
    batch, labels = pixels(folder, images)
    assert torch.equal(batch, pixels(teacher, images)[0])
    target_model = AutoModelForImageClassification.from_pretrained(teacher)
    student_model = AutoModelForImageClassification.from_pretrained(folder)
    target, states = (hidden_states(model, batch).double().numpy() for model in (target_model, student_model))
    assert np.array_equal(hidden_states(AutoModel.from_pretrained(folder), batch).double().numpy(), states)

    error, fidelity = states[:, 1:] - target[:, 1:], found["fidelity"]
    spread = target[:, 1:] - target[:, 1:].mean(axis=(0, 2), keepdims=True)
    np.testing.assert_allclose(fidelity["r2"], 1 - (error**2).sum((0, 2, 3)) / (spread**2).sum((0, 2, 3)), rtol=1e-4)
    epsilon = np.sqrt((error**2).sum((2, 3)))
    np.testing.assert_allclose(fidelity["epsilon"], epsilon.mean(0), rtol=1e-4)
    norms = np.sqrt((target[:, 1:] ** 2).sum((2, 3)))
    np.testing.assert_allclose(fidelity["relative_epsilon"], (epsilon / norms).mean(0), rtol=1e-4)
    product = (states * target).sum(3) / np.linalg.norm(states, axis=3) / np.linalg.norm(target, axis=3)
    groups = {"cls": product[:, 1:, :1], "registers": product[:, 1:, 1:3], "patches": product[:, 1:, 3:]}
    assert fidelity["cosine"].keys() == groups.keys()
    for name, values in groups.items():
        np.testing.assert_allclose(fidelity["cosine"][name], values.mean((0, 2)), rtol=1e-3, atol=1e-5)

    with torch.no_grad():
        predicted, truth = (model(batch).logits.argmax(1) for model in (student_model, target_model))
    assert fidelity["agreement"] == pytest.approx((predicted == truth).double().mean().item())
    assert fidelity["teacher_accuracy"] == pytest.approx((truth == labels).double().mean().item())
    assert fidelity["student_accuracy"] == pytest.approx((predicted == labels).double().mean().item())
    assert fidelity.keys() == {
        *("r2", "epsilon", "relative_epsilon", "cosine", "agreement", "teacher_accuracy", "student_accuracy"),
        *("num_images", "patches"),
    }
    assert fidelity["num_images"] == 24
    with torch.no_grad():
        normed = [model.base_model(batch).last_hidden_state[:, 3:] for model in (student_model, target_model)]
    cosine = torch.nn.functional.cosine_similarity(*normed, dim=2).mean().item()
    assert fidelity["patches"]["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert all(0 < value < 1 for value in fidelity["patches"].values())

    (start, middle), (again, end) = found["phases"]
    assert (start, again, end) == (0, middle, 4)
    assert found["parameters"]["student"] == sum(p.numel() for p in student_model.base_model.parameters())
    assert found["seconds"].keys() == {"phases", "stage1", "stage2", "evaluation"} and found["images_per_second"] > 0
    assert found["seed"] == 0 and found["unreadable_images"] == {} and found["versions"]["torch"] == torch.__version__
    assert json.loads((folder / "phases.json").read_text())["stability"]["modal_frequency"] > 0
    for figure in ("phases", "fidelity", "losses"):
        assert (folder / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_folder_works_in_the_image_classification_pipeline(run):
    folder = run(stage1_steps=0)
    images = open_images("digits", "test[:24]")
    answers = pipeline("image-classification", model=str(folder), top_k=1)(images.decode(3)[0])
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(folder)(pixels(folder, images)[0][3:4]).logits
    assert answers[0]["label"] == f"thing {logits.argmax().item()}"
    assert answers[0]["score"] == pytest.approx(logits.softmax(1).max().item(), rel=1e-4)


def test_tracker_gets_the_log(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(tracker="tensorboard")
    (events,) = (folder / "logs" / "distill").glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    logged = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    found = losses(folder)
    expected = [(3, 0), (6, 1)], [(9, 0), (12, 1)]
    for stage, pairs in zip(found.values(), expected, strict=True):
        for step, index in pairs:
            assert (step, pytest.approx(stage[index][1])) in logged


def test_long_enough_training_reconstructs_the_teacher(run):
    settings = {"block_repeats": [1, 1, 1, 1], "init": "middle", "depth_conditioning": "none", "normalize_loss": True}
    exact = metrics(run("exact", **settings, learning_rate=1e-9, stage1_steps=0, stage2_steps=2))["fidelity"]
    assert min(exact["r2"]) > 0.999 and exact["agreement"] == 1.0  # a block per layer, each a copy of it
    settings |= {"block_repeats": [2, 2], "depth_conditioning": "low_rank", "learning_rate": 0.01}
    tied = [metrics(run(f"{steps}", **settings, stage1_steps=steps, stage2_steps=steps)) for steps in (2, 30)]
    assert tied[1]["fidelity"]["r2"][-1] > tied[0]["fidelity"]["r2"][-1] + 0.2


def test_what_is_not_known_is_null(run, tmp_path):
    headless = save_teacher(tmp_path / "headless", num_labels=None, family="dinov2")
    fidelity = metrics(run("headless run", teacher=headless, stage2_steps=0))["fidelity"]
    assert [fidelity[name] for name in ("agreement", "teacher_accuracy", "student_accuracy")] == [None] * 3
    assert fidelity["cosine"]["registers"] is None and len(fidelity["cosine"]["patches"]) == 4
    assert AutoModel.from_pretrained(tmp_path / "headless run").config.num_register_tokens == 0

    pictures = [PIL.Image.new("L", (8, 8), 9 * i) for i in range(16)]
    Dataset.from_dict({"picture": pictures}).to_parquet(tmp_path / "unlabelled.parquet")
    unlabelled = {"dataset": tmp_path / "unlabelled.parquet", "train_split": "train", "test_split": "train[:5]"}
    fidelity = metrics(run("unlabelled", **unlabelled, stage2_steps=0))["fidelity"]
    assert fidelity["agreement"] is not None
    assert fidelity["teacher_accuracy"] is None and fidelity["student_accuracy"] is None


def test_labels_that_are_not_the_teacher_s_classes_give_no_accuracy(run, tmp_path):
    other = save_teacher(tmp_path / "other", num_labels=3)
    fidelity = metrics(run("named", teacher=other, stage2_steps=0))["fidelity"]
    assert fidelity["agreement"] is not None and fidelity["teacher_accuracy"] is None
    rows = {"image": [PIL.Image.new("L", (8, 8), 9 * i) for i in range(16)], "label": [i % 5 for i in range(16)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "numbered.parquet")
    numbered = {"dataset": tmp_path / "numbered.parquet", "train_split": "train", "test_split": "train[:5]"}
    fidelity = metrics(run("numbered", teacher=other, **numbered, stage2_steps=0))["fidelity"]
    assert fidelity["agreement"] is not None and fidelity["student_accuracy"] is None


def test_macs_are_of_the_images_that_the_processor_gives(run, tmp_path):
    large = save_teacher(tmp_path / "large", crop=12)  # position embeddings for 8 x 8
    found = metrics(run(teacher=large, stage2_steps=0))["macs"]
    model = load_teacher(str(large)).model
    assert found["teacher"] == macs(model, torch.zeros(1, 3, 12, 12)) > macs(model, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "changes",
    [
        {"input_noise": 0.1, "eval_every": 5, "horizon": 3, "ema_decay": 0.9},
        {"streaming": True, "train_split": "train", "test_split": "test", "eval_images": 20, "optimizer": "muon"},
        {"trajectory_cache_gb": 1, "mixed_precision": "bf16"},
        {"image_sizes": [4, 8], "final_image_size": 16, "final_share": 0.4},
        {"augment": True, "optimizer": "muon", "init": "fitted", "fit_images": 16, "ema_decay": 0.5}
        | {"depth_conditioning": "low_rank", "branch_shifts": True},
        {"elastic": [2, 3, 6], "elastic_distribution": "near", "gradient_accumulation_steps": 2}
        | {"elastic_targets": "nearest", "depth_conditioning": "low_rank"},
    ],
    ids=[
        "random access, average",
        "stream, Muon",
        "cached trajectories",
        "sizes",
        "augmented, fitted, Muon",
        "elastic",
    ],
)
def test_run_interrupted_again_and_again_ends_in_the_same_bits(run, monkeypatch, changes):
    whole = run("whole", **changes)
    backward, save_outputs = distill.Run.backward, distill.save_outputs
    # steps of both stages counted on: before any checkpoint, mid-way between two, right after one, in each stage's
    # first and last step; the last interruption is after the training
    for stop in (1, 4, 6, 7, 8, 11, 12, None):

        def interrupted(self, stage, *args, stop=stop):
            if (stage - 1) * 6 + self.step + 1 == stop:
                raise KeyboardInterrupt
            return backward(self, stage, *args)

        def unsaved(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(distill.Run, "backward", interrupted)
        monkeypatch.setattr(distill, "save_outputs", unsaved)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", **changes)
    monkeypatch.setattr(distill, "save_outputs", save_outputs)
    stopped = run("stopped", **changes)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert losses(stopped) == losses(whole) and len(losses(whole)["stage1"]) == len(losses(whole)["stage2"]) == 2
    evaluations = [metrics(folder)["evaluations"] for folder in (stopped, whole)]
    for entry in sum(evaluations, []):
        assert entry.pop("seconds") > 0
    assert evaluations[0] == evaluations[1]
    assert metrics(stopped)["fidelity"] == metrics(whole)["fidelity"]


def test_automatic_precision_may_change_with_the_machine_that_goes_on_and_says_so(run, monkeypatch, caplog):
    monkeypatch.setattr(loop, "multiplies_in_bf16", lambda device: True)
    save_outputs = distill.save_outputs

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "save_outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(mixed_precision="auto")
    monkeypatch.setattr(distill, "save_outputs", save_outputs)
    AcceleratorState._reset_state(reset_partial_state=True)  # as in another process
    assert "resumed" not in caplog.text
    monkeypatch.setattr(loop, "multiplies_in_bf16", lambda device: False)
    folder = run(mixed_precision="auto")
    assert "saved with mixed_precision bf16, resumed with no" in caplog.text
    assert metrics(folder)["mixed_precision"] == "no"


def test_finished_run_started_again_takes_no_step_and_writes_the_same_model(run, monkeypatch):
    folder = run()
    first = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(distill.Run, "backward", None)
    assert (run() / "model.safetensors").read_bytes() == first


def kill(folder: Path, step: int, delay: float, command: list[str]) -> None:
    """Starts the recipe and kills it, that many seconds after it wrote a checkpoint of that step or a later one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(f"{folder}.txt", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    while process.poll() is None:
        if any(int(path.name[5:13]) >= step for path in folder.glob("checkpoints/step-*")):
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL, Path(f"{folder}.txt").read_text()
    assert not (folder / "metrics.json").exists()


@pytest.mark.parametrize(
    "steps",
    [[36], pytest.param([3, 12, 30, 48, 66], marks=pytest.mark.slow)],
    ids=["once in stage 2", "five times in both stages"],
)
def test_killed_run_ends_in_the_same_bits(run, tmp_path, teacher, steps):
    # many short steps, so that a kill has something to interrupt
    settings = SHORT | {"stage1_steps": 30, "stage2_steps": 90, "checkpoint_every": 3, "input_noise": 0.1}
    whole = run("whole", **settings)
    settings |= {"teacher": teacher, "output_dir": tmp_path / "killed"}
    delays = random.Random(0)
    for step in steps:
        command = [sys.executable, "training/distill.py", *flags(**settings)]
        kill(tmp_path / "killed", step, delays.uniform(0, 0.05), command)
    killed = run("killed", **settings)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert losses(killed) == losses(whole)


def test_other_settings_in_the_same_folder_are_refused_and_shown(run, capsys):
    folder = run()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        run(learning_rate=0.5, block_repeats=[2, 2])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "block_repeats: [3, 1] -> [2, 2], learning_rate: 0.001 -> 0.5" in message and "override" in message
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_override_trains_anew_with_the_other_settings(run, monkeypatch):
    changes = {"learning_rate": 0.02, "block_repeats": [2, 2], "stage2_steps": 3}
    expected = run("fresh", **changes)
    run()
    # an overriding run is resumed like any other
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill.Run, "evaluate", interrupt)
        run(**changes, override=True)
    monkeypatch.setattr(distill.Run, "backward", None)
    folder = run(**changes, override=True)
    assert same(weights(folder), weights(expected)) and metrics(folder)["blocks"] == [[1, 2], [3, 4]]
    assert yaml.safe_load((folder / "resolved.yaml").read_text())["learning_rate"] == 0.02


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_settings_of_the_loss_reach_it(run, teacher, monkeypatch):
    tasks, make = [], DistillationTask.__init__

    def spy(self, *args, **options):
        tasks.append(self)
        make(self, *args, **options)

    monkeypatch.setattr(DistillationTask, "__init__", spy)
    short = {"stage1_steps": 2, "stage2_steps": 2}
    run("published", **short)
    run("ours", **short, stage2_weights=[0.2, 0.3, 0.5], horizon=2, input_noise=0.1, loss="frobenius")
    run("plain", **short, cls_weighting=False, normalize_loss=True)
    run("mixture", **short, cosine_weight=0.5, normed_mse_weight=0.25, normalize_loss=True)
    published, ours, plain, mixture = tasks
    assert mixture.loss.kinds == {"mse": 1.0, "cosine": 0.5, "normed_mse": 0.25} and published.loss.kinds == {
        "mse": 1.0
    }
    norm = AutoModelForImageClassification.from_pretrained(teacher).base_model.layernorm
    assert same(dict(mixture.loss.final_norm.state_dict()), dict(norm.state_dict()))
    assert (published.stage1_weights, published.stage2_weights) == ([0.34, 0.33, 0.33], [0.45, 0.10, 0.45])
    assert (published.horizon, published.input_noise, published.loss.kind) == (None, 0.0, "mse")
    assert published.loss.layer_scale is None and published.loss.tokens.num_registers == 2
    assert (ours.stage2_weights, ours.horizon, ours.input_noise) == ([0.2, 0.3, 0.5], 2, 0.1)
    assert ours.loss.kind == "frobenius" and (plain.stage1_weights, plain.stage2_weights) == (None, None)
    # the standard deviations on the images that the phases were found on, the first ones of the training
    options = {"batch_size": 16, "seed": 0, "num_steps": 1}
    (batch,) = train_loader(open_images("digits", "train[:48]"), load_image_processor(str(teacher)), **options)
    model = AutoModelForImageClassification.from_pretrained(teacher)
    states = hidden_states(model, batch["pixel_values"]).transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(plain.loss.layer_scale, states.var(dim=1, correction=0).mean(dim=1).sqrt())


def test_all_blocks_together_train_as_each_alone(run):
    together = weights(run("together", stage2_steps=0))
    for block in range(2):
        alone = weights(run(f"alone {block}", stage2_steps=0, train_block=block))
        own = {name for name in together if f".blocks.{block}." in name or f".conditioners.{block}." in name}
        assert own and all(torch.equal(together[name], alone[name]) for name in own)
        others = {name for name in together if ".encoder." in name} - own
        assert not any(torch.equal(together[name], alone[name]) for name in others if name.endswith("fc1.weight"))


def test_student_drops_nothing_whatever_the_teacher_was_trained_with(run, tmp_path):
    drops = ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")
    regularised = save_teacher(tmp_path / "regularised", **dict.fromkeys(drops, 0.5))
    folders = [run("regularised run", teacher=regularised), run()]
    assert same(*map(weights, folders))
    assert {getattr(AutoModel.from_pretrained(folders[0]).config, name) for name in drops} == {0.0}


@pytest.fixture
def batches(monkeypatch) -> list[tuple[torch.Tensor, float]]:
    """Images and weight of teacher forcing of every step that is taken."""
    taken, backward = [], distill.Run.backward

    def spy(self, stage, pixel_values, forcing):
        taken.append((pixel_values, forcing))
        return backward(self, stage, pixel_values, forcing)

    monkeypatch.setattr(distill.Run, "backward", spy)
    return taken


def test_stage2_goes_on_in_the_data_with_a_fresh_optimizer(run, batches):
    folder = run(train_split="train[:96]")
    digests = {image.numpy().tobytes() for images, _ in batches for image in images}
    assert len(batches) == 12 and len(digests) == 96  # every image once
    # Adam's own count of the steps of stage 2, 4 of them done in the last checkpoint but one
    for step, count in ((10, 4), (12, 6)):
        counts = [tensor.item() for name, tensor in checkpoint(folder, step).items() if name.endswith(".step")]
        assert set(counts) == {count}


def test_fitted_phases_are_kept_with_their_costs_and_with_what_distances_find(run, caplog):
    caplog.set_level("INFO")
    folder = run(block_repeats=None, num_blocks=2, partition="fitted", stage1_steps=0, stage2_steps=2)
    record = json.loads((folder / "phases.json").read_text())
    costs = np.full((4, 4), np.inf)
    for start, row in enumerate(record["costs"]):
        costs[start, start:] = row
    found = Partition.from_dict(record)
    assert found == cheapest_phases(costs, 2) and found.method == "fitted"
    by_distance = find_phases(np.array(record["distance"]), 2)
    if by_distance.blocks != found.blocks:
        assert Partition.from_dict(record["other_phases"]["normalized"]).blocks == by_distance.blocks
    assert metrics(folder)["blocks"] == [list(block) for block in found.blocks]
    assert f"phases {found} (fitted)" in caplog.text


def test_augmentation_is_drawn_by_the_seed_and_leaves_phases_and_tests_alone(run, batches):
    plain = run("plain", stage1_steps=0)
    taken = [images for images, _ in batches]
    batches.clear()
    first, again = run("first", stage1_steps=0, augment=True), run("again", stage1_steps=0, augment=True)
    drawn = [images for images, _ in batches]
    assert all(torch.equal(*pair) for pair in zip(drawn[:6], drawn[6:], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(drawn[:6], taken, strict=True))
    assert same(weights(first), weights(again)) and not same(weights(first), weights(plain))
    phases = [json.loads((folder / "phases.json").read_text()) for folder in (plain, first)]
    assert phases[0]["distance"] == phases[1]["distance"]


def test_images_of_several_sizes_have_about_as_many_tokens_in_a_batch(run, batches):
    sizes = {"image_sizes": [4, 8], "image_size_shares": [2, 1], "final_image_size": 16, "final_share": 0.5}
    folder = run(**sizes, train_split="train[:96]")
    shapes = [tuple(images.shape[i] for i in (0, 3)) for images, _ in batches]
    # of 7, 19 and 67 tokens; the last half of stage 2 has the final size
    assert {*shapes[:9]} == {(21, 4), (8, 8)} and shapes[9:] == [(2, 16)] * 3
    (record,) = [record for record in json.loads((folder / "losses.json").read_text())["stage2"] if record["step"] == 6]
    assert record["images_per_second"] > 0
    assert [*metrics(folder)["fidelity_by_size"]] == ["4 x 4", "16 x 16"]


def test_a_final_size_has_at_least_one_step(run, batches):
    run(final_image_size=16, final_share=0.01)
    assert [pixels.shape[-1] for pixels, _ in batches] == [8] * 11 + [16]


def test_fidelity_is_measured_at_twice_the_size_or_as_asked(run, teacher, digits, monkeypatch):
    folder = run(test_split="test")
    assert [*metrics(folder)["fidelity_by_size"]] == ["16 x 16"]
    weights, student = (folder / "model.safetensors").read_bytes(), RaptorModel.from_pretrained(folder).eval()
    monkeypatch.setattr(distill.Run, "backward", None)  # another size is no reason to train again
    run(test_split="test", eval_sizes=[12])
    (found,) = metrics(folder)["fidelity_by_size"].values()
    half, size = [0.5, 0.5, 0.5], {"height": 12, "width": 12}
    processor = BitImageProcessorPil(size={"shortest_edge": 12}, crop_size=size, image_mean=half, image_std=half)
    pictures = [digits["test"][index]["image"].convert("RGB") for index in range(128)]
    pixel_values = processor(images=pictures, return_tensors="pt")["pixel_values"]
    states = load_teacher(str(teacher)).trajectory(pixel_values).double()
    own = hidden_states(student, pixel_values).double()
    error, spread = (own - states).square(), (states - states.mean(dim=(0, 2), keepdim=True)).square()
    expected = 1 - error.sum(dim=(0, 2, 3)) / spread.sum(dim=(0, 2, 3))
    np.testing.assert_allclose(found["r2"], expected[1:], atol=1e-5)
    assert found["num_images"] == 128 and metrics(folder)["fidelity"]["num_images"] == 500
    assert (folder / "model.safetensors").read_bytes() == weights


def test_cached_trajectories_train_the_same_student_with_fewer_passes_of_the_teacher(
    run, monkeypatch, batches, tmp_path
):
    passed, trajectory = [], Teacher.trajectory

    def spy(self, pixel_values):
        passed.append(len(pixel_values))
        return trajectory(self, pixel_values)

    monkeypatch.setattr(Teacher, "trajectory", spy)
    plain, without = run("plain"), sum(passed)
    passed.clear()
    cached = run("cached", trajectory_cache_gb=1)
    assert sum(passed) == without - 48  # of two epochs of 48 images, all of the second
    assert all(torch.equal(batches[step][0], batches[step + 12][0]) for step in range(12))
    assert largest_difference(weights(plain), weights(cached)) < 1e-6
    # two students of other blocks share a folder, which is of one teacher and precision
    shared = {"trajectory_cache_gb": 1, "trajectory_cache_dir": tmp_path / "kept"}
    run("first", **shared)
    passed.clear()
    second = run("second", **shared, block_repeats=[2, 2])
    assert sum(passed) == without - 96
    assert largest_difference(weights(run("alone", block_repeats=[2, 2])), weights(second)) < 1e-6


def test_elastic_student_is_measured_at_every_pace_that_it_learned(run, monkeypatch):
    paces, task = [], distill.DistillationTask
    forward = task.forward
    monkeypatch.setattr(task, "forward", lambda self, *args: (paces.append(args[4]), forward(self, *args))[1])
    folder = run(elastic=[2, 8], elastic_share=0.7, stage2_steps=12, normalize_loss=True, eval_every=4, figures=True)
    assert set(paces[:12]) == {None} and set(paces[12:]) == {None, 2, 8}  # 2 blocks of 6 steps in stage 1
    by_steps = metrics(folder)["fidelity"]["by_steps"]
    assert list(by_steps) == ["2", "4", "8"] and "by_steps" not in metrics(folder)["evaluations"][0]
    assert [row["block_repeats"] for row in by_steps.values()] == [[1, 1], [3, 1], [6, 2]]
    trained = metrics(folder)["fidelity"]
    assert by_steps["4"]["r2"] == pytest.approx(trained["r2"][-1], abs=1e-6)
    assert by_steps["4"]["student_accuracy"] == trained["student_accuracy"]
    assert by_steps["4"]["macs"] == metrics(folder)["macs"]["student"]
    assert by_steps["2"]["macs"] < by_steps["4"]["macs"] < by_steps["8"]["macs"]
    assert len({row["r2"] for row in by_steps.values()}) == 3
    assert (folder / "figures" / "depths.png").exists() and "**Elastic**" in (folder / "README.md").read_text()
    assert RaptorConfig.from_pretrained(folder).step_scaling


def test_parts_of_a_batch_take_paces_of_their_own_and_the_log_has_the_loss_of_each_pace(run, monkeypatch):
    found, forward = [], distill.DistillationTask.forward

    def spy(self, *args):
        losses = forward(self, *args)
        found.append((args[4] or 4, losses["loss"].item()))
        return losses

    monkeypatch.setattr(distill.DistillationTask, "forward", spy)
    folder = run(elastic=[2, 8], elastic_share=0.5, gradient_accumulation_steps=2, stage1_steps=0, stage2_steps=6)
    paces = [pace for pace, _ in found]
    assert paces[::2] == [4] * 6 and set(paces[1::2]) == {2, 8}
    records = json.loads((folder / "losses.json").read_text())["stage2"]
    for record, calls in zip(records, (found[:6], found[6:]), strict=True):
        names = {name for name in record if name.endswith("_steps")}
        assert names == {f"loss_{pace}_steps" for pace, _ in calls}
        for name in names:
            own = [loss for pace, loss in calls if name == f"loss_{pace}_steps"]
            assert record[name] == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_the_averaged_weights_are_evaluated_and_saved(run, monkeypatch):
    kept, update = [], distill.update_average

    def spy(optimizer, decay, step):
        update(optimizer, decay, step)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kept.append([parameter.detach().clone() for parameter in parameters])

    monkeypatch.setattr(distill, "update_average", spy)
    last, folder = run("last"), run("averaged", ema_decay=0.6)
    assert len(kept) == 12
    # of stage 2 alone; its first decays are (1 + step) / (10 + step)
    expected = kept[6]
    for step in range(1, 6):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, kept[6 + step], strict=True)]
    model = AutoModelForImageClassification.from_pretrained(folder)
    saved = {name: value for name, value in model.named_parameters() if ".encoder." in name}  # in the optimizer's order
    for (name, value), average in zip(saved.items(), expected, strict=True):
        torch.testing.assert_close(value.data, average)
        assert not torch.equal(weights(last)[name], value)
    assert metrics(last)["fidelity"]["r2"] != metrics(folder)["fidelity"]["r2"]
    # training itself is the same
    assert losses(last) == losses(folder)


def test_a_run_whose_loss_stays_above_its_start_stops(run):
    with pytest.raises(DivergedError, match="has been above .* for 4 steps: lower learning_rate"):
        run(learning_rate=0.1, init="middle", stage1_steps=0, stage2_steps=30, max_rising_steps=4)


@pytest.mark.parametrize(
    "changes, harmless",
    [
        ({}, [0.0, 0.0]),
        ({"normalize_loss": True}, [1.0, 0.5]),  # stage 1 has the sum over two blocks, stage 2 the mean over steps
        ({"normalize_loss": True, "stage1_weights": [1, 1, 2], "stage2_weights": [1, 1, 8]}, [2.5, 5.0]),
        ({"normalize_loss": True, "stage1_weights": [1, 1, 2], "stage2_steps": 0, "train_block": 1}, [2.0]),
        ({"normalize_loss": True, "cls_weighting": False, "stage2_steps": 0, "train_block": 0}, [0.5]),
        ({"normalize_loss": True, "loss": "cosine"}, [0.0, 0.0]),
    ],
    ids=["plain", "normalised", "weights", "last block", "first block", "cosine"],
)
def test_half_of_the_variance_is_harmless_where_the_loss_is_a_share_of_it(run, monkeypatch, changes, harmless):
    seen, guard = [], distill.RisingLossGuard

    def watched(*args, **kwargs):
        seen.append(kwargs["harmless"])
        return guard(*args, **kwargs)

    monkeypatch.setattr(distill, "RisingLossGuard", watched)
    run(**changes)
    assert seen == pytest.approx(harmless)


def test_stage_2_is_guarded_from_its_first_step_on_while_stage_1_would_still_anneal(run, monkeypatch):
    checked = []
    monkeypatch.setattr(distill.RisingLossGuard, "check", lambda self, step, loss, lr: checked.append(step))
    run(stage1_steps=6, anneal_fraction=1.0)
    assert checked == [6, *range(1, 7)]  # in stage 1 only where the forcing is that of its last step


def test_a_short_run_that_diverges_stops_before_its_end_and_a_healthy_one_does_not(run):
    with pytest.raises(DivergedError, match="has been above .* for 22 steps: lower learning_rate"):
        run("diverges", learning_rate=0.5, init="middle", stage1_steps=0, stage2_steps=44)
    healthy = losses(run("healthy", init="middle", stage1_steps=0, stage2_steps=44))["stage2"]
    assert healthy[-1][1] < healthy[0][1]


def test_teacher_forcing_is_annealed_by_default_or_all_or_nothing(run, batches):
    for kind, expected in (("anneal", [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]), ("only", [1.0] * 6), ("none", [0.0] * 6)):
        run(kind, teacher_forcing=kind, anneal_fraction=2 / 3, stage2_steps=0)
        assert [forcing for _, forcing in batches] == pytest.approx(expected)
        batches.clear()
    run("floor", teacher_forcing_floor=0.4, anneal_fraction=2 / 3, stage2_steps=0)
    assert [forcing for _, forcing in batches] == pytest.approx([1.0, 0.75, 0.5, 0.4, 0.4, 0.4])


def test_training_leaves_everything_but_the_blocks_as_the_teacher_has_it(run, teacher):
    student, source = AutoModelForImageClassification.from_pretrained(run()), load_teacher(str(teacher))
    assert same(dict(student.base_model.embeddings.state_dict()), source.embeddings_state_dict())
    assert same(dict(student.base_model.layernorm.state_dict()), dict(source.layernorm_state_dict()))
    assert same(dict(student.classifier.state_dict()), dict(source.classifier_state_dict()))


def test_gradient_accumulation_equals_none(run):
    settings = {"stage1_steps": 3, "stage2_steps": 3, "normalize_loss": True}
    whole, parts = run("whole", **settings), run("parts", **settings, gradient_accumulation_steps=4)
    assert largest_difference(weights(whole), weights(parts)) < 1e-6
    for stage, log in losses(whole).items():
        assert [record[1] for record in losses(parts)[stage]] == pytest.approx([record[1] for record in log], rel=1e-5)


def test_gradient_checkpointing_equals_none(run, monkeypatch):
    grads, step = [], RaptorBlock._step

    def spy(self, *args, **kwargs):
        grads.append(torch.is_grad_enabled())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RaptorBlock, "_step", spy)
    whole, plain = run("whole"), grads.count(True)
    grads.clear()
    folder = run("checkpointed", gradient_checkpointing=True)
    assert same(weights(whole), weights(folder))
    assert grads.count(True) > 1.8 * plain  # every step again in the backward pass; counting the MACs runs one forward


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones(run):
    settings = {"stage1_steps": 3, "stage2_steps": 3}
    eager, compiled = run("eager", **settings), run("compiled", **settings, compile=True)
    assert largest_difference(weights(eager), weights(compiled)) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_teacher_in_half_precision_gives_a_student_in_float32(run, dtype):
    folder = run(teacher_dtype=dtype, stage1_steps=2, stage2_steps=2)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}


def test_stage1_clips_every_block_alone_and_stage2_all_together(run, monkeypatch):
    sizes, clip = [], nn.utils.clip_grad_norm_

    def spy(parameters, *args):
        assert all(parameter.grad is not None for parameter in parameters)  # else a GPU run mixes devices
        sizes.append(sum(parameter.numel() for parameter in parameters))
        return clip(parameters, *args)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    run("both", stage1_steps=2, stage2_steps=2)
    block = sizes[0]
    assert sizes == [block] * 4 + [2 * block] * 2
    sizes.clear()
    run("one", stage1_steps=2, stage2_steps=0, train_block=1)
    assert sizes == [block] * 2


@pytest.fixture(scope="session")
def damaged(tmp_path_factory, digits) -> Path:
    """A folder of 96 images for training by class, the files of 4 of them cut off."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 96), ("test", 10)):
        for index, row in enumerate(digits[split].select(range(count))):
            (folder / split / str(row["label"])).mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / split / str(row["label"]) / f"{index}.png")
    for path in sorted((folder / "train").rglob("*.png"))[10::24]:
        path.write_bytes(path.read_bytes()[:60])
        path.rename(path.with_name(f"broken-{path.name}"))
    return folder


def test_two_processes_train_as_one(run, tmp_path, teacher, damaged):
    images = {"dataset": damaged, "train_split": "train", "test_split": "test"}
    settings = SHORT | images | {"stage1_steps": 10, "stage2_steps": 10, "normalize_loss": True}
    # of sizes whose batches divide among two; each process keeps an average, and states of the images it has seen
    settings |= {"image_sizes": [8, 16], "image_size_shares": [3, 1], "ema_decay": 0.5, "trajectory_cache_gb": 1}
    one, two = run("one", **settings), tmp_path / "two"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "training/accelerate/cpu2.yaml"]
    command = [*launch, "training/distill.py", *flags(**settings, teacher=teacher, output_dir=two)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert largest_difference(weights(one), weights(two)) < 1e-4
    np.testing.assert_allclose(metrics(two)["fidelity"]["r2"], metrics(one)["fidelity"]["r2"], atol=1e-4)
    for name in ("phases", "macs", "unreadable_images"):
        assert metrics(two)[name] == metrics(one)[name]
    assert len(metrics(one)["unreadable_images"]) == 4
    # the processes draw different noise
    state = load_file(two / "checkpoints" / "step-00000020" / "state.safetensors")
    assert not torch.equal(state["rng.0.torch"], state["rng.1.torch"])


def test_damaged_image_is_counted_named_and_replaced(run, damaged, batches, caplog):
    images = {"dataset": damaged, "train_split": "train", "test_split": "test"}
    folder = run(**images)
    assert [len(images) for images, _ in batches] == [8] * 12  # once through the images
    found = metrics(folder)["unreadable_images"]
    assert found.keys() == set(map(str, damaged.rglob("broken-*")))
    assert all(f"cannot read {name}: {reason}" in caplog.text for name, reason in found.items())
    with pytest.raises(TooManyFailuresError, match=r"4 images cannot be read, more than max_failures=3.*broken-"):
        run("strict", **images, max_decode_failures=3)


@pytest.mark.parametrize("poisoned_step", [3, 9], ids=["stage 1", "stage 2"])
def test_step_that_is_not_finite_never_reaches_the_weights(run, monkeypatch, poisoned_step):
    trajectory, calls = Teacher.trajectory, []

    def poisoned(self, pixel_values):
        states = trajectory(self, pixel_values)
        calls.append(1)
        if len(calls) == 2 + poisoned_step:  # the phases take two batches
            states[0, 2, 3, 4] = math.nan
        return states

    monkeypatch.setattr(Teacher, "trajectory", poisoned)
    settings = {"checkpoint_every": 1, "keep_checkpoints": 12}
    step = (poisoned_step - 1) % 6 + 1
    with pytest.raises(NonFiniteError, match=rf"at step {step} \(1 in a row, 0 allowed\), images row \d+ of digits"):
        run("ended", **settings)
    calls.clear()
    folder = run("skipped", **settings, max_nonfinite_steps=1)
    assert same(checkpoint(folder, poisoned_step), checkpoint(folder, poisoned_step - 1))
    assert not same(checkpoint(folder, poisoned_step + 1), checkpoint(folder, poisoned_step))
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())
    assert same(checkpoint(folder.with_name("ended"), poisoned_step - 1), checkpoint(folder, poisoned_step - 1))


def test_weights_that_are_not_finite_are_not_saved(run, monkeypatch, tmp_path):
    monkeypatch.setattr(distill.Run, "clip_gradients", lambda self, stage: True)
    forward = DistillationTask.forward

    def overflow(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        return found | {"loss": found["loss"] * math.inf}

    monkeypatch.setattr(DistillationTask, "forward", overflow)
    with pytest.raises(RuntimeError, match="the student's weights are not finite in .*; nothing was saved"):
        run(stage1_steps=2, stage2_steps=0)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture
def refused(run, capsys, monkeypatch, tmp_path):
    """Runs that must end with one line and status 2 before the first image reaches the teacher."""
    monkeypatch.setattr(Teacher, "trajectory", None)

    def refused(**changes) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(**changes)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        line = error.splitlines()[-1]
        assert line.startswith("distill.py: error: ")
        assert not (tmp_path / "run" / "resolved.yaml").exists()
        return line

    return refused


def test_teacher_that_cannot_be_one_is_refused(refused, tmp_path):
    assert "no such folder" in refused(teacher=tmp_path / "nowhere" / "teacher")
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    assert "is a 'bert' model; supported are dinov2" in refused(teacher=tmp_path / "bert")


def test_student_is_refused_as_a_teacher(refused, tmp_path):
    student = RaptorModel(RaptorConfig(block_repeats=(3, 1), hidden_size=16, num_attention_heads=2))
    student.save_pretrained(tmp_path / "student")
    assert "model_type 'raptor'; known are dinov2" in refused(teacher=tmp_path / "student")


def test_data_set_without_usable_images_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(dataset=tmp_path / "empty", train_split="train")
    assert "no such folder or file" in refused(dataset=tmp_path / "nowhere", train_split="train")
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "text.parquet")
    line = refused(dataset=tmp_path / "text.parquet", train_split="train", test_split="train")
    assert "has no column of images" in line and "['text']" in line
    line = refused(image_column="photo")
    assert "image_column='photo' is no column of digits train[:48]; its columns are ['image', 'label']" in line
    assert "label_column='kind' is no column" in refused(label_column="kind")
    assert "split='validation'" in refused(test_split="validation")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_repeats": None, "num_blocks": 5}, "num_blocks is 5; it must be between 1 and the teacher's 4 layers"),
        ({"block_repeats": None, "num_blocks": 0}, "num_blocks is 0"),
        ({"block_repeats": None}, "give block_repeats (steps per block)"),
        ({"num_blocks": 3}, "block_repeats is [3, 1], but num_blocks is 3; give one of them"),
        ({"block_repeats": [3, 2]}, "block_repeats is [3, 2], which sums to 5; it must sum to the teacher's 4 layers"),
        ({"block_repeats": [5, -1]}, "block_repeats is [5, -1]"),
        (
            {"block_repeats": None, "num_blocks": 4, "partition": "random_fragmented"},
            "num_blocks is 4; it must be in 2..3",
        ),
        ({"batch_size": 9, "gradient_accumulation_steps": 2}, "batch_size is 9; it must be a multiple of 2"),
        ({"learning_rate": "inf"}, "learning_rate is inf; it must be finite"),
        ({"learning_rate": "nan"}, "learning_rate is nan; it must be above 0"),
        ({"warmup_steps": 6}, "warmup_steps is 6; it must be below stage1_steps, 6"),
        ({"stage1_steps": 0, "stage2_steps": 0}, "there is nothing to train"),
        ({"augment": True, "trajectory_cache_gb": 1}, "trajectory_cache_gb is 1.0; it must be 0 with augment"),
        ({"trajectory_cache_dir": "kept"}, "trajectory_cache_gb is 0; with trajectory_cache_dir it must be above 0"),
        (
            {"image_sizes": [4, 9]},
            "image_sizes has 9: the image processor's output of 9 x 9 pixels does not divide into",
        ),
        ({"final_image_size": 3}, "final_image_size has 3: the image processor's output of 3 x 3 pixels"),
        (
            {"eval_sizes": [5]},
            "eval_sizes has 5: the image processor's output of 5 x 5 pixels does not divide into patches",
        ),
        (
            {"train_split": "train["},
            "train_split is 'train['; it must be a split or a part of one, such as train[:80%]",
        ),
        ({"test_split": "test[:"}, "test_split is 'test[:'; it must be a split or a part of one"),
        ({"tracker": "nonsense"}, "tracker is 'nonsense'; it must be one of all, "),
        ({"tracker": "clearml"}, "tracker is 'clearml', which is not installed; install it"),
        ({"image_sizes": [4, 4]}, "image_sizes is [4, 4]; it must be one or more different sizes"),
        ({"image_size_shares": [1.0]}, "image_size_shares is [1.0]; it must be a share for each of image_sizes, None"),
        ({"image_sizes": [4], "image_size_shares": [0.0]}, "it must be a share for each of image_sizes, [4]"),
        (
            {"image_sizes": [4], "streaming": True},
            "image_sizes is [4] and final_image_size None; both must be none with",
        ),
        ({"anneal_fraction": 1.5}, "anneal_fraction is 1.5; it must be between 0 and 1"),
        ({"horizon": 0}, "horizon is 0"),
        ({"input_noise": -0.1}, "input_noise is -0.1"),
        ({"stage2_weights": [0.5, 0.5]}, "stage2_weights is [0.5, 0.5]"),
        ({"eval_images": 0}, "eval_images is 0"),
        ({"max_decode_failures": -1}, "max_decode_failures is -1"),
        ({"conditioning_rank": 0}, "conditioning_rank is 0"),
        ({"init": "first", "ffn_type": "swiglu"}, "ffn_type='swiglu' does not fit the teacher's weights"),
        ({"train_block": 0}, "stage2_steps is 6; it must be 0 with train_block, which trains one block in stage 1"),
        ({"branch_shifts": True}, "depth_conditioning is 'scale'; with branch_shifts it must be 'low_rank'"),
        ({"train_block": 2, "stage2_steps": 0}, "train_block is 2; it must be between 0 and 1"),
        (
            {"num_attention_heads": 3, "init": "middle"},
            "num_attention_heads is 3; with init middle blocks have the heads",
        ),
        (
            {"num_attention_heads": 3, "init": "fitted", "depth_conditioning": "low_rank"},
            "init fitted without unit_gains blocks have the heads of the teacher's layers, 2",
        ),
        (
            {"elastic": [1]},
            "elastic is [1]; it must be one or more numbers of steps, each at least",
        ),
        ({"elastic": [3], "stage2_steps": 0}, "stage2_steps is 0; elastic needs a stage 2"),
        ({"elastic": [3], "horizon": 2}, "horizon is 2; elastic needs none"),
        ({"elastic": [3], "elastic_share": 1.5}, "elastic_share is 1.5"),
        ({"partition": "best"}, "partition"),
        ({"learning_rates": 1.0}, "unknown flag '--learning_rates'; did you mean --learning_rate"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_setting_that_cannot_work_is_refused_before_any_work(refused, changes, message):
    assert message in refused(**changes)


def test_images_that_do_not_divide_into_patches_are_refused(refused, tmp_path):
    odd = save_teacher(tmp_path / "odd", crop=9)
    assert "9 x 9 pixels does not divide into patches of patch_size=2; use 8 or 10" in refused(teacher=odd)


def test_folder_that_cannot_be_written_or_is_full_is_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    line = refused(trajectory_cache_gb=0.1, trajectory_cache_dir=tmp_path / "file")
    assert "trajectory_cache_dir=" in line and "is not a folder that can be written to" in line
    line = refused(output_dir=tmp_path / "file" / "run")
    assert "output_dir=" in line and "is not a folder that can be written to" in line
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "is on a disk with 0.00 GB free, and the run needs 0.01 GB" in refused()


def test_space_that_a_run_needs_is_that_of_its_student():
    teacher = Teacher(tiny_dinov2())
    named = {"teacher": "teacher", "dataset": "digits", "output_dir": "run"}
    settings = DistillSettings(**named, block_repeats=[3, 1], keep_checkpoints=2)
    wide = dataclasses.replace(settings, num_attention_heads=64)
    # 61 heads of 8 features, query, key, value and projection, for 24 features in 2 blocks
    more = 2 * 61 * 8 * (4 * 24 + 3)
    # the model, and weights with two moments of three checkpoints
    assert disk_space(wide, teacher) - disk_space(settings, teacher) == 4 * more * (1 + 3 * 3)


def test_there_are_configurations_of_distillations():
    assert {"digits_k3", "dinov2_vitb14_k3"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_makes_a_student_of_its_teacher(path):
    settings = parse_settings(DistillSettings, [str(path)], exit_on_error=False)
    header = path.read_text().split("\nteacher:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert settings.output_dir == f"runs/{path.stem}"
    # the teacher's depth, at a width that any machine can build in no time
    num_layers = 24 if "large" in settings.teacher else 12
    config = Dinov2WithRegistersConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=num_layers, image_size=28, patch_size=14
    )
    partition = trial_partition(settings, num_layers)
    student = make_student(Teacher(Dinov2WithRegistersModel(config)), partition, settings)
    assert student.config.num_blocks == (settings.num_blocks or len(settings.block_repeats))
    assert student.config.num_hidden_layers == num_layers
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in student.named_parameters() if name.split(".")[0] == "encoder"}


def test_a_shallower_student_learns_the_layers_that_it_is_given(run, teacher):
    folder = run(target_layers=[3, 4], block_repeats=[1, 1], init="middle", depth_conditioning="none")
    assert len(metrics(folder)["fidelity"]["r2"]) == 2 and metrics(folder)["blocks"] == [[1], [2]]
    student = AutoModel.from_pretrained(folder)
    assert student.config.num_hidden_layers == 2
    whole = metrics(run("whole", block_repeats=[1, 1, 1, 1], init="middle", depth_conditioning="none"))
    # fewer layers than the teacher cost fewer parameters and are counted against the whole teacher
    assert metrics(folder)["parameters"]["teacher"] == whole["parameters"]["teacher"]
    assert metrics(folder)["parameters"]["student"] < whole["parameters"]["student"]


def test_target_layers_need_block_repeats():
    with pytest.raises(ValueError, match="give block_repeats"):
        DistillSettings(teacher="t", dataset="digits", output_dir="o", num_blocks=2, target_layers=[2, 4])
