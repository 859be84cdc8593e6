"""How near a student is to its teacher on test images, and the table of it that a run prints."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..metrics import FidelityAccumulator, TopKAccuracy
from ..teacher import Teacher


@torch.no_grad()
def evaluate_student(
    teacher: Teacher,
    task: nn.Module,
    student: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    accelerator: Accelerator,
    to_classes: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Fidelity, agreement and accuracies on all images of all processes; a collective operation.

    Args:
        teacher: with its classifier, if it has one.
        task: that holds the student, as prepared for training.
        student: in training mode again afterwards.
        batches: of this process, with "pixel_values" (B, 3, H, W) and, where `to_classes` is given, "labels" (B,).
        accelerator: of the processes.
        to_classes: turns labels into classes of the teacher's classifier, negative where an image has none: those count
            for fidelity and agreement alone. None gives no accuracy.

    Returns:
        The fields of `Fidelity`, and "agreement", "teacher_accuracy" and "student_accuracy", None where not known.
    """
    for module in task.modules():
        if isinstance(module, FSDPModule):  # the student is called past the wrapper, which would gather its weights
            module.unshard()
    student.eval()
    fidelity = FidelityAccumulator(teacher.num_layers, teacher.tokens, teacher.hidden_size)
    scores = {name: TopKAccuracy(topk=(1,)) for name in ("agreement", "teacher_accuracy", "student_accuracy")}
    for batch in batches:
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
        if to_classes is not None:
            labels = to_classes(batch["labels"]).to(accelerator.device)
            known = labels >= 0
            scores["teacher_accuracy"].update(truth[known], labels[known])
            scores["student_accuracy"].update(predicted[known], labels[known])
    for accumulator in (fidelity, *scores.values()):
        accumulator.merge(accelerator)
    student.train()
    known = {name: bool(score.sums()[0]) for name, score in scores.items()}
    return fidelity.compute().to_dict() | {
        name: score.compute()["accuracy"] if known[name] else None for name, score in scores.items()
    }


def print_table(metrics: Mapping[str, Any]) -> None:
    """Print the fidelity per layer, the scores, and the size and cost of the student against the teacher's."""
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
