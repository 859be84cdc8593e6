"""Puts heads and neurons of all layers of a phase into one block, whose steps weigh them by gains of their own.

    student = student_from_teacher(teacher, (2, 4, 6), depth_conditioning="low_rank", unit_gains=True)
    gather_units(teacher, student.base_model.encoder, 0, scores, weights)

The layers of a phase do different things with the same width. A block that copies one of them has the features of that
layer alone. A block with the most important units of each has some features of all, and each step starts by using those
of its own layer (`unit_gains` of the conditioning "low_rank").
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..configuration_raptor import RaptorConfig
from ..conversion import BLOCK_FIELDS
from ..modeling_raptor import RaptorBlock
from ..teacher import Teacher

# what a step multiplies the units of its own layer by at the start, and those of other layers
OWN_GATE, OTHER_GATE = 1.0, 0.2


class UnitScores:
    """Streams how much variance each head and each neuron of a teacher's layers adds to the tokens."""

    def __init__(self) -> None:
        self._sums: dict[int, list[Tensor]] = {}
        # that of the heads, (D, D), and the squared norm of what each neuron is mapped to, (F,)
        self._projections: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, block: RaptorBlock, heads: Tensor, neurons: Tensor) -> None:
        """Adds tokens of a layer.

        Args:
            layer: l, 1..L.
            block: with the weights of that layer.
            heads: side by side, what the last projection of the attention reads, (..., D).
            neurons: what the last projection of the FFN reads, (..., F).
        """
        heads, neurons = heads.flatten(0, -2).double(), neurons.flatten(0, -2).double()
        count = neurons.new_full((1,), len(neurons))
        sums = [count, heads.sum(0), heads.T @ heads, neurons.sum(0), neurons.square().sum(0)]
        if layer in self._sums:
            sums = [old + new for old, new in zip(self._sums[layer], sums, strict=True)]
        else:
            attention, ffn = scaled_projections(block.state_dict())
            self._projections[layer] = attention, ffn.square().sum(0)
        self._sums[layer] = sums

    def heads(self, layer: int, num_heads: int) -> Tensor:
        """Variance that each head adds, summed over features, (heads,), float64."""
        count, total, products, *_ = self._sums[layer]
        covariance = products / count - torch.outer(total, total) / count.square()
        return head_variances(covariance, self._projections[layer][0], num_heads)

    def neurons(self, layer: int) -> Tensor:
        """Variance that each neuron adds, summed over features, (F,), float64."""
        count, *_, total, squares = self._sums[layer]
        return (squares / count - (total / count).square()) * self._projections[layer][1]


def scaled_projections(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The last projections of both branches of a block, (D, D) and (D, F), LayerScale included, in float64."""
    attention = weights["attention.proj.weight"] * weights["layer_scale1.lambda1"][:, None]
    return attention.double(), (weights["ffn.fc2.weight"] * weights["layer_scale2.lambda1"][:, None]).double()


def head_variances(covariance: Tensor, projection: Tensor, num_heads: int) -> Tensor:
    """Variance that each head adds, (heads,).

    Args:
        covariance: of the channels of all heads side by side, (D, D).
        projection: that maps them to tokens, (D, D).
        num_heads: number of heads.
    """
    size = len(covariance) // num_heads
    own = torch.stack([covariance[i : i + size, i : i + size] for i in range(0, len(covariance), size)])
    columns = torch.stack(projection.split(size, dim=1))
    return ((columns @ own) * columns).sum((1, 2))


def inverse_variance(variance: Tensor) -> Tensor:
    """What a squared error in each layer costs, relative to the variance of that layer alone, (L + 1,), float64."""
    return 1 / variance.double().clamp(min=1e-30)


def lasting_weights(variance: Tensor) -> Tensor:
    """What a squared error in each layer costs, relative to the variance of that layer and of all later ones.

    An error stays in the tokens, so it counts in every later layer too.

    Args:
        variance: of the teacher's layers, (L + 1,).

    Returns:
        (L + 1,), float64. Entry 0 is what an error in the embedding costs in the layers.
    """
    inverse = inverse_variance(variance)
    inverse[0] = 0
    return inverse.flip(0).cumsum(0).flip(0)


def check_units(teacher: Teacher, config: RaptorConfig) -> None:
    """Refuses a student whose blocks differ from the teacher's layers in more than their number of units.

    Raises:
        ValueError: if they do, or the teacher's layers cannot become blocks.
    """
    teacher.block_state_dict(1)  # raises where they cannot
    own = RaptorConfig.from_teacher(teacher.config, (teacher.num_layers,))
    for name in BLOCK_FIELDS:
        value, expected = getattr(config, name), getattr(own, name)
        if name not in ("intermediate_size", "num_attention_heads") and value != expected:
            name = "head_dim" if name == "head_size" else name
            raise ValueError(f"{name} is {value!r}; to take units of the teacher's layers it must be {expected!r}")


@torch.no_grad()
def gather_units(teacher: Teacher, encoder: Any, block: int, scores: UnitScores, weights: Tensor) -> None:
    """Fills a block with the most important heads and neurons of the layers of its phase, in place.

    Every step starts with the norms of its own layer, and with the gates `OWN_GATE` and `OTHER_GATE`. LayerScale
    becomes one. The biases of the last projections become zero, for a fit to replace them. Where a block has more units
    than all layers of its phase, the rest keep the first weights that they have, and add nothing.

    Args:
        teacher: of a family whose layers can become blocks.
        encoder: of a student that `check_units` takes, with the conditioning "low_rank" and `unit_gains`.
        block: its number.
        scores: of the layers of its phase.
        weights: what scores of a layer are multiplied by to be compared with those of another, (L + 1,).
    """
    target: RaptorBlock = encoder.blocks[block]
    tables: nn.Module = encoder.conditioners[block]
    config, layers = encoder.config, encoder.config.block_layers[block]
    size = config.head_size
    heads = _best(
        [scores.heads(layer, teacher.num_heads) * weights[layer] for layer in layers], config.num_attention_heads
    )
    neurons = _best([scores.neurons(layer) * weights[layer] for layer in layers], config.intermediate_size)
    channels = [(own[:, None] * size + torch.arange(size, device=own.device)).flatten() for own in heads]

    # a step that stands for several layers of the teacher's model starts with the last of them
    sources = [teacher.block_state_dict(teacher.span(layer)[-1]) for layer in layers]
    gathered = dict(target.state_dict())
    stacked = {
        "attention.qkv.weight": (channels, 3),
        "attention.qkv.bias": (channels, 3),
        "attention.query_bias": (channels, 1),
        "attention.value_bias": (channels, 1),
        "ffn.fc1.weight": (neurons, 2 if config.ffn_type == "swiglu" else 1),
        "ffn.fc1.bias": (neurons, 2 if config.ffn_type == "swiglu" else 1),
    }
    for name, (chosen, parts) in stacked.items():
        if name in gathered:
            gathered[name] = _rows([source[name] for source in sources], chosen, parts, gathered[name])
    projections = [scaled_projections(source) for source in sources]
    for number, (name, chosen) in enumerate((("attention.proj", channels), ("ffn.fc2", neurons))):
        columns = [both[number][:, own] for both, own in zip(projections, chosen, strict=True)]
        missing = gathered[f"{name}.weight"].shape[1] - sum(len(own) for own in chosen)
        gathered[f"{name}.weight"] = nn.functional.pad(torch.cat(columns, dim=1), (0, missing))
    for name, value in gathered.items():
        if name.startswith("layer_scale") or name in ("norm1.weight", "norm2.weight"):
            gathered[name] = torch.ones_like(value)
        elif name in ("norm1.bias", "norm2.bias", "attention.proj.bias", "ffn.fc2.bias"):
            gathered[name] = torch.zeros_like(value)
    target.load_state_dict(gathered)

    for step, source in enumerate(sources):
        for norm in ("norm1", "norm2"):
            getattr(tables, f"{norm}_gain")[step] = source[f"{norm}.weight"] - 1
            if f"{norm}.bias" in source:
                getattr(tables, f"{norm}_shift")[step] = source[f"{norm}.bias"]
        for table, chosen in ((tables.heads_gain, channels), (tables.neurons_gain, neurons)):
            owner = torch.cat([torch.full_like(own, index) for index, own in enumerate(chosen)])
            table[step, : len(owner)] = torch.where(owner == step, OWN_GATE, OTHER_GATE) - 1


def _best(scores: list[Tensor], number: int) -> list[Tensor]:
    """Indices, by layer, of the best `number` of all layers' units."""
    scores = torch.stack(scores)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().topk(min(number, scores.numel())).indices] = True
    return [own.nonzero()[:, 0] for own in chosen.view(scores.shape)]


def _rows(weights: list[Tensor], chosen: list[Tensor], parts: int, before: Tensor) -> Tensor:
    """The rows of chosen units, where a matrix, or a bias, is `parts` stacked ones of the same units.

    `before` has the rows that the block has so far; those that no unit takes stay.
    """
    stacks = [torch.stack(weight.chunk(parts))[:, own] for weight, own in zip(weights, chosen, strict=True)]
    rest = torch.stack(before.chunk(parts))[:, sum(len(own) for own in chosen) :]
    return torch.cat((*stacks, rest.to(stacks[0])), dim=1).flatten(0, 1)
