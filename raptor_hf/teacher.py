"""Teachers: a Vision Transformer from the Hub or a folder, its trajectory, and the parts of it that a student copies.

    teacher = load_teacher("facebook/dinov2-with-registers-base", device="cuda")
    states = teacher.trajectory(pixel_values)          # (B, L + 1, T, D)
    teacher.logits(states[:, -1])                      # (B, num_labels), if the checkpoint has a classifier
    teacher.run_layers(states[:, 3], [4, 5, 5])        # on from any state, by any layers, (B, 4, T, D)
    teacher.block_state_dict(7)                        # layer 7, as the weights of a RaptorBlock

Nothing else in the package knows how a foreign model calls its parts. A further family is one more entry of `FAMILIES`.
"""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

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


@dataclass(frozen=True)
class Family:
    """Where the models of one `model_type` keep their parts, as paths of submodules of the model without a head.

    Args:
        layers: a list of modules; whenever one is called, it returns the next state.
        embeddings: the module that returns states[0].
        final_norm: the norm after the last layer.
        has_cls: whether the first token is a cls token; register tokens follow it, then the patches.
        block_parts: how a layer maps to a RaptorBlock, as `DINOV2_BLOCK`; empty if it cannot be one.
    """

    layers: str
    embeddings: str = "embeddings"
    final_norm: str = "layernorm"
    has_cls: bool = True
    block_parts: Mapping[str, list[tuple[str, ...]]] = field(default_factory=dict)


FAMILIES = {
    "dinov2": Family(layers="encoder.layer", block_parts=DINOV2_BLOCK),
    "dinov2_with_registers": Family(layers="encoder.layer", block_parts=DINOV2_BLOCK),
    # students, so that whatever analyses a teacher analyses them too
    "raptor": Family(layers="encoder.blocks"),
}


def load_teacher(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    layers: Sequence[int] | None = None,
    variant: str | None = None,
) -> "Teacher":
    """Loads a teacher, with its classifier if the checkpoint has one.

    Args:
        name_or_path: repository on the Hub, or a folder.
        revision: branch, tag or commit of the repository.
        dtype: precision of the weights and of the trajectory.
        device: where the model goes; None leaves it on the CPU.
        attn_implementation: as in `from_pretrained`; None is the model's default.
        layers: as in `Teacher`.
        variant: head of a student's folder to load with it; None takes the student's own, if it has one still.

    Returns:
        The frozen teacher, in eval mode.

    Raises:
        FileNotFoundError: if `name_or_path` is a path and nothing is there.
        OSError: if the Hub does not have it, or it holds no model.
        ValueError: if the model is of no supported family, has no such layers, or its weights are incomplete or not
            finite.
    """
    _check_exists(name_or_path)
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    _check_family(config, str(name_or_path))
    has_classifier = any(name.endswith("ForImageClassification") for name in config.architectures or ())
    auto_class = AutoModelForImageClassification if has_classifier else AutoModel
    options = {"attn_implementation": attn_implementation, "variant": variant}
    options = {name: value for name, value in options.items() if value is not None}
    model, info = auto_class.from_pretrained(
        name_or_path, config=config, revision=revision, dtype=dtype, output_loading_info=True, **options
    )
    # transformers fills what is missing with random numbers
    missing = sorted(name for name in info["missing_keys"] if not name.endswith("mask_token"))
    if config.model_type == "raptor" and missing == ["classifier.bias", "classifier.weight"]:
        model, missing = model.base_model, []  # its head has become one of several variants
    if missing:
        raise ValueError(f"{name_or_path} lacks {len(missing)} of the weights of {type(model).__name__}: {missing[:5]}")
    not_finite = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if not_finite:
        raise ValueError(f"{name_or_path} has NaN or infinite weights in {len(not_finite)} tensors: {not_finite[:5]}")
    revision = getattr(config, "_commit_hash", None) or revision
    return Teacher(model.to(device), name=str(name_or_path), revision=revision, layers=layers)


class Teacher(nn.Module):
    """A frozen model of a supported family, seen as the trajectory of its states.

    It takes the model over: its parameters no longer require gradients, and it stays in eval mode.

    Args:
        model: with or without a head.
        name: where it is from; None takes what the configuration says.
        revision: commit it is from, if known.
        layers: those whose states make up the trajectory, ascending, in 1 .. L; None takes all. With some of them it is
            the teacher of a shallower model, one layer of which stands for all up to the next of these.

    Attributes:
        model: the model without a head.
        layers: the model's layers that are layers of this teacher.
        classifier: linear layer on [cls, mean patch] after the final norm, (2 D) to num_labels; None if there is none.
        family: its `model_type`.

    Raises:
        TypeError: if `model` is no transformers model.
        ValueError: if it is of no supported family, or has no such layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str | None = None,
        revision: str | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model is of type {type(model).__name__}; give a model, or load one with load_teacher")
        _check_family(model.config, type(model).__name__)
        self.name = model.config.name_or_path if name is None else name
        self.revision = revision
        self.family = model.config.model_type
        self.model = model.base_model
        depth = model.config.num_hidden_layers
        self.layers = tuple(range(1, depth + 1) if layers is None else layers)
        if not self.layers or list(self.layers) != sorted({*self.layers} & {*range(1, depth + 1)}):
            raise ValueError(f"layers={self.layers} must be layers of the model in 1..{depth}, ascending, each once")
        self.classifier = find_classifier(model)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode, also inside a model that is set to training."""
        return super().train(False)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, with the number of layers that this teacher has."""
        if len(self.layers) == self.model.config.num_hidden_layers:
            return self.model.config
        config = copy.deepcopy(self.model.config)
        config.num_hidden_layers = len(self.layers)
        return config

    @property
    def num_layers(self) -> int:
        """L, layers of a teacher, steps of a student."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.config.hidden_size

    @property
    def num_heads(self) -> int:
        """Attention heads per layer."""
        return self.config.num_attention_heads

    @property
    def has_cls(self) -> bool:
        """Whether the first token is a cls token."""
        return FAMILIES[self.family].has_cls

    @property
    def num_registers(self) -> int:
        """R, register tokens between cls and patches."""
        return getattr(self.config, "num_register_tokens", 0)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: cls and registers."""
        return self.has_cls + self.num_registers

    @property
    def patch_size(self) -> int | tuple[int, int]:
        """Side of a patch in pixels, or (height, width), as configured."""
        return self.config.patch_size

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side in pixels of the images that the position embeddings are for, or (height, width), as configured."""
        return self.config.image_size

    @property
    def num_parameters(self) -> int:
        """Parameters without heads, as `count_parameters` counts them."""
        return count_parameters(self.model)

    @torch.no_grad()
    def trajectory(self, pixel_values: Tensor) -> Tensor:
        """Runs the model's own forward pass and keeps every state.

        Without gradients, but not in inference mode: the states may enter a student's backward pass.

        Args:
            pixel_values: normalised images, (B, C, H, W), on the model's device.

        Returns:
            States a_0 .. a_L before the final norm, (B, L + 1, T, D), in the precision of the embeddings' output: the
            model's, or what the caller's autocast makes of it.
        """
        states, num_calls = None, 0
        places = {layer: place for place, layer in enumerate((0, *self.layers))}

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal states, num_calls
            state = output[0] if isinstance(output, tuple) else output
            if states is None:
                states = state.new_empty(state.shape[0], self.num_layers + 1, *state.shape[1:])
            if num_calls in places:
                states[:, places[num_calls]] = state
            num_calls += 1

        family = FAMILIES[self.family]
        modules = [self.model.get_submodule(family.embeddings), *self.model.get_submodule(family.layers)]
        handles = [module.register_forward_hook(keep) for module in modules]
        try:
            self.model(pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        return states

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        """Runs the embeddings alone.

        Args:
            pixel_values: normalised images, (B, C, H, W), on the model's device.

        Returns:
            a_0, (B, T, D), where `run_layers` begins.
        """
        return self.model.get_submodule(FAMILIES[self.family].embeddings)(pixel_values)

    @torch.no_grad()
    def run_layers(self, state: Tensor, layers: Sequence[int]) -> Tensor:
        """Applies layers to a state in any order, each any number of times.

        All layers in order, after `embed`, give the trajectory. A student's layer l is its step l, with the block and
        the depth index that this step has.

        Args:
            state: tokens to begin with, (B, T, D), before the final norm.
            layers: 1 .. L, in the order of application.

        Returns:
            The given state and that after each layer, (B, len(layers) + 1, T, D).

        Raises:
            IndexError: if there is no such layer.
        """
        for layer in layers:
            if not 1 <= layer <= self.num_layers:
                raise IndexError(f"layers={list(layers)} has {layer}, but every layer must be in 1..{self.num_layers}")
        calls = self._layer_calls()
        states = [state]
        for layer in layers:
            for own in self.span(layer):
                output = calls[own - 1](state)
                state = output[0] if isinstance(output, tuple) else output
            states.append(state)
        return torch.stack(states, 1)

    def _layer_calls(self) -> list[Callable[[Tensor], Any]]:
        """What applies the model's layer l, at index l - 1."""
        if self.family != "raptor":
            return list(self.model.get_submodule(FAMILIES[self.family].layers))
        encoder = self.model.encoder
        steps = zip(encoder.plan, encoder.modulations(encoder.plan), strict=True)
        return [
            lambda state, block=encoder.blocks[block], modulation=modulation: block(state, *modulation)
            for (block, _), modulation in steps
        ]

    def final_norm(self, state: Tensor) -> Tensor:
        """Normalises a state, (..., T, D), as the model does after its last layer; gradients reach the state.

        A state of another precision, a student's for example, is first brought to the model's.
        """
        norm = self.model.get_submodule(FAMILIES[self.family].final_norm)
        return norm(state.to(norm.weight.dtype))

    def logits(self, last_state: Tensor) -> Tensor | None:
        """Classifies by the teacher's head on [cls, mean patch] after the final norm; registers are left out.

        Args:
            last_state: a_L or a student's reconstruction of it, (B, T, D), before the final norm; gradients reach it.

        Returns:
            (B, num_labels), or None without a classifier.
        """
        if self.classifier is None:
            return None
        tokens = self.final_norm(last_state)
        return self.classifier(torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(1)], 1))

    def embeddings_state_dict(self) -> dict[str, Tensor]:
        """The embeddings under the names of RaptorEmbeddings, without the mask token, which no student has.

        Like all state dicts of the teacher it may share memory with the model: load it, do not change it.
        """
        weights = self.model.get_submodule(FAMILIES[self.family].embeddings).state_dict()
        # DINOv2 with 0 registers keeps an empty tensor for them
        return {name: tensor for name, tensor in weights.items() if name != "mask_token" and tensor.numel()}

    def layernorm_state_dict(self) -> dict[str, Tensor]:
        """The final norm under the names of `nn.LayerNorm`."""
        return self.model.get_submodule(FAMILIES[self.family].final_norm).state_dict()

    def classifier_state_dict(self) -> dict[str, Tensor] | None:
        """The classifier's weight (num_labels, 2 D) and bias (num_labels,), or None without one."""
        return None if self.classifier is None else self.classifier.state_dict()

    def span(self, layer: int) -> range:
        """The model's layers that one layer of this teacher, 1 .. L, stands for: itself, where it has them all."""
        return range((0, *self.layers)[layer - 1] + 1, self.layers[layer - 1] + 1)

    def block_state_dict(self, layer: int) -> dict[str, Tensor]:
        """One layer under the names of RaptorBlock: QKV in one matrix, as are SwiGLU's halves, the gated one first.

        Args:
            layer: of the model, 1 .. L, as `span` numbers them.

        Raises:
            IndexError: if there is no such layer.
            ValueError: if the family's layers are no DINOv2 layers.
        """
        depth = self.model.config.num_hidden_layers
        if not 1 <= layer <= depth:
            raise IndexError(f"layer={layer} must be in 1..{depth}")
        family = FAMILIES[self.family]
        if not family.block_parts:
            raise ValueError(f"the layers of a {self.family!r} model cannot be copied into a RaptorBlock")
        parts = _block_modules(self.model.get_submodule(family.layers)[layer - 1], family.block_parts)
        weights = {part: [module.state_dict() for module in modules] for part, modules in parts.items()}
        return {
            f"{part}.{name}": torch.cat([tensors[name] for tensors in stacked])
            for part, stacked in weights.items()
            for name in stacked[0]
        }


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
    """Builds a DINOv2 model from parts under Raptor's names: the inverse of `Teacher`'s state dicts.

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
        for part, modules in _block_modules(layer, family.block_parts).items():
            for index, module in enumerate(modules):
                names = module.state_dict().keys()
                module.load_state_dict({n: weights[f"{part}.{n}"].chunk(len(modules))[index] for n in names})
    model.base_model.get_submodule(family.final_norm).load_state_dict(layernorm)
    if classifier is not None:
        model.classifier.load_state_dict(classifier)
    return model


def find_classifier(model: PreTrainedModel) -> nn.Linear | None:
    """Returns the model's linear layer on [cls, mean patch], (2 D) to num_labels, or None if it has none."""
    classifier = getattr(model, "classifier", None)
    fits = isinstance(classifier, nn.Linear) and classifier.in_features == 2 * model.config.hidden_size
    return classifier if fits else None


def count_parameters(model: PreTrainedModel) -> int:
    """Counts the parameters of a model without its head: what embeddings, blocks and final norm use.

    Every block counts once however often it is applied. DINOv2's mask token, which only pre-training uses, is left out.
    """
    parameters = model.base_model.named_parameters()
    return sum(parameter.numel() for name, parameter in parameters if not name.endswith("mask_token"))


# with gradients: FlopCounterMode fails on views of parameters that are made without
@torch.enable_grad()
def macs(model: Callable[[Tensor], Any], pixel_values: Tensor) -> int:
    """Counts the multiply-accumulates of one forward pass on one image: matrix products, attention and convolutions.

    Args:
        model: a model, or anything that takes images.
        pixel_values: images, (B, C, H, W), of which the first is used.

    Raises:
        ValueError: if the model's attention runs in kernels that cannot be counted.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"model uses {attention!r} attention, which is not counted; load it with 'sdpa' or 'eager'")
    # the fused attention of CPUs is not counted either; written out, it is two matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixel_values[:1])
    return counter.get_total_flops() // 2


def _block_modules(layer: nn.Module, parts: Mapping[str, list[tuple[str, ...]]]) -> dict[str, list[nn.Module]]:
    modules = dict(layer.named_modules())
    found = {}
    for part, alternatives in parts.items():
        names = next((names for names in alternatives if all(name in modules for name in names)), None)
        if names is None:
            raise RuntimeError(f"{type(layer).__name__} has none of {alternatives}: unknown version of transformers")
        found[part] = [modules[name] for name in names]
    return found


def _check_exists(name_or_path: str | os.PathLike[str]) -> None:
    if Path(name_or_path).exists():
        return
    try:
        validate_repo_id(name_or_path)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"name_or_path={str(name_or_path)!r}: no such folder, and no repository on the Hub, owner/name"
        ) from error


def _check_family(config: PreTrainedConfig, source: str) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(f"{source} is a {config.model_type!r} model; supported are {', '.join(FAMILIES)}")
