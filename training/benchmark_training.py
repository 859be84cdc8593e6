"""Training steps: this package beside the plain loop of reference_loop.py, at equal mathematics, weights and images.

Both sides run the teacher once per step, transformers' own model, and take one optimizer step; in stage 1 the reference
goes from block to block. training/benchmark.py calls this file and writes what it finds.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from distill import block_parameters
from reference_loop import ReferenceLoop
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.benchmarking import Comparison, alternate, count_flops, matmul_peak, peak_memory, saved_bytes
from raptor_hf.conversion import student_from_teacher
from raptor_hf.distillation import DistillationTask, TrajectoryLoss
from raptor_hf.teacher import Teacher

SHAPES: dict[str, dict[str, int]] = {
    "digits": dict(hidden_size=96, num_attention_heads=3, image_size=8, patch_size=2, num_register_tokens=2),
    "vits14": dict(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14),
    "vitb14": dict(hidden_size=768, num_attention_heads=12, image_size=224, patch_size=14),
}
BLOCK_REPEATS = (7, 3, 2)
# name of the row: stage and lambda; lambda is 0 for three quarters of the published stage 1
STAGES = {"1, annealing": (1, 0.5), "1, autoregressive": (1, 0.0), "2": (2, 0.0)}
# operators of a profile, by the first prefix that fits their names
OPERATORS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_linear", "aten::_addmm_activation"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "norms": ("aten::native_layer_norm",),
    "activations": ("aten::gelu", "aten::silu"),
    "losses": ("aten::mse_loss",),
    "copies": ("aten::copy_", "aten::cat", "aten::stack", "aten::fill_", "aten::zero_"),
    "optimizer": ("aten::_fused_adamw", "Optimizer", "aten::_foreach"),
    "sums and products": ("aten::add", "aten::mul", "aten::addcmul", "aten::sum", "aten::sub", "aten::div"),
}


@dataclass(frozen=True)
class TrainingCase:
    """One comparison of training steps.

    Args:
        size: of `SHAPES`.
        batch_size: images.
        ffn_type: "mlp" or "swiglu".
        stage: of `STAGES`.
        device: what both run on.
        autocast: precision of ours; the reference is in fp32 always.
        compile: whether our blocks are compiled.
    """

    size: str
    batch_size: int
    ffn_type: str
    stage: str
    device: torch.device
    autocast: torch.dtype | None = None
    compile: bool = False


def build_steps(case: TrainingCase, learning_rate: float = 1e-4) -> tuple[Callable[[], float], "OurLoop", Tensor]:
    """The reference's step, ours, and the images, with equal weights in both students."""
    torch.manual_seed(0)
    shape = SHAPES[case.size]
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape))
    student = student_from_teacher(
        model,
        BLOCK_REPEATS,
        seed=0,
        depth_conditioning="scale",
        ffn_type=case.ffn_type,
        intermediate_size=4 * shape["hidden_size"],
        layerscale_value=0.1,  # of a trained block rather than a new one, so that losses mean something
    ).to(case.device)
    images = torch.randn(case.batch_size, 3, shape["image_size"], shape["image_size"], device=case.device)
    reference = ReferenceLoop(student.base_model, learning_rate)
    ours = OurLoop(Teacher(model.to(case.device)), student, case, images, learning_rate)
    return partial(reference_step, reference, model, images, case), ours, images


def reference_step(
    loop: ReferenceLoop, teacher: nn.Module, images: Tensor, case: TrainingCase, update: bool = True
) -> float:
    """One step of the reference; without `update` its losses alone, with their graph."""
    with torch.no_grad():
        activations = teacher(images, output_hidden_states=True).hidden_states
    stage, forcing = STAGES[case.stage]
    if stage == 2:
        return loop.stage2_step(activations) if update else loop.stage2_loss(activations)
    if update:
        return loop.stage1_step(activations, forcing)
    return sum(
        loop.stage1_loss(block, layers, activations, forcing)
        for block, layers in zip(loop.blocks, loop.layers, strict=True)
    )


class OurLoop:
    """The step of distill.py without its data, logs and checks.

    Args:
        teacher: run in every step.
        student: whose blocks are trained.
        case: what is measured.
        images: (B, 3, H, W).
        learning_rate: of AdamW.
    """

    def __init__(
        self, teacher: Teacher, student: nn.Module, case: TrainingCase, images: Tensor, learning_rate: float
    ) -> None:
        self.teacher, self.case, self.images = teacher, case, images
        self.student = student.requires_grad_(False).train()
        self.groups = [block_parameters(student, block) for block in range(student.config.num_blocks)]
        for parameter in sum(self.groups, []):
            parameter.requires_grad_(True)
        if case.compile:
            for block in student.base_model.encoder.blocks:
                block.compile()
        self.task = DistillationTask(
            student,
            TrajectoryLoss("mse", teacher.num_registers),
            stage1_weights=[0.34, 0.33, 0.33],
            stage2_weights=[0.45, 0.10, 0.45],
        )
        self.optimizer = torch.optim.AdamW(sum(self.groups, []), lr=learning_rate, weight_decay=1e-4, fused=True)

    def loss(self) -> Tensor:
        """The loss with its graph, the teacher's pass included."""
        stage, forcing = STAGES[self.case.stage]
        device, dtype = self.images.device.type, self.case.autocast
        context = torch.autocast(device, dtype) if dtype else contextlib.nullcontext()
        with context:
            states = self.teacher.trajectory(self.images)
            return self.task(states, stage=stage, forcing=forcing)["loss"]

    def __call__(self) -> float:
        loss = self.loss()
        loss.backward()
        groups = self.groups if self.case.stage != "2" else [sum(self.groups, [])]
        for group in groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def compare_training(case: TrainingCase, repeats: int, warmup: int) -> dict[str, Any]:
    """
    Time, saved activations and MFU of both.

    Returns:
        a JSON-able row; `loss_difference` is relative, of the first step; `floor_seconds` the FLOPs of our step over
        the matmul peak of our precision, measured in the same run.
    """
    reference, ours, images = build_steps(case)
    losses = reference(), ours()
    peaks = {
        "reference": matmul_peak(case.device, torch.float32),
        "ours": matmul_peak(case.device, case.autocast or torch.float32),
    }
    times = alternate([reference, ours], repeats=repeats, warmup=warmup, device=case.device)
    comparison = Comparison(times[0].tolist(), times[1].tolist())
    eager = ours if not case.compile else build_steps(without_compile(case))[1]
    flops = {"reference": count_flops(reference), "ours": count_flops(eager)}
    loop, model = reference.args[0], reference.args[1]
    teacher_weights = [images, *model.parameters()]
    saved = {
        "reference": saved_bytes(partial(reference, update=False), [*teacher_weights, *loop.blocks.parameters()]),
        "ours": saved_bytes(eager.loss, [*teacher_weights, *eager.student.parameters()]),
    }
    seconds = dict(zip(("reference", "ours"), np.median(times, axis=1).tolist(), strict=True))
    return {
        "size": case.size,
        "batch_size": case.batch_size,
        "ffn_type": case.ffn_type,
        "stage": case.stage,
        "precision": str(case.autocast or torch.float32).removeprefix("torch."),
        "compiled": case.compile,
        "seconds": seconds,
        **{key: value for key, value in comparison.to_dict().items() if key.startswith(("speedup", "repeats"))},
        "images_per_second": {name: case.batch_size / value for name, value in seconds.items()},
        "saved_bytes": saved,
        "flops": flops,
        "matmul_peak": peaks,
        "mfu": {name: flops[name] / seconds[name] / peaks[name] for name in seconds},
        "floor_seconds": flops["ours"] / peaks["ours"],
        "loss_difference": abs(losses[1] - losses[0]) / abs(losses[0]),
    }


def without_compile(case: TrainingCase) -> TrainingCase:
    """The same case, eager."""
    return TrainingCase(case.size, case.batch_size, case.ffn_type, case.stage, case.device, case.autocast)


def peak_memories(case: TrainingCase) -> dict[str, int]:
    """Peak memory in bytes of two steps of either side, models included, each in a process of its own on a CPU."""
    return {name: peak_memory(partial(_two_steps, case, name), case.device) for name in ("reference", "ours")}


def _two_steps(case: TrainingCase, name: str) -> None:
    reference, ours, _ = build_steps(case)
    step = reference if name == "reference" else ours
    step()
    step()


def profile_step(case: TrainingCase, steps: int = 5) -> dict[str, Any]:
    """Where the time of our step goes: shares of self time by kind of operator, and the slowest operators."""
    _, step, _ = build_steps(case)
    step()
    activities = [ProfilerActivity.CPU]
    if case.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
    times = Counter()
    for event in recorded.key_averages():
        times[event.key] = event.self_device_time_total if case.device.type == "cuda" else event.self_cpu_time_total
    total = sum(times.values())
    kinds = Counter()
    for name, microseconds in times.items():
        kind = next((kind for kind, starts in OPERATORS.items() if name.startswith(starts)), "other, and Python")
        kinds[kind] += microseconds / total
    slowest = [{"operator": name, "share": value / total} for name, value in times.most_common(12)]
    return {
        "size": case.size,
        "batch_size": case.batch_size,
        "stage": case.stage,
        "precision": str(case.autocast or torch.float32).removeprefix("torch."),
        "shares": dict(kinds.most_common()),
        "slowest": slowest,
    }
