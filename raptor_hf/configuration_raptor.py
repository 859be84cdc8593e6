"""Configuration of the Raptor model family: a Vision Transformer whose layers are a few blocks applied repeatedly."""

import copy
import math
from operator import attrgetter
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

FFN_TYPES = ("mlp", "swiglu")
DEPTH_CONDITIONINGS = ("none", "scale", "embedding", "low_rank")
# what tells that an image needs no further step
EXIT_CRITERIA = ("step_size", "second_difference", "head_margin")
POSITION_TYPES = ("learned", "learned_cropped", "rotary_2d", "rotary_2d_index", "sincos_2d", "none")
POSITION_INTERPOLATIONS = ("bicubic", "bicubic_antialias", "bilinear_antialias")
NORM_TYPES = ("layer_norm", "rms_norm")
EMBEDDING_NORMS = ("none", "tokens", "patches")
FINAL_NORMS = ("tokens", "pooled", "none")
POOLING_TYPES = ("cls", "mean", "attention", "attention_mlp")
CLASSIFIER_INPUTS = ("tokens", "pooled")
# fields that are a family's unless they are given: what they are where `TEACHER_FAMILIES` says nothing
FAMILY_FIELDS = {
    "has_cls": True,
    "position_type": "learned",
    "position_interpolation": "bicubic",
    "patch_bias": True,
    "embedding_norm": "none",
    "norm_type": "layer_norm",
    "key_bias": True,
    "final_norm": "tokens",
    "classifier_input": "tokens",
}
_CLIP = {"num_register_tokens": 0, "patch_bias": False, "embedding_norm": "tokens"}
_BEIT = {
    "num_register_tokens": 0,
    "key_bias": False,
    "position_type": lambda teacher: "learned" if teacher.use_absolute_position_embeddings else "none",
    "final_norm": lambda teacher: "pooled" if teacher.use_mean_pooling else "tokens",
    "pooling_type": lambda teacher: "mean" if teacher.use_mean_pooling else "cls",
    "classifier_input": "pooled",
}
# family of the teacher -> what its students have, a value or how it is read from the teacher's configuration; registers
# are as many as the teacher's configuration says where nothing is said here
TEACHER_FAMILIES: dict[str, dict[str, Any]] = {
    "dinov2_with_registers": {"position_interpolation": "bicubic_antialias"},
    "dinov2": {"num_register_tokens": 0},
    "dinov3_vit": {
        "position_type": "rotary_2d",
        "key_bias": lambda teacher: teacher.key_bias,
        "qkv_bias": lambda teacher: teacher.query_bias and teacher.value_bias,
        "ffn_type": lambda teacher: "swiglu" if teacher.use_gated_mlp else "mlp",
    },
    "vit": {"num_register_tokens": 0},
    "deit": {"num_register_tokens": 1},  # its distillation token
    "vit_mae": {"num_register_tokens": 0},
    "vit_msn": {"num_register_tokens": 0},
    "ijepa": {"num_register_tokens": 0, "has_cls": False},
    "beit": _BEIT,
    "data2vec-vision": _BEIT,
    "clip_vision_model": _CLIP,
    "metaclip_2_vision_model": _CLIP,
    "mlcd_vision_model": _CLIP
    | {"position_type": "rotary_2d_index", "rope_theta": lambda teacher: teacher.rope_parameters["rope_theta"]},
    "siglip_vision_model": {"num_register_tokens": 0, "has_cls": False},
    "siglip2_vision_model": {
        "num_register_tokens": 0,
        "has_cls": False,
        "position_interpolation": "bilinear_antialias",
        "image_size": lambda teacher: math.isqrt(teacher.num_patches) * teacher.patch_size,
    },
    "aimv2_vision_model": {
        "num_register_tokens": 0,
        "has_cls": False,
        "position_type": lambda teacher: "sincos_2d" if teacher.is_native else "learned",
        "embedding_norm": "patches",
        "norm_type": "rms_norm",
        "ffn_type": "swiglu",
        "proj_bias": lambda teacher: teacher.qkv_bias,
    },
    "tipsv2_vision_model": {"position_interpolation": "bilinear_antialias"},
    "radio": {
        # all of its cls tokens but the first are among the registers
        "num_register_tokens": lambda teacher: teacher.num_cls_tokens - 1 + teacher.num_registers,
        "position_type": "learned_cropped",
        "position_image_size": lambda teacher: teacher.max_img_size,
        "final_norm": "none",
    },
    # its configuration says nothing of the model: `raptor_hf.families.describe_timm` writes these fields into it
    "timm_wrapper": {
        name: attrgetter(name)
        for name in (*FAMILY_FIELDS, "num_register_tokens", "pooling_type", "ffn_type", "intermediate_size")
    },
}
EMBEDDING_TYPES = tuple(TEACHER_FAMILIES)
# which class of the flat files each Auto class finds, where raptor_hf is not installed
AUTO_MAP = {
    "AutoConfig": "configuration_raptor.RaptorConfig",
    "AutoModel": "modeling_raptor.RaptorModel",
    "AutoBackbone": "modeling_raptor.RaptorBackbone",
    "AutoModelForImageClassification": "modeling_raptor.RaptorForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_raptor.RaptorForSemanticSegmentation",
    "AutoModelForDepthEstimation": "modeling_raptor.RaptorForDepthEstimation",
    "AutoImageProcessor": "image_processing_raptor.RaptorImageProcessor",
}
# Largest values, far above any model of today: a damaged or hostile file is refused before anything so large is made.
MAX_STEPS = 10_000
MAX_LABELS = 100_000
MAX_PARAMETERS = 10**12
LARGEST = {
    "hidden_size": 65_536,
    "num_attention_heads": 65_536,
    "head_dim": 65_536,
    "intermediate_size": 1_048_576,
    "conditioning_rank": 65_536,
    "num_channels": 65_536,
    "num_register_tokens": 65_536,
    "num_segmentation_labels": MAX_LABELS,
    "num_depth_bins": MAX_LABELS,
    "image_size": 65_536,
    "position_image_size": 65_536,
    "pooling_intermediate_size": 1_048_576,
    "patch_size": 65_536,
}
# what a teacher's configuration must say, if it says anything, for its layers to become blocks
NEEDED_OF_LAYERS = {
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "num_key_value_groups": 1,
}
# what a teacher's configuration and ours share, under the same names, as far as the teacher has them
TEACHER_FIELDS = (
    "hidden_size",
    "num_attention_heads",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "num_register_tokens",
    "qkv_bias",
    "proj_bias",
    "drop_path_rate",
    "rope_theta",
    "apply_layernorm",
    "reshape_hidden_states",
)
# the same under another name of the teacher's
TEACHER_NAMES = {
    "attention_probs_dropout_prob": "attention_dropout",
    "ffn_bias": "mlp_bias",
    "layer_norm_eps": "rms_norm_eps",
}


@strict
class RaptorConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`RaptorModel`] and its heads. The fields of [`Dinov2WithRegistersConfig`] keep their names;
    `num_hidden_layers` (the number of steps) and `num_blocks` are derived from `block_repeats` and read-only.

    Args:
        block_repeats (`tuple[int, ...]`, *optional*, defaults to `(7, 3, 2)`):
            Steps per block, in order: block 0 is applied `block_repeats[0]` times, then block 1, ...
        block_schedule (`list[int]`, *optional*):
            Block of every step, for partitions that are not contiguous. Must use block j `block_repeats[j]` times.
            `None`: each block's steps follow each other.
        hidden_size (`int`, *optional*, defaults to 768):
            Width D of the tokens.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Attention heads per block.
        head_dim (`int`, *optional*):
            Width of each head. `None`: `hidden_size // num_attention_heads`. With a width of their own, all heads of a
            block together may be wider or narrower than the tokens.
        ffn_type (`str`, *optional*, defaults to `"mlp"`):
            `"mlp"`: linear, `hidden_act`, linear. `"swiglu"`: silu(first half) * second half of a linear, then linear.
        intermediate_size (`int`, *optional*):
            Inner width of the FFN (of each of the two halves for `"swiglu"`). Defaults to 4 * `hidden_size`.
        depth_conditioning (`str`, *optional*, defaults to `"none"`):
            How a block knows its step. `"none"`: not at all. `"scale"`: an MLP of the layer index gives three vectors
            that scale attention branch, FFN branch and output. `"embedding"`: a learned vector per layer index is added
            to the block's input. `"low_rank"`: per step a rank-r term on the QKV and the first FFN projection, and an
            affine change of both norms and both LayerScales.
        conditioning_rank (`int`, *optional*, defaults to 8):
            Rank r of `"low_rank"`.
        branch_shifts (`bool`, *optional*, defaults to `False`):
            Whether `"low_rank"` also adds a vector per step to what each branch adds to the tokens.
        unit_gains (`bool`, *optional*, defaults to `False`):
            Whether `"low_rank"` also multiplies every channel of the heads and every neuron of the FFN by a gain per
            step, so that a step can use some of them and leave others to other steps.
        step_scaling (`bool`, *optional*, defaults to `False`):
            Whether a step over dt layers adds dt times what a step over one layer adds, so that `num_steps=` and
            `block_repeats=` run through the whole depth at another pace. At the trained pace dt is 1. Models trained
            with `--elastic` have it.
        exit_thresholds (`dict[str, float]`, *optional*):
            Thresholds of early exit by criterion (`"step_size"`, `"second_difference"`, `"head_margin"`), as
            `raptor_hf.calibrate_exit` finds them. A call with `exit_criterion=` takes its threshold from here.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the `"mlp"` FFN.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the embeddings.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the final LayerNorm.
        block_layer_norm_eps (`float`, *optional*):
            Epsilon of the LayerNorms in the blocks. Defaults to `layer_norm_eps`; the research code uses 1e-5.
        image_size (`int`, *optional*, defaults to 224):
            Side of the images that the position embeddings were made for, in pixels. Other sizes are interpolated.
        patch_size (`int`, *optional*, defaults to 14):
            Side of a patch, in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the images.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether the QKV projection has a bias.
        key_bias (`bool`, *optional*):
            Whether that bias has a part for the keys. Defaults to that of the `embedding_type`.
        proj_bias (`bool`, *optional*, defaults to `True`):
            Whether the output projection of the attention has a bias.
        ffn_bias (`bool`, *optional*, defaults to `True`):
            Whether the projections of the FFN have a bias.
        layerscale_value (`float`, *optional*, defaults to 1e-5):
            Initial LayerScale.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth, per sample and residual branch.
        num_register_tokens (`int`, *optional*, defaults to 4):
            Register tokens between the cls token and the patches. 1 for `embedding_type="deit"`, whose distillation
            token it is; 0 for families without such tokens.
        embedding_type (`str`, *optional*, defaults to `"dinov2_with_registers"`):
            Family of the teacher whose embedding is wrapped, one of `TEACHER_FAMILIES`. The fields that follow are the
            family's unless they are given.
        has_cls (`bool`, *optional*):
            Whether the first token is a cls token. Without one, heads read the mean patch in its place.
        position_type (`str`, *optional*):
            `"learned"`: a vector per patch of a square image is added to the patches, interpolated for other images.
            `"learned_cropped"`: the same of a table for images of `position_image_size`, first shrunk bilinearly to a
            square of the image's longer side, then cropped. `"sincos_2d"`: sines and cosines of column and row are
            added. `"rotary_2d"`: queries and keys of the patches are turned by angles of their row and column, each
            running from -1 to 1 over the image. `"rotary_2d_index"`: the same by the number of row and column, and the
            cls token by learned angles. `"none"`: no positions.
        position_interpolation (`str`, *optional*):
            How `"learned"` positions are interpolated: `"bicubic"`, `"bicubic_antialias"` or `"bilinear_antialias"`.
        position_image_size (`int`, *optional*):
            Side in pixels of the images that `"learned_cropped"` positions cover. Defaults to `image_size`.
        rope_theta (`float`, *optional*, defaults to 100.0):
            Ratio of the fastest to the slowest turning of rotary positions.
        patch_bias (`bool`, *optional*):
            Whether the projection of the patches has a bias.
        embedding_norm (`str`, *optional*):
            `"tokens"`: a norm follows the embeddings. `"patches"`: it follows the projection of the patches, before
            positions are added. `"none"`: there is none.
        norm_type (`str`, *optional*):
            All norms: `"layer_norm"`, or `"rms_norm"`, which neither centres nor shifts.
        final_norm (`str`, *optional*):
            What the norm after the last step is applied to: all `"tokens"`, what is `"pooled"` from them, or nothing,
            `"none"`.
        pooling_type (`str`, *optional*):
            What `pooler_output` is: the `"cls"` token, the `"mean"` patch, `"attention"` of a learned query to all
            tokens with `hidden_size // head width` heads, or `"attention_mlp"`, that with a residual FFN after it.
            Defaults to the first, without a cls token to the second.
        pooling_intermediate_size (`int`, *optional*):
            Inner width of the FFN of `"attention_mlp"`. Defaults to `intermediate_size`.
        classifier_input (`str`, *optional*):
            What a classifier reads: `"tokens"`, the cls token and the mean patch (without cls that alone), or
            `"pooled"`, the `pooler_output`.
        apply_layernorm (`bool`, *optional*, defaults to `True`):
            Whether the backbone normalises its feature maps.
        reshape_hidden_states (`bool`, *optional*, defaults to `True`):
            Whether the backbone gives feature maps as (B, D, height, width) rather than all tokens as (B, T, D).
        num_segmentation_labels (`int`, *optional*, defaults to 150):
            Classes of the segmentation head.
        segmentation_id2label (`dict[int, str]`, *optional*):
            Names of the segmentation classes, for the pipelines. Kept apart from the classifier's `id2label`.
        segmentation_ignore_index (`int`, *optional*, defaults to 255):
            Label of the pixels that the segmentation loss leaves out.
        num_depth_bins (`int`, *optional*, defaults to 256):
            Bins of the depth head, evenly spaced over [`min_depth`, `max_depth`].
        min_depth (`float`, *optional*, defaults to 0.001):
            Smallest depth, in metres.
        max_depth (`float`, *optional*, defaults to 10.0):
            Largest depth, in metres.
        out_features (`list[str]`, *optional*):
            Stages whose feature maps the backbone gives: `"stem"`, `"stage1"`, ..., `"stageL"`. Defaults to the last.
        out_indices (`list[int]`, *optional*):
            The same by index.

    Raises:
        ValueError: a field has an impossible value; the message names field, value and what would work.

    Example:

    ```python
    >>> from raptor_hf import RaptorConfig, RaptorModel

    >>> config = RaptorConfig(block_repeats=(7, 3, 2))
    >>> config.num_hidden_layers, config.num_blocks
    (12, 3)
    >>> model = RaptorModel(config)
    ```"""

    model_type = "raptor"

    block_repeats: list[int] | tuple[int, ...] = (7, 3, 2)
    block_schedule: list[int] | tuple[int, ...] | None = None
    hidden_size: int = 768
    num_attention_heads: int = 12
    head_dim: int | None = None
    ffn_type: str = "mlp"
    intermediate_size: int | None = None
    depth_conditioning: str = "none"
    conditioning_rank: int = 8
    branch_shifts: bool = False
    unit_gains: bool = False
    step_scaling: bool = False
    exit_thresholds: dict[str, float | int] | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    block_layer_norm_eps: float | int | None = None
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 14
    num_channels: int = 3
    qkv_bias: bool = True
    key_bias: bool | None = None
    proj_bias: bool = True
    ffn_bias: bool = True
    layerscale_value: float | int = 1e-5
    drop_path_rate: float | int = 0.0
    num_register_tokens: int = 4
    embedding_type: str = "dinov2_with_registers"
    has_cls: bool | None = None
    position_type: str | None = None
    position_interpolation: str | None = None
    position_image_size: int | None = None
    rope_theta: float | int = 100.0
    patch_bias: bool | None = None
    embedding_norm: str | None = None
    norm_type: str | None = None
    final_norm: str | None = None
    pooling_type: str | None = None
    pooling_intermediate_size: int | None = None
    classifier_input: str | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    num_segmentation_labels: int = 150
    segmentation_id2label: dict[int, str] | dict[str, str] | None = None
    segmentation_ignore_index: int = 255
    num_depth_bins: int = 256
    min_depth: float | int = 0.001
    max_depth: float | int = 10.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.block_repeats = tuple(self.block_repeats)
        if self.block_schedule is not None:
            self.block_schedule = tuple(self.block_schedule)
        self._check_block_fields()
        self._refuse_derived_fields(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.block_layer_norm_eps is None:
            self.block_layer_norm_eps = self.layer_norm_eps
        family = TEACHER_FAMILIES.get(self.embedding_type, {})
        for name, default in FAMILY_FIELDS.items():
            if getattr(self, name) is None:
                value = family.get(name, default)
                setattr(self, name, default if callable(value) else value)
        if self.pooling_type is None:
            self.pooling_type = "cls" if self.has_cls else "mean"
        if self.position_image_size is None:
            self.position_image_size = max(as_pair(self.image_size))
        if self.pooling_intermediate_size is None:
            self.pooling_intermediate_size = self.intermediate_size
        for name in ("intermediate_size", *LARGEST):
            _check_largest(name, getattr(self, name))
        _check_largest("num_labels", kwargs.get("num_labels"), MAX_LABELS)
        self.segmentation_id2label = _by_index(self.segmentation_id2label)
        # all entries, whichever class is saved; what a file says (stage_names too) may be stale
        kwargs.pop("auto_map", None)
        kwargs.pop("stage_names", None)
        self.auto_map = dict(AUTO_MAP)
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)
        self.id2label = _by_index(self.id2label)

    @property
    def num_hidden_layers(self) -> int:
        """Number of steps L: the sum of `block_repeats`."""
        return sum(self.block_repeats)

    @property
    def head_size(self) -> int:
        """Width of one attention head: `head_dim`, or an equal share of the tokens' width."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def heads_width(self) -> int:
        """Width of all heads of a block side by side."""
        return self.num_attention_heads * self.head_size

    @property
    def num_blocks(self) -> int:
        """Number of blocks K that have weights."""
        return len(self.block_repeats)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: cls and registers."""
        return self.has_cls + self.num_register_tokens

    @property
    def block_layers(self) -> tuple[tuple[int, ...], ...]:
        """For every block, the layer indices 1..L that it stands for, in order."""
        schedule = self.block_schedule
        if schedule is None:
            schedule = [block for block, repeats in enumerate(self.block_repeats) for _ in range(repeats)]
        layers: list[list[int]] = [[] for _ in self.block_repeats]
        for layer, block in enumerate(schedule, start=1):
            layers[block].append(layer)
        return tuple(map(tuple, layers))

    def step_plan(
        self, num_steps: int | None = None, block_repeats: tuple[int, ...] | list[int] | None = None
    ) -> tuple[tuple[int, float], ...]:
        """
        Returns the block that runs at every step, and the depth index that it is told.

        Args:
            num_steps (`int`, *optional*):
                Steps to run. Fewer than L: the first ones. More: the last block goes on, its depth index held at L.
                With `step_scaling`: steps through the whole depth, shared among the blocks by `spread_steps`.
            block_repeats (`tuple[int, ...]`, *optional*):
                Other counts for the same blocks; block j's depth indices are spread evenly over its phase (start, end].

        Returns:
            `tuple[tuple[int, float], ...]`: (block, depth index in layers 1..L) of every step.

        Raises:
            ValueError: `num_steps` is below 1, or `block_repeats` does not fit the blocks; with `step_scaling`,
                `num_steps` is below the number of blocks, or both are given.
        """
        layers = self.block_layers
        if self.step_scaling and num_steps is not None:
            if block_repeats is not None:
                raise ValueError(
                    f"num_steps is {num_steps} and block_repeats is {block_repeats}; with step_scaling each of them "
                    "sets the pace through the whole depth: give one."
                )
            num_steps, block_repeats = None, self.spread_steps(num_steps)
        if block_repeats is None:
            plan = [(block, float(layer)) for block, members in enumerate(layers) for layer in members]
            plan.sort(key=lambda step: step[1])
        else:
            block_repeats = self._check_retiming(block_repeats)
            plan, start = [], 0
            for block, (repeats, trained) in enumerate(zip(block_repeats, self.block_repeats, strict=True)):
                plan += [(block, start + trained * (i + 1) / repeats) for i in range(repeats)]
                start += trained
        if num_steps is not None:
            if not _is_count(num_steps) or num_steps > MAX_STEPS:
                raise ValueError(f"num_steps is {num_steps!r}; it must be an integer from 1 to {MAX_STEPS}.")
            plan = plan[:num_steps] + [plan[-1]] * (num_steps - len(plan))
        return tuple(plan)

    def spread_steps(self, num_steps: int) -> tuple[int, ...]:
        """
        Shares steps among the blocks, at least one each; every further one goes where steps are the longest.

        Args:
            num_steps (`int`):
                How many, from K up. L gives `block_repeats`.

        Returns:
            `tuple[int, ...]`: steps of every block.

        Raises:
            ValueError: fewer steps than blocks, or no number of steps.
        """
        if not _is_count(num_steps) or not self.num_blocks <= num_steps <= MAX_STEPS:
            raise ValueError(
                f"num_steps is {num_steps!r}; it must be an integer from {self.num_blocks}, one step per block, to "
                f"{MAX_STEPS}."
            )
        steps = [1] * self.num_blocks
        for _ in range(num_steps - self.num_blocks):
            sizes = [layers / count for layers, count in zip(self.block_repeats, steps, strict=True)]
            steps[sizes.index(max(sizes))] += 1
        return tuple(steps)

    def exit_threshold(self, criterion: str, given: float | None = None) -> float:
        """
        The threshold of a criterion of early exit: the one that is given, or that of `exit_thresholds`.

        Raises:
            ValueError: neither is there.
        """
        threshold = (self.exit_thresholds or {}).get(criterion) if given is None else given
        if threshold is None and criterion in EXIT_CRITERIA:
            raise ValueError(
                f"exit_threshold is None, and exit_thresholds in the configuration has none for {criterion!r}; give "
                "one, or have raptor_hf.calibrate_exit find it."
            )
        return threshold

    def for_segmentation(self) -> "RaptorConfig":
        """
        Copies the configuration with the segmentation classes as `id2label`, where pipelines look for them; a file
        written from the copy has the classifier's labels.

        Labels that were given at loading, `from_pretrained(folder, num_labels=3, id2label=...)`, are the segmentation
        classes of the model that is loaded with them.
        """
        config = copy.copy(self)
        given = config.__dict__.pop("_labels_at_loading", None)
        if given is not None:
            config._classifier_labels = given["of_file"]
            if given["named"]:
                config.segmentation_id2label = self.id2label
            elif self.num_labels != self.num_segmentation_labels:
                config.segmentation_id2label = None
            config.num_segmentation_labels = self.num_labels
        elif not hasattr(self, "_classifier_labels"):
            config._classifier_labels = {"id2label": self.id2label, "label2id": self.label2id}
        names = config.segmentation_id2label or {i: f"LABEL_{i}" for i in range(config.num_segmentation_labels)}
        config.id2label, config.label2id = names, {name: index for index, name in names.items()}
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "RaptorConfig":
        """
        [`PreTrainedConfig.from_dict`], with `kwargs` given to the constructor rather than assigned afterwards: fields
        follow from one another, and all are checked.

        Raises:
            ValueError: the dictionary is the configuration of another model family.
        """
        family = config_dict.get("model_type", cls.model_type)
        if family != cls.model_type:
            raise ValueError(
                f"model_type is {family!r}; RaptorConfig reads {cls.model_type!r} only. For a student of a teacher: "
                "RaptorConfig.from_teacher(teacher_config, block_repeats)."
            )
        names = {*cls.__dataclass_fields__, "out_features", "out_indices", "num_hidden_layers", "num_blocks"}
        names -= {"id2label", "label2id"}
        given = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        if "block_repeats" in given or given.keys() & {"out_features", "out_indices"}:
            # what the file says of the stages is of the old ones
            config_dict = {name: config_dict[name] for name in config_dict.keys() - {"out_features", "out_indices"}}
        _check_largest("num_labels", kwargs.get("num_labels", config_dict.get("num_labels")), MAX_LABELS)
        labels = {name: kwargs.pop(name) for name in ("num_labels", "id2label", "label2id") if name in kwargs}
        labels = {name: value for name, value in labels.items() if value is not None}
        if not labels:
            return super().from_dict(config_dict | given, **kwargs)
        of_file = {name: config_dict.get(name) for name in ("id2label", "label2id")}
        config_dict = {name: config_dict[name] for name in config_dict.keys() - {"id2label", "label2id", "num_labels"}}
        loaded = super().from_dict(config_dict | given | _checked_labels(labels, of_file), **kwargs)
        if not given.keys() & {"num_segmentation_labels", "segmentation_id2label"}:
            # which of the heads they are for is known only when the model is made: see `for_segmentation`
            config = loaded[0] if isinstance(loaded, tuple) else loaded
            before = cls(**{name: value for name, value in of_file.items() if value is not None})
            config._labels_at_loading = {
                "of_file": {"id2label": before.id2label, "label2id": before.label2id},
                "named": "id2label" in labels,
            }
        return loaded

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("_labels_at_loading", None)
        return output | output.pop("_classifier_labels", {})

    @classmethod
    def from_teacher(
        cls, teacher_config: PreTrainedConfig, block_repeats: tuple[int, ...] | list[int], **overrides: Any
    ) -> "RaptorConfig":
        """
        Configuration of a student of a teacher of any family that `embedding_type` names.

        Args:
            teacher_config (`PreTrainedConfig`):
                A `Dinov2WithRegistersConfig`, `ViTConfig`, `CLIPVisionConfig`, ...
            block_repeats (`tuple[int, ...]`):
                Steps per block; they must sum to the teacher's number of layers.
            **overrides:
                Fields that differ from the teacher's. FFN kind and width are the teacher's unless given here;
                `layerscale_value` is never the teacher's.

        Raises:
            ValueError: the teacher is of another family, its layers do what no block does, or `block_repeats` does not
                sum to their number.
        """
        fields = teacher_fields(teacher_config)
        # DINOv2's SwiGLU is with SiLU whatever its hidden_act
        is_gated = fields["ffn_type"] == "swiglu" and not hasattr(teacher_config, "use_swiglu_ffn")
        for name, wanted in (NEEDED_OF_LAYERS | ({"hidden_act": "silu"} if is_gated else {})).items():
            if getattr(teacher_config, name, wanted) != wanted:
                value = getattr(teacher_config, name)
                raise ValueError(f"{name} of teacher_config is {value!r}; for a block it must be {wanted!r}.")
        fields["id2label"], fields["label2id"] = teacher_config.id2label, teacher_config.label2id
        config = cls(block_repeats=tuple(block_repeats), **(fields | overrides))
        if config.num_hidden_layers != teacher_config.num_hidden_layers:
            raise ValueError(
                f"block_repeats is {tuple(block_repeats)}, which sums to {config.num_hidden_layers}; "
                f"it must sum to the teacher's {teacher_config.num_hidden_layers} layers."
            )
        return config

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: every impossible value is an error."""
        self._check_block_fields()
        self._check_positive()
        for name, choices in (
            ("ffn_type", FFN_TYPES),
            ("depth_conditioning", DEPTH_CONDITIONINGS),
            ("embedding_type", EMBEDDING_TYPES),
            ("hidden_act", tuple(ACT2FN)),
            ("position_type", POSITION_TYPES),
            ("position_interpolation", POSITION_INTERPOLATIONS),
            ("embedding_norm", EMBEDDING_NORMS),
            ("norm_type", NORM_TYPES),
            ("final_norm", FINAL_NORMS),
            ("pooling_type", POOLING_TYPES),
            ("classifier_input", CLASSIFIER_INPUTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        if self.unit_gains and self.depth_conditioning != "low_rank":
            raise ValueError(
                f"depth_conditioning is {self.depth_conditioning!r}; with unit_gains it must be 'low_rank'."
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            divisors = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            near = sorted(divisors, key=lambda n: abs(n - self.num_attention_heads))[:3]
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which does not divide hidden_size "
                f"{self.hidden_size}; nearest that do: {sorted(near)}. Or give head_dim."
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim is {self.head_dim}; it must be at least 1.")
        num_parameters = self._num_parameters()
        if num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, with {self.num_attention_heads} heads of {self.head_size}, "
                f"intermediate_size {self.intermediate_size}, block_repeats {_shortened(self.block_repeats)}, "
                f"image_size {self.image_size} and patch_size {self.patch_size}: this model would take "
                f"{4 * num_parameters:.1e} bytes in float32; it must be below {4 * MAX_PARAMETERS:.0e}."
            )
        if self.pooling_type == "cls" and not self.has_cls:
            raise ValueError("pooling_type is 'cls', but has_cls is False; it must be 'mean' or 'attention'.")
        if self.position_image_size < max(as_pair(self.image_size)):
            raise ValueError(
                f"position_image_size is {self.position_image_size}; it must be at least image_size, {self.image_size}."
            )
        if self.position_type == "sincos_2d" and self.hidden_size % 4:
            raise ValueError(f"hidden_size is {self.hidden_size}; for position_type 'sincos_2d' it must be 4 * n.")
        if self.position_type.startswith("rotary") and self.head_size % 4:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, whose heads are {self.head_size} wide for "
                f"hidden_size {self.hidden_size} and head_dim {self.head_dim}; for position_type "
                f"{self.position_type!r} that must be a multiple of 4."
            )
        if self.pooling_type.startswith("attention") and self.hidden_size % self.head_size:
            raise ValueError(
                f"head_dim is {self.head_dim}; for pooling_type {self.pooling_type!r} it must divide hidden_size "
                f"{self.hidden_size}."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        registers = TEACHER_FAMILIES[self.embedding_type].get("num_register_tokens")
        registers = None if callable(registers) else registers
        if self.num_register_tokens < 0 or registers not in (None, self.num_register_tokens):
            raise ValueError(
                f"num_register_tokens is {self.num_register_tokens}; it must be "
                f"{'at least 0' if registers is None else registers} for embedding_type {self.embedding_type!r}."
            )
        for name, threshold in (self.exit_thresholds or {}).items():
            if name not in EXIT_CRITERIA or not 0 <= threshold < math.inf:
                raise ValueError(
                    f"exit_thresholds is {self.exit_thresholds}; it must give numbers of at least 0 for some of "
                    f"{', '.join(EXIT_CRITERIA)}, or be None."
                )
        names = self.segmentation_id2label
        if names is not None and sorted(names) != list(range(self.num_segmentation_labels)):
            raise ValueError(
                f"segmentation_id2label has {len(names)} names, of the classes {sorted(names)}; it must name each of "
                f"0..{self.num_segmentation_labels - 1} (num_segmentation_labels is {self.num_segmentation_labels}), "
                "or be None."
            )
        if self.max_depth <= self.min_depth:
            raise ValueError(f"max_depth is {self.max_depth} m; it must be above min_depth, {self.min_depth} m.")
        for image, patch in zip(as_pair(self.image_size), as_pair(self.patch_size), strict=True):
            if image % patch:
                raise ValueError(
                    f"image_size is {self.image_size}, which is not a multiple of patch_size {self.patch_size}; "
                    f"nearest that are: {max(image // patch, 1) * patch} and {(image // patch + 1) * patch}."
                )
        height, width = (i // p for i, p in zip(as_pair(self.image_size), as_pair(self.patch_size), strict=True))
        if height != width:
            raise ValueError(
                f"image_size is {self.image_size}: position embeddings are made for a square of patches, not for "
                f"{height} x {width}. Give a square image_size; images of other shapes are interpolated at run time."
            )

    def _num_parameters(self) -> int:
        """The parameters of the largest tables and matrices, up to a few per cent those of the model."""
        dim, patch = self.hidden_size, math.prod(as_pair(self.patch_size))
        ffn = self.intermediate_size * (3 if self.ffn_type == "swiglu" else 2)
        positions = math.prod(as_pair(self.image_size)) // max(patch, 1)
        heads = self.heads_width
        tables = self.conditioning_rank * (2 * dim + 3 * heads + ffn) if self.depth_conditioning == "low_rank" else 0
        return (
            dim
            * (self.num_blocks * (4 * heads + ffn) + positions + self.num_register_tokens + self.num_channels * patch)
            + self.num_hidden_layers * tables
        )

    def _check_block_fields(self) -> None:
        repeats, schedule = self.block_repeats, self.block_schedule
        if not repeats or any(isinstance(n, bool) or n < 1 for n in repeats):
            raise ValueError(
                f"block_repeats is {_shortened(repeats)}; it must be one or more positive integers, e.g. (7, 3, 2)."
            )
        if sum(repeats) > MAX_STEPS:
            raise ValueError(
                f"block_repeats is {_shortened(repeats)}, which sums to {sum(repeats)} steps; it must be at most "
                f"{MAX_STEPS}."
            )
        if schedule is not None and [schedule.count(j) for j in range(len(repeats))] + [len(schedule)] != [
            *repeats,
            sum(repeats),
        ]:
            raise ValueError(
                f"block_schedule is {list(schedule)}; it must have {sum(repeats)} entries and name block j "
                f"block_repeats[j] times, for block_repeats {repeats}."
            )
        if schedule is not None and self.step_scaling:
            raise ValueError("step_scaling is True, for contiguous phases only; this model has a block_schedule.")

    def _check_retiming(self, block_repeats: tuple[int, ...] | list[int]) -> tuple[int, ...]:
        if self.block_schedule is not None:
            raise ValueError("block_repeats can re-time contiguous phases only; this model has a block_schedule.")
        block_repeats = tuple(block_repeats)
        if len(block_repeats) != self.num_blocks or not all(_is_count(n) for n in block_repeats):
            raise ValueError(
                f"block_repeats is {block_repeats}; it must be {self.num_blocks} positive integers, one per block "
                f"(trained with {tuple(self.block_repeats)})."
            )
        if sum(block_repeats) > MAX_STEPS:
            raise ValueError(
                f"block_repeats is {block_repeats}, which sums to {sum(block_repeats)} steps; it must be at most "
                f"{MAX_STEPS}."
            )
        return block_repeats

    def _check_positive(self) -> None:
        for name in (
            *("hidden_size", "num_attention_heads", "intermediate_size", "conditioning_rank", "num_channels"),
            *(
                "layer_norm_eps",
                "block_layer_norm_eps",
                "rope_theta",
                "num_segmentation_labels",
                "min_depth",
                "max_depth",
            ),
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and finite.")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"initializer_range is {self.initializer_range}; it must be at least 0 and finite.")
        if not math.isfinite(self.layerscale_value):
            raise ValueError(f"layerscale_value is {self.layerscale_value}; it must be finite.")
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) and len(value) != 2:
                raise ValueError(f"{name} is {value}; it must be an integer or a pair (height, width), in pixels.")
            if min(as_pair(value)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1 pixel.")
        if self.num_depth_bins < 2:
            raise ValueError(f"num_depth_bins is {self.num_depth_bins}; it must be at least 2.")

    def _refuse_derived_fields(self, kwargs: dict[str, Any]) -> None:
        derived = {"num_hidden_layers": self.num_hidden_layers, "num_blocks": self.num_blocks}
        for name, value in derived.items():
            given = kwargs.pop(name, value)
            if given != value:
                raise ValueError(
                    f"{name} is {given}, but it follows from block_repeats {tuple(self.block_repeats)}: {value}. "
                    "Leave it out, or change block_repeats."
                )
        for name in ("use_swiglu_ffn", "mlp_ratio"):
            if name in kwargs:
                raise ValueError(
                    f"{name} is {kwargs[name]}; RaptorConfig takes ffn_type ({' or '.join(FFN_TYPES)}) and "
                    "intermediate_size instead."
                )


def teacher_fields(teacher_config: PreTrainedConfig) -> dict[str, Any]:
    """
    Returns a teacher's configuration as fields of [`RaptorConfig`], with all those of `FAMILY_FIELDS`.

    Raises:
        ValueError: the teacher is of no family in `TEACHER_FAMILIES`.
    """
    family = teacher_config.model_type
    if family not in EMBEDDING_TYPES:
        raise ValueError(f"teacher_config has model_type {family!r}; known are {', '.join(EMBEDDING_TYPES)}.")
    names = [*zip(TEACHER_FIELDS, TEACHER_FIELDS, strict=True), *TEACHER_NAMES.items()]
    fields = {name: getattr(teacher_config, theirs) for name, theirs in names if hasattr(teacher_config, theirs)}
    fields |= FAMILY_FIELDS | _ffn_of(teacher_config)
    for name, value in TEACHER_FAMILIES[family].items():
        fields[name] = value(teacher_config) if callable(value) else value
    return fields | {"embedding_type": family}


def _ffn_of(teacher_config: PreTrainedConfig) -> dict[str, Any]:
    """Kind and width of the FFN of a teacher."""
    if not hasattr(teacher_config, "mlp_ratio"):
        return {"ffn_type": "mlp", "intermediate_size": teacher_config.intermediate_size}
    inner = int(teacher_config.hidden_size * teacher_config.mlp_ratio)
    if not teacher_config.use_swiglu_ffn:
        return {"ffn_type": "mlp", "intermediate_size": inner}
    # DINOv2's SwiGLU keeps two thirds of the width, rounded up to a multiple of 8
    return {"ffn_type": "swiglu", "intermediate_size": (int(inner * 2 / 3) + 7) // 8 * 8}


def _check_largest(name: str, value: Any, largest: int | None = None) -> None:
    """Refuses sizes that no model has; what is no number, or too small, is left to the checks of each field."""
    largest = LARGEST[name] if largest is None else largest
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(number, (int, float)) and number > largest for number in numbers):
        raise ValueError(f"{name} is {_shortened(value)}; it must be at most {largest}.")


def _checked_labels(labels: dict[str, Any], of_file: dict[str, Any]) -> dict[str, Any]:
    """Labels given at loading, as fields; the names in the file stay if only a number is given and it is theirs."""
    names, count = _by_index(labels.get("id2label")), labels.get("num_labels")
    if names is None:
        if count is None or count == len(of_file["id2label"] or (0, 1)):
            labels = {name: value for name, value in of_file.items() if value is not None} | labels
        return labels
    if sorted(names) != list(range(len(names))) or count not in (None, len(names)):
        raise ValueError(
            f"id2label has {len(names)} names, of the classes {_shortened(sorted(names))}; it must name each of "
            f"0..{(count or len(names)) - 1}."
        )
    return {"id2label": names, "label2id": labels.get("label2id") or {name: i for i, name in names.items()}}


def _by_index(names: dict[int, str] | dict[str, str] | None) -> dict[int, str] | None:
    """Names of classes in the order of their numbers: a file may list them as strings, 0, 1, 10, 11, 2."""
    return None if names is None else dict(sorted((int(index), name) for index, name in names.items()))


def _shortened(value: Any) -> str:
    """A value for a message; of a long sequence, its beginning."""
    return f"{value[:10]}..." if isinstance(value, (list, tuple)) and len(value) > 10 else f"{value}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size given as one integer or as a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


__all__ = ["RaptorConfig"]
