"""Chooses the partition that the settings of a distillation ask for, and makes the student with trainable blocks."""

from typing import Any

import numpy as np
from raptor_settings.distill import DistillSettings
from torch import nn

from ..conversion import student_from_teacher
from ..phases import (
    Partition,
    boundary_stability,
    cheapest_phases,
    find_phases,
    random_contiguous,
    random_fragmented,
)
from ..similarity import SimilarityAccumulator
from ..teacher import Teacher
from .units import check_units


def choose_partition(
    distance: np.ndarray,
    similarity: SimilarityAccumulator | None,
    settings: DistillSettings,
    num_layers: int,
    costs: np.ndarray | None = None,
) -> tuple[Partition, dict[str, Any] | None]:
    """Returns the given or found partition, and for one found by distances its stability in a bootstrap over images.

    `costs` are those of `partition.mean_costs`, for the partition "fitted".
    """
    if settings.block_repeats is not None:
        ends = np.cumsum(settings.block_repeats)[:-1].tolist()
        return Partition.from_boundaries(ends, num_layers, method="given"), None
    if settings.partition == "random_contiguous":
        return random_contiguous(num_layers, settings.num_blocks, settings.seed), None
    if settings.partition == "random_fragmented":
        return random_fragmented(num_layers, settings.num_blocks, settings.seed), None
    if settings.partition == "fitted":
        return cheapest_phases(costs, settings.num_blocks), None
    partition = find_phases(distance, settings.num_blocks, method=settings.partition)
    if similarity is None or similarity.num_bootstraps == 0 or settings.partition == "bisection":
        return partition, None
    stability = boundary_stability(similarity.bootstrap(), settings.num_blocks, method=settings.partition)
    return partition, {
        "boundary_frequency": stability.boundary_frequency,
        "modal": stability.modal.to_dict(),
        "modal_frequency": stability.modal_frequency,
    }


def trial_partition(settings: DistillSettings, num_layers: int) -> Partition:
    """Makes a partition of the wanted kind without images: where phases are to be found, it makes up the distances."""
    layers = np.arange(num_layers)
    distance = abs(layers - layers[:, None])
    return choose_partition(distance, None, settings, num_layers, costs=distance)[0]


def make_student(teacher: Teacher, partition: Partition, settings: DistillSettings) -> nn.Module:
    """Makes the student, with everything frozen but its blocks and their conditioning."""
    wanted = {
        "ffn_type": settings.ffn_type,
        "intermediate_size": settings.intermediate_size,
        "block_layer_norm_eps": settings.block_layer_norm_eps,
    }
    overrides = {name: value for name, value in wanted.items() if value is not None}
    if settings.num_attention_heads is not None:
        # each as wide as the teacher's
        overrides |= {
            "num_attention_heads": settings.num_attention_heads,
            "head_dim": teacher.hidden_size // teacher.num_heads,
        }
    # the trajectory to learn is that of a teacher without dropout or dropped paths, whatever it was trained with
    overrides |= {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # a fit begins with the middle layers, or with blocks that it fills with units of all layers
    gathers = settings.init == "fitted" and settings.unit_gains
    if settings.num_attention_heads not in (None, teacher.num_heads) and not (gathers or settings.init == "random"):
        without = " without unit_gains" if settings.init == "fitted" else ""
        raise ValueError(
            f"num_attention_heads is {settings.num_attention_heads}; with init {settings.init}{without} blocks have "
            f"the heads of the teacher's layers, {teacher.num_heads}: take init random, or init fitted with unit_gains"
        )
    student = student_from_teacher(
        teacher,
        partition,
        init="random" if gathers else "middle" if settings.init == "fitted" else settings.init,
        seed=settings.seed,
        depth_conditioning=settings.depth_conditioning,
        conditioning_rank=settings.conditioning_rank,
        branch_shifts=settings.branch_shifts,
        unit_gains=settings.unit_gains,
        step_scaling=settings.elastic is not None,
        **overrides,
    )
    if gathers:
        check_units(teacher, student.config)
    student.requires_grad_(False)
    for block in range(partition.num_blocks):
        if settings.train_block in (None, block):
            for parameter in block_parameters(student, block):
                parameter.requires_grad_(True)
    if settings.gradient_checkpointing:
        # called so from transformers 5.23 on
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if settings.compile:
        for block in student.base_model.encoder.blocks:
            block.compile()
    return student.train()


def block_parameters(student: nn.Module, block: int) -> list[nn.Parameter]:
    """Weights of one block and its conditioner."""
    encoder = student.base_model.encoder
    return [*encoder.blocks[block].parameters(), *encoder.conditioners[block].parameters()]
