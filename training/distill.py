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
import dataclasses
import functools
import logging
import time
from typing import Any

import torch
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn

from raptor_hf import figures
from raptor_hf.data.images import ImageSet, check_image_size
from raptor_hf.data.labels import ClassMatch
from raptor_hf.data.loaders import ImageLoader, eval_loader, train_loader
from raptor_hf.data.sizes import SizedSteps, batch_size_at
from raptor_hf.distillation.evaluation import evaluate_student, print_table
from raptor_hf.distillation.image_sizes import FURTHER_IMAGES, cropping, further_processors, num_tokens, sized_steps
from raptor_hf.distillation.inputs import class_match, disk_space, open_inputs
from raptor_hf.distillation.partition import check_phases, check_trained_blocks, phases_of, read_partition
from raptor_hf.distillation.start import fit_student
from raptor_hf.distillation.student import block_parameters, make_student
from raptor_hf.distillation.task import DistillationTask, TrajectoryLoss, draw_num_steps, teacher_forcing
from raptor_hf.distillation.trajectory_cache import cached_trajectory
from raptor_hf.hub.heads import backbone_fingerprint
from raptor_hf.hub.publication import write_card
from raptor_hf.image_processing_raptor import RaptorImageProcessor
from raptor_hf.phases import Partition
from raptor_hf.recipes.averaging import averaged_weights, update_average
from raptor_hf.recipes.files import as_plain, write_json
from raptor_hf.recipes.fingerprints import fingerprint_dataset, fingerprint_model
from raptor_hf.recipes.loop import (
    IntervalLog,
    NonFiniteGuard,
    RisingLossGuard,
    cosine_schedule,
    describe_environment,
    is_step_finite,
    progress_bar,
    set_learning_rate,
    usable_workers,
)
from raptor_hf.recipes.optimizers import check_optimizer, has_fused_adamw, make_optimizer
from raptor_hf.recipes.run_metrics import StudentMetrics
from raptor_hf.recipes.session import Session, holds_backbone, run_program, save_model, whole_weights
from raptor_hf.recipes.settings import check_output_dir, user_errors
from raptor_hf.teacher import Teacher, count_parameters, macs

logger = logging.getLogger("distill")

# of the first loss, what a run may rise to: after a fitted start the first steps at the full rate lose some of it
RISING_FACTOR = 1.5


def main() -> None:
    settings = parse_settings(DistillSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        session = Session("distill", settings)
        accelerator, folder = session.accelerator, session.folder
        if settings.trajectory_cache_dir is not None:
            check_output_dir(settings.trajectory_cache_dir, setting="trajectory_cache_dir")
        check_optimizer(settings.optimizer, sharded=accelerator.distributed_type == DistributedType.FSDP)
        # the weights have a generator of their own; every process draws input noise of its own
        set_seed(settings.seed, device_specific=True)
        teacher, processor, train_images, test_images = open_inputs(settings, accelerator)
        sized = sized_steps(settings, processor, teacher, accelerator.num_processes)
        eval_processors = further_processors(settings, processor, teacher)
        fingerprints = {"teacher": fingerprint_model(teacher.model), "images": fingerprint_dataset(train_images)}
        settings = dataclasses.replace(settings, test_split=test_images.split)  # saved as it was found
        session.claim(settings, disk_space(settings, teacher), fingerprints, inputs=[settings.teacher])
        evaluated_on = {"dataset": settings.dataset, "split": settings.test_split, "num_images": settings.eval_images}
        result_of = evaluated_on | {"further_sizes": list(eval_processors)}
        if metrics := session.read_result(needs="model*.safetensors", evaluated_on=result_of):
            if accelerator.is_main_process:
                print_table(metrics)
            session.close("this run is finished; its folder stays as it is")
            return
        loader = functools.partial(
            train_loader,
            train_images,
            processor=processor,
            batch_size=settings.batch_size,
            seed=settings.seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=usable_workers(settings.num_workers),
            max_failures=settings.max_decode_failures,
            pin_memory=accelerator.device.type == "cuda",
        )
        phases = read_partition(folder, settings, teacher.num_layers)
        check_phases(session, phases)
    phases = phases_of(session, teacher, loader, phases)
    partition, variance = phases["partition"], phases["variance"] if settings.normalize_loss else None

    # found or read, the phases leave the random numbers in the same state
    set_seed(settings.seed, device_specific=True)
    student = make_student(teacher, partition, settings)
    began = time.perf_counter()
    if settings.init == "fitted" and session.progress is None:
        fit_student(teacher, student, loader, settings, accelerator)
    fit_seconds = time.perf_counter() - began
    task = DistillationTask(
        student,
        TrajectoryLoss(
            settings.loss,
            teacher.tokens,
            variance.sqrt().to(accelerator.device) if variance is not None else None,
            {"cosine": settings.cosine_weight, "normed_mse": settings.normed_mse_weight},
            copy.deepcopy(student.base_model.layernorm).to(accelerator.device),
        ),
        stage1_weights=(settings.stage1_weights or [0.34, 0.33, 0.33]) if settings.cls_weighting else None,
        stage2_weights=(settings.stage2_weights or [0.45, 0.10, 0.45]) if settings.cls_weighting else None,
        horizon=settings.horizon,
        input_noise=settings.input_noise,
        targets=settings.elastic_targets,
    )
    optimizer = make_optimizer(
        settings.optimizer,
        student,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        mixed_precision=accelerator.mixed_precision,
        fused=has_fused_adamw(accelerator),
    )
    task, optimizer = accelerator.prepare(task, optimizer)

    run = Run(session, teacher, task, optimizer, test_images, processor, sized, fit_seconds)
    run.resume(evaluated_on)
    if sized is not None:
        loader = functools.partial(loader, sized=sized)
    elif settings.augment:
        cropped, crop = cropping(processor, teacher)
        loader = functools.partial(loader, augment=crop, processor=cropped)
    for stage in (1, 2):
        if run.num_steps(stage) and run.stage <= stage:
            run.train(stage, loader)
    accelerator.wait_for_everyone()

    # the trained weights are on the disk before the evaluation begins
    with averaged_weights(optimizer):
        weights = whole_weights(task)  # on a CPU no copies
        if accelerator.is_main_process:
            save_student(run, weights)
    began = time.perf_counter()
    metrics = {"fidelity": run.evaluate(all_paces=True)}
    metrics["fidelity_by_size"] = {size: run.evaluate(further) for size, further in eval_processors.items()}
    metrics["unreadable_images"] = session.gather_failures(run.failures)
    seconds = {"phases": phases.get("seconds", 0.0)}
    seconds |= {"fit": run.fit_seconds} if settings.init == "fitted" else {}
    seconds |= {f"stage{stage}": log[-1]["seconds"] for stage, log in run.histories.items() if log}
    seconds["evaluation"] = time.perf_counter() - began
    if accelerator.is_main_process:
        metrics |= describe_run(run, partition, seconds, metrics["fidelity"]) | {"evaluated_on": result_of}
        save_outputs(run, partition, metrics)
        print_table(metrics)
    session.close(f"saved to {folder}: the model, its card README.md, metrics.json and figures/")


class Run:
    """The training under way: what a checkpoint holds, the loop, and the evaluation."""

    def __init__(
        self,
        session: Session,
        teacher: Teacher,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        test_images: ImageSet,
        processor: Any,
        sized: SizedSteps | None,
        fit_seconds: float,
    ) -> None:
        self.fit_seconds = fit_seconds
        self.session, self.settings, self.accelerator = session, session.settings, session.accelerator
        self.teacher, self.task, self.optimizer = teacher, task, optimizer
        fingerprint = session.identity["fingerprints"]["teacher"]
        self.trajectory = cached_trajectory(teacher, self.settings, self.accelerator, fingerprint)
        self.test_images, self.processor, self.sized = test_images, processor, sized
        self.stage, self.step = 1, 0
        self.log: IntervalLog | None = None
        self.histories: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        self.evaluations: list[dict[str, Any]] = []
        self.evaluated_on: dict[str, Any] = {}
        self.failures: dict[str, str] = {}
        self.pending_log: dict[str, Any] | None = None
        self.rising: dict[str, float | int | None] = {}

    @property
    def student(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.task).student

    @functools.cached_property
    def class_match(self) -> ClassMatch:
        """Finds which classes of the teacher's classifier the labels of the test images mean."""
        return class_match(self.teacher, self.test_images)

    def num_images(self, step: int) -> int:
        """Images of one step of the run, of both stages counted on."""
        return self.settings.batch_size if self.sized is None else self.sized.num_images(step)

    def num_steps(self, stage: int) -> int:
        return self.settings.stage1_steps if stage == 1 else self.settings.stage2_steps

    def train(self, stage: int, loader: functools.partial) -> None:
        """Trains one stage, from where the run is."""
        settings, accelerator, num_steps = self.settings, self.accelerator, self.num_steps(stage)
        if self.stage < stage:  # a fresh optimizer for the second stage
            self.stage, self.step, self.pending_log, self.rising = stage, 0, None, {}
            self.optimizer.state.clear()
        self.log = IntervalLog(
            accelerator, num_steps=num_steps, images_per_step=settings.batch_size, log_every=settings.log_every
        )
        if self.pending_log:
            self.log.load_state_dict(self.pending_log)
        self.histories[stage] = self.log.history
        guard = NonFiniteGuard(settings.max_nonfinite_steps)
        rising = RisingLossGuard(
            settings.max_rising_steps,
            num_steps=num_steps,
            **self.rising,
            factor=RISING_FACTOR,
            harmless=self.harmless_loss(stage),
        )
        # stage 2 goes on in the data where stage 1 ended
        offset = settings.stage1_steps if stage == 2 else 0
        batches: ImageLoader = loader(num_steps=offset + num_steps, start_step=offset + self.step)
        batches.failures.reasons.update(self.failures)
        self.failures = batches.failures.reasons
        bar = progress_bar(batches, f"stage {stage}", accelerator, total=num_steps, initial=self.step)
        for step, batch in enumerate(bar, start=self.step):
            lr = cosine_schedule(
                step,
                num_steps=num_steps,
                warmup_steps=settings.warmup_steps,
                base_lr=settings.learning_rate,
                final_lr=settings.final_learning_rate,
            )
            set_learning_rate(self.optimizer, lr)
            losses = self.backward(stage, batch["pixel_values"], self.forcing(stage, step))
            is_finite = is_step_finite(accelerator, losses["loss"], self.clip_gradients(stage))
            if guard.check(step + 1, is_finite, batch["names"]) or accelerator.scaler is not None:
                self.optimizer.step()
                if settings.ema_decay:
                    update_average(self.optimizer, settings.ema_decay, step)
            self.optimizer.zero_grad()
            self.step = step + 1
            # until its forcing is the last one stage 1 has another loss at every step
            if self.forcing(stage, step) == self.forcing(stage, num_steps - 1):
                rising.check(self.step, float(accelerator.reduce(losses["loss"], reduction="mean")), lr)
                self.rising = rising.state
            if record := self.log.update(step + 1, losses, lr=lr, num_images=self.num_images(offset + step)):
                accelerator.log(record, step=offset + step + 1)
            if settings.eval_every and self.step % settings.eval_every == 0 and self.step < num_steps:
                self.note_evaluation()
            if self.step % settings.checkpoint_every == 0 or self.step == num_steps:
                self.save(offset)
        if settings.eval_every and (stage, num_steps) not in {(e["stage"], e["step"]) for e in self.evaluations}:
            self.note_evaluation()  # after the checkpoint: an evaluation that fails costs no step
            self.save(offset)

    def harmless_loss(self, stage: int) -> float:
        """The loss of a student that explains half of the teacher's variance: up to it none counts as risen.

        0 for losses of another kind, which have no such scale; those that are added to it are left out.
        """
        if not self.settings.normalize_loss or self.settings.loss != "mse":
            return 0.0
        task = self.accelerator.unwrap_model(self.task)
        if stage == 2:
            return 0.5 * sum(task.stage2_weights or [1.0])
        # of each block, of which the last one alone has weights; the loss is the sum over those that are trained
        halves = [0.5] * self.student.config.num_blocks
        halves[-1] *= sum(task.stage1_weights or [1.0])
        return sum(halves) if self.settings.train_block is None else halves[self.settings.train_block]

    def note_evaluation(self) -> None:
        """Keep the scores of the student as it is now."""
        with self.log.paused():
            fidelity = self.evaluate()
        scores = {name: fidelity[name] for name in ("r2", "agreement", "student_accuracy")}
        seconds = self.seconds(self.stage)
        self.evaluations.append({"stage": self.stage, "step": self.step, "seconds": seconds, **scores})

    def seconds(self, stage: int) -> float:
        """Training time until now, of both stages."""
        return self.log.seconds + (self.histories[1][-1]["seconds"] if stage == 2 and self.histories[1] else 0.0)

    def forcing(self, stage: int, step: int) -> float:
        """The weight of teacher forcing in a step; stage 2 has none."""
        if stage == 2:
            return 0.0
        if self.settings.teacher_forcing == "anneal":
            weight = teacher_forcing(step, self.settings.stage1_steps, self.settings.anneal_fraction)
            return max(weight, self.settings.teacher_forcing_floor)
        return 1.0 if self.settings.teacher_forcing == "only" else 0.0

    def backward(self, stage: int, pixel_values: Tensor, forcing: float) -> dict[str, Tensor]:
        """Computes the gradients of one batch, in as many parts as they are accumulated over.

        Returns:
            The mean losses; for an elastic student also those of each number of steps that was taken.
        """
        accelerator, settings = self.accelerator, self.settings
        parts = settings.gradient_accumulation_steps
        num_layers = self.student.config.num_hidden_layers
        paces: list[int | None] = [None] * parts
        if stage == 2:
            near = num_layers if settings.elastic_distribution == "near" else None
            drawn_from = settings.elastic, settings.elastic_share, settings.seed, self.step
            paces = draw_num_steps(*drawn_from, parts=parts, near=near)
        groups = self.blocks_at_once(stage)
        totals: dict[str, Tensor] = {}
        by_pace: dict[int, list[Tensor]] = {}
        for index, images in enumerate(pixel_values.to(accelerator.device, non_blocking=True).chunk(parts)):
            with torch.no_grad(), accelerator.autocast():
                states = self.trajectory(images)
            for blocks in groups:
                # gradients are exchanged between processes once, with the last part
                with accelerator.no_sync(self.task) if index + 1 < parts else contextlib.nullcontext():
                    losses = self.task(states, stage, forcing, blocks, paces[index], images.shape[2:])
                    accelerator.backward(losses["loss"] / parts)
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0) + value.detach() / parts
                if settings.elastic and stage == 2:
                    by_pace.setdefault(paces[index] or num_layers, []).append(losses["loss"].detach())
        totals |= {f"loss_{num_steps}_steps": torch.stack(own).mean() for num_steps, own in by_pace.items()}
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
        """Write a checkpoint; a collective operation."""
        progress = {
            "stage": self.stage,
            "step": self.step,
            "log": self.log.state_dict(),
            "histories": {str(stage): history for stage, history in self.histories.items()},
            "evaluations": self.evaluations,
            "evaluated_on": self.evaluated_on,
            "failures": self.session.gather_failures(self.failures),
            "fit_seconds": self.fit_seconds,
            "rising": self.rising,
            "blocks": [list(layers) for layers in self.student.config.block_layers],
        }
        # a fit has changed the blocks that are not trained, too
        trainable_only = self.settings.init != "fitted" or self.settings.train_block is None
        self.session.save(offset + self.step, self.task, self.optimizer, progress, trainable_only=trainable_only)

    def resume(self, evaluated_on: dict[str, Any]) -> None:
        """Take up the last checkpoint, if there is one; a collective operation."""
        self.evaluated_on = evaluated_on
        progress = self.session.resume(self.task, self.optimizer)
        if progress is None:
            return
        check_trained_blocks(progress, self.student.config.block_layers)
        self.stage, self.step, self.pending_log = progress["stage"], progress["step"], progress["log"]
        self.histories = {int(stage): history for stage, history in progress["histories"].items()}
        self.failures = progress["failures"]
        self.fit_seconds = progress.get("fit_seconds", 0.0)
        if progress.get("evaluated_on", evaluated_on) == evaluated_on:  # else those so far are of other images
            self.evaluations = progress["evaluations"]
        self.rising = progress.get("rising", {})
        logger.info("resumed in stage %d after step %d", self.stage, self.step)

    def evaluate(self, processor: Any = None, all_paces: bool = False) -> dict[str, Any]:
        """Measures fidelity, agreement and accuracies on the test images; a collective operation.

        Args:
            processor: that makes these images of a further size, on some of them; None for the run's own.
            all_paces: whether to measure an elastic student also at all numbers of steps that it has learned.
        """
        accelerator, settings = self.accelerator, self.settings
        batch_size, limit = settings.eval_batch_size, settings.eval_images
        if processor is not None:
            tokens, own_tokens = (num_tokens(each, self.teacher) for each in (processor, self.processor))
            batch_size = batch_size_at(batch_size, tokens, own_tokens, accelerator.num_processes)
            limit = min(limit or FURTHER_IMAGES, FURTHER_IMAGES)
        batches = eval_loader(
            self.test_images,
            processor or self.processor,
            batch_size=batch_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=usable_workers(settings.num_workers),
            limit=limit,
            max_failures=settings.max_decode_failures,
            pin_memory=accelerator.device.type == "cuda",
        )
        batches = progress_bar(batches, "evaluation", accelerator)
        to_classes = self.class_match if self.class_match.classes is not None else None
        elastic = settings.elastic if all_paces else None
        paces = sorted({*elastic, self.student.config.num_hidden_layers}) if elastic else ()
        with averaged_weights(self.optimizer):
            return evaluate_student(self.teacher, self.task, self.student, batches, accelerator, to_classes, paces)


def describe_run(run: Run, partition: Partition, seconds: dict[str, float], fidelity: dict[str, Any]) -> dict[str, Any]:
    """Returns all fields of metrics.json except the fidelity, to which it adds the costs of other numbers of steps."""
    settings, teacher, student = run.settings, run.teacher, run.student.base_model.eval()
    size = check_image_size(run.processor, teacher.patch_size)  # of these images, not of the position embeddings
    image = torch.zeros(1, student.config.num_channels, *size, device=run.accelerator.device)
    for num_steps, scores in fidelity.get("by_steps", {}).items():
        scores["macs"] = macs(functools.partial(student, num_steps=int(num_steps)), image)
    trained = sum(run.num_images(step) for step in range(settings.stage1_steps + settings.stage2_steps))
    training_seconds = seconds.get("stage1", 0.0) + seconds.get("stage2", 0.0)
    return {
        **run.session.identity,
        "teacher": {
            "name": settings.teacher,
            "revision": teacher.revision,
            "fingerprint": run.session.identity["fingerprints"]["teacher"],
        },
        "phases": partition.phases if partition.is_contiguous else None,
        "blocks": [list(layers) for layers in partition.blocks],
        "parameters": {"teacher": teacher.num_parameters, "student": count_parameters(student)},
        "macs": {"teacher": macs(teacher, image), "student": macs(student, image)},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "images_per_second": trained / training_seconds if training_seconds else None,
        "evaluations": run.evaluations,
        "seed": settings.seed,
        "mixed_precision": run.accelerator.mixed_precision,
        **describe_environment(run.accelerator.device),
    }


def save_student(run: Run, weights: dict[str, Tensor]) -> None:
    """Saves the model and its image processor; a folder that has these weights keeps the heads added to it."""
    prefix = "student."
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    student, folder = run.student.eval(), run.session.folder
    if not holds_backbone(folder, state, student.base_model_prefix):
        save_model(folder, state, student, RaptorImageProcessor.from_teacher(run.processor), "student")


def save_outputs(run: Run, partition: Partition, metrics: dict[str, Any]) -> None:
    """Writes the figures and metrics.json, with what else the folder knows of these weights."""
    folder = run.session.folder
    if earlier := run.session.read_result():
        metrics = {name: earlier[name] for name in ("probes", "quick_checks") if name in earlier} | metrics
    (folder / "figures").mkdir(exist_ok=True)
    figures.plot_fidelity(metrics["fidelity"], partition, folder / "figures" / "fidelity.png")
    if metrics["fidelity"].get("by_steps"):
        figures.plot_depths(metrics["fidelity"], metrics["macs"]["teacher"], folder / "figures" / "depths.png")
    figures.plot_losses(run.histories, folder / "figures" / "losses.png")
    write_json(folder / "losses.json", {f"stage{stage}": history for stage, history in run.histories.items()})
    # heads that are trained on this backbone will carry its fingerprint
    StudentMetrics.from_dict(as_plain(metrics | {"backbone": backbone_fingerprint(folder)})).write(folder)
    write_card(folder)


if __name__ == "__main__":
    run_program(main)
