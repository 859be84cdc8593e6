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
import functools
import logging
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from PIL.Image import Resampling
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from raptor_hf import figures
from raptor_hf.configuration_raptor import as_pair
from raptor_hf.data.dense import DenseSet, open_dense
from raptor_hf.data.images import ImageSet, check_image_size, load_image_processor, open_images
from raptor_hf.data.labels import keep_labelled, match_classes, name_classes, names_in_order
from raptor_hf.data.loaders import EpochOrder, ImageLoader, Steps, eval_loader, train_loader
from raptor_hf.data.sources import open_splits
from raptor_hf.data.transforms import Augmentations, ColorJitter, CropFlip, DepthCollate, SegmentationCollate
from raptor_hf.hub.heads import check_head, check_variant, list_heads, save_head
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.metrics import NYU_SIZE
from raptor_hf.probing import (
    PROTOCOLS,
    TOP5_CLASSES,
    Backbone,
    FeatureBank,
    Probe,
    ProbeMetric,
    bank_bytes,
    initialize_head,
    load_backbone,
    make_probe,
    pool_features,
    scheduled_rate,
)
from raptor_hf.recipes.files import as_plain, write_json, written_beside
from raptor_hf.recipes.fingerprints import fingerprint_dataset, fingerprint_model
from raptor_hf.recipes.loop import (
    IntervalLog,
    NonFiniteGuard,
    describe_environment,
    is_step_finite,
    progress_bar,
    set_learning_rate,
    usable_workers,
)
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


def is_finished(session: Session, inputs: "Inputs") -> bool:
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


@dataclass(frozen=True)
class Inputs:
    """Backbone, head and images, all checked.

    Args:
        backbone: as loaded.
        probe: with a head that fits the task.
        start: classifier, or file of one, that the head starts from; None starts at random.
        processor: of the images that are not augmented.
        class_names: None for depth.
        image_size: height and width of the processed images in pixels.
        train_batches: `train_loader` with everything but seed and steps.
        plain_batches: the training images once, not augmented.
        test_batches: the test images once.
        num_train_images: N.
        test_split: name of the split that the metrics are for.
        num_test_images: of that split.
        steps: which images make up a step.
        num_steps: of one head.
        fingerprint: of the training images.
    """

    backbone: Backbone
    probe: Probe
    start: nn.Linear | str | None
    processor: RaptorImageProcessor
    class_names: list[str] | None
    image_size: tuple[int, int]
    train_batches: functools.partial
    plain_batches: ImageLoader
    test_batches: ImageLoader
    num_train_images: int
    test_split: str
    num_test_images: int
    steps: Steps
    num_steps: int
    fingerprint: str


def open_inputs(settings: ProbeSettings, accelerator: Accelerator) -> Inputs:
    """Everything that can be wrong with backbone, images and truth, before any work starts."""
    check_variant(settings.variant)
    for name in ("batch_size", "eval_batch_size"):
        if getattr(settings, name) % accelerator.num_processes:
            raise ValueError(
                f"{name} is {getattr(settings, name)}; it must be a multiple of {accelerator.num_processes} processes"
            )
    backbone, start = open_backbone(settings)
    # one process of each node prepares the data set, the others find it in the cache
    with accelerator.local_main_process_first():
        opened = open_splits(functools.partial(open_split, settings), settings.train_split, settings.test_split)
    class_names, train_images, test_images = classes_of(settings, *opened, backbone)
    if isinstance(start, nn.Linear):
        start = reorder_classes(start, train_images, backbone, settings)
    processor = RaptorImageProcessor.from_teacher(load_image_processor(settings.model, settings.model_revision))
    collate, augment, train_processor = image_pipeline(settings, processor, backbone)
    share = {"num_workers": usable_workers(settings.num_workers), "max_failures": settings.max_decode_failures}
    share["pin_memory"] = accelerator.device.type == "cuda"
    share |= {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    once = functools.partial(eval_loader, batch_size=settings.eval_batch_size, collate=collate, **share)
    test_batches = once(test_images, processor)
    # the first image, for all processes
    first = functools.partial(once, batch_size=1, num_workers=0, process_index=0, num_processes=1)
    image_size = probe_image_size(first(test_images, processor), backbone)
    if (train_size := probe_image_size(first(train_images, processor), backbone)) != image_size:
        raise ValueError(f"training images are {train_size} after processing, test images {image_size}")
    padded = tuple(side + -side % patch for side, patch in zip(NYU_SIZE, patches_of(backbone), strict=True))
    if settings.eigen_crop and image_size != padded:
        raise ValueError(f"eigen_crop is for images of 480 x 640 pixels; these are {image_size}, padding included")
    probe = make_probe(
        backbone,
        settings.task,
        class_names=class_names,
        num_depth_bins=settings.num_depth_bins,
        min_depth=settings.min_depth,
        max_depth=settings.max_depth,
    )
    initialize_head(probe, settings.seeds[0], start)
    steps = Steps(train_images.num_images, settings.batch_size, settings.last_batch, accelerator.num_processes)
    num_steps = settings.epochs * steps.per_epoch
    if settings.warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_steps is {settings.warmup_steps}; it must be below the {num_steps} steps that {settings.epochs} "
            f"epochs of {train_images.num_images} images make"
        )
    if settings.metric == "top5_accuracy" and len(class_names) < TOP5_CLASSES:
        raise ValueError(f"metric is 'top5_accuracy', which {len(class_names)} classes are too few for")
    if settings.quick_checks and not fits_cache(settings, accelerator, probe, train_images.num_images, image_size):
        raise ValueError(f"quick_checks need the features in memory, which cache_gb={settings.cache_gb} forbids")
    if backbone.folder is not None:
        check_head(probe.model, backbone.folder, settings.variant)
    return Inputs(
        backbone=backbone,
        probe=probe,
        start=start,
        processor=processor,
        class_names=class_names,
        image_size=image_size,
        train_batches=functools.partial(
            train_loader,
            train_images,
            train_processor,
            batch_size=settings.batch_size,
            collate=collate,
            augment=augment,
            last_batch=settings.last_batch,
            **share,
        ),
        plain_batches=once(train_images, processor),
        test_batches=test_batches,
        num_train_images=train_images.num_images,
        test_split=test_images.split,
        num_test_images=test_images.num_images,
        steps=steps,
        num_steps=num_steps,
        fingerprint=fingerprint_dataset(train_images),
    )


def open_backbone(settings: ProbeSettings) -> tuple[Backbone, nn.Linear | str | None]:
    """The backbone, and what the head starts from."""
    wanted = settings.init_head
    is_file = wanted is not None and (wanted.endswith((".pth", ".pt")) or Path(wanted).is_file())
    if is_file and not Path(wanted).is_file():
        raise FileNotFoundError(f"init_head={wanted!r} does not exist; it is a file, a variant of the model, or 'own'")
    variant = None if wanted in (None, "own") or is_file else wanted
    backbone = load_backbone(
        settings.model,
        revision=settings.model_revision,
        num_layers=settings.num_layers,
        variant=variant,
        reinitialize=settings.reinitialize,
    )
    if wanted is None or is_file:
        return backbone, wanted
    if backbone.classifier is None:
        raise ValueError(f"init_head is {wanted!r}, but {settings.model} has no such classifier")
    return backbone, backbone.classifier


def open_split(settings: ProbeSettings, split: str) -> ImageSet | DenseSet:
    """Images with their truth."""
    sources = {"config_name": settings.dataset_config, "revision": settings.dataset_revision}
    sources |= {"image_column": settings.image_column}
    if settings.task == "image-classification":
        images = open_images(settings.dataset, split, label_column=settings.label_column, **sources)
        if not images.has_labels:
            raise ValueError(f"{images.title} has no class labels; name their column with label_column")
        return images
    images = open_dense(
        settings.task,
        settings.dataset,
        split,
        target_column=settings.label_column,
        num_classes=settings.num_classes,
        ignore_label=settings.ignore_label,
        depth_unit=settings.depth_unit
        if split == settings.train_split
        else settings.test_depth_unit or settings.depth_unit,
        **sources,
    )
    depth_range = (settings.min_depth, settings.max_depth) if settings.task == "depth-estimation" else None
    images.check(depth_range=depth_range)
    return images


def classes_of(
    settings: ProbeSettings, train_images: ImageSet | DenseSet, test_images: ImageSet | DenseSet, backbone: Backbone
) -> tuple[list[str] | None, ImageSet | DenseSet, ImageSet | DenseSet]:
    """Names of the classes, None for depth; and the training and test images that have a truth, all checked."""
    if settings.task == "depth-estimation":
        return None, train_images, test_images
    if settings.task == "semantic-segmentation":
        return train_images.class_names, train_images, test_images
    names = name_classes(train_images, test_images)
    labelled = [keep_labelled(images, names) for images in (train_images, test_images)]
    own = backbone.model.config
    # where the data set does not tell them, the model may
    if train_images.class_names is None and own.num_labels == len(names):
        names = names_in_order(own.id2label)
    return names, *labelled


def reorder_classes(classifier: nn.Linear, images: ImageSet, backbone: Backbone, settings: ProbeSettings) -> nn.Linear:
    """The classifier to start from, with its classes in the order of the data set's."""
    match = match_classes(images, classifier.out_features, backbone.model.config.id2label)
    if match.classes is None:
        raise ValueError(f"init_head is {settings.init_head!r}, but its classes are not the data set's; {match.reason}")
    ordered = copy.deepcopy(classifier)
    ordered.weight.data, ordered.bias.data = (tensor.data[match.classes] for tensor in (ordered.weight, ordered.bias))
    return ordered


def image_pipeline(
    settings: ProbeSettings, processor: RaptorImageProcessor, backbone: Backbone
) -> tuple[Callable | None, Callable | None, RaptorImageProcessor]:
    """How images and truth become batches: collate, augmentation, and the processor of augmented images."""
    side, patch = settings.image_size, patches_of(backbone)[0]
    interpolation = Resampling[settings.interpolation.upper()]
    cropped = processor
    if settings.task == "semantic-segmentation":
        collate, size = SegmentationCollate(processor, side, interpolation), side
    elif settings.task == "depth-estimation":
        collate, size = DepthCollate(processor, patch), tuple(settings.crop_size)
    else:
        processor.resample = interpolation
        if side is not None:
            processor.crop_size = {"height": side, "width": side}
        if side is not None or settings.resize_size is not None:
            processor.size = {"shortest_edge": settings.resize_size or side}
        collate, size = None, check_image_size(processor, patch)
        cropped = copy.deepcopy(processor)
        cropped.do_resize = cropped.do_center_crop = False
    if settings.augment == "none":
        return collate, None, processor
    area, ratio = tuple(settings.crop_area), tuple(settings.crop_ratio)
    crop = CropFlip(size, area, ratio, interpolation, settings.flip_probability)
    jitter = (ColorJitter(*settings.color_jitter),) if any(settings.color_jitter) else ()
    return collate, Augmentations((crop, *jitter)), cropped


def patches_of(backbone: Backbone) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    return as_pair(backbone.model.config.patch_size)


def fits_cache(
    settings: ProbeSettings, accelerator: Accelerator, probe: Probe, num_images: int, image_size: tuple[int, int]
) -> bool:
    """Whether the features of so many images may be kept: every process holds all, twice while they are gathered."""
    copies = 1 if accelerator.num_processes == 1 else 2 * accelerator.num_processes
    return copies * bank_bytes(probe, settings.task, num_images, image_size) <= settings.cache_gb * 1e9


def probe_image_size(batches: ImageLoader, backbone: Backbone) -> tuple[int, int]:
    """Height and width of the processed images, which must divide into patches."""
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("none of the images can be read")
    size = tuple(batch["pixel_values"].shape[-2:])
    for side, patch in zip(size, patches_of(backbone), strict=True):
        if side % patch:
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels do not divide into patches of {patch}; "
                f"set image_size to a multiple of it, such as {side // patch * patch + patch}"
            )
    return size


def disk_space(inputs: Inputs, settings: ProbeSettings) -> int:
    """Bytes that a run may take: checkpoints with head and two moments, one being written, heads, and the backbone."""
    head = sum(parameter.numel() for parameter in inputs.probe.head.parameters())
    copies = 3 * (settings.keep_checkpoints + 1) + len(settings.seeds) + 1
    return 4 * (head * copies + count_parameters(inputs.backbone.model)) + 10_000_000


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
        """All seeds, from where the run is."""
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
        """Features of all images, where none changes from epoch to epoch and there is memory for them."""
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
            batches = progress_bar(loader, f"features, {name}", self.accelerator)
            with self.accelerator.autocast():
                own = pool_features(self.unwrapped, batches, self.accelerator.device)
            shares = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
            self.banks[name] = FeatureBank.joined(shares)
            self.failures |= self.banks[name].failures
        self.feature_seconds = time.perf_counter() - began

    def train_seed(self, seed: int) -> None:
        """One head, from where it is."""
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
        ends = {epoch * self.inputs.steps.per_epoch: epoch for epoch in range(1, settings.epochs + 1)}
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
        """The metrics on the test images; a collective operation."""
        settings, accelerator = self.settings, self.accelerator
        metric = ProbeMetric(
            settings.task,
            self.unwrapped.head.out_features,
            settings.min_depth,
            settings.max_depth,
            settings.eigen_crop,
        )
        for features, labels in self.test_features():
            labels = labels.to(accelerator.device)
            _, predictions = self.unwrapped(features.to(accelerator.device), self.inputs.image_size, labels)
            metric.update(predictions, labels)
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
        for batch in progress_bar(self.inputs.test_batches, "evaluation", self.accelerator):
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
        """The head of a seed that is done, so that a run that stops later still has it."""
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
        **describe_environment(run.accelerator.device),
    }


def save_outputs(run: Run) -> None:
    """The head of the first seed and the numbers in the model's folder; then what could still fail."""
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
    """A teacher as a Raptor, anew: what an overridden run left in the folder must not be taken for it."""
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
    """metrics.json of a backbone that no distillation made; its cost is that of the size that it is for."""
    backbone = inputs.backbone
    image = torch.zeros(1, backbone.model.config.num_channels, *as_pair(backbone.model.config.image_size))
    return {
        "teacher": {"name": backbone.name, "revision": backbone.revision},
        "num_layers": backbone.model.config.num_hidden_layers,
        "parameters": {"student": count_parameters(backbone.model)},
        "macs": {"student": macs(backbone.model, image)},
    }


def quick_checks(run: Run, knn_k: int) -> dict[str, Any]:
    """k-NN and logistic regression on [cls, mean patch], by scikit-learn."""
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
    """A few test images, what they show and what the head of the first seed says."""
    settings, inputs = run.settings, run.inputs
    batch = next(iter(inputs.test_batches))
    pixel_values, labels = batch["pixel_values"][:num_images], batch["labels"][:num_images]
    _, predictions = run.unwrapped(run.unwrapped.features(pixel_values), inputs.image_size, labels)
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
    """The metrics over the seeds."""
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
