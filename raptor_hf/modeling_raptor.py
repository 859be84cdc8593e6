"""Raptor: a Vision Transformer rewritten as a few blocks applied again and again (arXiv 2512.19941).

The patch embeddings and the final LayerNorm are those of the teacher; between them, step l of L applies the block of
its phase. `hidden_states[0]` is the embedding, `hidden_states[l]` the state after step l, before the final LayerNorm.
"""

import contextlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_raptor import EXIT_CRITERIA, RaptorConfig, as_pair

# arguments of a call that are no inputs: of attention kernels, and which outputs to return
KNOWN_ARGUMENTS = {*TransformersKwargs.__annotations__, "return_dict"}
CODE_FILES = ("configuration_raptor.py", "modeling_raptor.py", "image_processing_raptor.py")

# a region is traced once and reused wherever it recurs, so that compile time grows with blocks and hardly with steps
_compile_once = getattr(torch.compiler, "nested_compile_region", lambda function: function)


@dataclass
class OutputOverDepth:
    """Fields that the output of a Raptor adds to those of its class in transformers.

    Args:
        depths: with `hidden_states`, the depth that each of them stands for, in layers 0..L, (steps + 1,).
        num_steps: with `exit_criterion`, the steps that each image took, (B,).
    """

    depths: torch.FloatTensor | None = None
    num_steps: torch.LongTensor | None = None


@dataclass
class RaptorEncoderOutput(OutputOverDepth, BaseModelOutput):
    """`BaseModelOutput` over depth."""


@dataclass
class RaptorModelOutput(OutputOverDepth, BaseModelOutputWithPooling):
    """`BaseModelOutputWithPooling` over depth."""


@dataclass
class RaptorImageClassifierOutput(OutputOverDepth, ImageClassifierOutput):
    """`ImageClassifierOutput` over depth."""


@dataclass
class RaptorSemanticSegmenterOutput(OutputOverDepth, SemanticSegmenterOutput):
    """`SemanticSegmenterOutput` over depth."""


@dataclass
class RaptorDepthEstimatorOutput(OutputOverDepth, DepthEstimatorOutput):
    """`DepthEstimatorOutput` over depth."""


class RaptorPatchEmbeddings(nn.Module):
    """Images (B, C, H, W) to patch tokens (B, P, D) by one strided convolution."""

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__()
        self.image_size = as_pair(config.image_size)
        self.patch_size = as_pair(config.patch_size)
        self.num_channels = config.num_channels
        self.num_patches = math.prod(i // p for i, p in zip(self.image_size, self.patch_size, strict=True))
        self.projection = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            self.patch_size,
            self.patch_size,
            bias=config.patch_bias,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; "
                f"it must be (batch, {self.num_channels}, height, width)."
            )
        for name, pixels, patch in zip(("height", "width"), pixel_values.shape[2:], self.patch_size, strict=True):
            if pixels < patch or pixels % patch:
                below = pixels // patch * patch
                raise ValueError(
                    f"pixel_values has {name} {pixels}; it must be a multiple of patch_size {patch}: "
                    + (f"{below} or {below + patch}." if below else f"at least {patch}.")
                )
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class RaptorRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) whose scale can be changed for one call; it has no shift."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self, hidden_states: torch.Tensor, gain: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = self.weight if gain is None else torch.addcmul(self.weight, self.weight, gain)
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return weight * wide.to(hidden_states.dtype)


def _norm(config: RaptorConfig) -> nn.Module:
    """A norm outside the blocks."""
    kind = RaptorRMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


class RaptorEmbeddings(nn.Module):
    """The teacher's embeddings: images (B, C, H, W) to tokens (B, T, D), ordered cls, registers, patches.

    T = 1 + R + P, without cls R + P. Norms between patches and layers, such as CLIP's, belong to them.
    """

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.interpolation = config.position_interpolation
        self.patch_embeddings = RaptorPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.has_cls else None
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.num_register_tokens, dim)) if config.num_register_tokens else None
        )
        positions = {
            "learned": config.has_cls + self.patch_embeddings.num_patches,
            "learned_cropped": math.prod(config.position_image_size // p for p in as_pair(config.patch_size)),
        }
        self.position_type = config.position_type
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, positions[config.position_type], dim))
            if config.position_type in positions
            else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = None if config.embedding_norm == "none" else _norm(config)
        self.norm_of_patches = config.embedding_norm == "patches"

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """
        Position embeddings for images of `height` x `width` pixels.

        Returns:
            `torch.Tensor`: (1, 1 + P, D), without cls (1, P, D); interpolated in float32.
        """
        patch_height, patch_width = self.patch_embeddings.patch_size
        size = height // patch_height, width // patch_width
        side = math.isqrt(self.patch_embeddings.num_patches)
        # sizes that an exported program leaves open must not be compared: the comparison would close them
        if not any(isinstance(count, torch.SymInt) for count in size) and size == (side, side):
            return self.position_embeddings
        dim = self.position_embeddings.shape[-1]
        first = 0 if self.cls_token is None else 1
        grid = self.position_embeddings[:, first:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
        mode, _, antialias = self.interpolation.partition("_")
        grid = nn.functional.interpolate(
            grid.float(), size=size, mode=mode, align_corners=False, antialias=bool(antialias)
        )
        grid = grid.to(self.position_embeddings.dtype).flatten(2).transpose(1, 2)
        return torch.cat((self.position_embeddings[:, :first], grid), dim=1)

    def cropped_positions(self, height: int, width: int) -> torch.Tensor:
        """
        Positions of the patches of images of `height` x `width` pixels, (1, P, D): the upper left corner of the table
        once it is shrunk to the longer side.
        """
        patch_height, patch_width = self.patch_embeddings.patch_size
        rows, columns = height // patch_height, width // patch_width
        side = math.isqrt(self.position_embeddings.shape[1])
        grid = self.position_embeddings.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        longer = torch.sym_max(rows, columns)
        grid = nn.functional.interpolate(grid.float(), size=(longer, longer), mode="bilinear", align_corners=False)
        return grid[:, :, :rows, :columns].to(self.position_embeddings.dtype).flatten(2).transpose(1, 2)

    def sincos_positions(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """Sines and cosines of column and row of the patches of images of `height` x `width` pixels, (P, D)."""
        patch_height, patch_width = self.patch_embeddings.patch_size
        quarter = like.shape[-1] // 4
        frequencies = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float32, device=like.device) / quarter)

        def waves(count: int) -> torch.Tensor:
            angles = torch.arange(count, dtype=torch.float32, device=like.device)[:, None] * frequencies
            return torch.cat((angles.sin(), angles.cos()), dim=-1)

        rows, columns = waves(height // patch_height), waves(width // patch_width)
        columns, rows = torch.broadcast_tensors(columns[None], rows[:, None])
        return torch.cat((columns, rows), dim=-1).flatten(0, 1).to(like.dtype)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens, size = self.patch_embeddings(pixel_values), pixel_values.shape[2:]
        if self.norm_of_patches:
            tokens = self.norm(tokens)
        if self.position_type == "learned_cropped":
            tokens = tokens + self.cropped_positions(*size)
        elif self.position_type == "sincos_2d":
            tokens = tokens + self.sincos_positions(*size, tokens)
        if self.cls_token is not None:
            tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if self.position_type == "learned":
            tokens = tokens + self.interpolate_pos_encoding(*size)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(tokens.shape[0], -1, -1)
            first = 0 if self.cls_token is None else 1
            tokens = torch.cat((tokens[:, :first], registers, tokens[:, first:]), dim=1)
        tokens = self.dropout(tokens)
        return tokens if self.norm is None or self.norm_of_patches else self.norm(tokens)


class RaptorRotaryPositions(nn.Module):
    """Rotary positions (arXiv 2104.09864) in two dimensions: the angles by which queries and keys of a token turn.

    They depend on the shape of the image alone and are the same in every step, so they are computed once per call. A
    quarter of a head turns with the patch's row, a quarter with its column; cls and registers do not turn, but by
    learned angles where `"rotary_2d_index"` has them for cls.
    """

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__()
        self.patch_size = as_pair(config.patch_size)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.quarter = config.head_size // 4
        self.theta = config.rope_theta
        self.by_index = config.position_type == "rotary_2d_index"
        self.cls_angles = nn.Parameter(torch.zeros(1, 2 * self.quarter)) if self.by_index and config.has_cls else None

    def forward(
        self, image_size: tuple[int, int], device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            image_size (`tuple[int, int]`): height and width in pixels.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: cosines and sines, each (T, head_dim / 2), computed in float32.
        """
        height, width = (pixels // patch for pixels, patch in zip(image_size, self.patch_size, strict=True))
        frequencies = 1 / self.theta ** (torch.arange(self.quarter, dtype=torch.float32, device=device) / self.quarter)
        rows, columns = (self.coordinates(count, device)[:, None] * frequencies for count in (height, width))
        angles = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1).flatten(
            0, 1
        )
        prefix = [] if self.cls_angles is None else [self.cls_angles.float()]
        prefix.append(angles.new_zeros(self.num_prefix_tokens - len(prefix), 2 * self.quarter))
        angles = torch.cat((*prefix, angles))
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def coordinates(self, count: int, device: torch.device | None) -> torch.Tensor:
        """Places of patches side by side: their numbers, or 2 pi times their centres in an image from -1 to 1."""
        numbers = torch.arange(count, dtype=torch.float32, device=device)
        return numbers if self.by_index else 2 * math.pi * (2 * ((numbers + 0.5) / count) - 1)


def _turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys, (B, heads, T, head_dim), turned: each of the first half of a head with one of the second."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class StepModulation(NamedTuple):
    """Changes that a conditioner makes to its block at one step; `None` leaves the tied weights as they are.

    input_shift, attention_gain, ffn_gain, output_gain: (D,), added to the input, multiplied onto branches and output;
        the gains of the branches are scalars where they are the size of the step alone.
    norm1_gain ... norm2_shift: (D,), the norms become norm(x) * weight * (1 + gain) + bias + shift.
    layer_scale1_gain, layer_scale2_gain: (D,), LayerScale becomes gamma * (1 + gain).
    qkv_up, qkv_down: (3 heads head_dim, r) and (r, D); their product is added to the QKV weight.
    ffn_up, ffn_down: the same for the first projection of the FFN.
    attention_shift, ffn_shift: (D,), added to what a branch adds to the tokens.
    heads_gain, neurons_gain: (heads head_dim,) and (FFN width,), what the last projection of a branch reads is
        multiplied by 1 + gain.
    """

    input_shift: torch.Tensor | None = None
    attention_gain: torch.Tensor | None = None
    ffn_gain: torch.Tensor | None = None
    output_gain: torch.Tensor | None = None
    norm1_gain: torch.Tensor | None = None
    norm1_shift: torch.Tensor | None = None
    norm2_gain: torch.Tensor | None = None
    norm2_shift: torch.Tensor | None = None
    layer_scale1_gain: torch.Tensor | None = None
    layer_scale2_gain: torch.Tensor | None = None
    qkv_up: torch.Tensor | None = None
    qkv_down: torch.Tensor | None = None
    ffn_up: torch.Tensor | None = None
    ffn_down: torch.Tensor | None = None
    attention_shift: torch.Tensor | None = None
    ffn_shift: torch.Tensor | None = None
    heads_gain: torch.Tensor | None = None
    neurons_gain: torch.Tensor | None = None

    def over(self, size: torch.Tensor) -> "StepModulation":
        """The same step over `size` layers, a scalar: what it adds to the tokens is multiplied by it."""
        changed = {
            "attention_gain": size if self.attention_gain is None else self.attention_gain * size,
            "ffn_gain": size if self.ffn_gain is None else self.ffn_gain * size,
        }
        for name in ("input_shift", "attention_shift", "ffn_shift"):
            if getattr(self, name) is not None:
                changed[name] = getattr(self, name) * size
        if self.output_gain is not None:
            changed["output_gain"] = 1 + (self.output_gain - 1) * size
        return self._replace(**changed)


class NoConditioner(nn.Module):
    """`"none"`: every step of a block is the same."""

    def __init__(self, config: RaptorConfig, block: int) -> None:
        super().__init__()

    def forward(self, depths: tuple[float, ...], device: torch.device | None = None) -> list[StepModulation]:
        return [StepModulation()] * len(depths)


class ScaleLinear(nn.Linear):
    """A layer of the `"scale"` MLP: a handful of numbers on which every token depends.

    A class of its own, so that quantisers, which replace what is exactly an `nn.Linear`, leave it as it is.
    """

    def __init__(self, in_features: int, out_features: int, init_std: float | None) -> None:
        super().__init__(in_features, out_features)
        self.init_std = init_std

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        # here the weight is at hand; outside of its own module's call, an offloaded one is elsewhere
        return nn.functional.linear(values.to(self.weight), self.weight, self.bias)


class ScaleConditioner(nn.Module):
    """`"scale"`, the research code's: S = W2 SiLU(W1 z + b1) + b2 + 1 for depth index z, split in three gains, (D,)."""

    hidden_size = 16

    def __init__(self, config: RaptorConfig, block: int) -> None:
        super().__init__()
        self.fc1 = ScaleLinear(1, self.hidden_size, init_std=None)
        # near zero, so that the gains start near one
        self.fc2 = ScaleLinear(self.hidden_size, 3 * config.hidden_size, init_std=1e-4)

    def forward(self, depths: tuple[float, ...], device: torch.device | None = None) -> list[StepModulation]:
        # of the weight its type alone is asked, which it keeps wherever it is
        depth = torch.tensor(depths, dtype=self.fc1.weight.dtype, device=device)[:, None]
        gains = self.fc2(nn.functional.silu(self.fc1(depth))) + 1
        # not views of one tensor, which a nested compile region does not take
        attention, ffn, output = (part.clone() for part in gains.chunk(3, dim=1))
        return [
            StepModulation(attention_gain=a, ffn_gain=f, output_gain=o)
            for a, f, o in zip(attention.unbind(), ffn.unbind(), output.unbind(), strict=True)
        ]


class TableConditioner(nn.Module):
    """Base of the conditioners that keep one entry per layer of their block; between two layers, entries are mixed."""

    # fields of StepModulation that tables of another name stand for
    fields: dict[str, str] = {}

    def __init__(self, config: RaptorConfig, block: int) -> None:
        super().__init__()
        self.layers = config.block_layers[block]

    def forward(self, depths: tuple[float, ...], device: torch.device | None = None) -> list[StepModulation]:
        entries = self.entries()
        return [self.modulation(entries, depth) for depth in depths]

    def modulation(self, entries: list[StepModulation], depth: float) -> StepModulation:
        """The entry of `depth`; linear between the layers of the block, held at the first and the last."""
        above = min(sum(layer < depth for layer in self.layers), len(self.layers) - 1)
        if above == 0 or depth >= self.layers[above]:
            return entries[above]
        low, high = self.layers[above - 1], self.layers[above]
        return self.mix(entries[above - 1], entries[above], (depth - low) / (high - low))

    def entries(self) -> list[StepModulation]:
        """One per layer, each table unbound once: row by row, every row's gradient would be as large as its table."""
        tables = {self.fields.get(name, name): table.unbind() for name, table in self.named_parameters()}
        return [StepModulation(**dict(zip(tables, rows, strict=True))) for rows in zip(*tables.values(), strict=True)]

    def mix(self, low: StepModulation, high: StepModulation, weight: float) -> StepModulation:
        raise NotImplementedError


class EmbeddingConditioner(TableConditioner):
    """`"embedding"`: a learned vector per layer index, added to the block's input. Zero at the start."""

    fields = {"depth_embeddings": "input_shift"}

    def __init__(self, config: RaptorConfig, block: int) -> None:
        super().__init__(config, block)
        self.depth_embeddings = nn.Parameter(torch.zeros(config.block_repeats[block], config.hidden_size))

    def mix(self, low: StepModulation, high: StepModulation, weight: float) -> StepModulation:
        return StepModulation(input_shift=torch.lerp(low.input_shift, high.input_shift, weight))


class LowRankConditioner(TableConditioner):
    """`"low_rank"`: per layer a rank-r term on QKV and first FFN weight, an affine change of norms and LayerScales.

    With `branch_shifts` also a shift of what each branch adds to the tokens. With `unit_gains` also a gain of every
    channel of the heads and of every neuron of the FFN.
    Neutral at the start: the up factors and all gains and shifts are zero.
    """

    vectors = (
        "norm1_gain",
        "norm1_shift",
        "norm2_gain",
        "norm2_shift",
        "layer_scale1_gain",
        "layer_scale2_gain",
    )

    def __init__(self, config: RaptorConfig, block: int) -> None:
        super().__init__(config, block)
        steps, dim, rank = config.block_repeats[block], config.hidden_size, config.conditioning_rank
        ffn_width = config.intermediate_size * (2 if config.ffn_type == "swiglu" else 1)
        self.qkv_down = nn.Parameter(torch.zeros(steps, rank, dim))
        self.qkv_up = nn.Parameter(torch.zeros(steps, 3 * config.heads_width, rank))
        self.ffn_down = nn.Parameter(torch.zeros(steps, rank, dim))
        self.ffn_up = nn.Parameter(torch.zeros(steps, ffn_width, rank))
        if config.norm_type == "rms_norm":
            # such a norm has no shift
            self.vectors = tuple(name for name in self.vectors if name not in ("norm1_shift", "norm2_shift"))
        if config.branch_shifts:
            self.vectors += ("attention_shift", "ffn_shift")
        if config.unit_gains:
            self.vectors += ("heads_gain", "neurons_gain")
        for name in self.vectors:
            size = {"heads_gain": config.heads_width, "neurons_gain": config.intermediate_size}.get(name, dim)
            self.register_parameter(name, nn.Parameter(torch.zeros(steps, size)))

    def mix(self, low: StepModulation, high: StepModulation, weight: float) -> StepModulation:
        low_entry, high_entry = low._asdict(), high._asdict()
        mixed = {name: torch.lerp(low_entry[name], high_entry[name], weight) for name in self.vectors}
        for name in ("qkv", "ffn"):
            # side by side, the two factorisations multiply to exactly the mixture of the two products
            up, down = f"{name}_up", f"{name}_down"
            mixed[up] = torch.cat(((1 - weight) * low_entry[up], weight * high_entry[up]), dim=1)
            mixed[down] = torch.cat((low_entry[down], high_entry[down]), dim=0)
        return StepModulation(**mixed)


# a further kind is a class here, its name in the configuration and, if it has tables, its initialisation
CONDITIONERS: dict[str, type[nn.Module]] = {
    "none": NoConditioner,
    "scale": ScaleConditioner,
    "embedding": EmbeddingConditioner,
    "low_rank": LowRankConditioner,
}


def _linear(in_features: int, out_features: int, start: str, bias: bool = True) -> nn.Linear:
    """A linear layer that `_init_weights` draws as `start` says: `"qkv"`, `"proj"`, `"ffn"` or `"head"`.

    It is a plain `nn.Linear`, called with one tensor, so that adapters, quantisers and hooks find what they expect.
    """
    layer = nn.Linear(in_features, out_features, bias)
    layer.start = start
    return layer


def _is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is what this file made it: of its class, no hook on it, its call not replaced."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _low_rank(
    layer: nn.Module, hidden_states: torch.Tensor, up: torch.Tensor | None, down: torch.Tensor | None
) -> torch.Tensor:
    """What `layer` would give if up @ down were added to its weight; `None` adds nothing."""
    if up is None:
        return layer(hidden_states)
    many = layer.training and hidden_states.shape[:-1].numel() > hidden_states.shape[-1]
    if many and _is_bare(layer, nn.Linear):
        # merged into the weight: one product for a whole batch, and one gradient for all three factors
        return nn.functional.linear(hidden_states, torch.addmm(layer.weight, up, down), layer.bias)
    # beside the layer: whatever wraps or replaces it is added to the same weight in training and at inference
    return layer(hidden_states) + nn.functional.linear(nn.functional.linear(hidden_states, down), up)


def _scaled(
    layer: nn.Module, hidden_states: torch.Tensor, scale: torch.Tensor | None, gain: nn.Module, by: torch.Tensor | None
) -> torch.Tensor:
    """The output of a linear layer times `scale`, (D,), and its input times 1 + `by`; `None` changes nothing.

    With a scale both go into the weight; otherwise the module `gain` multiplies the input.
    """
    if scale is None:
        return layer(gain(hidden_states, by))
    if hidden_states.dtype == torch.float16:
        # products of weights and of a LayerScale at its start are below its range
        return layer(gain(hidden_states, by)) * scale
    weight = layer.weight * scale[:, None]
    if by is not None:
        weight = torch.addcmul(weight, weight, by)
    bias = None if layer.bias is None else layer.bias * scale
    return nn.functional.linear(hidden_states, weight, bias)


class RaptorUnitGain(nn.Module):
    """Multiplies channels of heads, or neurons, by 1 + gain; a module, so that hooks see what they were before."""

    def forward(self, hidden_states: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states if gain is None else torch.addcmul(hidden_states, hidden_states, gain.to(hidden_states))


class RaptorLayerNorm(nn.LayerNorm):
    """LayerNorm whose affine part can be changed for one call."""

    def forward(
        self, hidden_states: torch.Tensor, gain: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = self.weight if gain is None else torch.addcmul(self.weight, self.weight, gain)
        bias = self.bias if shift is None else self.bias + shift
        return nn.functional.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)


class RaptorLayerScale(nn.Module):
    """LayerScale: gamma * (1 + gain) * branch_gain, (D,), what the output of a branch is multiplied by."""

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value)))

    def forward(self, gain: torch.Tensor | None = None, branch_gain: torch.Tensor | None = None) -> torch.Tensor:
        scale = self.lambda1 if gain is None else torch.addcmul(self.lambda1, self.lambda1, gain)
        return scale if branch_gain is None else scale * branch_gain


class RaptorDropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382); the identity outside training."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep = torch.rand(hidden_states.shape[0], 1, 1, dtype=hidden_states.dtype, device=hidden_states.device)
        return hidden_states * (keep >= self.drop_prob) / (1 - self.drop_prob)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for transformers' attention interface: (B, heads, T, head_dim) to (B, T, heads, ...)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class RaptorAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_size
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        # query, key and value, stacked in this order
        self.qkv = _linear(config.hidden_size, 3 * config.heads_width, "qkv", bias=config.qkv_bias and config.key_bias)
        # a bias of queries and values alone is beside the layer, which stays a plain one
        has_own = config.qkv_bias and not config.key_bias
        self.query_bias = nn.Parameter(torch.zeros(config.heads_width)) if has_own else None
        self.value_bias = nn.Parameter(torch.zeros(config.heads_width)) if has_own else None
        self.heads = RaptorUnitGain()
        self.proj = _linear(config.heads_width, config.hidden_size, "proj", bias=config.proj_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        up: torch.Tensor | None = None,
        down: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        positions: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, tokens, _ = hidden_states.shape
        qkv = _low_rank(self.qkv, hidden_states, up, down).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        if self.query_bias is not None:
            query = query + self.query_bias.to(query.dtype).view(self.num_heads, 1, self.head_dim)
            value = value + self.value_bias.to(value.dtype).view(self.num_heads, 1, self.head_dim)
        if positions is not None:
            query, key = _turned(query, *positions), _turned(key, *positions)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout, dtype = self.dropout if self.training else 0.0, query.dtype
        precise = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
        with torch.autocast("cpu", enabled=False) if precise else contextlib.nullcontext():
            if precise:
                # on CPUs the backward pass of attention in bfloat16 is many times slower than that in float32
                query, key, value = query.float(), key.float(), value.float()
            context, weights = attend(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        context = context.reshape(batch, tokens, -1).to(dtype)
        return _scaled(self.proj, context, scale, self.heads, gain), weights


class RaptorMLP(nn.Module):
    """`"mlp"`: linear, activation, linear."""

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__()
        self.fc1 = _linear(config.hidden_size, config.intermediate_size, "ffn", bias=config.ffn_bias)
        self.activation = ACT2FN[config.hidden_act]
        self.neurons = RaptorUnitGain()
        self.fc2 = _linear(config.intermediate_size, config.hidden_size, "ffn", bias=config.ffn_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        up: torch.Tensor | None = None,
        down: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
    ) -> torch.Tensor:
        neurons = self.activation(_low_rank(self.fc1, hidden_states, up, down))
        return _scaled(self.fc2, neurons, scale, self.neurons, gain)


class RaptorSwiGLU(nn.Module):
    """`"swiglu"`: silu(first half) * second half of one linear, then linear."""

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__()
        self.fc1 = _linear(config.hidden_size, 2 * config.intermediate_size, "ffn", bias=config.ffn_bias)
        self.neurons = RaptorUnitGain()
        self.fc2 = _linear(config.intermediate_size, config.hidden_size, "ffn", bias=config.ffn_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        up: torch.Tensor | None = None,
        down: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
    ) -> torch.Tensor:
        gate, value = _low_rank(self.fc1, hidden_states, up, down).chunk(2, dim=-1)
        return _scaled(self.fc2, nn.functional.silu(gate) * value, scale, self.neurons, gain)


class RaptorBlock(GradientCheckpointingLayer):
    """One pre-norm transformer block with LayerScale; a step is one call of it.

    Args:
        hidden_states: tokens, (B, T, D).
        *modulation: the fields of `StepModulation`, flat and positional, since checkpointing follows no other tensors.
        positions: cosines and sines of `RaptorEncoder.positions`, where positions are rotary.
        step: which step of the model this is, 1..L. The block itself is the same at every step; a hook that is
            registered with `with_kwargs=True` reads it as `kwargs["step"]`.

    Returns:
        the tokens after the step, (B, T, D), and the attention weights, (B, heads, T, T), or `None` where the attention
        implementation has none.
    """

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__()
        norm = RaptorRMSNorm if config.norm_type == "rms_norm" else RaptorLayerNorm
        self.norm1 = norm(config.hidden_size, eps=config.block_layer_norm_eps)
        self.attention = RaptorAttention(config)
        self.layer_scale1 = RaptorLayerScale(config)
        self.norm2 = norm(config.hidden_size, eps=config.block_layer_norm_eps)
        self.ffn = RaptorSwiGLU(config) if config.ffn_type == "swiglu" else RaptorMLP(config)
        self.layer_scale2 = RaptorLayerScale(config)
        self.drop_path = RaptorDropPath(config.drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *modulation: torch.Tensor | None,
        step: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Exported graphs have no nested regions, and in training Inductor (seen in torch 2.13) computes wrong gradients
        # through them. There, compile time is kept down by compiling each block alone: block.compile().
        if torch.compiler.is_dynamo_compiling() and not (torch.compiler.is_exporting() or torch.is_grad_enabled()):
            return self._compiled_step(hidden_states, *modulation, **kwargs)
        return self._step(hidden_states, *modulation, **kwargs)

    def _step(
        self,
        hidden_states: torch.Tensor,
        *modulation: torch.Tensor | None,
        positions: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        step = StepModulation(*modulation)
        if step.input_shift is not None:
            hidden_states = hidden_states + step.input_shift
        # In training LayerScale goes into the weight before the branch's output, of which then nothing is kept for the
        # gradient, if that is more than the weight and nobody else has to do with that output; otherwise onto it.
        fold = self._folds(hidden_states, self.attention, self.attention.heads, self.attention.proj)
        scale = self.layer_scale1(step.layer_scale1_gain, step.attention_gain)
        branch = self.norm1(hidden_states, step.norm1_gain, step.norm1_shift)
        branch, weights = self.attention(
            branch,
            step.qkv_up,
            step.qkv_down,
            scale if fold else None,
            step.heads_gain,
            positions=positions,
            **kwargs,
        )
        branch = self.drop_path(branch)
        hidden_states = hidden_states + branch if fold else torch.addcmul(hidden_states, branch, scale)
        if step.attention_shift is not None:
            hidden_states = hidden_states + step.attention_shift

        fold = self._folds(hidden_states, self.ffn, self.ffn.neurons, self.ffn.fc2)
        scale = self.layer_scale2(step.layer_scale2_gain, step.ffn_gain)
        if fold and step.output_gain is not None:
            scale = scale * step.output_gain
        branch = self.norm2(hidden_states, step.norm2_gain, step.norm2_shift)
        branch = self.ffn(branch, step.ffn_up, step.ffn_down, scale if fold else None, step.neurons_gain)
        branch = self.drop_path(branch)
        if step.ffn_shift is not None:
            hidden_states = hidden_states + step.ffn_shift
        if step.output_gain is None:
            return hidden_states + branch if fold else torch.addcmul(hidden_states, branch, scale), weights
        if fold:
            return torch.addcmul(branch, hidden_states, step.output_gain), weights
        return torch.addcmul(hidden_states, branch, scale) * step.output_gain, weights

    _compiled_step = _compile_once(_step)

    def _folds(self, hidden_states: torch.Tensor, branch: nn.Module, gain: nn.Module, output: nn.Module) -> bool:
        """Whether LayerScale, and the gain of units, go into the weight of the last layer of a branch."""
        return (
            self.training
            and _is_bare(output, nn.Linear)
            and hidden_states.shape[:-1].numel() > output.in_features
            and any(_is_bare(branch, kind) for kind in (RaptorAttention, RaptorMLP, RaptorSwiGLU))
            and _is_bare(gain, RaptorUnitGain)
            and _is_bare(self.drop_path, RaptorDropPath)
        )


class ExitRule:
    """Decides when an image needs no further step, by what its last steps did to its tokens, (B, T, D).

    `"step_size"`: the norm of what a step adds, per layer, over the norm of the tokens. `"second_difference"`: the same
    of the difference to what the step before added; twice in a row. `"head_margin"`: how far the probability of the
    head's first class is above that of its second.

    Args:
        criterion: one of `EXIT_CRITERIA`.
        threshold: the first two must be at most this, the margin at least; `None` only measures.
        classify: the head, tokens before the final norm to logits, (B, labels); for `"head_margin"`.

    Raises:
        ValueError: an unknown criterion, a threshold below 0, or a margin without a head of two classes.
    """

    def __init__(
        self,
        criterion: str,
        threshold: float | None = None,
        classify: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        if criterion not in EXIT_CRITERIA:
            raise ValueError(f"exit_criterion is {criterion!r}; it must be one of {', '.join(EXIT_CRITERIA)}.")
        if threshold is not None and not 0 <= threshold < math.inf:
            raise ValueError(f"exit_threshold is {threshold}; it must be at least 0 and finite.")
        if criterion == "head_margin" and classify is None:
            raise ValueError(
                "exit_criterion is 'head_margin'; it needs a classifier, as RaptorForImageClassification has: "
                f"use {EXIT_CRITERIA[0]!r} or {EXIT_CRITERIA[1]!r}."
            )
        self.criterion, self.threshold, self.classify = criterion, threshold, classify
        self.velocity: torch.Tensor | None = None
        self.was_calm: torch.Tensor | None = None

    def measure(self, before: torch.Tensor, after: torch.Tensor, size: float) -> torch.Tensor:
        """Measures what the threshold is for, after a step over `size` layers, (B,); infinite if not known yet."""
        if self.criterion == "head_margin":
            first, second = self.classify(after).float().softmax(dim=-1).topk(2).values.unbind(dim=-1)
            return first - second
        velocity = (after.float() - before.float()) / size
        change = velocity
        if self.criterion == "second_difference":
            change = torch.full_like(velocity, math.inf) if self.velocity is None else velocity - self.velocity
            self.velocity = velocity
        return change.flatten(1).norm(dim=1) / after.float().flatten(1).norm(dim=1)

    def is_settled(self, measured: torch.Tensor) -> torch.Tensor:
        """Tells which images need no further step, (B,), by what was measured after this one."""
        is_calm = measured >= self.threshold if self.criterion == "head_margin" else measured <= self.threshold
        if self.criterion != "second_difference":
            return is_calm
        settled = torch.zeros_like(is_calm) if self.was_calm is None else is_calm & self.was_calm
        self.was_calm = is_calm
        return settled

    def keep(self, images: torch.Tensor) -> None:
        """Forgets all but these images of the batch."""
        self.velocity, self.was_calm = (
            None if value is None else value[images] for value in (self.velocity, self.was_calm)
        )


class RaptorPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving of all Raptor models."""

    config: RaptorConfig
    base_model_prefix = "raptor"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RaptorEmbeddings", "RaptorBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(RaptorBlock, index=0),
        "attentions": OutputRecorder(RaptorBlock, index=1),
    }
    _input_embed_layer = "patch_embeddings"
    # every loss is a mean over its batch, which a Trainer that accumulates gradients must divide by their number
    accepts_loss_kwargs = False
    # what the configuration says of a class's head
    _head_fields: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        config: Any = None,
        variant: str | None = None,
        **kwargs: Any,
    ) -> "RaptorPreTrainedModel":
        """
        [`PreTrainedModel.from_pretrained`]; of several heads in one folder, `variant` names one, and without it a
        class gets the first head of its kind. Other classes or labels than the folder's ask for a new head.

        Raises:
            ValueError: the folder has heads, but not this one; the message names those that it has.
        """
        if pretrained_model_name_or_path is not None and cls._head_fields:
            variant = cls._find_head(pretrained_model_name_or_path, config, variant, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, variant=variant, **kwargs)

    @classmethod
    def _find_head(cls, folder: str | Path, config: Any, variant: str | None, kwargs: dict[str, Any]) -> str | None:
        """The variant that `from_pretrained` loads, None where the folder lists no heads or a new head is asked for."""
        places = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        stored, _ = cls.config_class.get_config_dict(folder, **{key: kwargs[key] for key in places if key in kwargs})
        heads = stored.get("head_variants") or {}
        own = [name for kind in cls.__mro__ for name in heads.get(kind.__name__, ())]
        if not heads or variant in own:
            return variant
        known = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in heads.items())
        if variant is not None:
            raise ValueError(
                f"variant is {variant!r}; {folder} has no such head for {cls.__name__}. Its heads are {known}."
            )
        there = cls.config_class.from_dict(dict(stored))
        wanted = config if isinstance(config, PreTrainedConfig) else cls.config_class.from_dict(dict(stored), **kwargs)
        wanted, there = wanted.to_dict(), there.to_dict()
        if any(wanted.get(name) != there.get(name) for name in cls._head_fields):
            return None
        if not own:
            raise ValueError(
                f"{folder} has no head for {cls.__name__}. Its heads are {known}. For a new head, to be trained, give "
                "num_labels, id2label or num_depth_bins."
            )
        return own[0]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings and heads as in DINOv2; blocks as PyTorch initialises them, as in the research code."""
        # by the classes that own the parameters: of modules outside transformers without parameters of their own,
        # transformers believes that they are initialised, and never brings them here
        std = self.config.initializer_range
        start = getattr(module, "start", None)
        if start == "qkv":
            # nn.MultiheadAttention's: Xavier over the stacked matrix, no bias
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif start == "head":
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, ScaleLinear) and module.init_std is not None:
            init.normal_(module.weight, std=module.init_std)
            init.normal_(module.bias, std=module.init_std)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if start == "proj" and module.bias is not None:
                init.zeros_(module.bias)
            elif module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RaptorAttention) and module.query_bias is not None:
            init.zeros_(module.query_bias)
            init.zeros_(module.value_bias)
        elif isinstance(module, RaptorRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RaptorRotaryPositions) and module.cls_angles is not None:
            init.normal_(module.cls_angles, std=std)
        elif isinstance(module, RaptorPooling) and module.query is not None:
            init.trunc_normal_(module.query, std=std)
        elif isinstance(module, RaptorLayerScale):
            init.constant_(module.lambda1, self.config.layerscale_value)
        elif isinstance(module, LowRankConditioner):
            for name, table in module.named_parameters():
                if name in ("qkv_down", "ffn_down"):
                    init.normal_(table, std=self.config.hidden_size**-0.5)
                else:
                    init.zeros_(table)
        elif isinstance(module, EmbeddingConditioner):
            init.zeros_(module.depth_embeddings)
        elif isinstance(module, RaptorEmbeddings):
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, std=std)
            if module.register_tokens is not None:
                init.zeros_(module.register_tokens)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """
        [`PreTrainedModel.save_pretrained`]; beside the weights go the code files that `auto_map` names, so that the
        folder also loads where raptor_hf is not installed, by `trust_remote_code=True`.
        """
        # imported here so that transformers brings this file along with remote code, too
        from .image_processing_raptor import RaptorImageProcessor  # noqa: F401

        # which heads lie in the folder that the model came from says nothing of this one
        self.config.__dict__.pop("head_variants", None)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            here = Path(__file__).parent
            for name in CODE_FILES:
                if (here / name).is_file() and here.resolve() != Path(save_directory).resolve():
                    shutil.copyfile(here / name, Path(save_directory) / name)


class RaptorEncoder(RaptorPreTrainedModel):
    """The recurrence: block j applied `block_repeats[j]` times, for all j in order."""

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList([RaptorBlock(config) for _ in range(config.num_blocks)])
        # beside the blocks, not in them: they are evaluated once for all steps, before the loop
        conditioner = CONDITIONERS[config.depth_conditioning]
        self.conditioners = nn.ModuleList([conditioner(config, block) for block in range(config.num_blocks)])
        self.rotary = RaptorRotaryPositions(config) if config.position_type.startswith("rotary") else None
        self.plan = config.step_plan()
        self.post_init()

    def positions(
        self, hidden_states: torch.Tensor, image_size: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        Computes what every block is given as `positions`; `None` where positions are not rotary.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, D)`):
                Tokens, of which the number, the precision and the device are read.
            image_size (`tuple[int, int]`, *optional*):
                Height and width in pixels of the images that they are of; `None` stands for a square of patches.

        Raises:
            ValueError: images of that size have another number of patches.
        """
        if self.rotary is None:
            return None
        patch_height, patch_width = as_pair(self.config.patch_size)
        if image_size is None:
            num_patches = hidden_states.shape[1] - self.config.num_prefix_tokens
            side = math.isqrt(num_patches)
            if side**2 != num_patches:
                raise ValueError(
                    f"image_size is None for {num_patches} patches, which are no square; it must be (height, width)."
                )
            image_size = side * patch_height, side * patch_width
        return self.rotary(image_size, hidden_states.device, hidden_states.dtype)

    def modulations(
        self, plan: tuple[tuple[int, float], ...], device: torch.device | None = None
    ) -> list[StepModulation]:
        """
        The modulation of every step of a plan, or of the steps of one block in a plan.

        Args:
            plan (`tuple[tuple[int, float], ...]`):
                (block, depth index) of every step, as `RaptorConfig.step_plan` gives it.
            device (`torch.device`, *optional*):
                Where the tokens are. Needed only where weights are elsewhere between the calls of their modules.
        """
        modulations: list[StepModulation] = [StepModulation()] * len(plan)
        for block, conditioner in enumerate(self.conditioners):
            steps = [step for step, (owner, _) in enumerate(plan) if owner == block]
            ends = [plan[step][1] for step in steps]
            sizes = self._step_sizes(block, ends)
            # a step over (end - size, end] stands for the mean of the layers in it; over one layer, for that layer
            depths = tuple(end - (size - 1) / 2 for end, size in zip(ends, sizes, strict=True))
            told = conditioner(depths, device) if steps else ()
            for step, size, modulation in zip(steps, sizes, told, strict=True):
                modulations[step] = modulation if size == 1 else modulation.over(torch.full((), size, device=device))
        return modulations

    def _step_sizes(self, block: int, ends: list[float]) -> list[float]:
        """dt, in layers, of the steps of a block that end at these depths; without `step_scaling` 1."""
        if not self.config.step_scaling:
            return [1.0] * len(ends)
        return [end - start for start, end in pairwise((self.config.block_layers[block][0] - 1, *ends))]

    def run(
        self,
        hidden_states: torch.Tensor,
        num_steps: int | None = None,
        block_repeats: tuple[int, ...] | None = None,
        image_size: tuple[int, int] | None = None,
        exit_criterion: str | None = None,
        exit_threshold: float | None = None,
        classify: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RaptorEncoderOutput:
        """
        `forward` with the plan of `RaptorConfig.step_plan(num_steps, block_repeats)`; adds `depths`. With
        `exit_criterion` each image takes as many steps of it as the [`ExitRule`] asks for.

        Raises:
            TypeError: an argument that no model of this family has, such as `bool_masked_pos`.
        """
        unknown = [name for name, value in kwargs.items() if name not in KNOWN_ARGUMENTS and value is not None]
        if unknown:
            raise TypeError(
                f"{unknown[0]} is no argument of this model, whose forward takes pixel_values, num_steps, "
                "block_repeats, and labels if it has a head; it has no mask token and leaves no token out."
            )
        # the caller decides on tuples, at its own boundary
        kwargs["return_dict"] = True
        own_plan = num_steps is None and block_repeats is None
        plan = self.plan if own_plan else self.config.step_plan(num_steps, block_repeats)
        if exit_criterion is not None:
            rule = ExitRule(exit_criterion, self.config.exit_threshold(exit_criterion, exit_threshold), classify)
            return self._run_until_settled(hidden_states, plan, rule, image_size, **kwargs)
        if exit_threshold is not None:
            raise ValueError(
                f"exit_threshold is {exit_threshold}, but exit_criterion is None; it must be one of "
                f"{', '.join(EXIT_CRITERIA)}."
            )
        selected = kwargs.get("output_hidden_states")
        if not (selected is None or isinstance(selected, bool)):
            # transformers resolves indices with config.num_hidden_layers, which may not be the number of steps, and its
            # versions disagree on the initial state
            kwargs["output_hidden_states"] = True
        output = self(hidden_states, plan, image_size, **kwargs)
        states = output.hidden_states
        if states is not None:
            output.depths = torch.tensor([0.0, *(depth for _, depth in plan)], device=hidden_states.device)
        if not (selected is None or isinstance(selected, bool)):
            indices = {range(len(states))[i] for i in ([selected] if isinstance(selected, int) else selected)}
            output.hidden_states = tuple(state if i in indices else None for i, state in enumerate(states))
        return output

    def _run_until_settled(
        self,
        hidden_states: torch.Tensor,
        plan: tuple[tuple[int, float], ...],
        rule: ExitRule,
        image_size: tuple[int, int] | None,
        **kwargs: Any,
    ) -> RaptorEncoderOutput:
        """Runs the steps of a plan; images that have settled leave the batch, so that the others cost less."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise ValueError(
                f"exit_criterion is {rule.criterion!r}, but the model is compiled or exported, where every image takes "
                "the same steps: leave it out, and give num_steps for fewer."
            )
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.pop(name, None):
                raise ValueError(
                    f"{name} is True, but exit_criterion is {rule.criterion!r}, with which images differ in their "
                    "number of states: leave out one of them."
                )
        kwargs.pop("return_dict", None)
        images = torch.arange(len(hidden_states), device=hidden_states.device)
        left: list[tuple[torch.Tensor, torch.Tensor]] = []
        counts: list[torch.Tensor] = []
        reached = 0.0
        modulations, positions = self.modulations(plan, hidden_states.device), self.positions(hidden_states, image_size)
        for step, ((block, depth), modulation) in enumerate(zip(plan, modulations, strict=True), start=1):
            before = hidden_states
            hidden_states, _ = self.blocks[block](hidden_states, *modulation, positions=positions, step=step, **kwargs)
            # a step past the depth, on which the last block goes on, counts as a layer
            size, reached = depth - reached or 1.0, depth
            if step == len(plan):
                settled = torch.ones_like(images, dtype=torch.bool)
            else:
                settled = rule.is_settled(rule.measure(before, hidden_states, size))
            if not settled.any():
                continue
            left.append((images[settled], hidden_states[settled]))
            counts.append(torch.full_like(images[settled], step))
            images, hidden_states = images[~settled], hidden_states[~settled]
            rule.keep(~settled)
            if len(images) == 0:
                break
        numbers, states = map(torch.cat, zip(*left, strict=True))
        order = numbers.argsort()
        return RaptorEncoderOutput(last_hidden_state=states[order], num_steps=torch.cat(counts)[order])

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: tuple[tuple[int, float], ...] | None = None,
        image_size: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RaptorEncoderOutput:
        plan = self.plan if plan is None else plan
        if self.training and torch.is_grad_enabled() and self.blocks[0].gradient_checkpointing:
            # reentrant checkpointing gives a block no gradients if its input needs none, as after frozen embeddings
            hidden_states = hidden_states if hidden_states.requires_grad else hidden_states.detach().requires_grad_()
        modulations = self.modulations(plan, hidden_states.device)
        positions = self.positions(hidden_states, image_size)
        for step, ((block, _), modulation) in enumerate(zip(plan, modulations, strict=True), start=1):
            hidden_states, _ = self.blocks[block](hidden_states, *modulation, positions=positions, step=step, **kwargs)
        return RaptorEncoderOutput(last_hidden_state=hidden_states)


class RaptorPooling(nn.Module):
    """The teacher's pooling: tokens (B, T, D) after the final norm to one vector per image, (B, D).

    It has weights where the teacher's has them: a norm after it, or a learned query that attends to all tokens.
    """

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__()
        dim, self.kind = config.hidden_size, config.pooling_type
        # as many as the teacher's layers have, whatever the blocks have
        self.num_prefix_tokens, self.num_heads = config.num_prefix_tokens, dim // config.head_size
        self.query = self.key_value = self.proj = self.fc1 = self.fc2 = None
        if self.kind.startswith("attention"):
            self.query = nn.Parameter(torch.zeros(1, 1, dim))
            self.key_value = _linear(dim, 2 * dim, "qkv", bias=config.qkv_bias)
            self.proj = _linear(dim, dim, "proj")
        if self.kind == "attention_mlp":
            self.fc1 = _linear(dim, config.pooling_intermediate_size, "ffn")
            self.activation = ACT2FN[config.hidden_act]
            self.fc2 = _linear(config.pooling_intermediate_size, dim, "ffn")
        has_norm = config.final_norm == "pooled" or self.kind == "attention_mlp"
        self.norm = _norm(config) if has_norm else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.query is not None:
            pooled = self._attend(tokens)
        else:
            pooled = tokens[:, 0] if self.kind == "cls" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        if self.fc1 is not None:
            return pooled + self.fc2(self.activation(self.fc1(self.norm(pooled))))
        return pooled if self.norm is None else self.norm(pooled)

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, dim = tokens.shape
        split = self.key_value(tokens).view(batch, count, 2, self.num_heads, dim // self.num_heads)
        key, value = split.permute(2, 0, 3, 1, 4).unbind()
        query = self.query.to(key.dtype).view(1, self.num_heads, 1, -1).expand(batch, -1, -1, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value).reshape(batch, dim))


def _final_norm(config: RaptorConfig) -> nn.Module:
    """The norm of all tokens after the last step, the identity where there is none."""
    return _norm(config) if config.final_norm == "tokens" else nn.Identity()


class RaptorModel(RaptorPreTrainedModel):
    """The recurrent backbone: the teacher's embeddings, the blocks, the teacher's final norm and pooling."""

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__(config)
        self.embeddings = RaptorEmbeddings(config)
        self.encoder = RaptorEncoder(config)
        self.layernorm = _final_norm(config)
        self.pooling = RaptorPooling(config)
        self.post_init()

    def get_input_embeddings(self) -> RaptorPatchEmbeddings:
        return self.embeddings.patch_embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_steps: int | None = None,
        block_repeats: tuple[int, ...] | None = None,
        exit_criterion: str | None = None,
        exit_threshold: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RaptorModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`):
                Normalised images; H and W multiples of the patch size.
            num_steps (`int`, *optional*):
                Steps to run instead of L: the first ones if fewer; if more, the last block goes on with its depth index
                held at L. With `config.step_scaling`: steps through the whole depth, at another pace.
            block_repeats (`tuple[int, ...]`, *optional*):
                Other step counts for the same blocks, their depth indices spread evenly over each phase.
            exit_criterion (`str`, *optional*):
                Stop each image where it has settled, by `"step_size"`, `"second_difference"` or, with a classifier,
                `"head_margin"`; see [`ExitRule`]. Images that have finished leave the batch. Not in compiled or
                exported models.
            exit_threshold (`float`, *optional*):
                Of the criterion; defaults to the one in `config.exit_thresholds`, where
                `raptor_hf.calibrate_exit` saves it.

        Returns:
            `RaptorModelOutput`: `last_hidden_state` (B, T, D) after the final norm, `pooler_output` (B, D) what
            `config.pooling_type` makes of it, in most families its cls token; on request `hidden_states`, one more than
            there are steps, before the final norm, with `depths`, the layer that each of them stands for, and
            `attentions`, one per step; with `exit_criterion` `num_steps`, (B,), the steps of each image.
        """
        encoded = self.encoder.run(
            self.embeddings(pixel_values),
            num_steps,
            block_repeats,
            pixel_values.shape[2:],
            exit_criterion=exit_criterion,
            exit_threshold=exit_threshold,
            **kwargs,
        )
        tokens = self.layernorm(encoded.last_hidden_state)
        return RaptorModelOutput(
            last_hidden_state=tokens,
            pooler_output=self.pooling(tokens),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            depths=encoded.depths,
            num_steps=encoded.num_steps,
        )


class RaptorBackbone(BackboneMixin, RaptorPreTrainedModel):
    """Raptor as a backbone: one feature map per stage, `"stem"` the embedding and `"stageL"` the state after step l.

    With another number of steps, or re-timed, stage l is the last state whose depth index does not exceed l; the last
    stage is thus always the final state.
    """

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = RaptorEmbeddings(config)
        self.encoder = RaptorEncoder(config)
        self.layernorm = _final_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> RaptorPatchEmbeddings:
        return self.embeddings.patch_embeddings

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_steps: int | None = None,
        block_repeats: tuple[int, ...] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`):
                Normalised images; H and W multiples of the patch size.
            num_steps (`int`, *optional*): as in [`RaptorModel.forward`].
            block_repeats (`tuple[int, ...]`, *optional*): as in [`RaptorModel.forward`].

        Returns:
            `BackboneOutput`: `feature_maps`, one per entry of `out_features`, (B, D, H / patch, W / patch), or
            (B, T, D) with `reshape_hidden_states=False`.
        """
        kwargs["output_hidden_states"] = True
        encoded = self.encoder.run(
            self.embeddings(pixel_values), num_steps, block_repeats, pixel_values.shape[2:], **kwargs
        )
        plan = self.config.step_plan(num_steps, block_repeats)
        height, width = (
            pixels // patch
            for pixels, patch in zip(pixel_values.shape[2:], as_pair(self.config.patch_size), strict=True)
        )
        feature_maps = []
        for stage in self.out_features:
            layer = self.stage_names.index(stage)
            tokens = encoded.hidden_states[sum(depth <= layer for _, depth in plan)]
            if self.config.apply_layernorm:
                tokens = self.layernorm(tokens)
            if self.config.reshape_hidden_states:
                patches = tokens[:, self.config.num_prefix_tokens :]
                tokens = patches.transpose(1, 2).reshape(patches.shape[0], -1, height, width).contiguous()
            feature_maps.append(tokens)
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


class RaptorForImageClassification(RaptorPreTrainedModel):
    """A linear layer on [cls, mean patch] after the final LayerNorm, DINOv2's classification head.

    Without a cls token it is on the mean patch alone, and on what is pooled where `config.classifier_input` says so.
    """

    _head_fields = ("id2label",)

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.raptor = RaptorModel(config)
        reads_both = config.has_cls and config.classifier_input == "tokens"
        width = (reads_both + 1) * config.hidden_size
        self.classifier = _linear(width, config.num_labels, "head") if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_steps: int | None = None,
        block_repeats: tuple[int, ...] | None = None,
        exit_criterion: str | None = None,
        exit_threshold: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RaptorImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`):
                Normalised images; H and W multiples of the patch size.
            labels (`torch.LongTensor` of shape `(B,)`, *optional*):
                Class indices; with them the output has a cross-entropy `loss` (mean squared error for one label).
            num_steps (`int`, *optional*): as in [`RaptorModel.forward`].
            block_repeats (`tuple[int, ...]`, *optional*): as in [`RaptorModel.forward`].
            exit_criterion (`str`, *optional*): as in [`RaptorModel.forward`].
            exit_threshold (`float`, *optional*): as in [`RaptorModel.forward`].

        Returns:
            `RaptorImageClassifierOutput`: `logits` (B, num_labels).
        """
        outputs = self.raptor(
            pixel_values,
            num_steps=num_steps,
            block_repeats=block_repeats,
            exit_criterion=exit_criterion,
            exit_threshold=exit_threshold,
            classify=self.classify if exit_criterion is not None and self.num_labels > 1 else None,
            return_dict=True,
            **kwargs,
        )
        head = self.predict(self.features(outputs.last_hidden_state), labels=labels, **kwargs)
        return RaptorImageClassifierOutput(
            loss=head.loss,
            logits=head.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            depths=outputs.depths,
            num_steps=outputs.num_steps,
        )

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        What the head reads: [cls, mean patch], (B, 2 D), without cls the mean patch, (B, D), of the tokens after the
        final LayerNorm, (B, T, D); or what is pooled from them, (B, D).
        """
        if self.config.classifier_input == "pooled":
            return self.raptor.pooling(tokens)
        mean = tokens[:, self.config.num_prefix_tokens :].mean(dim=1)
        return torch.cat((tokens[:, 0], mean), dim=1) if self.config.has_cls else mean

    def classify(self, state: torch.Tensor) -> torch.Tensor:
        """Logits, (B, num_labels), of tokens after any step, (B, T, D), before the final LayerNorm."""
        return self.classifier(self.features(self.raptor.layernorm(state)))

    def predict(
        self,
        features: torch.Tensor,
        image_size: tuple[int, int] | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """The head alone, on stored `features`; `image_size` is for the dense heads."""
        logits = self.classifier(features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)


class RaptorForSemanticSegmentation(RaptorPreTrainedModel):
    """A linear layer on the patches after the final LayerNorm, its logits bilinearly upsampled to the image."""

    _head_fields = ("num_segmentation_labels", "segmentation_id2label", "id2label")

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__(config.for_segmentation())
        self.raptor = RaptorModel(self.config)
        self.classifier = _linear(config.hidden_size, self.config.num_segmentation_labels, "head")
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_steps: int | None = None,
        block_repeats: tuple[int, ...] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RaptorSemanticSegmenterOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`):
                Normalised images; H and W multiples of the patch size.
            labels (`torch.LongTensor` of shape `(B, H, W)`, *optional*):
                Class of every pixel; `segmentation_ignore_index` is left out of the cross-entropy `loss`, which is zero
                where no other label is.
            num_steps (`int`, *optional*): as in [`RaptorModel.forward`].
            block_repeats (`tuple[int, ...]`, *optional*): as in [`RaptorModel.forward`].

        Returns:
            `RaptorSemanticSegmenterOutput`: `logits` (B, num_segmentation_labels, H, W).
        """
        outputs = self.raptor(
            pixel_values, num_steps=num_steps, block_repeats=block_repeats, return_dict=True, **kwargs
        )
        head = self.predict(self.features(outputs.last_hidden_state), pixel_values.shape[2:], labels)
        return RaptorSemanticSegmenterOutput(
            loss=head.loss,
            logits=head.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            depths=outputs.depths,
            num_steps=outputs.num_steps,
        )

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the head reads: the patches, (B, P, D), of the tokens after the final LayerNorm, (B, T, D)."""
        return tokens[:, self.config.num_prefix_tokens :]

    def predict(
        self, features: torch.Tensor, image_size: tuple[int, int], labels: torch.Tensor | None = None
    ) -> SemanticSegmenterOutput:
        """The head alone, on stored `features` of images of (height, width) pixels; logits are of the labels' size."""
        grid = _patch_grid(self.classifier(features), image_size, self.config)
        size = image_size if labels is None else labels.shape[1:]
        logits = nn.functional.interpolate(grid, size=size, mode="bilinear", align_corners=False)
        loss = None
        if labels is not None:
            ignore_index = self.config.segmentation_ignore_index
            total = nn.functional.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
            # a batch without a pixel that counts has a loss of zero
            loss = total / (labels != ignore_index).sum().clamp(min=1)
        return SemanticSegmenterOutput(loss=loss, logits=logits)


class RaptorForDepthEstimation(RaptorPreTrainedModel):
    """Depth in metres as the expectation over bins: a linear layer on [patch, cls], its logits upsampled four times.

    The mean patch stands for cls where there is none.
    """

    _head_fields = ("num_depth_bins",)
    upsampling = 4
    sigma_weight = 10.0
    sigma_lambda = 0.85

    def __init__(self, config: RaptorConfig) -> None:
        super().__init__(config)
        self.raptor = RaptorModel(config)
        self.bins = _linear(2 * config.hidden_size, config.num_depth_bins, "head")
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_steps: int | None = None,
        block_repeats: tuple[int, ...] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RaptorDepthEstimatorOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`):
                Normalised images; H and W multiples of the patch size.
            labels (`torch.Tensor` of shape `(B, H, W)`, *optional*):
                Depth in metres; pixels outside [`min_depth`, `max_depth`], or not finite, are left out of the `loss`:
                10 * scale-invariant log loss (lambda .85) + cross-entropy over the bins.
            num_steps (`int`, *optional*): as in [`RaptorModel.forward`].
            block_repeats (`tuple[int, ...]`, *optional*): as in [`RaptorModel.forward`].

        Returns:
            `RaptorDepthEstimatorOutput`: `predicted_depth` in metres, (B, 4 * H / patch, 4 * W / patch).
        """
        outputs = self.raptor(
            pixel_values, num_steps=num_steps, block_repeats=block_repeats, return_dict=True, **kwargs
        )
        head = self.predict(self.features(outputs.last_hidden_state), pixel_values.shape[2:], labels)
        return RaptorDepthEstimatorOutput(
            loss=head.loss,
            predicted_depth=head.predicted_depth,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            depths=outputs.depths,
            num_steps=outputs.num_steps,
        )

    def features(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the head reads: cls and patches, (B, 1 + P, D), of the tokens after the final LayerNorm, (B, T, D)."""
        patches = tokens[:, self.config.num_prefix_tokens :]
        return torch.cat((_summary_token(tokens, self.config), patches), dim=1)

    def predict(
        self, features: torch.Tensor, image_size: tuple[int, int], labels: torch.Tensor | None = None
    ) -> DepthEstimatorOutput:
        """The head alone, on stored `features` of images of (height, width) pixels."""
        patches = features[:, 1:]
        tokens = torch.cat((patches, features[:, :1].expand_as(patches)), dim=-1)
        # a linear layer and a bilinear upsampling commute, and this order is 16 times cheaper
        grid = _patch_grid(self.bins(tokens), image_size, self.config)
        logits = nn.functional.interpolate(grid, scale_factor=self.upsampling, mode="bilinear", align_corners=False)
        centres = torch.linspace(
            self.config.min_depth, self.config.max_depth, self.config.num_depth_bins, device=logits.device
        )
        depth = torch.einsum("bnhw,n->bhw", logits.float().softmax(dim=1), centres)
        loss = None
        if labels is not None:
            loss = self._loss(logits.float(), depth, labels.float())
        return DepthEstimatorOutput(loss=loss, predicted_depth=depth.to(logits.dtype))

    def _loss(self, logits: torch.Tensor, depth: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        low, high = self.config.min_depth, self.config.max_depth
        depth = nn.functional.interpolate(depth[:, None], size=labels.shape[1:], mode="bilinear", align_corners=False)
        valid = (labels >= low) & (labels <= high)
        # masked by multiplication: the number of valid pixels must not become a shape
        gap = torch.where(valid, depth[:, 0].log() - torch.where(valid, labels, low).log(), 0)
        count = valid.sum().clamp(min=1)
        variance = gap.square().sum() / count - self.sigma_lambda * (gap.sum() / count).square()
        sigma = torch.sqrt(variance.clamp(min=1e-12))
        nearest = nn.functional.interpolate(labels[:, None], size=logits.shape[2:], mode="nearest")[:, 0]
        in_range = (nearest >= low) & (nearest <= high)
        bin_index = ((nearest.nan_to_num(low) - low) / (high - low) * (logits.shape[1] - 1)).round()
        target = torch.where(in_range, bin_index, -100).long()
        cross_entropy = nn.functional.cross_entropy(logits, target, reduction="sum") / in_range.sum().clamp(min=1)
        return self.sigma_weight * sigma + cross_entropy


def _summary_token(tokens: torch.Tensor, config: RaptorConfig) -> torch.Tensor:
    """The cls token of tokens (B, T, D), or their mean patch where there is none, (B, 1, D)."""
    return tokens[:, :1] if config.has_cls else tokens[:, config.num_prefix_tokens :].mean(dim=1, keepdim=True)


def _patch_grid(values: torch.Tensor, image_size: tuple[int, int], config: RaptorConfig) -> torch.Tensor:
    """Values of the patches, (B, P, N), as maps, (B, N, H / patch, W / patch)."""
    patch_height, patch_width = as_pair(config.patch_size)
    size = image_size[0] // patch_height, image_size[1] // patch_width
    return values.transpose(1, 2).reshape(values.shape[0], values.shape[2], *size)


__all__ = [
    "RaptorPreTrainedModel",
    "RaptorModel",
    "RaptorBackbone",
    "RaptorForImageClassification",
    "RaptorForSemanticSegmentation",
    "RaptorForDepthEstimation",
]
