"""Training steps: this package beside the plain loop of raptor_minimal.py, at equal mathematics, weights and images.

Both sides run the teacher once per step, transformers' own model, and take one optimizer step; in stage 1 the reference
goes from block to block. benchmark.py calls this file and writes what it finds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from raptor_hf.conversion import student_from_teacher
from raptor_hf.distillation.student import block_parameters
from raptor_hf.distillation.task import DistillationTask, TrajectoryLoss
from raptor_hf.modeling_raptor import RaptorModel
from raptor_hf.research_checkpoints import BLOCK_NAMES, CONDITIONER_NAMES
from raptor_hf.teacher import Teacher
from training.raptor_minimal import Block, make_optimizer, stage1_loss, stage2_loss, take_step

from .measuring import Comparison, alternate, count_flops, matmul_peak, saved_bytes
from .settings import SHAPES

BLOCK_REPEATS = (7, 3, 2)
# name of the row: stage and lambda; lambda is 0 for three quarters of the published stage 1
STAGES = {"1, annealing": (1, 0.5), "1, autoregressive": (1, 0.0), "2": (2, 0.0)}


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

    @property
    def precision(self) -> str:
        """Of ours, in words."""
        return str(self.autocast or torch.float32).removeprefix("torch.")


class MinimalLoop:
    """The stages of raptor_minimal.py on blocks that start with a student's weights.

    Args:
        model: the student, with "scale" conditioning, contiguous phases and a cls token.
        learning_rate: of AdamW.
        stage: 1 or 2; in stage 1 each block has an optimizer of its own.
        forcing: lambda, in stage 1.
    """

    def __init__(self, model: RaptorModel, learning_rate: float, stage: int, forcing: float = 0.0) -> None:
        config = model.config
        self.phases, self.num_registers, self.stage, self.forcing = (
            config.block_layers,
            config.num_register_tokens,
            stage,
            forcing,
        )
        sizes = config.hidden_size, config.num_attention_heads, config.intermediate_size, config.ffn_type
        self.blocks = nn.ModuleList(Block(*sizes).to(model.device) for _ in self.phases)
        for own, block, conditioner in zip(self.blocks, model.encoder.blocks, model.encoder.conditioners, strict=True):
            weights, gains = block.state_dict(), conditioner.state_dict()
            own.load_state_dict(
                {name: weights[ours] for name, ours in BLOCK_NAMES.items()}
                | {name: gains[ours] for name, ours in CONDITIONER_NAMES.items()}
            )
            own.norm1.eps = own.norm2.eps = config.block_layer_norm_eps
        self.trained = [*self.blocks] if stage == 1 else [self.blocks]
        self.optimizers = [make_optimizer(module, learning_rate) for module in self.trained]

    def step(self, states: Sequence[Tensor]) -> float:
        """Takes one step of every block, in stage 1 one after the other; the sum of the losses before it.

        Args:
            states: states 0..L of the teacher, each (B, T, D).
        """
        return sum(
            take_step(loss(states), module, optimizer)
            for loss, module, optimizer in zip(self.losses, self.trained, self.optimizers, strict=True)
        )

    @property
    def losses(self) -> list[Callable[[Sequence[Tensor]], Tensor]]:
        """The losses as functions of the teacher's states: of each block in stage 1, one of all blocks in stage 2."""
        if self.stage == 2:
            return [partial(stage2_loss, self.blocks, self.phases, num_registers=self.num_registers)]
        return [
            partial(stage1_loss, block, layers, forcing=self.forcing, num_registers=self.num_registers)
            for block, layers in zip(self.blocks, self.phases, strict=True)
        ]


class ReferenceStep:
    """A step of the minimal loop, the teacher's pass included.

    Args:
        loop: what is trained.
        teacher: transformers' own model.
        images: (B, 3, H, W).
    """

    def __init__(self, loop: MinimalLoop, teacher: nn.Module, images: Tensor) -> None:
        self.loop, self.teacher, self.images = loop, teacher, images

    def __call__(self) -> float:
        """Takes the step; the loss before it."""
        return self.loop.step(self.states())

    def states(self) -> tuple[Tensor, ...]:
        """States 0..L of the teacher, each (B, T, D)."""
        with torch.no_grad():
            return self.teacher(self.images, output_hidden_states=True).hidden_states

    def saved_bytes(self) -> int:
        """Activations saved at once, without the teacher's states; in stage 1, block by block, those of the largest."""
        states = self.states()
        exclude = [*states, *self.loop.blocks.parameters()]
        return max(saved_bytes(partial(loss, states), exclude) for loss in self.loop.losses)


class OurStep:
    """The step of distill.py without its data, logs and checks.

    Args:
        teacher: run in every step.
        student: whose blocks are trained.
        images: (B, 3, H, W).
        learning_rate: of AdamW.
        stage: 1 or 2.
        forcing: lambda, in stage 1.
        autocast: precision; None for that of the weights.
        compile: whether the blocks are compiled.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: nn.Module,
        images: Tensor,
        learning_rate: float,
        stage: int = 2,
        forcing: float = 0.0,
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        self.teacher, self.images, self.autocast = teacher, images, autocast
        self.stage, self.forcing = stage, forcing
        self.student = student.requires_grad_(False).train()
        self.groups = [block_parameters(student, block) for block in range(student.config.num_blocks)]
        # in stage 1 one after the other, as distill.py does in a single process
        self.blocks_at_once = [(block,) for block in range(student.config.num_blocks)]
        if self.stage == 2:
            self.groups, self.blocks_at_once = [sum(self.groups, [])], [None]
        trained = sum(self.groups, [])
        for parameter in trained:
            parameter.requires_grad_(True)
        if compile:
            # what earlier cases compiled counts towards the limit of graphs per function, past which it stays eager
            torch.compiler.reset()
            for block in student.base_model.encoder.blocks:
                block.compile()
        self.task = DistillationTask(
            student,
            TrajectoryLoss("mse", teacher.tokens),
            stage1_weights=[0.34, 0.33, 0.33],
            stage2_weights=[0.45, 0.10, 0.45],
        )
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=1e-4, fused=True)

    def __call__(self) -> float:
        """Takes the step; the loss before it."""
        states, total = self.states(), 0.0
        for blocks in self.blocks_at_once:
            loss = self.loss(states, blocks)
            loss.backward()
            total += loss.detach()
        for group in self.groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()

    def states(self) -> Tensor:
        """States 0..L of the teacher, (B, L + 1, T, D)."""
        with self._precision():
            return self.teacher.trajectory(self.images)

    def loss(self, states: Tensor, blocks: tuple[int, ...] | None = None) -> Tensor:
        """The loss with its graph; in stage 1 of some blocks, None for all."""
        with self._precision():
            return self.task(states, stage=self.stage, forcing=self.forcing, blocks=blocks)["loss"]

    def saved_bytes(self) -> int:
        """Activations saved at once, without the teacher's states."""
        states = self.states()
        excluded = [states, *self.student.parameters()]
        return max(saved_bytes(partial(self.loss, states, blocks), excluded) for blocks in self.blocks_at_once)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, self.autocast, enabled=self.autocast is not None)


def build_steps(case: TrainingCase, learning_rate: float = 1e-4) -> tuple[ReferenceStep, OurStep]:
    """The steps of both sides, with the same teacher and images, and equal weights in both students."""
    torch.manual_seed(0)
    shape = SHAPES[case.size]
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape)).eval()
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
    reference = MinimalLoop(student.base_model, learning_rate, *STAGES[case.stage])
    options = {"autocast": case.autocast, "compile": case.compile}
    ours = OurStep(Teacher(model.to(case.device)), student, images, learning_rate, *STAGES[case.stage], **options)
    return ReferenceStep(reference, model, images), ours


def compare_training(case: TrainingCase, repeats: int, warmup: int) -> dict[str, Any]:
    """
    Time, saved activations and MFU of both.

    Args:
        case: what is measured.
        repeats: repetitions that are timed, of both sides.
        warmup: repetitions before these.

    Returns:
        A JSON-able row; `loss_difference` is relative, of the first step; `mfu` is FLOPs over time and over the peak of
        matrix products at the same precision, measured in the same run.
    """
    reference, ours = build_steps(case)
    losses = reference(), ours()
    peaks = {
        "reference": matmul_peak(case.device, torch.float32),
        "ours": matmul_peak(case.device, case.autocast or torch.float32),
    }
    times = alternate([reference, ours], repeats=repeats, warmup=warmup, device=case.device)
    comparison = Comparison(*times.tolist())
    # neither FLOPs nor saved activations are seen in compiled code
    eager = build_steps(replace(case, compile=False))[1] if case.compile else ours
    flops = {"reference": count_flops(reference), "ours": count_flops(eager)}
    seconds = dict(zip(("reference", "ours"), np.median(times, axis=1).tolist(), strict=True))
    return {
        "size": case.size,
        "batch_size": case.batch_size,
        "ffn_type": case.ffn_type,
        "stage": case.stage,
        "precision": case.precision,
        "compiled": case.compile,
        "seconds": seconds,
        **comparison.to_dict(),
        "repeats": repeats,
        "images_per_second": {name: case.batch_size / value for name, value in seconds.items()},
        "saved_bytes": {"reference": reference.saved_bytes(), "ours": eager.saved_bytes()},
        "flops": flops,
        "matmul_peak": peaks,
        "mfu": {name: flops[name] / seconds[name] / peaks[name] for name in seconds},
        "loss_difference": abs(losses[1] - losses[0]) / abs(losses[0]),
    }
