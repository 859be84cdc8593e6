"""Says for each family of Vision Transformers where its models keep their parts, and how a Raptor takes them over.

Nothing else in the package knows how a foreign model names its parts. A further family is one more entry of `FAMILIES`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from .configuration_raptor import teacher_fields
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
AIMV2_BLOCK = {
    "norm1": [("rms_norm1",)],
    "attention.qkv": [("attention.q_proj", "attention.k_proj", "attention.v_proj")],
    "attention.proj": [("attention.out_proj",)],
    "norm2": [("rms_norm2",)],
    "ffn.fc1": [("ffn.gate_proj", "ffn.up_proj")],
    "ffn.fc2": [("ffn.down_proj",)],
}
# LayerScale of BEiT's are parameters of the layer itself.
BEIT_BLOCK = VIT_BLOCK | {"layer_scale1": [("lambda_1",)], "layer_scale2": [("lambda_2",)]}
DATA2VEC_BLOCK = BEIT_BLOCK | {
    "attention.qkv": [("attention.attention.query", "attention.attention.key", "attention.attention.value")],
    "attention.proj": [("attention.output.dense",)],
    "ffn.fc1": [("intermediate.dense",)],
    "ffn.fc2": [("output.dense",)],
}
TIMM_BLOCK = {
    "norm1": [("norm1",)],
    "attention.qkv": [("attn.qkv",)],
    "attention.proj": [("attn.proj",)],
    "layer_scale1": [("ls1",)],
    "norm2": [("norm2",)],
    "ffn.fc1": [("mlp.fc1",)],
    "ffn.fc2": [("mlp.fc2",)],
    "layer_scale2": [("ls2",)],
}
# Activations of timm -> what transformers calls them.
TIMM_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
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
AIMV2_EMBEDDINGS = {
    "position_embedding.weight": "position_embeddings",
    "patch_embed.weight": "patch_embeddings.projection.weight",
    "patch_embed.bias": "patch_embeddings.projection.bias",
    "rms_norm.weight": "norm.weight",
}
# The first of RADIO's rows is the cls token, the others are registers.
RADIO_EMBEDDINGS = {
    "patch_projection.weight": "patch_embeddings.projection.weight",
    "position_embedding": "position_embeddings",
    "cls_register_token": "register_tokens",
}
# Parameters of RaptorPooling -> those of a head that pools by attention: names, where several are stacked; SigLIP's are
# in one matrix, as queries, keys and values.
SIGLIP_POOLING = {
    "proj": ("attention.out_proj",),
    "norm": ("layernorm",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}
AIMV2_POOLING = {"key_value": ("k_proj", "v_proj"), "proj": ("output_proj",)}


@dataclass(frozen=True)
class Family:
    """Where the models of one `model_type` keep their parts, as paths of submodules of the model without a head.

    `configuration_raptor.TEACHER_FAMILIES` says what their students are, and which tokens come first.

    An entry is complete when every parameter of the model is of one of its parts: of a layer, the embeddings, a norm or
    the rotary positions, or of what only heads use (`unused`). If students can be made of it, every parameter of a
    layer is also of one of the `block_parts`, and every one of the embeddings has a name in RaptorEmbeddings. A test
    checks this for every family.

    Args:
        layers: a list of modules; whenever one is called, it returns the next state.
        embeddings: the module that returns states[0], unless there is a `pre_norm`.
        pre_norm: a norm between embeddings and layers, which then returns states[0].
        final_norm: the norm after the last layer, None without one. (CLIP itself applies it to cls alone.)
        pooled_norm: a norm of what a classifier reads, after the tokens' mean, where the model has one.
        heads: possible inputs of a linear classifier, each a selection of "cls", "registers" and "patches" (their
            mean); the number of its inputs tells which it has.
        head_is_normed: whether the classifier comes after the final norm.
        unused: parts that only heads use, which checkpoints without these lack.
        must_interpolate: whether the model takes images of another size only when told to interpolate its positions.
        can_mask: whether the model masks and shuffles patches, by noise that can be given.
        conditioner: the module that normalises images in the model itself.
        takes_patches: whether the model takes images as rows of patches, channels last, with a mask and their shape.
        layers_see_shape: whether layers are given something that depends on the shape of the image.
        rotary: a parameter of the positions that layers are given, beside the embeddings.
        layer_arguments: what a layer must be given beside its state, where it does not depend on the shape.
        pooling: how a `head` that pools by attention maps to a RaptorPooling, as `SIGLIP_POOLING`.
        block_parts: how a layer maps to a RaptorBlock, as `DINOV2_BLOCK`; empty if it cannot be one.
        embedding_names: how the embeddings' parameters map to those of RaptorEmbeddings, as `CLIP_EMBEDDINGS`.
        model_class: of transformers, where no Auto class knows the family's models.
        plain_fields: what the family's configuration says in words of its own, from that of a student; None if no
            student becomes a model of the family.
    """

    layers: str
    embeddings: str = "embeddings"
    pre_norm: str | None = None
    final_norm: str | None = "layernorm"
    pooled_norm: str | None = None
    heads: tuple[tuple[str, ...], ...] = (("cls", "patches"),)
    head_is_normed: bool = True
    unused: tuple[str, ...] = ()
    must_interpolate: bool = False
    can_mask: bool = False
    conditioner: str | None = None
    takes_patches: bool = False
    layers_see_shape: bool = False
    rotary: str | None = None
    layer_arguments: Mapping[str, Any] = field(default_factory=dict)
    block_parts: Mapping[str, list[tuple[str, ...]]] = field(default_factory=dict)
    embedding_names: Mapping[str, str] = field(default_factory=dict)
    pooling: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    model_class: str | None = None
    plain_fields: Callable[[PreTrainedConfig], dict[str, Any]] | None = lambda student: {}


def _as_dinov2(student: PreTrainedConfig, whole: bool = True) -> dict[str, Any]:
    """The FFN of DINOv2's: a multiple of D wide, a whole one or any; SwiGLU takes 2/3 of it, rounded up to 8 * n."""
    width, dim, swiglu = student.intermediate_size, student.hidden_size, student.ffn_type == "swiglu"
    exact = width / dim * (1.5 if swiglu else 1)
    around = int(exact)
    widths = {}
    for ratio in (*(() if whole else (exact,)), *range(max(around - 1, 1), around + 2)):
        widths[(int(int(ratio * dim) * 2 / 3) + 7) // 8 * 8 if swiglu else int(ratio * dim)] = ratio
    if width not in widths:
        raise ValueError(
            f"intermediate_size={width} is no width that DINOv2 can have for ffn_type={student.ffn_type!r} and "
            f"hidden_size={dim}; nearest that are: {sorted(widths)}"
        )
    return {"use_swiglu_ffn": swiglu, "mlp_ratio": widths[width]}


def _as_dinov3(student: PreTrainedConfig) -> dict[str, Any]:
    is_gated = student.ffn_type == "swiglu"
    activation = {"hidden_act": "silu"} if is_gated else {}
    biases = {"query_bias": student.qkv_bias, "key_bias": student.key_bias, "value_bias": student.qkv_bias}
    return {"use_gated_mlp": is_gated} | activation | biases


def _as_beit(student: PreTrainedConfig) -> dict[str, Any]:
    return {
        "use_absolute_position_embeddings": student.position_type == "learned",
        "use_mean_pooling": student.final_norm != "tokens",
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "layer_scale_init_value": 1.0,
    }


def _as_radio(student: PreTrainedConfig) -> dict[str, Any]:
    num_cls = min(3, student.num_register_tokens + 1)
    counts = {"num_cls_tokens": num_cls, "num_registers": student.num_register_tokens + 1 - num_cls}
    summary = {"summary_idxs": list(range(min(2, num_cls)))}
    ffn = _as_dinov2(student, whole=False)
    ffn["mlp_ratio"] = float(ffn["mlp_ratio"])
    return ffn | counts | summary | {"max_img_size": student.position_image_size}


CLIP_FAMILY = Family(
    layers="encoder.layers",
    pre_norm="pre_layrnorm",
    final_norm="post_layernorm",
    heads=(("patches",),),
    head_is_normed=False,
    must_interpolate=True,
    layer_arguments={"attention_mask": None},
    block_parts=CLIP_BLOCK,
    embedding_names=CLIP_EMBEDDINGS,
)
SIGLIP_FAMILY = Family(
    layers="encoder.layers",
    final_norm="post_layernorm",
    heads=(("patches",),),
    unused=("head",),
    must_interpolate=True,
    layer_arguments={"attention_mask": None},
    block_parts=CLIP_BLOCK,
    embedding_names=CLIP_EMBEDDINGS,
    pooling=SIGLIP_POOLING,
    plain_fields=lambda student: {"vision_use_head": student.pooling_type == "attention_mlp"},
)
BEIT_FAMILY = Family(
    layers="layers",
    pooled_norm="pooler.layernorm",
    heads=(("patches",), ("cls",)),
    unused=("pooler",),
    layers_see_shape=True,
    block_parts=BEIT_BLOCK,
    plain_fields=_as_beit,
)
FAMILIES = {
    "dinov2": Family(layers="encoder.layer", block_parts=DINOV2_BLOCK, plain_fields=_as_dinov2),
    "dinov2_with_registers": Family(layers="encoder.layer", block_parts=DINOV2_BLOCK, plain_fields=_as_dinov2),
    "dinov3_vit": Family(
        layers="model.layer",
        final_norm="norm",
        layers_see_shape=True,
        block_parts=DINOV3_BLOCK,
        embedding_names=DINOV3_EMBEDDINGS,
        plain_fields=_as_dinov3,
    ),
    "vit": Family(layers="layers", heads=(("cls",),), unused=("pooler",), must_interpolate=True, block_parts=VIT_BLOCK),
    # trained by distillation, it has a second head, on its distillation token, which stands where registers do
    "deit": Family(
        layers="layers",
        heads=(("cls",), ("cls", "registers")),
        unused=("pooler",),
        must_interpolate=True,
        block_parts=VIT_BLOCK,
    ),
    "vit_mae": Family(layers="layers", must_interpolate=True, can_mask=True, block_parts=VIT_BLOCK),
    "vit_msn": Family(layers="layers", heads=(("cls",),), must_interpolate=True, block_parts=VIT_BLOCK),
    "ijepa": Family(
        layers="layers", heads=(("patches",),), unused=("pooler",), must_interpolate=True, block_parts=VIT_BLOCK
    ),
    "beit": BEIT_FAMILY,
    "data2vec-vision": replace(BEIT_FAMILY, layers="encoder.layer", block_parts=DATA2VEC_BLOCK),
    "clip_vision_model": CLIP_FAMILY,
    "metaclip_2_vision_model": replace(CLIP_FAMILY, model_class="MetaClip2VisionModel"),
    "mlcd_vision_model": replace(
        CLIP_FAMILY,
        must_interpolate=False,
        layers_see_shape=True,
        rotary="class_pos_emb",
        plain_fields=lambda student: {"rope_parameters": {"rope_type": "axial", "rope_theta": student.rope_theta}},
    ),
    "siglip_vision_model": SIGLIP_FAMILY,
    "siglip2_vision_model": replace(
        SIGLIP_FAMILY,
        must_interpolate=False,
        takes_patches=True,
        plain_fields=lambda student: {
            "vision_use_head": student.pooling_type == "attention_mlp",
            "num_patches": (student.image_size // student.patch_size) ** 2,
        },
    ),
    "aimv2_vision_model": Family(
        layers="encoder.layers",
        final_norm="rms_norm",
        unused=("head",),
        block_parts=AIMV2_BLOCK,
        embedding_names=AIMV2_EMBEDDINGS,
        pooling=AIMV2_POOLING,
        plain_fields=lambda student: {
            "hidden_act": "silu",
            "is_native": student.position_type == "sincos_2d",
            "use_head": student.pooling_type == "attention",
        },
    ),
    "tipsv2_vision_model": Family(
        layers="encoder.layer", block_parts=DINOV2_BLOCK, plain_fields=partial(_as_dinov2, whole=False)
    ),
    "radio": Family(
        layers="encoder.layer",
        final_norm=None,
        unused=("video_patch_projection",),
        conditioner="input_conditioner",
        block_parts=DINOV2_BLOCK,
        embedding_names=RADIO_EMBEDDINGS,
        plain_fields=_as_radio,
    ),
    # any ViT of timm with blocks of this form, through transformers' wrapper
    "timm_wrapper": Family(
        layers="timm_model.blocks",
        embeddings="timm_model.patch_embed",
        pre_norm="timm_model.norm_pre",
        final_norm="timm_model.norm",
        pooled_norm="timm_model.fc_norm",
        heads=(("cls",), ("patches",)),
        unused=("head", "attn_pool"),
        block_parts=TIMM_BLOCK,
        plain_fields=None,
    ),
    # students, so that whatever analyses a teacher analyses them too
    "raptor": Family(
        layers="encoder.blocks",
        pooled_norm="pooling.norm",
        heads=(("cls", "patches"), ("patches",), ("cls",)),
        unused=("pooling",),
    ),
}

# Models of images and text, of which the `vision_model` is the teacher.
TWO_TOWERS = ("clip", "siglip", "siglip2", "metaclip_2", "aimv2", "tipsv2")


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
    if model.config.model_type == "timm_wrapper":
        return model  # the model inside is none of transformers'
    # not simply the base model: what DINOv3 calls so are its layers alone
    parts = (model, model.base_model, getattr(model, "vision_model", None))
    return next((part for part in parts if hasattr(part, "embeddings")), model.base_model)


def token_layout(config: PreTrainedConfig) -> TokenLayout:
    """Returns which tokens of a state are cls, registers, patches, by the configuration of a backbone.

    DeiT's distillation token and all of RADIO's cls tokens but the first count as registers.
    """
    if config.model_type == "raptor":
        return TokenLayout(config.num_register_tokens, config.has_cls)
    fields = teacher_fields(config)
    return TokenLayout(fields["num_register_tokens"], fields["has_cls"])


def find_classifier(model: PreTrainedModel) -> nn.Linear | None:
    """Returns the model's linear layer to num_labels on one of the `heads` of its family, or None if it has none.

    Of a DeiT with two heads, whose logits are the mean of both, it is one layer that computes this.
    """
    config = vision_config(model.config)
    classifier = getattr(model, "classifier", None)
    vit = getattr(model, "timm_model", None)
    if vit is not None and vit.global_pool in ("token", "avg") and not vit.pool_include_prefix:
        classifier = vit.head
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
        parts: of the family's `block_parts`. A LayerScale may be a parameter of the layer, or None where it has none.

    Returns:
        Part to modules, in the order in which the part stacks them.

    Raises:
        RuntimeError: if the layer has none of the modules of a part.
    """
    modules = dict(layer.named_modules())
    for name in ("lambda_1", "lambda_2"):
        if isinstance(getattr(layer, name, None), nn.Parameter):
            modules[name] = nn.ParameterDict({"lambda1": getattr(layer, name)})
        elif hasattr(layer, name):
            modules[name] = nn.Identity()
    found = {}
    for part, alternatives in parts.items():
        names = next((names for names in alternatives if all(name in modules for name in names)), None)
        if names is None:
            raise RuntimeError(f"{type(layer).__name__} has none of {alternatives}: unknown version of transformers")
        found[part] = [modules[name] for name in names]
    return found


def embeddings_to_raptor(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns a backbone's embeddings, and the norm that may follow them, under the names of RaptorEmbeddings."""
    family, config = FAMILIES[model.config.model_type], model.config
    if config.model_type == "timm_wrapper":
        return _timm_embeddings(model.timm_model)
    state = model.get_submodule(family.embeddings).state_dict()
    # DINOv2 with 0 registers keeps an empty tensor for them
    state = {n: t for n, t in state.items() if t.numel() and not is_unused(n, family)}
    weights = {family.embedding_names.get(name, name): tensor for name, tensor in state.items()}
    if family.pre_norm is not None:
        weights |= {f"norm.{n}": t for n, t in model.get_submodule(family.pre_norm).state_dict().items()}
    for name in {"cls_token", "register_tokens", "position_embeddings"} & weights.keys():
        # some keep them without the dimension of the batch
        weights[name] = weights[name].reshape(1, -1, config.hidden_size)
    if "cls_register_token" in state:
        weights["cls_token"], registers = weights.pop("register_tokens").tensor_split([1], 1)
        weights |= {"register_tokens": registers} if registers.numel() else {}
    if "distillation_token" in weights:
        # a register has no position; the sum of both is one parameter as well
        cls, distillation, patches = weights["position_embeddings"].tensor_split([1, 2], 1)
        weights["register_tokens"] = weights.pop("distillation_token") + distillation
        weights["position_embeddings"] = torch.cat([cls, patches], 1)
    name = "patch_embeddings.projection"
    if weights[f"{name}.weight"].ndim == 2:
        weights[f"{name}.weight"] = _as_convolution(weights[f"{name}.weight"], config, family)
    if family.conditioner is not None:
        # without padding, normalising the images is linear in them: it goes into the projection
        module = model.get_submodule(family.conditioner)
        mean, std = module.norm_mean.double(), module.norm_std.double()
        weight = weights[f"{name}.weight"].double() / std
        weights[f"{name}.weight"], weights[f"{name}.bias"] = weight, -(weight * mean).sum((1, 2, 3))
    return weights


def describe_timm(model: PreTrainedModel) -> None:
    """Writes into the configuration of a timm model's wrapper the fields that other families' configurations have.

    Args:
        model: `TimmWrapperModel` or `TimmWrapperForImageClassification` of a Vision Transformer.

    Raises:
        ValueError: if it is none, or its blocks do what no RaptorBlock does; the message says what.
    """
    vit, config = model.timm_model, model.config
    title = f"timm's {config.architecture!r}"
    if lost := [name for name in ("patch_embed", "blocks", "norm", "norm_pre", "pos_embed") if not hasattr(vit, name)]:
        raise ValueError(f"{title} has no {', '.join(lost)}; supported are its models of class VisionTransformer")
    block, patches = vit.blocks[0], vit.patch_embed
    parameters = {name for name, _ in block.named_parameters()}
    known = {name for names in TIMM_BLOCK.values() for (name,) in names}
    if extra := {name for name in parameters if name.rpartition(".")[0] not in known}:
        raise ValueError(f"{title} has blocks with {', '.join(sorted(extra))}, which no RaptorBlock has")
    if not {"attn.qkv.weight", "mlp.fc1.weight"} <= parameters or not isinstance(block.norm1, nn.LayerNorm):
        raise ValueError(f"{title} has blocks of class {type(block).__name__}; supported are Block, with LayerNorm")
    activation = type(block.mlp.act).__name__
    if activation not in TIMM_ACTIVATIONS or has_weights(patches, "norm"):
        raise ValueError(f"{title} has {activation} in its FFN or a norm of its patches, which no student has")
    width, dim = block.mlp.fc2.in_features, vit.embed_dim
    has_fc_norm, has_cls = has_weights(vit, "fc_norm"), vit.cls_token is not None
    facts = {
        "hidden_size": dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": width,
        "ffn_type": "swiglu" if block.mlp.fc1.out_features == 2 * width else "mlp",
        "hidden_act": TIMM_ACTIVATIONS[activation],
        "layer_norm_eps": block.norm1.eps,
        "image_size": _square(patches.img_size),
        "patch_size": _square(patches.patch_size),
        "num_channels": patches.proj.in_channels,
        "num_register_tokens": 0 if vit.reg_token is None else vit.reg_token.shape[1],
        "has_cls": has_cls,
        "position_type": "none" if vit.pos_embed is None else "learned",
        "position_interpolation": "bicubic_antialias",
        "patch_bias": patches.proj.bias is not None,
        "embedding_norm": "tokens" if has_weights(vit, "norm_pre") else "none",
        "norm_type": "layer_norm",
        "qkv_bias": block.attn.qkv.bias is not None,
        "key_bias": True,
        "proj_bias": block.attn.proj.bias is not None,
        "mlp_bias": block.mlp.fc1.bias is not None,
        "final_norm": "tokens" if has_weights(vit, "norm") else "pooled" if has_fc_norm else "none",
        "pooling_type": "cls" if has_cls and vit.global_pool == "token" else "mean",
        "classifier_input": "pooled",
    }
    for name, value in facts.items():
        setattr(config, name, value)


def _square(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else size


def _timm_embeddings(vit: nn.Module) -> dict[str, Tensor]:
    """Embeddings of a ViT of timm, whose positions may be of the patches alone, of cls, or of cls and registers."""
    weights = {f"patch_embeddings.projection.{n}": t for n, t in vit.patch_embed.proj.state_dict().items()}
    weights |= {f"norm.{n}": t for n, t in vit.norm_pre.state_dict().items()}
    prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    count = sum(token.shape[1] for token in prefix)
    positions = vit.pos_embed
    if positions is not None:
        num_own = positions.shape[1] - vit.patch_embed.num_patches
        own, patches = positions.tensor_split([num_own], 1)
        own = own if num_own else positions.new_zeros(1, count, positions.shape[2])
        has_cls = vit.cls_token is not None
        weights["position_embeddings"] = torch.cat([own[:, :has_cls], patches], 1)
        if vit.reg_token is not None:
            # a register has no position; the sum of both is one parameter as well
            weights["register_tokens"] = vit.reg_token + own[:, int(has_cls) :]
    elif vit.reg_token is not None:
        weights["register_tokens"] = vit.reg_token
    if vit.cls_token is not None:
        weights["cls_token"] = vit.cls_token
    return {name: tensor.detach() for name, tensor in weights.items()}


def _as_convolution(weight: Tensor, config: PreTrainedConfig, family: Family) -> Tensor:
    """A projection of flattened patches, (D, C * patch * patch), as a kernel, (D, C, patch, patch)."""
    patch = config.patch_size
    if family.takes_patches:
        return weight.reshape(-1, patch, patch, config.num_channels).permute(0, 3, 1, 2)
    return weight.reshape(-1, config.num_channels, patch, patch)


@torch.no_grad()
def load_embeddings(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Loads embeddings under the names of RaptorEmbeddings into a backbone: the inverse of `embeddings_to_raptor`.

    Raises:
        ValueError: if the model normalises images in a way that these embeddings do not.
    """
    family, weights = FAMILIES[model.config.model_type], dict(weights)
    module = model.get_submodule(family.embeddings)
    state = {name: tensor for name, tensor in module.state_dict().items() if not is_unused(name, family)}
    name = "patch_embeddings.projection"
    if family.conditioner is not None:
        conditioner = model.get_submodule(family.conditioner)
        weight, bias = weights[f"{name}.weight"].double(), weights.pop(f"{name}.bias").double()
        if not torch.allclose(-(weight * conditioner.norm_mean.to(weight)).sum((1, 2, 3)), bias, atol=1e-3):
            raise ValueError("the patch bias is not that of the model's own normalisation of images")
        weights[f"{name}.weight"] = weight * conditioner.norm_std.to(weight)
    if "cls_register_token" in state:
        tokens = [weights.pop("cls_token"), *([weights["register_tokens"]] if "register_tokens" in weights else [])]
        weights["register_tokens"] = torch.cat(tokens, 1)
    if "distillation_token" in state:
        # its position is zero, and part of the token
        cls, patches = weights["position_embeddings"].tensor_split([1], 1)
        weights["position_embeddings"] = torch.cat([cls, torch.zeros_like(cls), patches], 1)
        weights["distillation_token"] = weights.pop("register_tokens")
    if family.takes_patches:
        weights[f"{name}.weight"] = weights[f"{name}.weight"].permute(0, 2, 3, 1)
    if family.pre_norm is not None:
        norm = model.get_submodule(family.pre_norm)
        norm.load_state_dict({n: weights.pop(f"norm.{n}") for n in norm.state_dict()})
    found = {name: family.embedding_names.get(name, name) for name, tensor in state.items() if tensor.numel()}
    if lost := weights.keys() - set(found.values()):
        raise ValueError(f"{type(model).__name__} has no place for {sorted(lost)}")
    module.load_state_dict(module.state_dict() | {n: weights[own].reshape(state[n].shape) for n, own in found.items()})


def pooling_to_raptor(model: PreTrainedModel) -> tuple[str, dict[str, Tensor]] | None:
    """Returns the kind and the weights of a backbone's pooling by attention as a RaptorPooling's, None without one."""
    parts, head = FAMILIES[model.config.model_type].pooling, getattr(model, "head", None)
    if not parts or head is None:
        return None
    state = head.state_dict()
    if "probe" in state:
        matrix, bias = state["attention.in_proj_weight"], state["attention.in_proj_bias"]
        # of a query that is always the same, its projection is the parameter
        dim = matrix.shape[1]
        weights = {"query": state["probe"] @ matrix[:dim].T + bias[:dim]}
        weights |= {"key_value.weight": matrix[dim:], "key_value.bias": bias[dim:]}
    else:
        weights = {"query": state["cls_token"]}
    for part, names in parts.items():
        stacked = [head.get_submodule(name).state_dict() for name in names]
        weights |= {f"{part}.{n}": torch.cat([tensors[n] for tensors in stacked]) for n in stacked[0]}
    return "attention_mlp" if "fc1" in parts else "attention", weights


@torch.no_grad()
def load_pooling(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Loads the weights of a RaptorPooling into a backbone's head: the inverse of `pooling_to_raptor`."""
    parts, head = FAMILIES[model.config.model_type].pooling, model.head
    if hasattr(head, "probe"):
        query = weights["query"].flatten()
        head.probe.zero_()
        attention = head.attention
        # a probe of zero leaves the bias, which is the query
        attention.in_proj_weight.copy_(torch.cat([torch.zeros(len(query), len(query)), weights["key_value.weight"]]))
        attention.in_proj_bias.copy_(torch.cat([query, weights["key_value.bias"]]))
    else:
        head.cls_token.copy_(weights["query"])
    for part, names in parts.items():
        for index, name in enumerate(names):
            module = head.get_submodule(name)
            module.load_state_dict({n: weights[f"{part}.{n}"].chunk(len(names))[index] for n in module.state_dict()})


def layer_to_raptor(layer: nn.Module, parts: Mapping[str, list[tuple[str, ...]]]) -> dict[str, Tensor]:
    """Returns a layer of a family with these `block_parts` as weights of a RaptorBlock; a missing LayerScale is one."""
    weights = {}
    for part, modules in block_modules(layer, parts).items():
        stacked = [dict(module.state_dict()) for module in modules]
        if "gamma" in stacked[0]:
            stacked = [{"lambda1": tensors["gamma"]} for tensors in stacked]  # timm's LayerScale
        if len(stacked) == 3 and "bias" in stacked[0] and "bias" not in stacked[1]:
            # keys alone have none
            weights["attention.query_bias"], _, weights["attention.value_bias"] = (t.pop("bias", None) for t in stacked)
        weights |= {f"{part}.{name}": torch.cat([tensors[name] for tensors in stacked]) for name in stacked[0]}
    return {f"layer_scale{i}.lambda1": torch.ones_like(weights["norm1.weight"]) for i in (1, 2)} | weights


@torch.no_grad()
def load_layer(layer: nn.Module, parts: Mapping[str, list[tuple[str, ...]]], weights: Mapping[str, Tensor]) -> None:
    """Loads the weights of a RaptorBlock into a layer: the inverse of `layer_to_raptor`.

    A LayerScale that the layer lacks goes into the projection before it.

    Raises:
        ValueError: if the layer has no place for one of the weights.
    """
    weights = dict(weights)
    for number, projection in ((1, "attention.proj"), (2, "ffn.fc2")):
        if f"layer_scale{number}" not in parts:
            scale = weights.pop(f"layer_scale{number}.lambda1")
            weights[f"{projection}.weight"] = weights[f"{projection}.weight"] * scale[:, None]
            if f"{projection}.bias" in weights:
                weights[f"{projection}.bias"] = weights[f"{projection}.bias"] * scale
    if "attention.query_bias" in weights:
        query, value = weights.pop("attention.query_bias"), weights.pop("attention.value_bias")
        weights["attention.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    used = set()
    for part, modules in block_modules(layer, parts).items():
        for index, module in enumerate(modules):
            for name, tensor in module.state_dict(keep_vars=True).items():
                tensor.copy_(weights[f"{part}.{name}"].chunk(len(modules))[index])
                used.add(f"{part}.{name}")
    if lost := weights.keys() - used:
        raise ValueError(f"{type(layer).__name__} has no place for {sorted(lost)}")


def classifier_to_raptor(classifier: nn.Linear, head: tuple[str, ...], has_cls: bool) -> dict[str, Tensor] | None:
    """Returns a classifier as one on [cls, mean patch], or without cls on the mean patch, None where that cannot be.

    Args:
        classifier: of a teacher.
        head: what it is on, one of the `heads` of its family.
        has_cls: whether a student has a cls token.
    """
    if "registers" in head:
        return None
    weights = classifier.state_dict()
    if has_cls and len(head) == 1:
        # the other has no say
        halves = [weights["weight"], torch.zeros_like(weights["weight"])]
        weights["weight"] = torch.cat(halves if head == ("cls",) else halves[::-1], 1)
    return weights


def build_plain(
    config: PreTrainedConfig,
    *,
    embeddings: Mapping[str, Tensor],
    blocks: Iterable[Mapping[str, Tensor]],
    norm: Mapping[str, Tensor],
    pooling: Mapping[str, Tensor] | None = None,
    cls_angles: Tensor | None = None,
    classifier: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Builds a model of a family from parts under Raptor's names: the inverse of the functions above.

    Args:
        config: of the model.
        embeddings: weights of RaptorEmbeddings; a mask token becomes zero.
        blocks: weights of RaptorBlock, one per layer.
        norm: of the final norm, or of the pooled one.
        pooling: weights of a RaptorPooling that attends.
        cls_angles: of rotary positions that turn the cls token.
        classifier: weight and bias of the classifier; None builds a model without a head.
        dtype: precision of the model.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        ValueError: if the model has no place for one of the weights.
    """
    family = FAMILIES[config.model_type]
    if classifier is not None:
        classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        # of DeiT's, the first has one head
        model = (classes[0] if isinstance(classes, tuple) else classes)._from_config(config, dtype=dtype)
    elif family.model_class is not None:
        model = getattr(transformers, family.model_class)._from_config(config, dtype=dtype)
    else:
        model = AutoModel.from_config(config, dtype=dtype)
    model, backbone = model.eval(), find_backbone(model)
    load_embeddings(backbone, embeddings)
    for layer, weights in zip(backbone.get_submodule(family.layers), blocks, strict=True):
        load_layer(layer, family.block_parts, weights)
    if norm:
        places = [family.final_norm, family.pooled_norm]
        backbone.get_submodule(next(p for p in places if p and has_weights(backbone, p))).load_state_dict(norm)
    if pooling is not None:
        load_pooling(backbone, pooling)
    if cls_angles is not None:
        backbone.get_parameter(family.rotary).data.copy_(cls_angles)
    if classifier is not None:
        model.classifier.load_state_dict(classifier)
    return model


def has_weights(model: nn.Module, path: str) -> bool:
    """Whether a model has a module of that path, and the module has parameters."""
    module = model
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None and any(True for _ in module.parameters())


def _mean_of_heads(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One linear layer on the inputs of both, side by side, whose output is the mean of theirs."""
    width, labels = first.in_features + second.in_features, first.out_features
    joint = nn.utils.skip_init(nn.Linear, width, labels, dtype=first.weight.dtype, device=first.weight.device)
    weight, bias = torch.cat([first.weight, second.weight], 1) / 2, (first.bias + second.bias) / 2
    joint.load_state_dict({"weight": weight, "bias": bias})
    return joint
