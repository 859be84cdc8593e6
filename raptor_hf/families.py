"""Families of Vision Transformers: where the models of each keep what `Teacher` works with, and how it becomes Raptor.

Nothing else in the package knows how a foreign model calls its parts. A further family is one more entry of `FAMILIES`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from .tokens import TokenLayout

# Part of a RaptorBlock -> the modules of a DINOv2 layer that it stacks, in order. Where there are several, they are the
# names of transformers from 5.23 on and those before, or those of the two kinds of FFN.
DINOV2_BLOCK = {
    "norm1": [("norm1",)],
    "attention.qkv": [
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ],
    "attention.proj": [("attention.o_proj",), ("attention.output.dense",)],
    "layer_scale1": [("layer_scale1",)],
    "norm2": [("norm2",)],
    "ffn.fc1": [("mlp.fc1",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.weights_in",)],
    "ffn.fc2": [("mlp.fc2",), ("mlp.down_proj",), ("mlp.weights_out",)],
    "layer_scale2": [("layer_scale2",)],
}

# DINOv3's FFN is `up_proj`, `down_proj`, with a `gate_proj` before them where it is gated.
DINOV3_BLOCK = DINOV2_BLOCK | {
    "attention.qkv": [("attention.q_proj", "attention.k_proj", "attention.v_proj")],
    "attention.proj": [("attention.o_proj",)],
    "ffn.fc1": [("mlp.gate_proj", "mlp.up_proj"), ("mlp.up_proj",)],
    "ffn.fc2": [("mlp.down_proj",)],
}

# The same of layers without LayerScale, as ViT and CLIP call their modules.
VIT_BLOCK = {
    "norm1": [("layernorm_before",)],
    "attention.qkv": [("attention.q_proj", "attention.k_proj", "attention.v_proj")],
    "attention.proj": [("attention.o_proj",)],
    "norm2": [("layernorm_after",)],
    "ffn.fc1": [("mlp.fc1",)],
    "ffn.fc2": [("mlp.fc2",)],
}
CLIP_BLOCK = {
    "norm1": [("layer_norm1",)],
    "attention.qkv": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")],
    "attention.proj": [("self_attn.out_proj",)],
    "norm2": [("layer_norm2",)],
    "ffn.fc1": [("mlp.fc1",)],
    "ffn.fc2": [("mlp.fc2",)],
}
# Parameters of embeddings -> those of RaptorEmbeddings, where they are not called the same.
DINOV3_EMBEDDINGS = {
    "patch_embeddings.weight": "patch_embeddings.projection.weight",
    "patch_embeddings.bias": "patch_embeddings.projection.bias",
}
CLIP_EMBEDDINGS = {
    "class_embedding": "cls_token",
    "position_embedding.weight": "position_embeddings",
    "patch_embedding.weight": "patch_embeddings.projection.weight",
    "patch_embedding.bias": "patch_embeddings.projection.bias",
}


@dataclass(frozen=True)
class Family:
    """Where the models of one `model_type` keep their parts, as paths of submodules of the model without a head.

    An entry is complete when every parameter of the model is of one of its parts: of a layer, the embeddings, a norm or
    the rotary positions, or of what only heads use (`unused`). If students can be made of it, every parameter of a
    layer is also of one of the `block_parts`, and every one of the embeddings has a name in RaptorEmbeddings. A test
    checks this for every family.

    Args:
        layers: a list of modules; whenever one is called, it returns the next state.
        embeddings: the module that returns states[0], unless there is a `pre_norm`.
        pre_norm: a norm between embeddings and layers, which then returns states[0].
        final_norm: the norm after the last layer. (CLIP itself applies it to cls alone.)
        has_cls: whether the first token is a cls token; register tokens follow it, then the patches.
        num_extra_tokens: tokens in the place of registers that the configuration does not count.
        heads: what a classifier may be a linear layer on, each a selection of "cls", "registers" and "patches" (their
            mean); the number of its inputs tells which it is.
        head_is_normed: whether the classifier comes after the final norm.
        unused: parts that only heads use, which checkpoints without these lack.
        must_interpolate: whether the model takes images of another size only when told to interpolate its positions.
        can_mask: whether the model masks and shuffles patches, by noise that can be given.
        rotary: the module that returns the `position_embeddings` of all layers for images of their size.
        layer_arguments: what a layer must be given beside its state.
        block_parts: how a layer maps to a RaptorBlock, as `DINOV2_BLOCK`; empty if it cannot be one.
        embedding_names: how the embeddings' parameters map to those of RaptorEmbeddings, as `CLIP_EMBEDDINGS`.
    """

    layers: str
    embeddings: str = "embeddings"
    pre_norm: str | None = None
    final_norm: str = "layernorm"
    has_cls: bool = True
    num_extra_tokens: int = 0
    heads: tuple[tuple[str, ...], ...] = (("cls", "patches"),)
    head_is_normed: bool = True
    unused: tuple[str, ...] = ()
    must_interpolate: bool = False
    can_mask: bool = False
    rotary: str | None = None
    layer_arguments: Mapping[str, Any] = field(default_factory=dict)
    block_parts: Mapping[str, list[tuple[str, ...]]] = field(default_factory=dict)
    embedding_names: Mapping[str, str] = field(default_factory=dict)


FAMILIES = {
    "dinov2": Family(layers="encoder.layer", block_parts=DINOV2_BLOCK),
    "dinov2_with_registers": Family(layers="encoder.layer", block_parts=DINOV2_BLOCK),
    "dinov3_vit": Family(
        layers="model.layer",
        final_norm="norm",
        rotary="rope_embeddings",
        block_parts=DINOV3_BLOCK,
        embedding_names=DINOV3_EMBEDDINGS,
    ),
    "vit": Family(layers="layers", heads=(("cls",),), unused=("pooler",), must_interpolate=True, block_parts=VIT_BLOCK),
    # its distillation token stands where registers do; trained by distillation, it has a second head on that token
    "deit": Family(
        layers="layers",
        num_extra_tokens=1,
        heads=(("cls",), ("cls", "registers")),
        unused=("pooler",),
        must_interpolate=True,
        block_parts=VIT_BLOCK,
    ),
    "vit_mae": Family(layers="layers", must_interpolate=True, can_mask=True, block_parts=VIT_BLOCK),
    "clip_vision_model": Family(
        layers="encoder.layers",
        pre_norm="pre_layrnorm",
        final_norm="post_layernorm",
        heads=(("patches",),),
        head_is_normed=False,
        must_interpolate=True,
        layer_arguments={"attention_mask": None},
        block_parts=CLIP_BLOCK,
        embedding_names=CLIP_EMBEDDINGS,
    ),
    "siglip_vision_model": Family(
        layers="encoder.layers",
        final_norm="post_layernorm",
        has_cls=False,
        heads=(("patches",),),
        unused=("head",),
        must_interpolate=True,
        layer_arguments={"attention_mask": None},
        block_parts=CLIP_BLOCK,
        embedding_names=CLIP_EMBEDDINGS,
    ),
    # students, so that whatever analyses a teacher analyses them too
    "raptor": Family(layers="encoder.blocks", heads=(("cls", "patches"), ("patches",))),
}

# Models of images and text, of which the `vision_model` is the teacher.
TWO_TOWERS = ("clip", "siglip")


def check_family(config: PreTrainedConfig, source: str) -> None:
    """Checks that a model is of a supported family.

    Args:
        config: of the model.
        source: what the message calls it.

    Raises:
        ValueError: if it is not, naming those that are.
    """
    if vision_config(config).model_type not in FAMILIES:
        known = ", ".join((*FAMILIES, *TWO_TOWERS))
        raise ValueError(f"{source} is a {config.model_type!r} model; supported are {known}")


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the part of a model that has embeddings, layers and final norm: no head, and no text tower."""
    # not simply the base model: what DINOv3 calls so are its layers alone
    parts = (model, model.base_model, getattr(model, "vision_model", None))
    return next((part for part in parts if hasattr(part, "embeddings")), model.base_model)


def token_layout(config: PreTrainedConfig) -> TokenLayout:
    """Returns which tokens of a state are cls, registers, patches, by the configuration of a backbone.

    DeiT's distillation token counts as a register; a student has a cls token if its teacher has one.
    """
    family = FAMILIES[config.model_type]
    num_registers = getattr(config, "num_register_tokens", 0) + family.num_extra_tokens
    return TokenLayout(num_registers, getattr(config, "has_cls", family.has_cls))


def find_classifier(model: PreTrainedModel) -> nn.Linear | None:
    """Returns the model's linear layer to num_labels on one of the `heads` of its family, or None if it has none.

    Of a DeiT with two heads, whose logits are the mean of both, it is one layer that computes this.
    """
    config = vision_config(model.config)
    classifier = getattr(model, "classifier", None)
    two = [getattr(model, name, None) for name in ("cls_classifier", "distillation_classifier")]
    if all(isinstance(head, nn.Linear) for head in two):
        classifier = _mean_of_heads(*two)
    # a head for segmentation is called a classifier, too
    is_classifier = "ForImageClassification" in type(model).__name__ and isinstance(classifier, nn.Linear)
    if config.model_type not in FAMILIES or not is_classifier:
        return None
    widths = [len(head) * config.hidden_size for head in FAMILIES[config.model_type].heads]
    return classifier if classifier.in_features in widths else None


def count_parameters(model: PreTrainedModel) -> int:
    """Counts the parameters of a model without its head: what embeddings, blocks and final norm use.

    Every block counts once however often it is applied. What only pre-training or a head uses is left out: mask token,
    pooler, text tower.
    """
    backbone = find_backbone(model)
    family = FAMILIES.get(backbone.config.model_type)
    return sum(p.numel() for name, p in backbone.named_parameters() if not is_unused(name, family))


def is_unused(name: str, family: Family | None) -> bool:
    """Whether a parameter, of a model or of its backbone, is of a part that only pre-training or a head uses."""
    return name.endswith("mask_token") or (family is not None and not {*name.split(".")}.isdisjoint(family.unused))


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the configuration of the vision tower, which is the given one for all but the `TWO_TOWERS`."""
    return config.vision_config if config.model_type in TWO_TOWERS else config


def block_modules(layer: nn.Module, parts: Mapping[str, list[tuple[str, ...]]]) -> dict[str, list[nn.Module]]:
    """Finds the modules of a layer that make up the parts of a RaptorBlock.

    Args:
        layer: of a model whose family has `block_parts`.
        parts: these.

    Returns:
        Part to modules, in the order in which the part stacks them.

    Raises:
        RuntimeError: if the layer has none of the modules of a part.
    """
    modules = dict(layer.named_modules())
    found = {}
    for part, alternatives in parts.items():
        names = next((names for names in alternatives if all(name in modules for name in names)), None)
        if names is None:
            raise RuntimeError(f"{type(layer).__name__} has none of {alternatives}: unknown version of transformers")
        found[part] = [modules[name] for name in names]
    return found


def embeddings_to_raptor(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns a backbone's embeddings, and the norm that may follow them, under the names of RaptorEmbeddings."""
    family = FAMILIES[model.config.model_type]
    state = model.get_submodule(family.embeddings).state_dict()
    # DINOv2 with 0 registers keeps an empty tensor for them
    weights = {family.embedding_names.get(n, n): t for n, t in state.items() if n != "mask_token" and t.numel()}
    if family.pre_norm is not None:
        weights |= {f"norm.{n}": t for n, t in model.get_submodule(family.pre_norm).state_dict().items()}
    for name in {"cls_token", "position_embeddings"} & weights.keys():
        # CLIP and SigLIP keep them without the dimension of the batch
        weights[name] = weights[name].reshape(1, -1, model.config.hidden_size)
    if "distillation_token" in weights:
        # a register has no position; the sum of both is one parameter as well
        cls, distillation, patches = weights["position_embeddings"].tensor_split([1, 2], 1)
        weights["register_tokens"] = weights.pop("distillation_token") + distillation
        weights["position_embeddings"] = torch.cat([cls, patches], 1)
    return weights


def layer_to_raptor(layer: nn.Module, parts: Mapping[str, list[tuple[str, ...]]]) -> dict[str, Tensor]:
    """Returns a layer of a family with these `block_parts` as weights of a RaptorBlock; LayerScale it lacks is one."""
    found = block_modules(layer, parts)
    weights = {}
    for part, modules in found.items():
        stacked = [module.state_dict() for module in modules]
        if part == "attention.qkv" and "bias" in stacked[0] and "bias" not in stacked[1]:
            # keys alone have none
            weights["attention.query_bias"], _, weights["attention.value_bias"] = (t.pop("bias", None) for t in stacked)
        weights |= {f"{part}.{name}": torch.cat([tensors[name] for tensors in stacked]) for name in stacked[0]}
    return {f"layer_scale{i}.lambda1": torch.ones_like(weights["norm1.weight"]) for i in (1, 2)} | weights


def classifier_to_raptor(classifier: nn.Linear, head: tuple[str, ...]) -> dict[str, Tensor] | None:
    """Returns a classifier as one on [cls, mean patch], or without cls on the mean patch, None where that cannot be.

    Args:
        classifier: of a teacher whose head is normed.
        head: what it is on, one of the `heads` of its family.
    """
    if "registers" in head:
        return None
    weights = classifier.state_dict()
    if head == ("cls",):
        # the mean patch has no say
        weights["weight"] = torch.cat([weights["weight"], torch.zeros_like(weights["weight"])], 1)
    return weights


@torch.no_grad()
def build_dinov2(
    config: PreTrainedConfig,
    *,
    embeddings: Mapping[str, Tensor],
    blocks: Iterable[Mapping[str, Tensor]],
    layernorm: Mapping[str, Tensor],
    classifier: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Builds a DINOv2 model from parts under Raptor's names: the inverse of the functions above.

    Args:
        config: of DINOv2, with or without registers.
        embeddings: weights of RaptorEmbeddings; the mask token becomes zero.
        blocks: weights of RaptorBlock, one per layer.
        layernorm: weight and bias of the final norm.
        classifier: weight and bias of the classifier; None builds a model without a head.
        dtype: precision of the model.

    Returns:
        The model, in eval mode, on the CPU.
    """
    auto_class = AutoModel if classifier is None else AutoModelForImageClassification
    model = auto_class.from_config(config, dtype=dtype).eval()
    family = FAMILIES[config.model_type]
    target = model.base_model.get_submodule(family.embeddings)
    target.load_state_dict(target.state_dict() | dict(embeddings))
    for layer, weights in zip(model.base_model.get_submodule(family.layers), blocks, strict=True):
        for part, modules in block_modules(layer, family.block_parts).items():
            for index, module in enumerate(modules):
                names = module.state_dict().keys()
                module.load_state_dict({n: weights[f"{part}.{n}"].chunk(len(modules))[index] for n in names})
    model.base_model.get_submodule(family.final_norm).load_state_dict(layernorm)
    if classifier is not None:
        model.classifier.load_state_dict(classifier)
    return model


def _mean_of_heads(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One linear layer on the inputs of both, side by side, whose output is the mean of theirs."""
    width, labels = first.in_features + second.in_features, first.out_features
    joint = nn.utils.skip_init(nn.Linear, width, labels, dtype=first.weight.dtype, device=first.weight.device)
    weight, bias = torch.cat([first.weight, second.weight], 1) / 2, (first.bias + second.bias) / 2
    joint.load_state_dict({"weight": weight, "bias": bias})
    return joint
