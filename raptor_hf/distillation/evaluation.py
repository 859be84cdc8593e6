"""Measures how near a student is to its teacher on test images, and prints the table of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..configuration_raptor import as_pair
from ..metrics import FidelityAccumulator, TopKAccuracy
from ..patch_metrics import PatchQualityAccumulator, shifted
from ..teacher import Teacher

# of all processes, whose patches are looked at once more in shifted pictures
NUM_PATCH_IMAGES = 64


@torch.no_grad()
def evaluate_student(
    teacher: Teacher,
    task: nn.Module,
    student: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    accelerator: Accelerator,
    to_classes: Callable[[Tensor], Tensor] | None = None,
    paces: Sequence[int] = (),
) -> dict[str, Any]:
    """Measures fidelity, agreement and accuracies on all images of all processes; a collective operation.

    Args:
        teacher: with its classifier, if it has one.
        task: that holds the student, as prepared for training.
        student: in training mode again afterwards.
        batches: of this process, with "pixel_values" (B, 3, H, W) and, where `to_classes` is given, "labels" (B,).
        accelerator: of the processes.
        to_classes: turns labels into classes of the teacher's classifier, negative where an image has none: those count
            for fidelity and agreement alone. None gives no accuracy.
        paces: numbers of steps through the whole depth, at which a student with `step_scaling` is measured, too.

    Returns:
        The fields of `Fidelity`, "num_images", and "agreement", "teacher_accuracy" and "student_accuracy", None where
        not known; "patches", the fields of `PatchQuality`, of the first `NUM_PATCH_IMAGES` images; with `paces`
        "by_steps", the fields of `StepsFidelity` by the number of steps, but for their cost.
    """
    sharded = [module for module in task.modules() if isinstance(module, FSDPModule)]
    for module in sharded:  # the student is called past the wrapper, which would gather its weights
        module.unshard()
    student.eval()
    fidelity = FidelityAccumulator(teacher.num_layers, teacher.tokens, teacher.hidden_size)
    own, teacher_accuracy = _Predictions(), TopKAccuracy(topk=(1,))
    quality, wanted = PatchQualityAccumulator(), -(-NUM_PATCH_IMAGES // accelerator.num_processes)
    # at another pace the states between belong to no layer; the last one does
    finals = {n: (FidelityAccumulator(1, teacher.tokens, teacher.hidden_size), _Predictions()) for n in paces}
    for batch in batches:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        with accelerator.autocast():
            teacher_states = teacher.trajectory(pixel_values)
            student_states = torch.stack(student.base_model(pixel_values, output_hidden_states=True).hidden_states, 1)
        fidelity.update(teacher_states, student_states)
        if wanted > 0:
            images, height, width = pixel_values[:wanted], *as_pair(teacher.patch_size)
            with accelerator.autocast():
                moved = shifted(images, width)
                last = [teacher_states[:wanted, -1], student_states[:wanted, -1], teacher.trajectory(moved)[:, -1]]
                last.append(student.base_model(moved, output_hidden_states=True).hidden_states[-1])
                patches = [teacher.final_norm(state)[:, teacher.tokens.slices["patches"]] for state in last]
            quality.update(*patches, grid=(images.shape[2] // height, images.shape[3] // width))
            wanted -= len(images)
        truth, labels = teacher.logits(teacher_states[:, -1]), None
        if truth is not None and to_classes is not None:
            labels = to_classes(batch["labels"]).to(accelerator.device)
            teacher_accuracy.update(truth[labels >= 0], labels[labels >= 0])
        own.update(teacher.logits(student_states[:, -1]), truth, labels)
        for num_steps, (final, predictions) in finals.items():
            with accelerator.autocast():
                output = student.base_model(pixel_values, num_steps=num_steps, output_hidden_states=True)
            ends = torch.stack((output.hidden_states[0], output.hidden_states[-1]), dim=1)
            final.update(teacher_states[:, [0, -1]], ends)
            predictions.update(teacher.logits(ends[:, 1]), truth, labels)
    student.train()
    for module in sharded:  # or training would go on with the weights of the evaluation, which may be an average
        module.reshard()
    fidelity.merge(accelerator)
    quality.merge(accelerator)
    scores = fidelity.compute().to_dict() | {"num_images": int(fidelity.sums()[0])} | own.compute(accelerator)
    scores["patches"] = quality.compute().to_dict()
    scores["teacher_accuracy"] = _accuracy(teacher_accuracy, accelerator)
    for num_steps, (final, predictions) in finals.items():
        final.merge(accelerator)
        row = {"block_repeats": list(student.config.spread_steps(num_steps)), "r2": final.compute().r2.item()}
        scores.setdefault("by_steps", {})[str(num_steps)] = row | predictions.compute(accelerator)
    return scores


class _Predictions:
    """How often the teacher's head, which is the student's too, says the same of both, and what is true."""

    def __init__(self) -> None:
        self.agreement, self.student_accuracy = TopKAccuracy(topk=(1,)), TopKAccuracy(topk=(1,))

    def update(self, predicted: Tensor | None, truth: Tensor | None, labels: Tensor | None) -> None:
        if predicted is None:
            return
        self.agreement.update(predicted, truth.argmax(dim=1))
        if labels is not None:
            self.student_accuracy.update(predicted[labels >= 0], labels[labels >= 0])

    def compute(self, accelerator: Accelerator) -> dict[str, float | None]:
        return {name: _accuracy(score, accelerator) for name, score in vars(self).items()}


def _accuracy(score: TopKAccuracy, accelerator: Accelerator) -> float | None:
    """Of all processes; None where nothing was counted."""
    score.merge(accelerator)
    return score.compute()["accuracy"] if score.sums()[0] else None


def print_table(metrics: Mapping[str, Any]) -> None:
    """Print the fidelity per layer, the scores, and the size and cost of the student against the teacher's."""
    fidelity, groups = metrics["fidelity"], metrics["fidelity"]["cosine"]
    print(f"\n{'layer':>5} {'R2':>8} {'epsilon':>9} {'relative':>9}" + "".join(f" {'cos ' + g:>13}" for g in groups))
    for index, r2 in enumerate(fidelity["r2"]):
        cosines = "".join(f" {values[index]:13.4f}" if values else f" {'-':>13}" for values in groups.values())
        epsilon, relative = fidelity["epsilon"][index], fidelity["relative_epsilon"][index]
        print(f"{index + 1:>5} {r2:8.4f} {epsilon:9.3f} {relative:9.4f}{cosines}")
    mean_r2 = np.mean(fidelity["r2"])
    print(f"mean R2 {mean_r2:.4f}")
    if mean_r2 < 0:
        print("the mean of the teacher's states has an R2 of 0: lower learning_rate, or train longer")
    for size, further in metrics.get("fidelity_by_size", {}).items():
        print(f"mean R2 {np.mean(further['r2']):.4f} at {size} pixels, on {further['num_images']} images")
    for name in ("agreement", "teacher_accuracy", "student_accuracy"):
        if fidelity[name] is not None:
            print(f"{name.replace('_', ' ')} {fidelity[name]:.2%}")
    if patches := {name: value for name, value in (fidelity.get("patches") or {}).items() if value is not None}:
        print("patches: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in patches.items()))
    if by_steps := fidelity.get("by_steps"):
        print(f"{'steps':>5} {'R2':>8} {'agreement':>9} {'accuracy':>9} {'macs':>13}")
        for num_steps, row in by_steps.items():
            shares = "".join(
                f" {'-' if row[n] is None else format(row[n], '.2%'):>9}" for n in ("agreement", "student_accuracy")
            )
            print(f"{num_steps:>5} {row['r2']:8.4f}{shares} {row['macs']:13,}")
    for name in ("parameters", "macs"):
        teacher, student = metrics[name]["teacher"], metrics[name]["student"]
        print(f"{name} {student:,} of the teacher's {teacher:,} ({student / teacher:.1%})")
