"""Distil a Hugging Face teacher into a Raptor: phases, stage 1, stage 2, fidelity, a folder that from_pretrained loads.

    accelerate launch --config_file training/accelerate/cpu.yaml training/distill.py CONFIG.yaml
    accelerate launch training/distill.py training/configs/distill/dinov2_vitb14_k3.yaml --batch_size 128

Every setting is a key of the YAML file and a flag of the same name. The same command, given again, resumes from the
last checkpoint and ends with the weights of a run that never stopped. What a run costs and gives stands in its config.
"""

from raptor_settings.distill import DistillSettings
from raptor_settings.parse import parse_settings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(DistillSettings)

import contextlib
import copy
import functools
import logging
import operator
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, gather_object, set_seed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from raptor_hf import figures
from raptor_hf.data.images import ImageSet, check_image_size, load_image_processor, open_images
from raptor_hf.data.loaders import ImageLoader, eval_loader, train_loader
from raptor_hf.data.transforms import CropFlip
from raptor_hf.distillation.start import fit_to_teacher
from raptor_hf.distillation.student import block_parameters, choose_partition, make_student, trial_partition
from raptor_hf.distillation.task import DistillationTask, LayerVariance, TrajectoryLoss, teacher_forcing
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.metrics import FidelityAccumulator, TopKAccuracy
from raptor_hf.phases import (
    Partition,
)
from raptor_hf.recipes.checkpoint import latest_checkpoint, resume_run, save_run
from raptor_hf.recipes.files import write_json
from raptor_hf.recipes.loop import (
    IntervalLog,
    NonFiniteGuard,
    RisingLossGuard,
    cosine_schedule,
    describe_environment,
    warn_if_single_thread,
)
from raptor_hf.recipes.optimizers import check_optimizer, make_optimizer
from raptor_hf.recipes.settings import prepare_output_dir, settings_to_dict, user_errors
from raptor_hf.similarity import SimilarityAccumulator
from raptor_hf.teacher import Teacher, count_parameters, load_teacher, macs

logger = logging.getLogger("distill")

# share of an image's area that --augment keeps, at least and at most
AUGMENT_AREA = (0.25, 1.0)


def main() -> None:
    settings = parse_settings(DistillSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=settings.tracker,
            project_dir=str(Path(settings.output_dir) / "logs") if settings.tracker else None,
        )
        warn_if_single_thread(logger, accelerator)
        check_optimizer(settings.optimizer, sharded=accelerator.distributed_type == DistributedType.FSDP)
        # the weights have a generator of their own; every process draws input noise of its own
        set_seed(settings.seed, device_specific=True)
        teacher, processor, train_images, test_images = open_inputs(settings, accelerator)
        folder = Path(settings.output_dir)
        if accelerator.is_main_process:
            prepare_output_dir(folder, settings, override=settings.override, needed_bytes=disk_space(settings, teacher))
        accelerator.wait_for_everyone()
    if settings.tracker:
        accelerator.init_trackers("distill", config={k: str(v) for k, v in settings_to_dict(settings).items()})
    seconds: dict[str, float] = {}

    began = time.perf_counter()
    loader = functools.partial(
        train_loader,
        train_images,
        processor=processor,
        batch_size=settings.batch_size,
        seed=settings.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=settings.num_workers,
        max_failures=settings.max_decode_failures,
        pin_memory=accelerator.device.type == "cuda",
    )
    partition, variance = phases_of(teacher, loader, settings, accelerator)
    seconds["phases"] = time.perf_counter() - began

    student = make_student(teacher, partition, settings)
    if settings.init == "fitted" and latest_checkpoint(folder / "checkpoints") is None:
        began = time.perf_counter()
        fit_student(teacher, student, loader, settings, accelerator)
        seconds["fit"] = time.perf_counter() - began
    task = DistillationTask(
        student,
        TrajectoryLoss(
            settings.loss,
            teacher.tokens,
            variance.sqrt().to(accelerator.device) if variance is not None else None,
        ),
        stage1_weights=(settings.stage1_weights or [0.34, 0.33, 0.33]) if settings.cls_weighting else None,
        stage2_weights=(settings.stage2_weights or [0.45, 0.10, 0.45]) if settings.cls_weighting else None,
        horizon=settings.horizon,
        input_noise=settings.input_noise,
    )
    optimizer = make_optimizer(
        settings.optimizer,
        student,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=has_fused_adamw(accelerator),
    )
    task, optimizer = accelerator.prepare(task, optimizer)

    run = Run(settings, accelerator, teacher, task, optimizer, test_images, processor)
    run.resume()
    if settings.augment:
        cropped = copy.deepcopy(processor)
        cropped.do_resize = cropped.do_center_crop = False
        crop = CropFlip(check_image_size(processor, teacher.patch_size), scale=AUGMENT_AREA)
        loader = functools.partial(loader, augment=crop, processor=cropped)
    for stage in (1, 2):
        if run.num_steps(stage) and run.stage <= stage:
            run.train(stage, loader)
    accelerator.wait_for_everyone()

    began = time.perf_counter()
    weights = accelerator.get_state_dict(task)
    metrics = run.evaluate(settings.eval_images) | {"unreadable_images": run.gather_failures()}
    seconds |= {f"stage{stage}": log[-1]["seconds"] for stage, log in run.histories.items() if log}
    seconds["evaluation"] = time.perf_counter() - began
    if accelerator.is_main_process:
        metrics |= describe_run(run, partition, seconds)
        save_outputs(run, partition, metrics, weights, folder)
        print_table(metrics)
        print(f"saved to {folder}: the model, metrics.json and figures/")
    accelerator.end_training()


def open_inputs(settings: DistillSettings, accelerator: Accelerator) -> tuple[Teacher, Any, ImageSet, ImageSet]:
    """Everything that can be wrong with teacher and images, before any work starts."""
    dtype = getattr(torch, settings.teacher_dtype)
    teacher = load_teacher(
        settings.teacher,
        revision=settings.teacher_revision,
        dtype=dtype,
        device=accelerator.device,
        layers=settings.target_layers,
    )
    layers = teacher.num_layers
    if settings.num_blocks is not None and not 1 <= settings.num_blocks <= layers:
        raise ValueError(f"num_blocks is {settings.num_blocks}; it must be between 1 and the teacher's {layers} layers")
    if settings.block_repeats is not None and sum(settings.block_repeats) != layers:
        raise ValueError(
            f"block_repeats is {settings.block_repeats}, which sums to {sum(settings.block_repeats)}; "
            f"it must sum to the teacher's {layers} layers"
            + (f", target_layers {settings.target_layers}" if settings.target_layers else "")
        )
    num_blocks = settings.num_blocks or len(settings.block_repeats)
    if settings.train_block is not None and not 0 <= settings.train_block < num_blocks:
        raise ValueError(f"train_block is {settings.train_block}; it must be between 0 and {num_blocks - 1}")
    share = accelerator.num_processes * settings.gradient_accumulation_steps
    if settings.batch_size % share:
        raise ValueError(
            f"batch_size is {settings.batch_size}; it must be a multiple of {share}, "
            f"{accelerator.num_processes} processes times {settings.gradient_accumulation_steps} accumulation steps"
        )
    if settings.eval_batch_size % accelerator.num_processes:
        raise ValueError(
            f"eval_batch_size is {settings.eval_batch_size}; "
            f"it must be a multiple of {accelerator.num_processes} processes"
        )
    # what a partition or a student of these settings would be refused for, before images are read to find the real one
    make_student(teacher, trial_partition(settings, layers), settings)
    processor = load_image_processor(settings.teacher, settings.teacher_revision)
    check_image_size(processor, teacher.patch_size)
    # one process of each node prepares the data set, the others find it in the cache
    with accelerator.local_main_process_first():
        train_images, test_images = (
            open_images(
                settings.dataset,
                split,
                config_name=settings.dataset_config,
                revision=settings.dataset_revision,
                image_column=settings.image_column,
                label_column=settings.label_column,
                streaming=settings.streaming,
            )
            for split in (settings.train_split, settings.test_split)
        )
    return teacher, processor, train_images, test_images


def disk_space(settings: DistillSettings, teacher: Teacher) -> int:
    """Bytes that a run may take: checkpoints with weights and two moments, one being written, and the model."""
    blocks = (settings.num_blocks or len(settings.block_repeats)) / teacher.num_layers
    return int(4 * teacher.num_parameters * (3 * 2 * blocks * (settings.keep_checkpoints + 1) + 1)) + 10_000_000


def phases_of(
    teacher: Teacher, loader: functools.partial, settings: DistillSettings, accelerator: Accelerator
) -> tuple[Partition, Tensor | None]:
    """
    The partition of the teacher's layers, given or found on `phase_images` training images, with its figure; and the
    teacher's variance in every layer, (L + 1,), if the loss is to be normalised.
    """
    folder, layers = Path(settings.output_dir), teacher.num_layers
    similarity = SimilarityAccumulator(
        layers,
        teacher.tokens,
        num_bootstraps=settings.num_bootstraps,
        seed=settings.seed + accelerator.process_index,
    )
    variance = LayerVariance(layers, teacher.hidden_size)
    # the images of the first steps; whole batches, so that every process has the same share
    num_steps = max(1, settings.phase_images // settings.batch_size)
    batches = tqdm(loader(num_steps=num_steps), "phases", disable=not accelerator.is_main_process, leave=False)
    for batch in batches:
        with torch.no_grad(), accelerator.autocast():
            states = teacher.trajectory(batch["pixel_values"].to(accelerator.device))
        similarity.update(states)
        variance.update(states)
    for accumulator in (similarity, variance):
        accumulator.merge(accelerator)
    distance = similarity.compute()
    partition, stability = choose_partition(distance, similarity, settings, layers)
    if accelerator.is_main_process:
        (folder / "figures").mkdir(exist_ok=True)
        record = partition.to_dict() | {"distance": distance, "num_images": num_steps * settings.batch_size}
        write_json(folder / "phases.json", record | {"stability": stability})
        figures.plot_phases(distance, partition, folder / "figures" / "phases.png")
        stable = f", boundaries stable in {stability['modal_frequency']:.0%} of bootstraps" if stability else ""
        logger.info("phases %s (%s%s)", partition, partition.method, stable)
    return partition, variance.compute() if settings.normalize_loss else None


def fit_student(
    teacher: Teacher,
    student: nn.Module,
    loader: functools.partial,
    settings: DistillSettings,
    accelerator: Accelerator,
) -> None:
    """Fits the blocks on the first `fit_images` training images, in whole batches, the same on every process."""
    num_steps = max(1, settings.fit_images // settings.batch_size)
    batches = loader(num_steps=num_steps, process_index=0, num_processes=1)
    student.to(accelerator.device)
    with accelerator.autocast():
        images = (batch["pixel_values"].to(accelerator.device) for batch in batches)
        fit_to_teacher(teacher, student, tqdm(images, "fit", disable=not accelerator.is_main_process, leave=False))
    if accelerator.num_processes > 1:  # kernels may differ in the last bits from process to process
        for parameter in student.parameters():
            broadcast(parameter.data)


def has_fused_adamw(accelerator: Accelerator) -> bool:
    """Whether AdamW updates all weights in one kernel here; FSDP's sharded tensors it does not take everywhere."""
    return accelerator.device.type in ("cpu", "cuda") and accelerator.distributed_type != DistributedType.FSDP


class Run:
    """The training under way: what a checkpoint holds, the loop, and the evaluation."""

    def __init__(
        self,
        settings: DistillSettings,
        accelerator: Accelerator,
        teacher: Teacher,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        test_images: ImageSet,
        processor: Any,
    ) -> None:
        self.settings, self.accelerator, self.teacher = settings, accelerator, teacher
        self.task, self.optimizer = task, optimizer
        self.test_images, self.processor = test_images, processor
        self.folder = Path(settings.output_dir)
        self.stage, self.step = 1, 0
        self.log: IntervalLog | None = None
        self.histories: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        self.evaluations: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}
        self.pending_log: dict[str, Any] | None = None

    @property
    def student(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.task).student

    @functools.cached_property
    def knows_labels(self) -> bool:
        """Whether the labels of the test images are classes of the teacher's classifier."""
        images, classifier = self.test_images, self.teacher.classifier
        if classifier is None or not images.has_labels:
            return False
        if images.class_names is not None:
            return len(images.class_names) == classifier.out_features
        labels = [] if images.streaming else images.dataset.unique(images.label_column)
        return all(label is None or 0 <= label < classifier.out_features for label in labels)

    def num_steps(self, stage: int) -> int:
        return self.settings.stage1_steps if stage == 1 else self.settings.stage2_steps

    def train(self, stage: int, loader: functools.partial) -> None:
        """One stage, from where the run is."""
        settings, accelerator, num_steps = self.settings, self.accelerator, self.num_steps(stage)
        if self.stage < stage:  # a fresh optimizer for the second stage
            self.stage, self.step, self.pending_log = stage, 0, None
            self.optimizer.state.clear()
        self.log = IntervalLog(
            accelerator, num_steps=num_steps, images_per_step=settings.batch_size, log_every=settings.log_every
        )
        if self.pending_log:
            self.log.load_state_dict(self.pending_log)
        self.histories[stage] = self.log.history
        guard, rising = NonFiniteGuard(settings.max_nonfinite_steps), RisingLossGuard(settings.max_rising_steps)
        # stage 2 goes on in the data where stage 1 ended
        offset = settings.stage1_steps if stage == 2 else 0
        batches: ImageLoader = loader(num_steps=offset + num_steps, start_step=offset + self.step)
        batches.failures.reasons.update(self.failures)
        self.failures = batches.failures.reasons
        bar = tqdm(
            batches,
            f"stage {stage}",
            total=num_steps,
            initial=self.step,
            disable=not accelerator.is_main_process,
            leave=False,
        )
        for step, batch in enumerate(bar, start=self.step):
            lr = cosine_schedule(
                step,
                num_steps=num_steps,
                warmup_steps=settings.warmup_steps,
                base_lr=settings.learning_rate,
                final_lr=settings.final_learning_rate,
            )
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            losses = self.backward(stage, batch["pixel_values"], self.forcing(step))
            is_finite = self.clip_gradients(stage)
            if accelerator.scaler is not None:
                # its scale is found by overflowing gradients, whose steps the scaler skips itself: only losses count
                is_finite = bool(accelerator.reduce(losses["loss"].isfinite().float(), reduction="mean") == 1)
            if guard.check(step + 1, is_finite, batch["names"]) or accelerator.scaler is not None:
                self.optimizer.step()
            self.optimizer.zero_grad()
            self.step = step + 1
            if self.forcing(step) == self.forcing(num_steps - 1):  # until then stage 1 has another loss at every step
                rising.check(self.step, float(accelerator.reduce(losses["loss"], reduction="mean")), lr)
            if record := self.log.update(step + 1, losses, lr=lr):
                accelerator.log(record, step=offset + step + 1)
            last = self.step == num_steps
            if settings.eval_every and (self.step % settings.eval_every == 0 or last):
                with self.log.paused():
                    fidelity = self.evaluate(settings.eval_images)["fidelity"]
                scores = {name: fidelity[name] for name in ("r2", "agreement", "student_accuracy")}
                self.evaluations.append({"stage": stage, "step": self.step, "seconds": self.seconds(stage), **scores})
            if self.step % settings.checkpoint_every == 0 or last:
                self.save(offset)

    def seconds(self, stage: int) -> float:
        """Training time until now, of both stages."""
        return self.log.seconds + (self.histories[1][-1]["seconds"] if stage == 2 and self.histories[1] else 0.0)

    def forcing(self, step: int) -> float:
        if self.settings.teacher_forcing == "anneal":
            return teacher_forcing(step, self.settings.stage1_steps, self.settings.anneal_fraction)
        return 1.0 if self.settings.teacher_forcing == "only" else 0.0

    def backward(self, stage: int, pixel_values: Tensor, forcing: float) -> dict[str, Tensor]:
        """Gradients of one batch, in as many parts as they are accumulated over; the mean losses."""
        accelerator, parts = self.accelerator, self.settings.gradient_accumulation_steps
        groups = self.blocks_at_once(stage)
        totals: dict[str, Tensor] = {}
        for index, images in enumerate(pixel_values.to(accelerator.device, non_blocking=True).chunk(parts)):
            with torch.no_grad(), accelerator.autocast():
                states = self.teacher.trajectory(images)
            for blocks in groups:
                # gradients are exchanged between processes once, with the last part
                with accelerator.no_sync(self.task) if index + 1 < parts else contextlib.nullcontext():
                    losses = self.task(states, stage=stage, forcing=forcing, blocks=blocks)
                    accelerator.backward(losses["loss"] / parts)
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0) + value.detach() / parts
        return totals

    def blocks_at_once(self, stage: int) -> list[tuple[int, ...] | None]:
        """
        The blocks of each backward pass, None for all: one after the other in stage 1, so that the activations of one
        are kept at a time. Several processes exchange the gradients of all blocks in a single pass.
        """
        if self.settings.train_block is not None:
            return [(self.settings.train_block,)]
        if stage == 2 or self.accelerator.num_processes > 1:
            return [None]
        return [(block,) for block in range(self.student.config.num_blocks)]

    def clip_gradients(self, stage: int) -> bool:
        """Clips, per block in stage 1, whose blocks are trained as if alone; whether all gradients are finite."""
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        groups = [block_parameters(self.student, block) for block in range(self.student.config.num_blocks)]
        if self.settings.train_block is not None:
            groups = [groups[self.settings.train_block]]
        elif stage == 2:
            groups = [sum(groups, [])]
        norms = [nn.utils.clip_grad_norm_(group, self.settings.max_grad_norm) for group in groups]
        return bool(torch.stack(norms).isfinite().all())

    def save(self, offset: int) -> None:
        """Writes a checkpoint; a collective operation."""
        progress = {
            "stage": self.stage,
            "step": self.step,
            "log": self.log.state_dict(),
            "histories": {str(stage): history for stage, history in self.histories.items()},
            "evaluations": self.evaluations,
            "failures": self.gather_failures(),
            "blocks": [list(layers) for layers in self.student.config.block_layers],
        }
        save_run(
            self.folder / "checkpoints",
            offset + self.step,
            self.accelerator,
            self.task,
            self.optimizer,
            progress,
            trainable_only=True,
            keep=self.settings.keep_checkpoints,
        )

    def gather_failures(self) -> dict[str, str]:
        """Name and reason of the unreadable training images of all processes; a collective operation."""
        if self.accelerator.num_processes == 1:
            return self.failures
        return functools.reduce(operator.or_, gather_object([self.failures]))

    def resume(self) -> None:
        """Takes up the last checkpoint, if there is one; a collective operation."""
        progress = resume_run(self.folder / "checkpoints", self.accelerator, self.task, self.optimizer)
        if progress is None:
            return
        blocks = [list(layers) for layers in self.student.config.block_layers]
        if progress["blocks"] != blocks:
            raise RuntimeError(
                f"the checkpoint is of blocks {progress['blocks']}, but the phases are now {blocks}: fix them by "
                "block_repeats, or start in another output_dir"
            )
        self.stage, self.step, self.pending_log = progress["stage"], progress["step"], progress["log"]
        self.histories = {int(stage): history for stage, history in progress["histories"].items()}
        self.evaluations, self.failures = progress["evaluations"], progress["failures"]
        logger.info("resumed in stage %d after step %d", self.stage, self.step)

    @torch.no_grad()
    def evaluate(self, limit: int | None) -> dict[str, Any]:
        """Fidelity, agreement and accuracies on the test images; a collective operation."""
        accelerator, teacher, student = self.accelerator, self.teacher, self.student
        for module in self.task.modules():
            if isinstance(module, FSDPModule):  # the student is called past the wrapper, which would gather its weights
                module.unshard()
        student.eval()
        fidelity = FidelityAccumulator(teacher.num_layers, teacher.tokens, teacher.hidden_size)
        scores = {name: TopKAccuracy(topk=(1,)) for name in ("agreement", "teacher_accuracy", "student_accuracy")}
        for batch in self.test_batches(limit):
            pixel_values = batch["pixel_values"].to(accelerator.device)
            with accelerator.autocast():
                teacher_states = teacher.trajectory(pixel_values)
                hidden_states = student.base_model(pixel_values, output_hidden_states=True).hidden_states
            student_states = torch.stack(hidden_states, dim=1)
            fidelity.update(teacher_states, student_states)
            if teacher.classifier is None:
                continue
            # the student's head is the teacher's
            predicted, truth = teacher.logits(student_states[:, -1]), teacher.logits(teacher_states[:, -1])
            scores["agreement"].update(predicted, truth.argmax(dim=1))
            if self.knows_labels:
                labels = batch["labels"].to(accelerator.device)
                scores["teacher_accuracy"].update(truth, labels)
                scores["student_accuracy"].update(predicted, labels)
        for accumulator in (fidelity, *scores.values()):
            accumulator.merge(accelerator)
        student.train()
        known = {name: self.knows_labels for name in scores} | {"agreement": teacher.classifier is not None}
        return {
            "fidelity": fidelity.compute().to_dict()
            | {name: score.compute()["accuracy"] if known[name] else None for name, score in scores.items()}
        }

    def test_batches(self, limit: int | None) -> Iterator[dict[str, Any]]:
        accelerator, settings = self.accelerator, self.settings
        batches = eval_loader(
            self.test_images,
            self.processor,
            batch_size=settings.eval_batch_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=settings.num_workers,
            limit=limit,
            max_failures=settings.max_decode_failures,
            pin_memory=accelerator.device.type == "cuda",
        )
        return tqdm(batches, "evaluation", disable=not accelerator.is_main_process, leave=False)


def describe_run(run: Run, partition: Partition, seconds: dict[str, float]) -> dict[str, Any]:
    """What metrics.json says beside the fidelity."""
    settings, teacher, student = run.settings, run.teacher, run.student.base_model.eval()
    size = check_image_size(run.processor, teacher.patch_size)  # of these images, not of the position embeddings
    image = torch.zeros(1, student.config.num_channels, *size, device=run.accelerator.device)
    trained = sum(log[-1]["step"] for log in run.histories.values() if log) * settings.batch_size
    training_seconds = seconds.get("stage1", 0.0) + seconds.get("stage2", 0.0)
    return {
        "teacher": {"name": settings.teacher, "revision": teacher.revision},
        "phases": partition.phases if partition.is_contiguous else None,
        "blocks": [list(layers) for layers in partition.blocks],
        "parameters": {"teacher": teacher.num_parameters, "student": count_parameters(student)},
        "macs": {"teacher": macs(teacher, image), "student": macs(student, image)},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "images_per_second": trained / training_seconds if training_seconds else None,
        "evaluations": run.evaluations,
        "seed": settings.seed,
        **describe_environment(run.accelerator.device),
    }


def save_outputs(
    run: Run, partition: Partition, metrics: dict[str, Any], weights: dict[str, Tensor], folder: Path
) -> None:
    """The model, its image processor, metrics.json and the figures."""
    prefix = "student."
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    not_finite = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if not_finite:
        raise RuntimeError(f"the student's weights are not finite in {not_finite[:5]}; nothing was saved")
    student = run.student
    student.eval()
    student.save_pretrained(folder, state_dict=state)
    RaptorImageProcessor.from_teacher(run.processor).save_pretrained(folder)
    figures.plot_fidelity(metrics["fidelity"], partition, folder / "figures" / "fidelity.png")
    figures.plot_losses(run.histories, folder / "figures" / "losses.png")
    write_json(folder / "losses.json", {f"stage{stage}": history for stage, history in run.histories.items()})
    write_json(folder / "metrics.json", metrics)


def print_table(metrics: dict[str, Any]) -> None:
    """The fidelity per layer and what it amounts to."""
    fidelity, groups = metrics["fidelity"], metrics["fidelity"]["cosine"]
    print(f"\n{'layer':>5} {'R2':>8} {'epsilon':>9} {'relative':>9}" + "".join(f" {'cos ' + g:>13}" for g in groups))
    for index, r2 in enumerate(fidelity["r2"]):
        cosines = "".join(f" {values[index]:13.4f}" if values else f" {'-':>13}" for values in groups.values())
        epsilon, relative = fidelity["epsilon"][index], fidelity["relative_epsilon"][index]
        print(f"{index + 1:>5} {r2:8.4f} {epsilon:9.3f} {relative:9.4f}{cosines}")
    print(f"mean R2 {np.mean(fidelity['r2']):.4f}")
    for name in ("agreement", "teacher_accuracy", "student_accuracy"):
        if fidelity[name] is not None:
            print(f"{name.replace('_', ' ')} {fidelity[name]:.2%}")
    for name in ("parameters", "macs"):
        teacher, student = metrics[name]["teacher"], metrics[name]["student"]
        print(f"{name} {student:,} of the teacher's {teacher:,} ({student / teacher:.1%})")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command resumes from the last checkpoint") from None
