"""Perturbs the states of a model or exchanges its layers, runs it on, and measures what changes.

    experiment = Perturbation(teacher, sizes=(0.1,), layers=range(0, 12))
    for pixel_values, labels in batches:
        experiment.update(teacher.trajectory(pixel_values), labels)
    experiment.compute().rate.mean                     # (layers, sizes), < 1 where perturbations shrink

Experiments on the number of steps are in `extrapolation`. All of them are accumulators: memory does not grow with the
number of images, and processes merge by adding their sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..accumulators import Curve, MomentAccumulator
from ..metrics import bootstrap_interval
from ..phases import Partition
from ..teacher import Teacher
from .motion import Result, angle, directions


@dataclass(frozen=True, eq=False)
class PerturbationResult(Result):
    """How noise that is added to the states after one layer grows or shrinks.

    Attributes:
        layers: after which noise was added, J of them.
        sizes: of the noise, relative to the norm of each token, S of them.
        angle: between perturbed and unperturbed tokens, mean over tokens, in radians, curve (J, S, L + 1); NaN before
            the layer of the noise.
        relative_distance: ||perturbed - unperturbed|| / ||unperturbed||, mean over tokens, likewise.
        rate: factor by which the angle changes per layer, fitted to all layers from the noise on, curve (J, S); below 1
            where perturbations shrink.
        relative_rate: the same of the relative distance.
        unchanged: fraction of predictions that stay, curve (J, S); None without a classifier.
    """

    layers: list[int]
    sizes: list[float]
    angle: Curve
    relative_distance: Curve
    rate: Curve
    relative_rate: Curve
    unchanged: Curve | None


class Perturbation(MomentAccumulator):
    """Adds Gaussian noise of a given relative size to all tokens after a layer, and runs the remaining layers.

    Args:
        teacher: the model.
        sizes: norms of the noise, relative to that of each token.
        layers: after which noise is added, 0 (the embeddings) to L - 1.
        seed: of the noise. Models with tokens of one shape meet the same noise on the same batches.

    Raises:
        ValueError: if a size is not positive or a layer is out of range.
    """

    def __init__(self, teacher: Teacher, sizes: Sequence[float], layers: Sequence[int], seed: int = 0):
        self.teacher, self.sizes, self.layers = teacher, list(sizes), list(layers)
        if not self.sizes or min(self.sizes) <= 0:
            raise ValueError(
                f"sizes is {self.sizes}; it must be one or more positive numbers, relative to the token's norm"
            )
        if not self.layers or not 0 <= min(self.layers) <= max(self.layers) < teacher.num_layers:
            raise ValueError(f"layers is {self.layers}; it must be one or more of 0..{teacher.num_layers - 1}")
        self._generator = torch.Generator().manual_seed(seed)
        grid = (len(self.layers), len(self.sizes))
        shapes = {name: (*grid, teacher.num_layers + 1) for name in ("angle", "relative_distance")}
        shapes |= {name: grid for name in ("rate", "relative_rate")}
        super().__init__(shapes | ({} if teacher.classifier is None else {"unchanged": grid}))

    @torch.no_grad()
    def update(self, states: Tensor) -> None:
        """Adds a batch of the teacher's trajectories, (B, L + 1, T, D)."""
        grid = (len(states), len(self.layers), len(self.sizes))
        angle = torch.full((*grid, self.teacher.num_layers + 1), torch.nan)
        distance, unchanged = angle.clone(), torch.zeros(grid)
        truth = self.teacher.logits(states[:, -1])
        for j, layer in enumerate(self.layers):
            # drawn on the CPU, the same for every model and device
            direction = F.normalize(torch.randn(states[:, layer].shape, generator=self._generator), dim=-1)
            for s, size in enumerate(self.sizes):
                noise = size * direction.to(states) * torch.linalg.vector_norm(states[:, layer], dim=-1, keepdim=True)
                perturbed = self.teacher.run_layers(
                    states[:, layer] + noise, range(layer + 1, self.teacher.num_layers + 1)
                )
                angle[:, j, s, layer:], distance[:, j, s, layer:] = (
                    values.mean(-1).cpu() for values in separation(perturbed, states[:, layer:])
                )
                if truth is not None:
                    same = self.teacher.logits(perturbed[:, -1]).argmax(1) == truth.argmax(1)
                    unchanged[:, j, s] = same.float().cpu()
        self.add("angle", angle)
        self.add("relative_distance", distance)
        self.add("rate", contraction_rate(angle))
        self.add("relative_rate", contraction_rate(distance))
        if truth is not None:
            self.add("unchanged", unchanged)

    def compute(self) -> PerturbationResult:
        """Returns the results over all images seen.

        Raises:
            ValueError: if no image was seen.
        """
        names = ("angle", "relative_distance", "rate", "relative_rate")
        return PerturbationResult(
            self.layers,
            self.sizes,
            *(self.curve(name) for name in names),
            unchanged=None if self.teacher.classifier is None else self.curve("unchanged"),
        )


def contraction_rate(distance: Tensor) -> Tensor:
    """Fits distance_l = c rate^l by least squares on the logarithm.

    Args:
        distance: over depth, (..., L + 1), positive, or NaN where there is none.

    Returns:
        rate, (...); NaN with fewer than two distances. Distances of 0 count as the smallest number there is.
    """
    logs = distance.double().clamp(min=torch.finfo(torch.float32).tiny).log()
    present = ~logs.isnan()
    layer = torch.arange(logs.shape[-1], dtype=torch.float64).expand(logs.shape)
    count = present.sum(-1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(present, values, 0.0)
        return torch.where(present, values - values.sum(-1, keepdim=True) / count, 0.0)

    x, y = centred(layer), centred(logs)
    slope = (x * y).sum(-1) / x.square().sum(-1)
    return torch.where(count[..., 0] > 1, slope.exp(), torch.nan)


def separation(perturbed: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Angle and relative distance of every token, in at least float32."""
    wide = torch.promote_types(states.dtype, torch.float32)
    perturbed, states = perturbed.to(wide), states.to(wide)
    norm = torch.linalg.vector_norm(states, dim=-1)
    distance = torch.linalg.vector_norm(perturbed - states, dim=-1) / norm.masked_fill(norm == 0, 1)
    # a token of norm 0 gets no noise, and so has no angle
    turned = torch.where(norm > 0, angle(directions(perturbed), directions(states)), 0.0)
    return turned, distance


@dataclass(frozen=True)
class LayerEdit:
    """A changed order of layers.

    Attributes:
        layers: what runs instead of 1 .. L.
        kind: "replace" (layers stand in for others) or "swap" (layers change places).
        relation: "within" one phase or "across" phases.
        num_edits: how many layers were replaced, or pairs swapped.
        pairs: (layer, its substitute) of every replacement, or the two layers that changed places.
    """

    layers: tuple[int, ...]
    kind: str
    relation: str
    num_edits: int
    pairs: tuple[tuple[int, int], ...]


def layer_edits(
    partition: Partition, kind: str, relation: str, num_edits: int, max_edits: int | None = None, seed: int = 0
) -> list[LayerEdit]:
    """Lists edits of the order of layers: all of one layer or pair, random ones of several.

    Args:
        partition: the phases.
        kind: "replace" or "swap".
        relation: "within" or "across", where a substitute or the other of a pair comes from.
        num_edits: layers to replace, or disjoint pairs to swap.
        max_edits: at most so many, chosen at random; needed for more than one edit at a time.
        seed: of the choice.

    Returns:
        Different edits; fewer than `max_edits`, down to none, if the phases do not allow so many.

    Raises:
        ValueError: for an unknown kind or relation, or several edits at a time without `max_edits`.
    """
    if kind not in ("replace", "swap") or relation not in ("within", "across"):
        raise ValueError(
            f"kind is {kind!r} and relation {relation!r}; they must be replace or swap, and within or across"
        )
    if num_edits < 1 or (max_edits is None and num_edits > 1):
        raise ValueError(f"num_edits is {num_edits}; it must be at least 1, and above 1 with max_edits only")
    owners = partition.layer_to_block
    pairs = [
        (a + 1, b + 1)
        for a in range(len(owners))
        for b in range(len(owners))
        if a != b and (owners[a] == owners[b]) == (relation == "within") and (kind == "replace" or a < b)
    ]
    generator = np.random.default_rng([seed, num_edits, kind == "swap", relation == "within"])
    if num_edits == 1:
        order = generator.permutation(len(pairs)) if max_edits is not None else range(len(pairs))
        found = [(pairs[index],) for index in list(order)[:max_edits]]
    else:
        found = _draw_edits(pairs, kind, num_edits, max_edits, generator)
    return [LayerEdit(_apply(len(owners), kind, edit), kind, relation, num_edits, edit) for edit in sorted(found)]


def _draw_edits(
    pairs: list[tuple[int, int]], kind: str, num_edits: int, max_edits: int, generator: np.random.Generator
) -> list[tuple[tuple[int, int], ...]]:
    found: set[tuple[tuple[int, int], ...]] = set()
    for _ in range(50 * max_edits):  # enough for any that are not nearly exhausted
        if len(found) == max_edits:
            break
        chosen: list[tuple[int, int]] = []
        taken: set[int] = set()
        for index in generator.permutation(len(pairs)):
            pair = pairs[index]
            touched = set(pair) if kind == "swap" else {pair[0]}
            if len(chosen) < num_edits and not touched & taken:
                chosen.append(pair)
                taken |= touched
        if len(chosen) == num_edits:
            found.add(tuple(sorted(chosen)))
    return list(found)


def _apply(num_layers: int, kind: str, pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    layers = list(range(1, num_layers + 1))
    for a, b in pairs:
        if kind == "replace":
            layers[a - 1] = b
        else:
            layers[a - 1], layers[b - 1] = b, a
    return tuple(layers)


@dataclass(frozen=True, eq=False)
class EditResult(Result):
    """Scores of a model with another order of layers; curves (E,) over images, one value per edit.

    Attributes:
        edits: the edits, E of them.
        cosine: mean over tokens of the cosine to the final states of the model as it is.
        agreement: fraction of the model's own predictions that stay, None without a classifier.
        accuracy: fraction of right predictions, None without a classifier or labels.
    """

    edits: list[LayerEdit]
    cosine: Curve
    agreement: Curve | None
    accuracy: Curve | None

    def to_dict(self) -> dict:
        """Returns one entry per edit, with mean and standard deviation over images of every score."""
        curves = {name: getattr(self, name) for name in ("cosine", "agreement", "accuracy")}
        scores = {name: curve.mean for name, curve in curves.items() if curve is not None}
        scores |= {f"{name}_std": curve.std for name, curve in curves.items() if curve is not None}
        return {
            "num_images": self.cosine.num_images,
            "edits": [
                {"kind": edit.kind, "relation": edit.relation, "pairs": [list(pair) for pair in edit.pairs]}
                | {name: float(values[index]) for name, values in scores.items()}
                for index, edit in enumerate(self.edits)
            ],
        }

    def summary(self, metric: str, seed: int = 0) -> dict[tuple[str, str, int], "Interval"]:
        """Returns mean and 95 % interval over the edits of every (kind, relation, num_edits)."""
        values = getattr(self, metric).mean
        kinds: dict[tuple[str, str, int], list[float]] = {}
        for edit, value in zip(self.edits, values.tolist(), strict=True):
            kinds.setdefault((edit.kind, edit.relation, edit.num_edits), []).append(value)
        return {key: mean_interval(values, seed) for key, values in kinds.items()}


class EditExperiment(MomentAccumulator):
    """Runs a model with its layers in other orders.

    Args:
        teacher: the model.
        edits: of `layer_edits`.
    """

    def __init__(self, teacher: Teacher, edits: Sequence[LayerEdit]):
        self.teacher, self.edits = teacher, list(edits)
        names = ("cosine",) if teacher.classifier is None else ("cosine", "agreement", "accuracy")
        super().__init__({name: (len(self.edits),) for name in names})

    @torch.no_grad()
    def update(self, states: Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            states: the teacher's own trajectories, (B, L + 1, T, D).
            labels: true classes of the teacher's classifier, (B,), or None for all batches.
        """
        truth = self.teacher.logits(states[:, -1])
        columns: dict[str, list[Tensor]] = {"cosine": [], "agreement": [], "accuracy": []}
        for edit in self.edits:
            # up to the first change the states are known
            start = next(index for index, layer in enumerate(edit.layers) if layer != index + 1)
            last = self.teacher.run_layers(states[:, start], edit.layers[start:])[:, -1]
            wide = torch.promote_types(last.dtype, torch.float32)
            columns["cosine"].append(F.cosine_similarity(last.to(wide), states[:, -1].to(wide), dim=-1).mean(1))
            if truth is not None:
                predicted = self.teacher.logits(last).argmax(1)
                columns["agreement"].append(predicted == truth.argmax(1))
                if labels is not None:
                    columns["accuracy"].append(predicted == labels)
        for name, values in columns.items():
            if values:
                self.add(name, torch.stack(values, 1))

    def compute(self) -> EditResult:
        """Returns the scores of all edits over all images seen.

        Raises:
            ValueError: if no image was seen.
        """
        return EditResult(
            self.edits,
            self.curve("cosine"),
            self.curve("agreement") if self.has_seen("agreement") else None,
            self.curve("accuracy") if self.has_seen("accuracy") else None,
        )


@dataclass(frozen=True)
class Interval(Result):
    """A mean with a 95 % confidence interval, over `count` values."""

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Takes the mean with its percentile-bootstrap interval of 95 %.

    Args:
        values: at least one; of a single one the interval is the value itself.
        seed: of the resampling.
    """
    values = np.asarray(values, dtype=np.float64)
    return Interval(math.fsum(values) / len(values), *bootstrap_interval([values], seed=seed), len(values))
