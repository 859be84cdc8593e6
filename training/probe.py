"""Train a linear head on a frozen backbone, report its metric, and save it into the model's folder as a variant.

    accelerate launch --config_file training/accelerate/cpu.yaml training/probe.py training/configs/probe/digits.yaml
    accelerate launch training/probe.py training/configs/probe/ade20k.yaml --model runs/k3

The backbone is a student, by folder or name, or a teacher, which is turned into the Raptor with one block per layer and
saved as such: teacher and student go through the same code. Features are computed once where no augmentation asks for
new ones and they fit into memory. Every setting is a key of the YAML file and a flag of the same name; those of the
optimization are the published ones of the task unless given. The same command, given again, resumes from the last
checkpoint. What a probe costs and gives stands in its config.
"""

from raptor_settings.parse import parse_settings
from raptor_settings.probe import ProbeSettings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(ProbeSettings)

import copy
import dataclasses
import logging
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from raptor_hf import figures
from raptor_hf.configuration_raptor import as_pair
from raptor_hf.data.loaders import EpochOrder
from raptor_hf.hub.heads import list_heads, save_head
from raptor_hf.probing import (
    PROTOCOLS,
    FeatureBank,
    Probe,
    ProbeMetric,
    initialize_head,
    pool_features,
    scheduled_rate,
)
from raptor_hf.recipes.files import as_plain, write_json, written_beside
from raptor_hf.recipes.fingerprints import fingerprint_model
from raptor_hf.recipes.loop import (
    IntervalLog,
    NonFiniteGuard,
    describe_environment,
    is_step_finite,
    logged,
    progress_bar,
    set_learning_rate,
)
from raptor_hf.recipes.probe_inputs import Inputs, disk_space, fits_cache, open_inputs
from raptor_hf.recipes.run_metrics import METRICS_FILE, ProbeRecord, StudentMetrics
from raptor_hf.recipes.session import Session, run_program
from raptor_hf.recipes.settings import user_errors
from raptor_hf.teacher import count_parameters, macs

logger = logging.getLogger("probe")


def main() -> None:
    settings = parse_settings(ProbeSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        session = Session("probe", settings)
        accelerator = session.accelerator
        set_seed(settings.seeds[0])
        inputs = open_inputs(settings, accelerator)
        fingerprints = {"model": fingerprint_model(inputs.backbone.model.base_model), "images": inputs.fingerprint}
        settings = dataclasses.replace(settings, test_split=inputs.test_split)  # saved as it was found
        session.claim(settings, disk_space(inputs, settings), fingerprints, inputs=[settings.model])
        if is_finished(session, inputs):
            session.close(f"this run is finished; its folder and the head {settings.variant!r} stay as they are")
            return

    parameters = inputs.probe.head.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    probe, optimizer = accelerator.prepare(inputs.probe, optimizer)
    run = Run(session, inputs, probe, optimizer)
    run.train()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_outputs(run)
    session.close()


def is_finished(session: Session, inputs: Inputs) -> bool:
    """Whether this very run has reached its end, and the head is still where it was put."""
    settings = session.settings
    expected = {"split": settings.test_split, "metric": settings.metric}
    record, folder = session.read_result("probe.json", **expected), inputs.backbone.folder or session.folder
    try:
        is_there = settings.variant in list_heads(folder)
        known = StudentMetrics.read(folder)
    except (OSError, ValueError):
        return False
    had_checks = settings.variant in known.quick_checks
    is_whole = is_there and settings.variant in known.probes and (had_checks or not settings.quick_checks)
    return record is not None and is_whole


class Run:
    """The training under way: what a checkpoint holds, the loop, and the evaluation."""

    def __init__(self, session: Session, inputs: Inputs, probe: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.session, self.settings, self.accelerator = session, session.settings, session.accelerator
        self.inputs, self.probe, self.optimizer = inputs, probe, optimizer
        self.folder = session.folder
        self.seed_index, self.step = 0, 0
        self.evaluations: list[list[dict[str, Any]]] = []
        self.histories: list[list[dict[str, Any]]] = []
        self.failures: dict[str, str] = {}
        self.pending_log: dict[str, Any] | None = None
        self.banks: dict[str, FeatureBank] = {}
        self.feature_seconds = 0.0
        self.num_steps = inputs.num_steps
        self.evaluated_on = {"split": self.settings.test_split, "num_images": inputs.num_test_images}

    @property
    def unwrapped(self) -> Probe:
        return self.accelerator.unwrap_model(self.probe)

    def train(self) -> None:
        """Train all seeds, from where the run is."""
        self.resume()
        self.cache_features()
        while self.seed_index < len(self.settings.seeds):
            self.train_seed(self.settings.seeds[self.seed_index])
            self.keep_head(self.settings.seeds[self.seed_index])
            self.seed_index, self.step, self.pending_log = self.seed_index + 1, 0, None
            if self.seed_index < len(self.settings.seeds):
                self.optimizer.state.clear()
                initialize_head(self.unwrapped, self.settings.seeds[self.seed_index], self.inputs.start)
        for seed, evaluations in zip(self.settings.seeds, self.evaluations, strict=True):
            if not evaluations:  # it was trained while the test images were others
                self.unwrapped.head.load_state_dict(load_file(self.head_file(seed)))
                evaluations.append({"epoch": self.settings.epochs, **self.evaluate()})

    def cache_features(self) -> None:
        """Compute the features of all images, where no image changes from epoch to epoch and memory is enough."""
        settings, inputs, began = self.settings, self.inputs, time.perf_counter()
        num_cached = 0
        for name, loader, num_images in (
            ("test", inputs.test_batches, inputs.num_test_images),
            ("train", inputs.plain_batches, inputs.num_train_images),
        ):
            num_cached += num_images
            fits = fits_cache(settings, self.accelerator, inputs.probe, num_cached, inputs.image_size)
            if not fits or (name == "train" and settings.augment != "none"):
                break
            batches = logged(loader, f"features, {name}", num_images, self.accelerator)
            with self.accelerator.autocast():
                own = pool_features(self.unwrapped, batches, self.accelerator.device)
            shares = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
            self.banks[name] = FeatureBank.joined(shares)
            self.failures |= self.banks[name].failures
        self.feature_seconds = time.perf_counter() - began

    def train_seed(self, seed: int) -> None:
        """Train one head, from where it is."""
        settings, accelerator = self.settings, self.accelerator
        log = IntervalLog(
            accelerator,
            num_steps=self.num_steps,
            images_per_step=settings.batch_size,
            log_every=settings.log_every,
        )
        if self.pending_log:
            log.load_state_dict(self.pending_log)
        del self.histories[self.seed_index :]
        self.histories.append(log.history)
        if len(self.evaluations) == self.seed_index:
            self.evaluations.append([])
        guard = NonFiniteGuard(settings.max_nonfinite_steps)
        evaluated = {*range(settings.eval_every, settings.epochs, settings.eval_every), settings.epochs}
        ends = {epoch * self.inputs.steps.per_epoch: epoch for epoch in evaluated}
        bar = progress_bar(self.batches(seed), f"seed {seed}", accelerator, self.num_steps, self.step)
        for step, batch in enumerate(bar, start=self.step):
            lr = scheduled_rate(
                step,
                num_steps=self.num_steps,
                base_lr=settings.learning_rate,
                schedule=settings.schedule,
                warmup_steps=settings.warmup_steps,
                start_fraction=settings.start_fraction,
                final_fraction=settings.final_fraction,
            )
            set_learning_rate(self.optimizer, lr)
            loss, _ = self.probe(
                batch["features"].to(accelerator.device),
                self.inputs.image_size,
                batch["labels"].to(accelerator.device, non_blocking=True),
                settings.loss_stride,
            )
            accelerator.backward(loss)
            # a limit of infinity changes no gradient, but fp16's scale is taken out and the norm is known
            limit = settings.max_grad_norm or math.inf
            norm = accelerator.clip_grad_norm_(self.unwrapped.head.parameters(), limit)
            is_finite = is_step_finite(accelerator, loss, loss.isfinite() & norm.isfinite())
            if guard.check(step + 1, is_finite, batch["names"]) or accelerator.scaler is not None:
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.step = step + 1
            if record := log.update(step + 1, {"loss": loss}, lr=lr):
                accelerator.log(record, step=self.seed_index * self.num_steps + step + 1)
            if self.step in ends:
                self.evaluations[-1].append({"epoch": ends[self.step], **self.evaluate()})
            if self.step % settings.checkpoint_every == 0 or self.step == self.num_steps:
                self.save(log)

    def batches(self, seed: int) -> Iterator[dict[str, Any]]:
        """Features and labels of this process's share of every step that is left, in the order of `train_loader`."""
        accelerator = self.accelerator
        if "train" not in self.banks:
            loader = self.inputs.train_batches(seed=seed, num_steps=self.num_steps, start_step=self.step)
            loader.failures.reasons.update(self.failures)
            self.failures = loader.failures.reasons
            for batch in loader:
                with accelerator.autocast():
                    features = self.unwrapped.features(batch["pixel_values"].to(accelerator.device))
                yield {"features": features, "labels": batch["labels"], "names": batch["names"]}
            return
        bank = self.banks["train"]
        # of the images that could be read
        order, steps = EpochOrder(bank.num_images, seed), self.inputs.steps
        for step in range(self.step, self.num_steps):
            rows = [order(position) for position in steps.positions(step, accelerator.process_index)]
            yield {
                "features": bank.features[rows],
                "labels": bank.labels[rows],
                "names": [bank.names[row] for row in rows],
            }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the metrics on the test images; a collective operation."""
        settings, accelerator = self.settings, self.accelerator
        metric = ProbeMetric(
            settings.task,
            self.unwrapped.head.out_features,
            settings.min_depth,
            settings.max_depth,
            settings.eigen_crop,
        )
        for features, labels in self.test_features():
            predictions = self.unwrapped.predict(features.to(accelerator.device), self.inputs.image_size)
            metric.update(predictions, labels.to(accelerator.device))
        metric.accumulator.merge(accelerator)
        return metric.compute()

    def test_features(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels of this process's share of the test images."""
        if "test" in self.banks:
            bank, accelerator = self.banks["test"], self.accelerator
            first, end = (
                bank.num_images * index // accelerator.num_processes
                for index in (accelerator.process_index, accelerator.process_index + 1)
            )
            size = self.settings.eval_batch_size
            for start in range(first, end, size):
                rows = slice(start, min(start + size, end))
                yield bank.features[rows], bank.labels[rows]
            return
        batches = self.inputs.test_batches
        for batch in logged(batches, "evaluation", self.inputs.num_test_images, self.accelerator):
            with self.accelerator.autocast():
                features = self.unwrapped.features(batch["pixel_values"].to(self.accelerator.device))
            yield features, batch["labels"]
        self.failures |= self.inputs.test_batches.failures.reasons

    def save(self, log: IntervalLog) -> None:
        """Write a checkpoint; a collective operation."""
        progress = {
            "seed_index": self.seed_index,
            "step": self.step,
            "log": log.state_dict(),
            "histories": self.histories,
            "evaluations": self.evaluations,
            "evaluated_on": self.evaluated_on,
            "failures": self.session.gather_failures(self.failures),
        }
        step = self.seed_index * self.num_steps + self.step
        self.session.save(step, self.probe, self.optimizer, progress, trainable_only=True)

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one; a collective operation."""
        progress = self.session.resume(self.probe, self.optimizer)
        if progress is None:
            return
        self.seed_index, self.step, self.pending_log = progress["seed_index"], progress["step"], progress["log"]
        self.histories, self.evaluations = progress["histories"], progress["evaluations"]
        self.failures = progress["failures"]
        if progress.get("evaluated_on", self.evaluated_on) != self.evaluated_on:  # those so far are of other images
            self.evaluations = [[] for _ in self.evaluations]
        logger.info("resumed in seed %d after step %d", self.settings.seeds[self.seed_index], self.step)

    def keep_head(self, seed: int) -> None:
        """Keep the head of a seed that is done, so that a run that stops later still has it."""
        if self.accelerator.is_main_process:
            (self.folder / "heads").mkdir(exist_ok=True)
            state = {name: tensor.detach().cpu() for name, tensor in self.unwrapped.head.state_dict().items()}
            save_file(state, self.head_file(seed))

    def head_file(self, seed: int) -> Path:
        return self.folder / "heads" / f"seed-{seed}.safetensors"


def describe_probe(run: Run) -> dict[str, Any]:
    """The entry of this head under "probes" in metrics.json."""
    settings, metric = run.settings, run.settings.metric
    higher_is_better = PROTOCOLS[settings.task].metrics[metric]
    last = [evaluations[-1] for evaluations in run.evaluations]
    pick = max if higher_is_better else min
    best = [pick(evaluations, key=lambda evaluation: evaluation[metric]) for evaluations in run.evaluations]
    return {
        "task": settings.task,
        "dataset": settings.dataset,
        "dataset_config": settings.dataset_config,
        "split": settings.test_split,
        "num_images": run.inputs.num_test_images,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "seeds": settings.seeds,
        "last": {name: [entry[name] for entry in last] for name in last[0] if name != "epoch"},
        # the best epoch is chosen on the very images it is reported for
        "best": {name: [entry[name] for entry in best] for name in ("epoch", metric)},
        "epochs": settings.epochs,
        "steps": run.num_steps,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "augment": settings.augment,
        "init": settings.init_head or "random",
        "image_size": list(run.inputs.image_size),
        "head_parameters": sum(parameter.numel() for parameter in run.unwrapped.head.parameters()),
        "feature_seconds": run.feature_seconds,  # of features that are computed once
        "seconds": sum(history[-1]["seconds"] for history in run.histories),
        "unreadable_images": run.failures,
        "command": shlex.join(["training/probe.py", *sys.argv[1:]]),
        "mixed_precision": run.accelerator.mixed_precision,
        **describe_environment(run.accelerator.device),
    }


def save_outputs(run: Run) -> None:
    """Write the head of the first seed and the numbers into the model's folder, then do what could still fail."""
    settings, inputs, probe = run.settings, run.inputs, run.unwrapped
    probe.head.load_state_dict(load_file(run.head_file(settings.seeds[0])))
    probe.to("cpu")
    record = describe_probe(run)
    write_json(run.folder / "losses.json", dict(zip(map(str, settings.seeds), run.histories, strict=True)))
    folder = inputs.backbone.folder or save_backbone(run)
    own_head = "teacher" not in list_heads(folder)
    save_head(probe.model, folder, settings.variant)
    if own_head and "teacher" in list_heads(folder):
        print(f"the classifier that {folder} had of its own is now its variant 'teacher'")
    has_metrics = (folder / METRICS_FILE).exists()
    metrics = StudentMetrics.read(folder) if has_metrics else StudentMetrics.from_dict(describe_backbone(inputs))
    metrics.probes[settings.variant] = ProbeRecord.from_dict(as_plain(record))
    metrics.write(folder)
    checks = quick_checks(run, settings.knn_k) if settings.quick_checks else None
    if checks:
        metrics.quick_checks[settings.variant] = checks
        metrics.write(folder)
    print_table(record, checks)
    print(f"saved to {folder}: the head of seed {settings.seeds[0]} as variant {settings.variant!r}, and metrics.json")
    for place in {run.folder, folder}:
        (place / "figures").mkdir(exist_ok=True)
        draw_predictions(run, place / "figures" / f"probe-{settings.variant}.png")
    # last: a folder with this file is finished
    write_json(run.folder / "probe.json", record | {"evaluations": run.evaluations} | run.session.identity)


def save_backbone(run: Run) -> Path:
    """Save a teacher as a Raptor, anew: what an overridden run left in the folder must not be taken for it."""
    for path in (*run.folder.glob("head-*.safetensors"), *run.folder.glob("model.safetensors.index.*.json")):
        path.unlink()
    (run.folder / METRICS_FILE).unlink(missing_ok=True)
    processor = copy.deepcopy(run.inputs.processor)
    if run.settings.task == "semantic-segmentation":  # as the head was trained
        height, width = run.inputs.image_size
        processor.size, processor.do_center_crop = {"height": height, "width": width}, False
    elif run.settings.task == "depth-estimation":
        processor.do_resize = processor.do_center_crop = False
    with written_beside(run.folder) as place:
        run.inputs.backbone.model.save_pretrained(place)
        processor.save_pretrained(place)
    return run.folder


def describe_backbone(inputs: Inputs) -> dict[str, Any]:
    """Return metrics.json of a backbone that was not distilled; its cost is that of images of its own size."""
    backbone = inputs.backbone
    image = torch.zeros(1, backbone.model.config.num_channels, *as_pair(backbone.model.config.image_size))
    return {
        "teacher": {"name": backbone.name, "revision": backbone.revision},
        "num_layers": backbone.model.config.num_hidden_layers,
        "parameters": {"student": count_parameters(backbone.model)},
        "macs": {"student": macs(backbone.model, image)},
    }


def quick_checks(run: Run, knn_k: int) -> dict[str, Any]:
    """Fit k-NN and logistic regression to [cls, mean patch], by scikit-learn."""
    train, test = ((bank.features.numpy(), bank.labels.numpy()) for bank in (run.banks["train"], run.banks["test"]))
    neighbors = KNeighborsClassifier(min(knn_k, len(train[0])), metric="cosine", weights="distance").fit(*train)
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*train)
    return {
        "knn_accuracy": neighbors.score(*test),
        "knn_k": knn_k,
        "logistic_regression_accuracy": regression.score(*test),
    }


@torch.no_grad()
def draw_predictions(run: Run, path: Path, num_images: int = 6) -> None:
    """Draw a few test images, with their truth and the prediction of the first seed's head."""
    settings, inputs = run.settings, run.inputs
    batch = next(iter(inputs.test_batches))
    pixel_values, labels = batch["pixel_values"][:num_images], batch["labels"][:num_images]
    predictions = run.unwrapped.predict(run.unwrapped.features(pixel_values), inputs.image_size)
    if settings.task != "depth-estimation":
        predictions = predictions.argmax(dim=1)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (inputs.processor.image_mean, inputs.processor.image_std)
    )
    images = (pixel_values * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    figures.plot_predictions(
        settings.task, images, labels.numpy(), predictions.numpy(), path, class_names=inputs.class_names
    )


def print_table(record: dict[str, Any], checks: dict[str, Any] | None) -> None:
    """Print the metrics over the seeds."""
    for name, values in record["last"].items():
        print(f"{name:>16} {statistics.fmean(values):.4f}" + spread(values))
    best = record["best"][record["metric"]]
    print(f"{'best epoch':>16} {statistics.fmean(best):.4f}{spread(best)} (chosen on the test images)")
    for name, value in (checks or {}).items():
        print(f"{name.replace('_', ' '):>30} {value:.4g}")


def spread(values: list[float]) -> str:
    return f" +- {statistics.stdev(values):.4f} over {len(values)} seeds" if len(values) > 1 else ""


if __name__ == "__main__":
    run_program(main)
