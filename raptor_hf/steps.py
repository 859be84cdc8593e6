"""Addresses what a model computes at one step, even where one block serves many: record, patch, steer, ablate.

    with record(student, ["step.7.attention", "step.*.ffn"]) as seen:
        student(pixel_values)
    seen["step.7.attention"]                           # (B, T, D)
    with patch(student, {"step.7": lambda state: state.flip(0)}):
        student(pixel_values)                          # from step 8 on, each image has another's state
    with steer(student, "step.7", direction, tokens="patches"), ablate(student, "step.9.heads", heads=[0]):
        student(pixel_values)

A teacher has the same places, its layers being the steps, so that an experiment runs on both:

    step.7              the state after step 7, (B, T, D), before the final norm; step.0 is the output of the embeddings
    step.7.attention    what the attention of step 7 gives, (B, T, D), before LayerScale
    step.7.heads        its heads side by side, before the output projection, (B, T, width of all)
    step.7.ffn          what the FFN of step 7 gives, (B, T, D), before LayerScale
    step.7.neurons      its activations, before the last linear layer, (B, T, width of the FFN)
    step.*, step.*.ffn  the same at every step, without the embeddings

Heads and neurons of a student with `unit_gains` are those after the gains of their step.
All of it is done by hooks, which are gone when the context ends. An edit returns a new tensor. A backward pass that
computes activations again, as with gradient checkpointing, belongs inside of the context.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import FAMILIES, block_modules, check_family, find_backbone, token_layout
from .teacher import Teacher, first_output

# what of a step -> the part of a RaptorBlock that computes it, and whether it is the part's input or output
_PARTS = {
    "attention": ("attention.proj", "output"),
    "heads": ("attention.proj", "input"),
    "ffn": ("ffn.fc2", "output"),
    "neurons": ("ffn.fc2", "input"),
}
_PLACE = re.compile(rf"step\.(\*|\d+)(?:\.({'|'.join(_PARTS)}))?")

Edit = Callable[[Tensor], Tensor] | Tensor
Tokens = str | slice | Sequence[int] | None


class Recording(dict[str, Tensor]):
    """What was recorded in the last forward pass, by place: `seen["step.7.ffn"]`."""

    def __missing__(self, place: str) -> Tensor:
        raise KeyError(f"{place} was not recorded; there are {', '.join(self) or 'none: run the model first'}")


@contextlib.contextmanager
def record(model: PreTrainedModel | Teacher, at: str | Sequence[str]) -> Iterator[Recording]:
    """Records values, as they are after all edits, with their gradients' graph unless the model runs without.

    Args:
        model: student or teacher, with or without a head.
        at: places, as above.

    Yields:
        The values by place; "step.*.ffn" is recorded as "step.1.ffn" and so on. A further forward pass replaces them.

    Raises:
        ValueError: if there is no such place, or, at the end, if the model ran and never came there.
    """
    seen = Recording()

    def keep(place: str, value: Tensor) -> None:
        # activations that a backward pass computes again are not those of the forward pass
        if torch._C._current_graph_task_id() == -1:
            seen[place] = value

    with _visit(model, dict.fromkeys([at] if isinstance(at, str) else at, keep), edits=False, restart=seen.clear):
        yield seen


@contextlib.contextmanager
def patch(model: PreTrainedModel | Teacher, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replaces values while a model runs; whatever is computed from them sees the edit.

    Several edits of a place are made in their order, that of the innermost context last.

    Args:
        model: student or teacher, with or without a head.
        edits: for each place a function of the value there, which returns the new one, or the new one itself. It may
            broadcast; it is brought to the precision and device of the model.

    Raises:
        ValueError: if there is no such place, an edit has another shape, or, at the end, if the model ran and never
            came there.
    """

    def edited(edit: Edit) -> Callable[[str, Tensor], Tensor]:
        def act(place: str, value: Tensor) -> Tensor:
            new = torch.as_tensor(edit(value) if callable(edit) else edit).to(value)
            try:
                return new.expand_as(value)
            except RuntimeError:
                raise ValueError(
                    f"the edit of {place} has shape {tuple(new.shape)}; it must be {tuple(value.shape)}"
                ) from None

        return act

    with _visit(model, {place: edited(edit) for place, edit in edits.items()}, edits=True):
        yield


def steer(
    model: PreTrainedModel | Teacher, at: str, direction: Tensor, tokens: Tokens = None, strength: float = 1.0
) -> contextlib.AbstractContextManager[None]:
    """Adds a direction to tokens while a model runs.

    Args:
        model: student or teacher, with or without a head.
        at: a place.
        direction: (D,), or of any shape that can be added to (B, T, D).
        tokens: a group, "cls", "registers" or "patches"; indices or a slice; None takes all.
        strength: what the direction is multiplied by.

    Raises:
        ValueError: as `patch`, and if the model has no such tokens.
    """
    chosen = _token_index(model, tokens)

    def add(value: Tensor) -> Tensor:
        return torch.where(_rows(value, chosen), value + strength * direction.to(value), value)

    return patch(model, {at: add})


def ablate(
    model: PreTrainedModel | Teacher,
    at: str,
    tokens: Tokens = None,
    heads: Sequence[int] | None = None,
    to: float | Tensor = 0.0,
) -> contextlib.AbstractContextManager[None]:
    """Replaces tokens, or heads of them, by a constant while a model runs.

    Args:
        model: student or teacher, with or without a head.
        at: a place.
        tokens: a group, "cls", "registers" or "patches"; indices or a slice; None takes all.
        heads: which heads, counted from 0, at a place that ends in ".heads"; None takes all.
        to: the constant, or what broadcasts to the value, such as its mean over images.

    Raises:
        ValueError: as `patch`, if the model has no such tokens or heads, or the place no heads.
    """
    chosen, num_heads = _token_index(model, tokens), _backbone(model).config.num_attention_heads
    if heads is not None and not (at.endswith(".heads") and {*heads} <= {*range(num_heads)}):
        raise ValueError(f"heads is {list(heads)} at {at!r}; they must be in 0..{num_heads - 1}, at 'step.L.heads'")

    def replace(value: Tensor) -> Tensor:
        mask = _rows(value, chosen)
        if heads is not None:
            owner = torch.arange(value.shape[-1], device=value.device) // (value.shape[-1] // num_heads)
            mask = mask & torch.isin(owner, torch.tensor(list(heads), device=value.device))
        return torch.where(mask, torch.as_tensor(to).to(value), value)

    return patch(model, {at: replace})


class _EditingHook:
    """A hook that edits: a class of its own, so that later ones find those that were there before."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _StepOfCall:
    """Which step a block is at, for the hooks inside of it.

    The number travels with the block's call as one more keyword, down to its attention, which comes first and takes it
    out. So it is also there when checkpointing computes the block again, which calls none of the block's own hooks.

    Args:
        step: until a block tells another, or for good, in layers that serve one step.
    """

    def __init__(self, step: int | None) -> None:
        self.step = step
        self.key = f"step_{id(self)}"  # of its own: contexts nest

    def tell(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {self.key: kwargs.get("step")}

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.step = kwargs.get(self.key)
        return args, {name: value for name, value in kwargs.items() if name != self.key}


@contextlib.contextmanager
def _visit(
    model: PreTrainedModel | Teacher,
    actions: Mapping[str, Callable[[str, Tensor], Tensor | None]],
    edits: bool,
    restart: Callable[[], Any] = lambda: None,
) -> Iterator[None]:
    """Calls `actions[place](place in full, value)` wherever the model comes to a place; what it returns, goes on.

    Args:
        model: student or teacher.
        actions: for each place.
        edits: whether the actions edit. These come before all that only read, transformers' own outputs included.
        restart: called where a forward pass begins.
    """
    backbone = _backbone(model)
    family, is_raptor = FAMILIES[backbone.config.model_type], backbone.config.model_type == "raptor"
    depth = backbone.config.num_hidden_layers
    layers = model.layers if isinstance(model, Teacher) else range(1, depth + 1)
    has_all = len(layers) == depth
    # a student may be run for more steps than it was made for
    wanted = {place: _parse(place, None if is_raptor and has_all else len(layers)) for place in actions}
    parts = sorted({part for _, part in wanted.values() if part is not None})
    if parts and not (is_raptor or family.block_parts):
        raise ValueError(
            f"at has {parts[0]!r}, whose place in the layers of {backbone.config.model_type!r} models is not known; "
            "take the state after a step, such as 'step.7'"
        )
    if parts and not has_all:
        raise ValueError(
            f"at has {parts[0]!r} of one layer, but a step of this teacher stands for several; take the state after a "
            "step, such as 'step.7', or load the teacher with all layers"
        )
    # of a teacher of some of a model's layers, the others are no steps
    numbers = None if has_all else {layer: step for step, layer in enumerate(layers, 1)}
    reached, ran, came = 0, False, set()

    def act(part: str | None, step: int | None, value: Tensor) -> Tensor:
        for place, (number, its_part) in wanted.items():
            if its_part == part and step is not None and (number == step or (number is None and step > 0)):
                came.add(place)
                changed = actions[place](place.replace("*", str(step)), value)
                value = value if changed is None else changed
        return value

    def on_embeddings(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        restart()
        return _with_first(output, act(None, 0, first_output(output)))

    with contextlib.ExitStack() as stack:

        def hook(module: nn.Module, kind: str, function: Callable[..., Any], **options: Any) -> None:
            if not edits:
                handle = getattr(module, f"register_{kind}")(function, **options)
            else:
                hooks = module._forward_pre_hooks if kind == "forward_pre_hook" else module._forward_hooks
                earlier = [key for key, other in hooks.items() if isinstance(other, _EditingHook)]
                handle = getattr(module, f"register_{kind}")(_EditingHook(function), prepend=True, **options)
                for key in reversed(earlier):
                    hooks.move_to_end(key, last=False)
            stack.callback(handle.remove)

        def on_layer(layer: nn.Module, number: int) -> None:
            own = _StepOfCall(number)

            def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                nonlocal reached, ran
                step = kwargs.get("step") if is_raptor else number
                step = step if numbers is None else numbers.get(step)
                reached, ran = max(reached, step or 0), True
                return _with_first(output, act(None, step, first_output(output)))

            hook(layer, "forward_hook", after, with_kwargs=True)
            if is_raptor and parts:
                stack.callback(layer.register_forward_pre_hook(own.tell, with_kwargs=True).remove)
                stack.callback(layer.attention.register_forward_pre_hook(own.hear, with_kwargs=True).remove)
            for part in parts:
                name, side = _PARTS[part]
                if is_raptor:
                    module = layer.get_submodule(name)
                else:
                    module = block_modules(layer, {name: family.block_parts[name]})[name][0]
                if side == "output":
                    hook(module, "forward_hook", lambda module, args, out, part=part: act(part, own.step, out))
                else:
                    hook(
                        module,
                        "forward_pre_hook",
                        lambda module, args, part=part: (act(part, own.step, args[0]), *args[1:]),
                    )

        hook(backbone.get_submodule(family.pre_norm or family.embeddings), "forward_hook", on_embeddings)
        for number, layer in enumerate(backbone.get_submodule(family.layers), 1):
            on_layer(layer, number)
        yield
    missed = [place for place in wanted if place not in came]
    if missed and ran:
        raise ValueError(f"at has {missed[0]!r}, where the model never came: it ran {reached} steps")


def _parse(place: str, depth: int | None) -> tuple[int | None, str | None]:
    """A place as its step, None for all, and its part, None for the state; `depth` is the last step there can be."""
    found = _PLACE.fullmatch(place)
    if found is None:
        raise ValueError(f"at has {place!r}; it must be like 'step.7', 'step.*', or either with .{', .'.join(_PARTS)}")
    number, part = found.groups()
    step = None if number == "*" else int(number)
    lowest = 0 if part is None else 1
    if step is not None and not lowest <= step <= (step if depth is None else depth):
        raise ValueError(f"at has {place!r}; its step must be in {lowest}..{depth or 'L'}")
    return step, part


def _backbone(model: PreTrainedModel | Teacher) -> PreTrainedModel:
    if isinstance(model, Teacher):
        return model.model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is of type {type(model).__name__}; give a model of transformers, or a Teacher")
    check_family(model.config, type(model).__name__)
    return find_backbone(model)


def _token_index(model: PreTrainedModel | Teacher, tokens: Tokens) -> slice | Sequence[int]:
    groups = token_layout(_backbone(model).config).slices
    if isinstance(tokens, str) and tokens not in groups:
        raise ValueError(f"tokens is {tokens!r}; this model has {', '.join(groups)}")
    return slice(None) if tokens is None else groups[tokens] if isinstance(tokens, str) else tokens


def _rows(value: Tensor, tokens: slice | Sequence[int]) -> Tensor:
    """Which tokens are chosen, (T, 1), of a value (B, T, D)."""
    rows = torch.zeros(value.shape[1], 1, dtype=torch.bool, device=value.device)
    rows[tokens if isinstance(tokens, slice) else list(tokens)] = True
    return rows


def _with_first(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value
