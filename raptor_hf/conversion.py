"""Conversion of weights: teacher to student, student to a plain model of its family, Meta's linear heads into either.

    teacher = load_teacher("facebook/dinov2-with-registers-base")
    student = student_from_teacher(teacher, (7, 3, 2), init="first", depth_conditioning="low_rank")
    to_plain(student).save_pretrained(folder)          # a plain DINOv2, which loads without this package

Checkpoints of the method's research code are read by `raptor_hf.research_checkpoints`.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from .configuration_raptor import FAMILY_FIELDS, TEACHER_FIELDS, TEACHER_NAMES, RaptorConfig, teacher_fields
from .families import FAMILIES, build_plain, count_parameters, find_classifier
from .modeling_raptor import (
    RaptorEncoder,
    RaptorForImageClassification,
    RaptorModel,
    StepModulation,
)
from .phases import Partition
from .teacher import Teacher

__all__ = ["BlockInit", "count_parameters", "load_meta_linear_head", "student_from_teacher", "to_dinov2", "to_plain"]

BlockInit = Literal["random", "first", "middle", "mean"]

# Fields that a student takes from its teacher unchanged: always, and if its blocks start from the teacher's layers.
SHARED_FIELDS = (
    *("hidden_size", "num_channels", "image_size", "patch_size", "num_register_tokens", "embedding_type"),
    *("layer_norm_eps", "position_image_size", "rope_theta", *FAMILY_FIELDS),
)
BLOCK_FIELDS = (
    "ffn_type",
    "intermediate_size",
    "hidden_act",
    "num_attention_heads",
    "head_size",
    "qkv_bias",
    "proj_bias",
    "ffn_bias",
)

DINOV2 = ("dinov2", "dinov2_with_registers")
NOT_IN_DINOV2 = {
    "scale": "it scales the tokens after every step, residual included, which no DINOv2 layer does",
    "embedding": "it adds a vector to the tokens before every step, residual included, which no DINOv2 layer does",
}


def student_from_teacher(
    teacher: Teacher | PreTrainedModel,
    block_repeats: Sequence[int] | Partition,
    init: BlockInit = "random",
    seed: int | None = None,
    **config_overrides: Any,
) -> RaptorForImageClassification | RaptorModel:
    """Builds a student with its teacher's embeddings, final norm and classifier.

    With `block_repeats=(1,) * L` and an `init` other than "random" the student computes what the teacher does.

    Args:
        teacher: a teacher, or a model of a family that `RaptorConfig.embedding_type` names, with or without a
            classifier, which is left as it is.
        block_repeats: steps per block, summing to the teacher's layers, or a partition of these.
        init: what the blocks start from. "random" is the initialisation of `RaptorPreTrainedModel`; "first" and
            "middle" copy the first or the middle layer (the earlier one of two) of those that the block stands for,
            LayerScale included; "mean" averages the parameters of all of them.
        seed: of the random numbers drawn here; None uses and advances PyTorch's global generator.
        **config_overrides: fields of `RaptorConfig` that are not to follow the teacher. With `block_schedule`, a block
            stands for the layers that `RaptorConfig.block_layers` says.

    Returns:
        The student in float32 and eval mode on the CPU, with a classifier if the teacher has one that a student can
        have, see `Teacher.classifier_state_dict`.

    Raises:
        ValueError: if `init` is unknown, the repeats do not fit the teacher, or an overridden field keeps the teacher's
            weights from fitting.
    """
    if init not in get_args(BlockInit):
        raise ValueError(f"init is {init!r}; it must be one of {', '.join(get_args(BlockInit))}")
    if not isinstance(teacher, Teacher):
        # a Teacher freezes its model; the caller's must stay as it is
        teacher = Teacher(copy.deepcopy(teacher))
    config = _student_config(teacher, block_repeats, init, config_overrides)
    classifier = teacher.classifier_state_dict()
    student_class = RaptorModel if classifier is None else RaptorForImageClassification
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        student = student_class(config).eval()
    base = student.base_model
    base.embeddings.load_state_dict(teacher.embeddings_state_dict())
    if config.final_norm != "none":
        (base.layernorm if config.final_norm == "tokens" else base.pooling.norm).load_state_dict(
            teacher.layernorm_state_dict()
        )
    if config.pooling_type.startswith("attention"):
        base.pooling.load_state_dict(teacher.pooling[1])
    if base.encoder.rotary is not None:
        base.encoder.rotary.load_state_dict(teacher.rotary_state_dict())
    if classifier is not None:
        student.classifier.load_state_dict(classifier)
    if init != "random":
        for block, layers in zip(base.encoder.blocks, config.block_layers, strict=True):
            block.load_state_dict(_initial_weights(teacher, layers, init))
    return student


def to_plain(
    student: RaptorForImageClassification | RaptorModel,
    num_steps: int | None = None,
    block_repeats: tuple[int, ...] | None = None,
) -> PreTrainedModel:
    """Unrolls a student into a plain model of its teacher's family, one layer per step.

    "low_rank" conditioning is merged into the weights of every layer, in float64, and so is LayerScale in families
    without it; a mask token is zero.

    Args:
        student: with depth conditioning "none" or "low_rank".
        num_steps: layers of the result, as `RaptorModel.forward` takes it; None takes the student's L.
        block_repeats: layers that each block becomes, as `RaptorModel.forward` takes it.

    Returns:
        A model of the family, such as `Dinov2Model`, or its `...ForImageClassification` if the student has a
        classifier, with the student's labels, precision and device, in eval mode.

    Raises:
        ValueError: if the student is of another class or has no such steps, or the family has no setting for one of its
            fields or no place for one of its weights.
    """
    if type(student).__name__ not in ("RaptorModel", "RaptorForImageClassification"):
        raise ValueError(
            f"student is a {type(student).__name__}; only RaptorModel and RaptorForImageClassification have a "
            "counterpart in their family. Save it and load it as one of these"
        )
    base, classifier = student.base_model, find_classifier(student)
    config = student.config
    plan = config.step_plan(num_steps, block_repeats)
    pooling = base.pooling.state_dict()
    plain = _plain_config(config, len(plan))
    model = build_plain(
        plain,
        embeddings=base.embeddings.state_dict(),
        blocks=_unrolled_blocks(base.encoder, plan),
        norm=base.layernorm.state_dict() or (base.pooling.norm.state_dict() if config.final_norm == "pooled" else {}),
        pooling=pooling if config.pooling_type.startswith("attention") else None,
        cls_angles=None if base.encoder.rotary is None else base.encoder.rotary.cls_angles,
        classifier=None if classifier is None else _plain_classifier(classifier, config),
        dtype=student.dtype,
    )
    return model.to(student.device)


def to_dinov2(
    student: RaptorForImageClassification | RaptorModel,
    num_steps: int | None = None,
    block_repeats: tuple[int, ...] | None = None,
) -> PreTrainedModel:
    """`to_plain` for students of DINOv2 alone: a `Dinov2Model` or `Dinov2WithRegistersModel`, or one with a classifier.

    Raises:
        ValueError: if the student is of another family, and where `to_plain` raises it.
    """
    if student.config.embedding_type not in DINOV2:
        raise ValueError(
            f"embedding_type is {student.config.embedding_type!r}; to become DINOv2, the student's must be one of "
            f"{', '.join(DINOV2)}. to_plain makes a model of its own family"
        )
    return to_plain(student, num_steps, block_repeats)


def load_meta_linear_head(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor], model: PreTrainedModel
) -> None:
    """Loads one of Meta's ImageNet linear heads, for DINOv2 or DINOv3, into a classification model, in place.

    Args:
        path_or_state_dict: file `dinov2_*_linear_head.pth`, or its content: `weight` (C, 2 D) and `bias` (C,) of a
            linear layer on [cls, mean patch] after the final norm.
        model: `RaptorForImageClassification`, `Dinov2ForImageClassification` or
            `Dinov2WithRegistersForImageClassification` of width D with C labels.

    Raises:
        ValueError: if the model has no such classifier, or the head is of another kind or size.
    """
    classifier = find_classifier(model) if model.config.model_type in ("raptor", *DINOV2) else None
    if classifier is None or classifier.in_features != 2 * model.config.hidden_size:
        raise ValueError(
            f"model is a {type(model).__name__} with num_labels={model.config.num_labels}; it must be a Raptor or "
            "DINOv2 ...ForImageClassification with num_labels above 0 and a cls token"
        )
    if isinstance(path_or_state_dict, Mapping):
        head = path_or_state_dict
    else:
        head = torch.load(path_or_state_dict, map_location="cpu", weights_only=True)
    if not isinstance(head, Mapping) or set(head) != {"weight", "bias"}:
        content = sorted(map(str, head)) if isinstance(head, Mapping) else type(head).__name__
        raise ValueError(f"path_or_state_dict holds {content}; a linear head has exactly 'weight' and 'bias'")
    shape, dim = tuple(head["weight"].shape), model.config.hidden_size
    if len(shape) == 2 and shape[1] == 5 * dim:
        raise ValueError(
            f"the head's weight is {shape}, 5 D wide for D={dim}: it takes the cls tokens of 4 layers and the mean "
            "patch. Use the head for 1 layer, 2 D wide; its file name has no 'linear4'"
        )
    if shape != (classifier.out_features, 2 * dim):
        raise ValueError(
            f"the head's weight is {shape}; a model with num_labels={classifier.out_features} and hidden_size={dim} "
            f"needs {(classifier.out_features, 2 * dim)}"
        )
    classifier.load_state_dict(head)


def _student_config(
    teacher: Teacher, block_repeats: Sequence[int] | Partition, init: BlockInit, overrides: Mapping[str, Any]
) -> RaptorConfig:
    if isinstance(block_repeats, Partition):
        if "block_schedule" in overrides:
            raise ValueError("block_repeats is a Partition, which has a schedule; leave block_schedule out")
        if not block_repeats.is_contiguous:
            overrides = {**overrides, "block_schedule": block_repeats.layer_to_block}
        block_repeats = block_repeats.block_repeats
    heads = teacher.head_fields()
    config = RaptorConfig.from_teacher(teacher.config, block_repeats, **(heads | overrides))
    unchanged = RaptorConfig.from_teacher(teacher.config, block_repeats, **heads)
    fields = SHARED_FIELDS
    fields_of_layers = BLOCK_FIELDS if init != "random" else ()
    fields += fields_of_layers
    if teacher.classifier_state_dict() is not None:
        fields += ("num_labels",)
    if heads.get("pooling_type"):
        fields += ("pooling_type", "pooling_intermediate_size", "head_size", "hidden_act", "qkv_bias")
    elif config.position_type == "rotary_2d_index" and config.has_cls:
        fields += ("head_size",)  # the cls token turns by angles of the teacher's
    for name in fields:
        value, expected, copies = getattr(config, name), getattr(unchanged, name), name in fields_of_layers
        if value != expected:
            shown = f"num_attention_heads={config.num_attention_heads}, of head_dim" if name == "head_size" else name
            raise ValueError(
                f"{shown}={value!r} does not fit the teacher's weights, which need {expected!r}"
                + (f"; init={init!r} copies its layers, init='random' does not" if copies else "")
            )
    return config


def _initial_weights(teacher: Teacher, layers: tuple[int, ...], init: BlockInit) -> dict[str, Tensor]:
    layers = [original for layer in layers for original in teacher.span(layer)]
    if init == "mean":
        weights = [teacher.block_state_dict(layer) for layer in layers]
        return {name: torch.stack([w[name] for w in weights]).cpu().double().mean(0) for name in weights[0]}
    return teacher.block_state_dict(layers[0] if init == "first" else layers[(len(layers) - 1) // 2])


def _unrolled_blocks(encoder: RaptorEncoder, plan: tuple[tuple[int, float], ...]) -> Iterator[dict[str, Tensor]]:
    """The weights of every step in float64, one step at a time, as all of a large model would not fit in memory."""
    encoder = copy.deepcopy(encoder).to("cpu", torch.float64)
    with torch.no_grad():
        for (block, _), modulation in zip(plan, encoder.modulations(plan), strict=True):
            yield _merged(encoder.blocks[block].state_dict(), modulation)


def _merged(weights: dict[str, Tensor], step: StepModulation) -> dict[str, Tensor]:
    """The weights of a block with the size and the "low_rank" modulation of one step merged in."""
    merged = dict(weights)
    for number, size in ((1, step.attention_gain), (2, step.ffn_gain)):
        if size is not None:
            merged[f"layer_scale{number}.lambda1"] = weights[f"layer_scale{number}.lambda1"] * size
    if step.qkv_up is None:
        return merged
    merged["attention.qkv.weight"] = weights["attention.qkv.weight"] + step.qkv_up @ step.qkv_down
    merged["ffn.fc1.weight"] = weights["ffn.fc1.weight"] + step.ffn_up @ step.ffn_down
    for projection, gain in (("attention.proj", step.heads_gain), ("ffn.fc2", step.neurons_gain)):
        if gain is not None:
            merged[f"{projection}.weight"] = weights[f"{projection}.weight"] * (1 + gain)
    merged["norm1.weight"] = weights["norm1.weight"] * (1 + step.norm1_gain)
    merged["norm2.weight"] = weights["norm2.weight"] * (1 + step.norm2_gain)
    for number, shift in ((1, step.norm1_shift), (2, step.norm2_shift)):
        if shift is not None:
            merged[f"norm{number}.bias"] = weights[f"norm{number}.bias"] + shift
    merged["layer_scale1.lambda1"] = merged["layer_scale1.lambda1"] * (1 + step.layer_scale1_gain)
    merged["layer_scale2.lambda1"] = merged["layer_scale2.lambda1"] * (1 + step.layer_scale2_gain)
    for number, projection, shift in (
        (1, "attention.proj", step.attention_shift),
        (2, "ffn.fc2", step.ffn_shift),
    ):
        if shift is not None:
            if f"{projection}.bias" not in weights:
                raise ValueError(f"branch_shifts=True cannot become layers whose {projection} has no bias")
            # LayerScale comes after the bias; of a feature that it removes, it is made one, and the feature's row zero
            scale, bias = merged[f"layer_scale{number}.lambda1"], weights[f"{projection}.bias"]
            removed = scale == 0
            merged[f"{projection}.weight"] = merged[f"{projection}.weight"].masked_fill(removed[:, None], 0)
            merged[f"layer_scale{number}.lambda1"] = scale.masked_fill(removed, 1)
            merged[f"{projection}.bias"] = torch.where(removed, shift, bias + shift / scale.masked_fill(removed, 1))
    return merged


def _plain_config(config: RaptorConfig, num_layers: int) -> PreTrainedConfig:
    family = config.embedding_type
    if config.depth_conditioning in NOT_IN_DINOV2:
        raise ValueError(
            f"depth_conditioning={config.depth_conditioning!r} cannot become {_title(family)}: "
            f"{NOT_IN_DINOV2[config.depth_conditioning]}. 'none' and 'low_rank' can"
        )
    if config.block_layer_norm_eps != config.layer_norm_eps:
        raise ValueError(
            f"block_layer_norm_eps={config.block_layer_norm_eps} differs from layer_norm_eps={config.layer_norm_eps}; "
            f"{_title(family)} has one epsilon for all norms"
        )
    if config.heads_width != config.hidden_size:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads}, of head_dim={config.head_size}, cannot become "
            f"{_title(family)}, whose heads are together as wide as the tokens, hidden_size={config.hidden_size}"
        )
    if FAMILIES[family].plain_fields is None:
        raise ValueError(f"embedding_type={family!r} cannot become a plain model: transformers cannot make one of timm")
    known = CONFIG_MAPPING[family]
    names = {name: name for name in (*TEACHER_FIELDS, "layerscale_value", "intermediate_size")} | TEACHER_NAMES
    fields = {theirs: getattr(config, ours) for ours, theirs in names.items() if hasattr(known, theirs)}
    for name in ("initializer_range", "layer_norm_eps", "rms_norm_eps", "layerscale_value", "rope_theta"):
        if name in fields:
            fields[name] = float(fields[name])  # where we take integers too, others do not
    fields |= FAMILIES[family].plain_fields(config) | {"id2label": config.id2label, "label2id": config.label2id}
    plain = AutoConfig.for_model(family, num_hidden_layers=num_layers, **fields)
    # what it says must be what the student is
    for name, value in teacher_fields(plain).items():
        own = getattr(config, name)
        # a model without a pooler lacks the pooled norm
        if own != value and name not in ("hidden_act", "pooling_type") and (own, value) != ("none", "pooled"):
            raise ValueError(f"{name}={own!r} cannot become {_title(family)}, which has {value!r}")
    return plain


def _title(family: str) -> str:
    return "DINOv2" if family in DINOV2 else f"a {family!r} model"


def _plain_classifier(classifier: nn.Linear, config: RaptorConfig) -> dict[str, Tensor]:
    """The classifier on what the family's own reads."""
    weights, heads = classifier.state_dict(), FAMILIES[config.embedding_type].heads
    if config.classifier_input == "pooled" or not config.has_cls or ("cls", "patches") in heads:
        return weights
    halves = dict(zip((("cls",), ("patches",)), weights["weight"].chunk(2, 1), strict=True))
    kept = next((head for head in heads if head in halves), None)
    if kept is None or any(half.any() for head, half in halves.items() if head != kept):
        raise ValueError(f"the classifier reads more than {heads}, which is all that {config.embedding_type!r} has")
    return weights | {"weight": halves[kept]}
