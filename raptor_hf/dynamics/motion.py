"""Measures how the states of a trajectory move from layer to layer, streamed over images.

    dynamics = DynamicsAccumulator(num_layers=12, tokens=teacher.tokens)
    for pixel_values in batches:
        dynamics.update(teacher.trajectory(pixel_values))
    dynamics.compute().gamma["cls"].mean               # (L + 1,), direction convergence to the final state

Norms grow with depth, so most quantities are of the directions x^ = x / ||x|| (section 4 of arXiv 2512.19941). Ranks of
the updates are in `ranks`, angles between classes in `basins`, linear models of the steps in `dmd`, and experiments
that act on the model in `interventions`.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..accumulators import Curve, MomentAccumulator
from ..tokens import TokenLayout

# of a radian
DEGREES = 180 / math.pi
# elements of the float32 copies made at a time: on a CPU few enough for its caches, on a GPU enough to keep it busy
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 2**18, 2**25
# placements of phase boundaries up to which a test takes them all
MAX_PLACEMENTS = 100_000


def to_plain(value: Any) -> Any:
    """Turns nested dataclasses, mappings, curves and tensors of results into what JSON can hold."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


class Result:
    """Base of the frozen dataclasses that analyses return."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, in lists and floats, which JSON can hold."""
        return {field.name: to_plain(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Dynamics(Result):
    """How a trajectory moves; every mapping goes from "cls", "registers", "patches" (as far as there are such tokens).

    Values are means over the tokens of a group in one image, then mean and spread over images. u = x / ||x||, and
    0 where x is 0.

    Attributes:
        norm: ||x_l||, (L + 1,).
        gamma: <u_l, u_L>, direction convergence to the final state, (L + 1,).
        update_norm: ||x_l - x_(l-1)|| / ||x_(l-1)||, the relative size of the update of layer l, (L,).
        angular_speed: arccos <u_l, u_(l-1)> in radians, the turn of layer l, (L,).
        second_difference: ||x_(l+1) - 2 x_l + x_(l-1)|| / ||x_l||, (L - 1,), for l = 1 .. L - 1.
        angular_second_difference: ||u_(l+1) - 2 u_l + u_(l-1)||, (L - 1,).
        turning: cosine between the successive updates x_l - x_(l-1) and x_(l+1) - x_l, (L - 1,).
        angular_turning: the same of u, (L - 1,).
        speed_change: |angular_speed of layer l + 1 - that of layer l|, (L - 1,).
        coherence: of the patches, ||mean over patches of u||, which is their mean cosine to their mean direction,
            (L + 1,).
    """

    norm: dict[str, Curve]
    gamma: dict[str, Curve]
    update_norm: dict[str, Curve]
    angular_speed: dict[str, Curve]
    second_difference: dict[str, Curve]
    angular_second_difference: dict[str, Curve]
    turning: dict[str, Curve]
    angular_turning: dict[str, Curve]
    speed_change: dict[str, Curve]
    coherence: Curve


class DynamicsAccumulator(MomentAccumulator):
    """Streams trajectories into `Dynamics`, in memory independent of the number of images.

    Args:
        num_layers: L, at least 2.
        tokens: which tokens are cls, registers, patches.

    Raises:
        ValueError: if there are fewer than two layers.
    """

    def __init__(self, num_layers: int, tokens: TokenLayout):
        if num_layers < 2:
            raise ValueError(
                f"num_layers is {num_layers}; it must be at least 2: one update has no change to its successor"
            )
        self.num_layers, self.tokens = num_layers, tokens
        self.groups = tokens.slices
        lengths = {"norm": 1, "gamma": 1, "update_norm": 0, "angular_speed": 0}
        quantities = [field.name for field in fields(Dynamics) if field.name != "coherence"]
        shapes = {
            f"{quantity}.{group}": (num_layers + lengths.get(quantity, -1),)
            for quantity in quantities
            for group in self.groups
        }
        super().__init__(shapes | {"coherence": (num_layers + 1,)})

    @torch.no_grad()
    def update(self, states: Tensor) -> None:
        """Adds a batch of trajectories.

        Args:
            states: (B, L + 1, T, D), before the final norm; tokens in the order cls, registers, patches.

        Raises:
            ValueError: if the shape does not fit this accumulator.
        """
        self.tokens.check_states(states, self.num_layers)
        curves: dict[str, list[Tensor]] = {}
        for x in layer_first_chunks(states):
            norm = torch.linalg.vector_norm(x, dim=-1)
            u = directions(x)
            for name, values in _quantities(x, norm, u).items():
                for group, tokens in self.groups.items():
                    # one value per image and layer
                    curves.setdefault(f"{name}.{group}", []).append(values[:, :, tokens].mean(2).T)
            patches = u[:, :, self.groups["patches"]].mean(2)
            curves.setdefault("coherence", []).append(torch.linalg.vector_norm(patches, dim=-1).T)
        for name, parts in curves.items():
            curve = torch.cat(parts)
            self.add(name, curve)
            if name.startswith("angular_speed."):
                self.add(name.replace("angular_speed", "speed_change"), curve.diff(dim=1).abs())

    def compute(self) -> Dynamics:
        """Returns the dynamics over all images seen, in float64 on the CPU.

        Raises:
            ValueError: if no image was seen.
        """
        names = [field.name for field in fields(Dynamics) if field.name != "coherence"]
        curves = {name: {group: self.curve(f"{name}.{group}") for group in self.groups} for name in names}
        return Dynamics(**curves, coherence=self.curve("coherence"))


@dataclass(frozen=True)
class SpeedJumps(Result):
    """Result of the test whether speed changes more where a phase ends than elsewhere.

    Attributes:
        at_boundaries: mean change of speed at the boundaries, radians.
        elsewhere: mean change between the other successive layers, radians.
        p_value: fraction of all placements of as many boundaries, or of a random sample of them, this one included,
            whose changes are as large.
    """

    at_boundaries: float
    elsewhere: float
    p_value: float


def speed_jumps(
    speed_change: Tensor, boundaries: Sequence[int], max_placements: int = MAX_PLACEMENTS, seed: int = 0
) -> SpeedJumps:
    """Tests whether speed jumps at phase boundaries, against all placements of as many boundaries.

    Args:
        speed_change: |speed of layer l + 1 - speed of layer l| for l = 1 .. L - 1, (L - 1,), as `Dynamics` has it.
        boundaries: last layers of the phases but the last, each in 1 .. L - 1.
        max_placements: if there are more, so many random ones stand for them.
        seed: of these.

    Raises:
        ValueError: if there is no boundary, one is out of range, or no other layer is left to compare with.
    """
    changes = np.asarray(speed_change, dtype=np.float64)
    chosen = sorted(set(boundaries))
    if not chosen or chosen[0] < 1 or chosen[-1] > len(changes) or len(chosen) == len(changes):
        raise ValueError(
            f"boundaries is {list(boundaries)}; it must be some, but not all, of the layers 1..{len(changes)}"
        )
    inside = changes[np.array(chosen) - 1]
    if math.comb(len(changes), len(chosen)) <= max_placements:
        placements = np.array([sum(c) for c in itertools.combinations(changes.tolist(), len(chosen))])
    else:
        # the first of a random order of the layers; with the placement itself, so that p is never 0
        order = np.random.default_rng(seed).random((max_placements, len(changes))).argsort(1)
        placements = np.append(changes[order[:, : len(chosen)]].sum(1), inside.sum())
    # rounding must not make the placement itself smaller than itself
    as_large = placements >= inside.sum() * (1 - 1e-12)
    rest = (changes.sum() - inside.sum()) / (len(changes) - len(chosen))
    return SpeedJumps(float(inside.mean()), float(rest), float(as_large.mean()))


def _quantities(x: Tensor, norm: Tensor, u: Tensor) -> dict[str, Tensor]:
    """The fields of `Dynamics` for every token, (L', B, T), of states x and their directions u, (L + 1, B, T, D)."""
    quantities = {"norm": norm, "gamma": (u * u[-1]).sum(-1)}
    divisor = norm.masked_fill(norm == 0, 1)
    for prefix, states, scale in (("", x, divisor), ("angular_", u, torch.ones_like(norm))):
        update = states[1:] - states[:-1]
        size = torch.linalg.vector_norm(update, dim=-1)
        bend = torch.linalg.vector_norm(update[1:] - update[:-1], dim=-1)
        quantities[f"{prefix}second_difference"] = bend / scale[1:-1]
        product = (update[1:] * update[:-1]).sum(-1)
        # a layer that does nothing has no direction: its cosine counts as 0
        quantities[f"{prefix}turning"] = product / (size[1:] * size[:-1]).clamp(min=torch.finfo(x.dtype).tiny)
        if prefix:
            has_direction = (norm > 0).to(x.dtype)
            quantities["angular_speed"] = _angle_of_chord(size, has_direction[1:] + has_direction[:-1])
        else:
            quantities["update_norm"] = size / divisor[:-1]
    return quantities


def directions(x: Tensor) -> Tensor:
    """x / ||x|| over the last dimension; zero where x is, as are the registers of an untrained network."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)


def angle(u: Tensor, v: Tensor) -> Tensor:
    """Angle between directions, over the last dimension, in radians; a right angle where one of them is zero."""
    return _angle_of_chord(torch.linalg.vector_norm(u - v, dim=-1), u.square().sum(-1) + v.square().sum(-1))


def _angle_of_chord(chord: Tensor, squares: Tensor) -> Tensor:
    """2 atan2(||u - v||, ||u + v||) of ||u - v|| and ||u||^2 + ||v||^2, by the parallelogram law.

    The arccos of a cosine near 1 would lose half the digits.
    """
    return 2 * torch.atan2(chord, (2 * squares - chord.square()).clamp(min=0).sqrt())


def layer_first_chunks(states: Tensor) -> Iterator[Tensor]:
    """Yields a trajectory some images at a time, in at least float32, as (L + 1, b, T, D) with layers outermost."""
    if len(states) == 0:
        return
    wide = torch.promote_types(states.dtype, torch.float32)
    elements = CHUNK_ELEMENTS if states.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    size = max(1, elements // states[0].numel())
    for chunk in states.split(size):
        yield chunk.transpose(0, 1).to(wide).contiguous()
