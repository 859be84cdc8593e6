"""Runs a model for fewer and more steps than it was trained for, and stops it early where its states have settled.

experiment = DepthExtrapolation(student, num_steps=(6, 12, 24), pace="hold")
experiment.update(states, reference=teacher_states, labels=labels)
exits = EarlyExit(student, thresholds=(0.1, 0.2), rule="angular_speed")
exits.update(states, labels)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..accumulators import Curve, MomentAccumulator
from ..teacher import Teacher
from .motion import Result, angle, directions

Pace = Literal["hold", "spread"]
ExitRule = Literal["angular_speed", "second_difference"]


def paced_layers(num_layers: int, num_steps: int, pace: Pace) -> list[int]:
    """Chooses the layers that run in another number of steps.

    Args:
        num_layers: L.
        num_steps: N, at least 1.
        pace: "hold" takes the first N layers and, past L, the last one again and again; "spread" goes through the depth
            evenly, step i with layer ceil(i L / N), so that layers are left out or repeated.

    Raises:
        ValueError: for an unknown pace, or fewer than 1 step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if pace == "hold":
        return [min(step, num_layers) for step in range(1, num_steps + 1)]
    if pace == "spread":
        return [-(-step * num_layers // num_steps) for step in range(1, num_steps + 1)]
    raise ValueError(f"pace is {pace!r}; it must be hold or spread")


@dataclass(frozen=True, eq=False)
class ExtrapolationResult(Result):
    """Scores of a model after N steps, for every N; curves (N,) over images.

    Attributes:
        num_steps: the numbers of steps.
        pace: as in `paced_layers`.
        cosine: mean over tokens of the cosine to the reference's final states.
        relative_error: ||state - reference|| / ||reference|| of the final states.
        last_speed: angle of the last step, mean over tokens, in radians: near 0 once the model has converged.
        agreement: fraction of the reference's predictions that stay, None without a classifier.
        accuracy: fraction of right predictions, None without a classifier or labels.
    """

    num_steps: list[int]
    pace: str
    cosine: Curve
    relative_error: Curve
    last_speed: Curve
    agreement: Curve | None
    accuracy: Curve | None


class DepthExtrapolation(MomentAccumulator):
    """Runs a model for other numbers of steps.

    Args:
        teacher: the model.
        num_steps: for how many.
        pace: as in `paced_layers`.

    Raises:
        ValueError: for an unknown pace, no number, or fewer than 1 step.
    """

    def __init__(self, teacher: Teacher, num_steps: Sequence[int], pace: Pace = "hold"):
        self.teacher, self.num_steps, self.pace = teacher, sorted(set(num_steps)), pace
        if not self.num_steps:
            raise ValueError(f"num_steps is {list(num_steps)}; it must be one or more numbers of steps")
        self._layers = {steps: paced_layers(teacher.num_layers, steps, pace) for steps in self.num_steps}
        names = ["cosine", "relative_error", "last_speed"]
        names += [] if teacher.classifier is None else ["agreement", "accuracy"]
        super().__init__({name: (len(self.num_steps),) for name in names})

    @torch.no_grad()
    def update(self, states: Tensor, reference: Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            states: the model's own trajectories, (B, L + 1, T, D).
            reference: final states to compare with, the teacher's for its student, (B, T, D).
            labels: true classes of the classifier, (B,), or None for all batches.
        """
        columns: dict[str, list[Tensor]] = {}
        truth = self.teacher.logits(reference)
        wide = torch.promote_types(states.dtype, torch.float32)
        target = reference.to(wide)
        size = torch.linalg.vector_norm(target, dim=(1, 2))
        for before, last in self._runs(states):
            row = {"cosine": F.cosine_similarity(last.to(wide), target, dim=-1).mean(1)}
            row["relative_error"] = torch.linalg.vector_norm(last.to(wide) - target, dim=(1, 2)) / size
            row["last_speed"] = angle(directions(last.to(wide)), directions(before.to(wide))).mean(1)
            if truth is not None:
                predicted = self.teacher.logits(last).argmax(1)
                row["agreement"] = predicted == truth.argmax(1)
                if labels is not None:
                    row["accuracy"] = predicted == labels
            for name, values in row.items():
                columns.setdefault(name, []).append(values)
        for name, values in columns.items():
            self.add(name, torch.stack(values, 1))

    def _runs(self, states: Tensor):
        """The last two states of every number of steps."""
        if self.pace == "hold":
            # one run, read out on the way
            extra = max(self.num_steps) - self.teacher.num_layers
            if extra > 0:
                more = self.teacher.run_layers(states[:, -1], [self.teacher.num_layers] * extra)
                states = torch.cat([states, more[:, 1:]], 1)
            for steps in self.num_steps:
                yield states[:, steps - 1], states[:, steps]
            return
        for steps in self.num_steps:
            run = self.teacher.run_layers(states[:, 0], self._layers[steps])
            yield run[:, -2], run[:, -1]

    def compute(self) -> ExtrapolationResult:
        """Returns the scores of every number of steps, over all images seen.

        Raises:
            ValueError: if no image was seen.
        """
        optional = _seen(self, ("agreement", "accuracy"))
        names = ("cosine", "relative_error", "last_speed")
        return ExtrapolationResult(self.num_steps, self.pace, *(self.curve(name) for name in names), **optional)


@dataclass(frozen=True, eq=False)
class EarlyExitResult(Result):
    """Scores of a model that stops where its states have settled; curves over images, one value per threshold.

    Attributes:
        rule: what falls below the threshold, for the cls token (the patch mean without one): "angular_speed", the turn
            of the last step in radians, or "second_difference", ||u_(l+1) - 2 u_l + u_(l-1)|| of its directions.
        thresholds: E of them.
        num_steps: steps taken; those that never settle take all L.
        agreement: fraction of the predictions after all L steps that the early ones equal, None without a classifier.
        accuracy: fraction of right predictions, None without a classifier or labels.
        cosine: mean over tokens of the cosine to the final states.
    """

    rule: str
    thresholds: list[float]
    num_steps: Curve
    cosine: Curve
    agreement: Curve | None
    accuracy: Curve | None


class EarlyExit(MomentAccumulator):
    """Stops every image at the first step at which a rule holds, and classifies there.

    Args:
        teacher: the model.
        thresholds: below which the quantity of the rule has to be.
        rule: as in `EarlyExitResult`.

    Raises:
        ValueError: for an unknown rule or no threshold.
    """

    def __init__(self, teacher: Teacher, thresholds: Sequence[float], rule: ExitRule = "angular_speed"):
        if rule not in ("angular_speed", "second_difference"):
            raise ValueError(f"rule is {rule!r}; it must be angular_speed or second_difference")
        if not thresholds:
            raise ValueError(f"thresholds is {list(thresholds)}; it must be one or more numbers")
        self.teacher, self.thresholds, self.rule = teacher, list(thresholds), rule
        names = ["num_steps", "cosine"] + ([] if teacher.classifier is None else ["agreement", "accuracy"])
        super().__init__({name: (len(self.thresholds),) for name in names})

    @torch.no_grad()
    def update(self, states: Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch of the model's own trajectories, (B, L + 1, T, D), and their labels, (B,), if there are any."""
        wide = torch.promote_types(states.dtype, torch.float32)
        rows = torch.arange(len(states), device=states.device)
        cosine = torch.stack(
            [F.cosine_similarity(state.to(wide), states[:, -1].to(wide), dim=-1).mean(1) for state in states.unbind(1)],
            1,
        )
        exits = exit_steps(self._settling(states.to(wide)), self.thresholds, self.teacher.num_layers)
        self.add("num_steps", exits)
        self.add("cosine", torch.stack([cosine[rows, steps] for steps in exits.unbind(1)], 1))
        if self.teacher.classifier is None:
            return
        predicted = torch.stack([self.teacher.logits(state).argmax(1) for state in states.unbind(1)], 1)
        early = torch.stack([predicted[rows, steps] for steps in exits.unbind(1)], 1)
        self.add("agreement", early == predicted[:, -1:])
        if labels is not None:
            self.add("accuracy", early == labels[:, None])

    def _settling(self, states: Tensor) -> Tensor:
        """The quantity of the rule after steps 1 .. L, (B, L); infinite where it is not defined yet."""
        # the first summary: cls, or the mean patch where there is none
        units = directions(self.teacher.tokens.summaries(states)[:, :, 0])
        if self.rule == "angular_speed":
            return angle(units[:, 1:], units[:, :-1])
        bend = torch.linalg.vector_norm(units[:, 2:] - 2 * units[:, 1:-1] + units[:, :-2], dim=-1)
        return F.pad(bend, (1, 0), value=torch.inf)

    def compute(self) -> EarlyExitResult:
        """Returns steps and scores of every threshold, over all images seen.

        Raises:
            ValueError: if no image was seen.
        """
        optional = _seen(self, ("agreement", "accuracy"))
        steps, cosine = self.curve("num_steps"), self.curve("cosine")
        return EarlyExitResult(self.rule, self.thresholds, steps, cosine, **optional)


def exit_steps(settling: Tensor, thresholds: Sequence[float], num_layers: int) -> Tensor:
    """Finds the first step after which a quantity is below each threshold.

    Args:
        settling: after steps 1 .. L, (B, L).
        thresholds: E of them.
        num_layers: L, the step of those that never are below.

    Returns:
        (B, E), in 1 .. L.
    """
    below = settling[:, None] < torch.tensor(thresholds, device=settling.device, dtype=settling.dtype)[None, :, None]
    first = below.long().argmax(2) + 1
    return torch.where(below.any(2), first, num_layers)


def _seen(accumulator: MomentAccumulator, names: Sequence[str]) -> dict[str, Curve | None]:
    """The curves of what was given, None for the rest."""
    return {name: accumulator.curve(name) if accumulator.has_seen(name) else None for name in names}
