"""Loads a teacher, a Vision Transformer, and gives its trajectory and the parts of it that a student copies.

    teacher = load_teacher("facebook/dinov2-with-registers-base", device="cuda")
    states = teacher.trajectory(pixel_values)          # (B, L + 1, T, D)
    teacher.logits(states[:, -1])                      # (B, num_labels), if the checkpoint has a classifier
    teacher.run_layers(states[:, 3], [4, 5, 5])        # on from any state, by any layers, (B, 4, T, D)
    teacher.block_state_dict(7)                        # layer 7, as the weights of a RaptorBlock

`raptor_hf.families` says which models are supported, and where they keep their parts.
"""

import copy
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from raptor_settings.resources import find_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from .configuration_raptor import FAMILY_FIELDS, as_pair, teacher_fields
from .families import (
    FAMILIES,
    check_family,
    classifier_to_raptor,
    count_parameters,
    describe_timm,
    embeddings_to_raptor,
    find_backbone,
    find_classifier,
    has_weights,
    is_unused,
    layer_to_raptor,
    pooling_to_raptor,
    token_layout,
    vision_config,
)
from .tokens import TokenLayout


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
    """Loads a teacher, with its classifier if the checkpoint has one; of CLIP and SigLIP, the vision tower alone.

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
    source = find_model(name_or_path)
    config = AutoConfig.from_pretrained(source, revision=revision)
    check_family(config, str(name_or_path))
    # DeiT's with two heads ends in ForImageClassificationWithTeacher
    has_classifier = any("ForImageClassification" in name for name in config.architectures or ())
    has_classifier |= config.model_type == "timm_wrapper" and config.num_labels > 0
    model_config = config if has_classifier else vision_config(config)
    auto_class = AutoModelForImageClassification if has_classifier else AutoModel
    model_class = FAMILIES[model_config.model_type].model_class if not has_classifier else None
    if model_class is not None:
        # no Auto class knows the vision tower: it is loaded as it was saved, alone or with the text tower
        auto_class = getattr(transformers, model_class) if model_config is config else AutoModel
        model_config = config
    options = {"attn_implementation": attn_implementation, "variant": variant}
    options = {name: value for name, value in options.items() if value is not None}
    model, info = auto_class.from_pretrained(
        source, config=model_config, revision=revision, dtype=dtype, output_loading_info=True, **options
    )
    # transformers fills what is missing with random numbers
    family = FAMILIES[vision_config(config).model_type]
    missing = sorted(name for name in info["missing_keys"] if not is_unused(name, family))
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

    It takes the model over: its parameters no longer require gradients, it stays in eval mode, and MAE no longer masks.

    Args:
        model: with or without a head; of CLIP or SigLIP with or without the text tower, which is left out.
        name: where it is from; None takes what the configuration says.
        revision: commit it is from, if known.
        layers: those whose states make up the trajectory, ascending, in 1 .. L; None takes all. With some of them it is
            the teacher of a shallower model, one layer of which stands for all up to the next of these.

    Attributes:
        model: the model without a head, as `find_backbone` finds it.
        layers: the model's layers that are layers of this teacher.
        classifier: linear layer to num_labels, on one of the `heads` of its family: [cls, mean patch], 2 D wide, in
            DINOv2 and students; cls in ViT; mean patch in CLIP and SigLIP. None if there is none.
        family: the `model_type` of `model`.

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
        check_family(model.config, type(model).__name__)
        self.name = model.config.name_or_path if name is None else name
        self.revision = revision
        self.model = find_backbone(model)
        self.family = self.model.config.model_type
        if self.family == "timm_wrapper":
            describe_timm(self.model)
        depth = self.model.config.num_hidden_layers
        self.layers = tuple(range(1, depth + 1) if layers is None else layers)
        if not self.layers or list(self.layers) != sorted({*self.layers} & {*range(1, depth + 1)}):
            raise ValueError(
                f"layers is {self.layers}; it must be layers of the model in 1..{depth}, ascending, each once"
            )
        own = self.model.config
        names = ("image_size", "pooling_type", *FAMILY_FIELDS)
        self.facts = {n: getattr(own, n) for n in names} if self.family == "raptor" else teacher_fields(own)
        self.classifier = find_classifier(model)
        if self.classifier is not None and self.model.config is not model.config:
            self.model.config.id2label, self.model.config.label2id = model.config.id2label, model.config.label2id
        if FAMILIES[self.family].can_mask:
            self.model.config.mask_ratio = 0.0
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
        return self.tokens.has_cls

    @property
    def num_registers(self) -> int:
        """R, register tokens between cls and patches; DeiT's distillation token counts as one."""
        return self.tokens.num_registers

    @property
    def tokens(self) -> TokenLayout:
        """Which tokens of a state are cls, registers, patches."""
        return token_layout(self.model.config)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: cls and registers."""
        return self.tokens.num_prefix_tokens

    @property
    def patch_size(self) -> int | tuple[int, int]:
        """Side of a patch in pixels, or (height, width), as configured."""
        return self.config.patch_size

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side in pixels of the images that the position embeddings are for, or (height, width), as configured."""
        return self.facts["image_size"]

    @property
    def num_parameters(self) -> int:
        """Parameters without heads, as `count_parameters` counts them."""
        return count_parameters(self.model)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Runs the model's own forward pass, with all patches and for images of any size.

        Args:
            pixel_values: normalised images, (B, C, H, W), on the model's device.

        Returns:
            The model's own output.
        """
        arguments = self._image_arguments(pixel_values)
        if FAMILIES[self.family].takes_patches:
            shape = pixel_values.shape[0], self.num_patches(*pixel_values.shape[-2:])
            arguments["pixel_attention_mask"] = torch.ones(shape, dtype=torch.long, device=pixel_values.device)
        return self.model(self._images(pixel_values), **arguments, **kwargs)

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
            state = first_output(output)
            if states is None:
                # layer by layer, as they are written and read
                states = state.new_empty(self.num_layers + 1, *state.shape).transpose(0, 1)
            if num_calls in places:
                states[:, places[num_calls]] = state
            num_calls += 1

        family = FAMILIES[self.family]
        before = self.model.get_submodule(family.pre_norm or family.embeddings)
        modules = [before, *self.model.get_submodule(family.layers)]
        handles = [module.register_forward_hook(keep) for module in modules]
        try:
            self(pixel_values)
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
        family = FAMILIES[self.family]
        if self.family == "timm_wrapper":
            # positions are added by the model itself, in no module
            return self.trajectory(pixel_values)[:, 0]
        embeddings = self.model.get_submodule(family.embeddings)
        # MAE's give its mask, too
        images = self._images(pixel_values)
        if family.conditioner is not None:
            images = self.model.get_submodule(family.conditioner)(images)
        state = first_output(embeddings(images, **self._image_arguments(pixel_values)))
        return state if family.pre_norm is None else self.model.get_submodule(family.pre_norm)(state)

    @torch.no_grad()
    def run_layers(self, state: Tensor, layers: Sequence[int], image_size: tuple[int, int] | None = None) -> Tensor:
        """Applies layers to a state in any order, each any number of times.

        All layers in order, after `embed`, give the trajectory. A student's layer l is its step l, with the block and
        the depth index that this step has.

        Args:
            state: tokens to begin with, (B, T, D), before the final norm.
            layers: 1 .. L, in the order of application.
            image_size: height and width in pixels of the images that the state is of, which rotary positions, those of
                DINOv3, depend on; None stands for a square of patches. Most families do not need it.

        Returns:
            The given state and that after each layer, (B, len(layers) + 1, T, D).

        Raises:
            IndexError: if there is no such layer.
            ValueError: if rotary positions need an `image_size`, or the one given has another number of patches.
        """
        for layer in layers:
            if not 1 <= layer <= self.num_layers:
                raise IndexError(f"layers is {list(layers)}; each must be in 1..{self.num_layers}, and {layer} is not")
        calls = self._layer_calls(state, image_size)
        states = [state]
        for layer in layers:
            for own in self.span(layer):
                state = first_output(calls[own - 1](state))
            states.append(state)
        return torch.stack(states, 1)

    def _images(self, pixel_values: Tensor) -> Tensor:
        """The images as the model's embeddings take them."""
        family, pixel_values = FAMILIES[self.family], pixel_values.to(self.model.dtype)
        if not family.takes_patches:
            return pixel_values
        height, width = as_pair(self.patch_size)
        patches = pixel_values.unfold(2, height, height).unfold(3, width, width)  # (B, C, rows, columns, height, width)
        return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def num_patches(self, height: int, width: int) -> int:
        """Number of patches, P, of an image of so many pixels."""
        patch_height, patch_width = as_pair(self.patch_size)
        return (height // patch_height) * (width // patch_width)

    def _image_arguments(self, pixel_values: Tensor) -> dict[str, Any]:
        """What the model, and its embeddings alone, are given beside the images."""
        family, arguments = FAMILIES[self.family], {}
        size = tuple(pixel_values.shape[-2:])
        if family.must_interpolate and size != as_pair(self.image_size):
            arguments["interpolate_pos_encoding"] = True
        if family.can_mask:
            noise = torch.arange(self.num_patches(*size), device=pixel_values.device)
            arguments["noise"] = noise.expand(len(pixel_values), -1)  # it sorts the patches by this
        if family.takes_patches:
            grid = [pixels // patch for pixels, patch in zip(size, as_pair(self.patch_size), strict=True)]
            arguments["spatial_shapes"] = torch.tensor([grid] * len(pixel_values), device=pixel_values.device)
        return arguments

    def _layer_calls(self, state: Tensor, image_size: tuple[int, int] | None) -> list[Callable[[Tensor], Any]]:
        """What applies the model's layer l to a state such as this one, at index l - 1."""
        if self.family != "raptor":
            family = FAMILIES[self.family]
            layers = self.model.get_submodule(family.layers)
            if not family.layers_see_shape:
                return [functools.partial(layer, **family.layer_arguments) for layer in layers]
            args, kwargs = self._seen_by_layers(state, image_size)
            return [lambda state, layer=layer: layer(state, *args, **kwargs) for layer in layers]
        encoder = self.model.encoder
        positions = None if encoder.rotary is None else encoder.positions(state, self._size_of(state, image_size))
        steps = zip(encoder.plan, encoder.modulations(encoder.plan), strict=True)
        return [
            lambda state, block=encoder.blocks[block], modulation=modulation, step=step: block(
                state, *modulation, positions=positions, step=step
            )
            for step, ((block, _), modulation) in enumerate(steps, start=1)
        ]

    def _seen_by_layers(
        self, state: Tensor, image_size: tuple[int, int] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model gives its layers beside a state of images of this size: rotary positions, or a bias."""
        # read on a blank image: it depends on the shape alone
        blank = torch.zeros((), dtype=self.model.dtype, device=state.device)
        blank = blank.expand(1, self.model.config.num_channels, *self._size_of(state, image_size))
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first = self.model.get_submodule(FAMILIES[self.family].layers)[0]
        handle = first.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[1:], kwargs)), with_kwargs=True
        )
        try:
            self(blank)
        finally:
            handle.remove()
        return seen[0]

    def _size_of(self, state: Tensor, image_size: tuple[int, int] | None) -> tuple[int, int]:
        """Height and width of the images that a state is of; None stands for a square of patches."""
        patch_height, patch_width = as_pair(self.patch_size)
        num_patches = state.shape[1] - self.num_prefix_tokens
        side = math.isqrt(num_patches)
        height, width = (side * patch_height, side * patch_width) if image_size is None else image_size
        if self.num_patches(height, width) != num_patches:
            raise ValueError(
                f"image_size={image_size} does not fit a state of {num_patches} patches of {patch_height} x "
                f"{patch_width} pixels; give the (height, width) of the images, None if they are square"
            )
        return height, width

    def final_norm(self, state: Tensor) -> Tensor:
        """Normalises a state, (..., T, D), as the model does after its last layer; gradients reach the state.

        A state of another precision, a student's for example, is first brought to the model's.
        """
        path = FAMILIES[self.family].final_norm
        if path is None or not has_weights(self.model, path):
            return state.to(self.model.dtype)
        norm = self.model.get_submodule(path)
        return norm(state.to(norm.weight.dtype))

    def logits(self, last_state: Tensor) -> Tensor | None:
        """Classifies by the teacher's head, see `classifier`.

        Args:
            last_state: a_L or a student's reconstruction of it, (B, T, D), before the final norm; gradients reach it.

        Returns:
            (B, num_labels), or None without a classifier.
        """
        return None if self.classifier is None else self.classifier(self.features(last_state))

    def features(self, last_state: Tensor) -> Tensor:
        """Returns what the teacher's classifier reads, or where there is none, what a probe of its family reads.

        Args:
            last_state: as in `logits`.

        Returns:
            Groups of tokens side by side, the patches as their mean: (B, 2 D) for cls and patches.
        """
        is_normed = self.classifier is None or FAMILIES[self.family].head_is_normed
        state = self.final_norm(last_state) if is_normed else last_state.to(self.model.dtype)
        groups = {name: state[:, tokens] for name, tokens in self.tokens.slices.items()}
        groups["patches"] = groups["patches"].mean(1)
        features = torch.cat([groups[name].flatten(1) for name in self.head], 1)
        norm = FAMILIES[self.family].pooled_norm
        if self.facts["classifier_input"] == "pooled" and norm is not None and has_weights(self.model, norm):
            features = self.model.get_submodule(norm)(features)
        return features

    @property
    def head(self) -> tuple[str, ...]:
        """The groups of tokens that the classifier is on, or that a probe would be on."""
        heads = [head for head in FAMILIES[self.family].heads if {*head} <= {*self.tokens.slices}]
        if self.facts["classifier_input"] == "pooled":
            return ("cls",) if self.facts["pooling_type"] == "cls" else ("patches",)
        if self.classifier is None:
            return heads[0]
        width = self.classifier.in_features
        return next(head for head in heads if len(head) * self.hidden_size == width)

    def embeddings_state_dict(self) -> dict[str, Tensor]:
        """The embeddings under the names of RaptorEmbeddings, without the mask token, which no student has.

        Like all state dicts of the teacher it may share memory with the model: load it, do not change it.
        """
        return embeddings_to_raptor(self.model)

    def layernorm_state_dict(self) -> dict[str, Tensor]:
        """The final norm, or that of what is pooled, under the names of `nn.LayerNorm`; empty without either."""
        family = FAMILIES[self.family]
        places = (path for path in (family.final_norm, family.pooled_norm) if path and has_weights(self.model, path))
        path = next(places, None)
        return {} if path is None else self.model.get_submodule(path).state_dict()

    def rotary_state_dict(self) -> dict[str, Tensor]:
        """The parameters of rotary positions, under the names of RaptorRotaryPositions."""
        path = FAMILIES[self.family].rotary
        if self.family == "raptor":
            return self.model.encoder.rotary.state_dict()
        return {} if path is None else {"cls_angles": self.model.get_parameter(path)}

    @functools.cached_property
    def pooling(self) -> tuple[str, dict[str, Tensor]] | None:
        """The kind and the weights of a pooling by attention, those of RaptorPooling; None without one."""
        return pooling_to_raptor(self.model)

    def head_fields(self) -> dict[str, Any]:
        """Fields of `RaptorConfig` that depend on the heads of this model, and not on its configuration alone."""
        if self.classifier is not None:
            # a classifier on tokens without the norm: that is then the pooled vector's alone
            return {} if FAMILIES[self.family].head_is_normed else {"final_norm": "pooled"}
        if self.pooling is None:
            # a pooled norm is a part of the pooler, which a model without heads may lack
            has_norm = self.facts["final_norm"] != "pooled" or self.layernorm_state_dict()
            return {} if has_norm else {"final_norm": "none"}
        kind, weights = self.pooling
        width = {"pooling_intermediate_size": len(weights["fc1.bias"])} if "fc1.bias" in weights else {}
        return {"pooling_type": kind} | width

    def classifier_state_dict(self) -> dict[str, Tensor] | None:
        """The classifier under the names of RaptorForImageClassification's, as one on what that reads.

        Returns:
            weight, (num_labels, 2 D), zero for what the teacher's does not read, or without cls (num_labels, D); and
            bias, (num_labels,). None without a classifier, and if a student can have none like it: that of a distilled
            DeiT is also on the distillation token.
        """
        if self.classifier is None:
            return None
        reads_both = self.has_cls and self.facts["classifier_input"] == "tokens"
        return classifier_to_raptor(self.classifier, self.head, reads_both)

    def span(self, layer: int) -> range:
        """The model's layers that one layer of this teacher, 1 .. L, stands for: itself, where it has them all."""
        return range((0, *self.layers)[layer - 1] + 1, self.layers[layer - 1] + 1)

    def block_state_dict(self, layer: int) -> dict[str, Tensor]:
        """One layer under the names of RaptorBlock: QKV in one matrix, as are SwiGLU's halves, the gated one first.

        Where the family has no LayerScale, it is one.

        Args:
            layer: of the model, 1 .. L, as `span` numbers them.

        Raises:
            IndexError: if there is no such layer.
            ValueError: if the family's layers are none of which a block can be made.
        """
        depth = self.model.config.num_hidden_layers
        if not 1 <= layer <= depth:
            raise IndexError(f"layer is {layer}; it must be in 1..{depth}")
        family = FAMILIES[self.family]
        if not family.block_parts:
            raise ValueError(
                f"the layers of a {self.family!r} model cannot be copied into a RaptorBlock; take a model of one of "
                + ", ".join(name for name, other in FAMILIES.items() if other.block_parts)
            )
        return layer_to_raptor(self.model.get_submodule(family.layers)[layer - 1], family.block_parts)


def untrained(teacher: Teacher, seed: int = 0, with_classifier: bool = False) -> Teacher:
    """Makes a model of a teacher's shape with weights as before training, to compare the teacher with.

    Args:
        teacher: whose configuration, precision and device are used.
        seed: of the weights.
        with_classifier: gives it a classifier if the teacher has one, on the same tokens.
    """
    weight = next(teacher.model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = type(teacher.model)(copy.deepcopy(teacher.model.config)).to(weight)
        fresh = Teacher(model, name=f"untrained {teacher.name}", layers=teacher.layers)
        if with_classifier and teacher.classifier is not None:
            # not the family's class with a head: that of CLIP takes text, too, and that of DeiT may have two heads
            head = nn.Linear(teacher.classifier.in_features, teacher.classifier.out_features)
            nn.init.trunc_normal_(head.weight, std=0.02)  # as nearly all families do, not all by their configuration
            nn.init.zeros_(head.bias)
            fresh.classifier = head.to(weight).requires_grad_(False).eval()
    return fresh


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


def first_output(output: Any) -> Tensor:
    """The tokens in what a layer or an embedding returns: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output
