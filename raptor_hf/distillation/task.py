"""Distilling a trajectory into recurrent blocks: losses, schedules and the two stages (section 4 of the paper).

Stage 1 trains every block from the teacher's state at the start of its phase, by teacher forcing annealed to
autoregression; given the trajectory the blocks are independent, so one teacher pass feeds all of them. Stage 2 trains
all blocks together, autoregressively through all L steps:

    task = DistillationTask(student, TrajectoryLoss(weights, ...), ...)
    states = teacher.trajectory(pixel_values)                                # (B, L + 1, T, D)
    losses = task(states, stage=1, forcing=teacher_forcing(step, num_steps)) # {"block_0": ..., "loss": ...}

An elastic student takes parts of the batches of stage 2 at another pace, and is compared with the teacher where its
steps end:

    for part, num_steps in zip(states.chunk(4), draw_num_steps([4, 6, 8, 16], 0.75, seed, step, parts=4)):
        losses = task(part, stage=2, num_steps=num_steps)
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..accumulators import Accumulator, in_float64
from ..modeling_raptor import RaptorModel, RaptorPreTrainedModel
from ..tokens import TOKEN_GROUPS, TokenLayout

# between two layers of the teacher: their mixture, or the nearer of them
Targets = Literal["interpolated", "nearest"]


def teacher_forcing(step: int, num_steps: int, anneal_fraction: float = 0.25) -> float:
    """Weight lambda of teacher forcing in stage 1: from 1 linearly to 0 over the first part of the steps, then 0.

    Args:
        step: 0-based.
        num_steps: of stage 1.
        anneal_fraction: share of the steps that the descent takes; 0 for no teacher forcing at all.
    """
    length = anneal_fraction * num_steps
    return max(0.0, 1.0 - step / length) if length > 0 else 0.0


def draw_num_steps(
    elastic: list[int] | None, share: float, seed: int, step: int, *, parts: int = 1, near: int | None = None
) -> list[int | None]:
    """Numbers of steps through the whole depth for the parts of one batch; of `seed` and `step` alone, so that all
    processes draw the same, and a resumed run what it would have drawn.

    The parts of a batch are drawn together, at equal distances of the cumulative distribution (systematic sampling): no
    part is drawn otherwise than it would be alone, and the parts differ as much as they can.

    Args:
        elastic: what to draw from; `None` for a student of one pace.
        share: of the parts, those that are drawn from `elastic`.
        seed: of the run.
        step: of the optimizer, in stage 2.
        parts: of the batch.
        near: L, to draw a number n in proportion to min(n, L) / max(n, L); `None` draws each alike.

    Returns:
        For each part a number of `elastic`, or `None` for the trained pace.
    """
    numbers = [None, *(elastic or ())]
    weights = [1.0 if near is None else min(number, near) / max(number, near) for number in numbers[1:]]
    shares = [1 - share, *(share * weight / sum(weights) for weight in weights)] if elastic else [1.0]
    points = (np.random.default_rng((seed, step)).random() + np.arange(parts)) / parts
    # the last share ends at 1, but for rounding
    found = np.searchsorted(np.cumsum(shares)[:-1], points, side="right")
    return [numbers[index] for index in found]


def group_weights(weights: list[float], sizes: tuple[int, int, int]) -> list[float]:
    """
    Weights of the token groups; where a group is empty (no registers), the others are scaled to the same sum.

    Args:
        weights: of cls, registers and patches, each at least 0.
        sizes: tokens in each group.

    Raises:
        ValueError: not three weights, a negative one, or nothing left to weigh.
    """
    if len(weights) != len(TOKEN_GROUPS) or min(weights) < 0:
        raise ValueError(f"weights is {weights}; it must be three numbers >= 0, for {', '.join(TOKEN_GROUPS)}.")
    present = [weight if size else 0.0 for weight, size in zip(weights, sizes, strict=True)]
    if sum(present) <= 0:
        raise ValueError(f"weights is {weights}; there must be a positive one for tokens that exist: {sizes}.")
    return [weight * sum(weights) / sum(present) for weight in present]


@dataclass(frozen=True)
class TrajectoryLoss:
    """The loss of one step: how far a state is from the teacher's.

    Args:
        kind: one of `LOSSES`: "mse"; "frobenius", the norm of the error of each image, averaged over images; "cosine",
            1 - cos of student and teacher, averaged over tokens; "normed_mse", the mse after the final norm.
        tokens: which tokens are cls, registers, patches.
        layer_scale: (L + 1,), what the error of each layer is divided by: the teacher's standard deviation in that
            layer for a normalised loss; `None` for none. A normalised "normed_mse" is divided by the mean square of
            the norm's gains instead, and "cosine" by nothing.
        added: weights of further kinds, whose losses are added.
        final_norm: of the teacher, frozen; for "normed_mse".

    Raises:
        ValueError: unknown kind, or "normed_mse" without a norm.
    """

    kind: str = "mse"
    tokens: TokenLayout = TokenLayout()
    layer_scale: Tensor | None = None
    added: Mapping[str, float] = field(default_factory=dict)
    final_norm: nn.LayerNorm | None = None

    def __post_init__(self) -> None:
        for kind in (self.kind, *self.added):
            if kind not in LOSSES:
                raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(LOSSES)}.")
        if self.kinds.get("normed_mse") and not hasattr(self.final_norm, "weight"):
            raise ValueError(
                f"final_norm is {self.final_norm}; it must be the teacher's final norm for the loss 'normed_mse'."
            )

    @property
    def kinds(self) -> dict[str, float]:
        """Weight of every kind that counts."""
        weights = {kind: weight for kind, weight in self.added.items() if weight}
        return weights | {self.kind: 1.0 + weights.get(self.kind, 0.0)}

    def __call__(self, student: Tensor, teacher: Tensor, layer: int, weights: list[float] | None = None) -> Tensor:
        """
        Args:
            student: state of the student, (B, T, D).
            teacher: state of the teacher, (B, T, D).
            layer: l, that both stand for.
            weights: of the groups cls, registers, patches, each group's loss being a mean over its tokens (or a norm);
                `None` for all tokens alike.

        Returns:
            scalar, float32.
        """
        student, teacher = student.float(), teacher.float()
        sizes = self.tokens.sizes(student.shape[1])
        return sum(
            factor * self._of_kind(kind, student, teacher, layer, weights, sizes) for kind, factor in self.kinds.items()
        )

    def _of_kind(
        self,
        kind: str,
        student: Tensor,
        teacher: Tensor,
        layer: int,
        weights: list[float] | None,
        sizes: tuple[int, int, int],
    ) -> Tensor:
        if kind == "normed_mse":
            student, teacher = self.final_norm(student), self.final_norm(teacher)
        distance = LOSSES[kind]
        if weights is None:
            loss = distance(student, teacher)
        else:
            # no difference of the states is kept for the gradient, only the states themselves, which are there anyway
            groups = zip(student.split(sizes, 1), teacher.split(sizes, 1), group_weights(weights, sizes), strict=True)
            loss = sum(weight * distance(own, target) for own, target, weight in groups if weight)
        if self.layer_scale is None or kind == "cosine":
            return loss
        if kind == "normed_mse":
            return loss / self.final_norm.weight.square().mean()
        scale = self.layer_scale[layer]
        return loss / (scale if kind == "frobenius" else scale.square())


def _frobenius(student: Tensor, teacher: Tensor) -> Tensor:
    """Norm of the difference of each image, averaged over images."""
    return (student - teacher).flatten(1).norm(dim=1).mean()


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of each token, averaged."""
    return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1).mean()


# distances of states of (B, T, D), by name
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": nn.functional.mse_loss,
    "frobenius": _frobenius,
    "cosine": _cosine,
    "normed_mse": nn.functional.mse_loss,
}


def runs(layers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Splits ascending layers into runs of consecutive ones: (1, 2, 5) gives (1, 2), (5,)."""
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(layers), start=1) if b != a + 1), len(layers)]
    return [layers[start:end] for start, end in pairwise(cuts)]


class DistillationTask(nn.Module):
    """The student with the losses of both stages; a module, so that Accelerate can wrap it.

    Args:
        student: the model whose blocks are trained.
        loss: of one step.
        stage1_weights: token-group weights of the block of layer L in stage 1; the others weigh all tokens alike.
            `None`: that block too.
        stage2_weights: token-group weights of every step in stage 2; `None` for all tokens alike.
        horizon: steps after which stage 2 starts again from the teacher's state; `None` for all L.
        input_noise: standard deviation of the Gaussian noise on the states that blocks start from, relative to the root
            mean square of each state.
        targets: what the teacher's state between two layers is, at another pace.

    Raises:
        ValueError: weights, horizon, noise or targets out of range.
    """

    def __init__(
        self,
        student: RaptorPreTrainedModel,
        loss: TrajectoryLoss,
        *,
        stage1_weights: list[float] | None = None,
        stage2_weights: list[float] | None = None,
        horizon: int | None = None,
        input_noise: float = 0.0,
        targets: Targets = "interpolated",
    ) -> None:
        super().__init__()
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon is {horizon}; it must be at least 1 step, or None for all.")
        if input_noise < 0:
            raise ValueError(f"input_noise is {input_noise}; it must be at least 0.")
        if targets not in get_args(Targets):
            raise ValueError(f"targets is {targets!r}; it must be one of {', '.join(get_args(Targets))}.")
        for weights in (stage1_weights, stage2_weights):
            if weights is not None:
                group_weights(weights, (1, 1, 1))
        self.student = student
        self.loss = loss
        self.stage1_weights, self.stage2_weights = stage1_weights, stage2_weights
        self.horizon, self.input_noise, self.targets = horizon, input_noise, targets

    @property
    def backbone(self) -> RaptorModel:
        return self.student.base_model

    def forward(
        self,
        states: Tensor,
        stage: int,
        forcing: float = 0.0,
        blocks: tuple[int, ...] | None = None,
        num_steps: int | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            states: the teacher's trajectory, (B, L + 1, T, D), before the final norm.
            stage: 1 or 2.
            forcing: lambda, the weight of teacher forcing against autoregression in stage 1.
            blocks: those to train in stage 1; `None` for all.
            num_steps: of stage 2, through the whole depth of a student with `step_scaling`; `None` for L.
            image_size: height and width in pixels of the images, which rotary positions depend on; `None` stands for a
                square of patches.

        Returns:
            "loss", the scalar to differentiate, and its parts, "block_J" for each block: its loss in stage 1, the mean
            over its steps in stage 2.
        """
        if stage == 2:
            return self.stage2_losses(states, num_steps, image_size)
        blocks = tuple(range(self.backbone.config.num_blocks)) if blocks is None else blocks
        losses = {f"block_{block}": self.stage1_loss(states, block, forcing, image_size) for block in blocks}
        return losses | {"loss": sum(losses.values())}

    def stage1_loss(
        self, states: Tensor, block: int, forcing: float, image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """
        lambda L_TF + (1 - lambda) L_AR of one block, each the mean over its steps.

        Teacher forcing takes every step from the teacher's state before it; autoregression starts from the teacher's
        state before each run of the block's layers and goes on from its own.
        """
        encoder, config = self.backbone.encoder, self.backbone.config
        layers = config.block_layers[block]
        weights = self.stage1_weights if config.num_hidden_layers in layers else None
        plan = tuple((block, float(layer)) for layer in layers)
        modulations = dict(zip(layers, encoder.modulations(plan), strict=True))
        step = functools.partial(encoder.blocks[block], positions=encoder.positions(states[:, 0], image_size))
        forced, rolled = [], []
        for run in runs(layers):
            state = None
            for layer in run:
                target = states[:, layer]
                if state is None or forcing > 0:
                    # the first step of a run is the same for both: each starts from the teacher
                    stepped = step(self._start(states[:, layer - 1]), *modulations[layer])[0]
                    forced.append(self.loss(stepped, target, layer, weights))
                if state is None:
                    state = stepped
                    rolled.append(forced[-1])
                elif forcing < 1:
                    state = step(state, *modulations[layer])[0]
                    rolled.append(self.loss(state, target, layer, weights))
        if forcing == 0:
            return torch.stack(rolled).mean()
        if forcing == 1:
            return torch.stack(forced).mean()
        return forcing * torch.stack(forced).mean() + (1 - forcing) * torch.stack(rolled).mean()

    def stage2_losses(
        self, states: Tensor, num_steps: int | None = None, image_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Autoregressive from a_0 through all steps (or afresh every `horizon` steps); means over the steps."""
        encoder, config = self.backbone.encoder, self.backbone.config
        plan, positions = config.step_plan(num_steps), encoder.positions(states[:, 0], image_size)
        horizon = self.horizon or len(plan)
        losses, reached = [], 0.0
        for step, ((block, depth), modulation) in enumerate(zip(plan, encoder.modulations(plan), strict=True)):
            if step % horizon == 0:
                state = self._start(self._target(states, reached))
            state = encoder.blocks[block](state, *modulation, positions=positions)[0]
            losses.append(self.loss(state, self._target(states, depth), _nearest_layer(depth), self.stage2_weights))
            reached = depth
        of_blocks: list[list[Tensor]] = [[] for _ in range(config.num_blocks)]
        for (block, _), loss in zip(plan, losses, strict=True):
            of_blocks[block].append(loss.detach())
        parts = {f"block_{block}": torch.stack(own).mean() for block, own in enumerate(of_blocks)}
        return parts | {"loss": torch.stack(losses).mean()}

    def _target(self, states: Tensor, depth: float) -> Tensor:
        """The teacher's state at a depth, of which the layers are the whole numbers."""
        below = int(depth)
        if depth == below or self.targets == "nearest":
            return states[:, _nearest_layer(depth)]
        return torch.lerp(states[:, below], states[:, below + 1], depth - below)

    def _start(self, state: Tensor) -> Tensor:
        # the teacher may be in half precision
        state = state.to(self.backbone.dtype)
        if self.input_noise == 0:
            return state
        scale = self.input_noise * state.float().square().mean(dim=(1, 2), keepdim=True).sqrt()
        return state + (torch.randn_like(state) * scale).to(state.dtype)


def _nearest_layer(depth: float) -> int:
    return int(depth + 0.5)


class LayerVariance(Accumulator):
    """Streams the teacher's variance in every layer: per feature over images and tokens, then the mean over features.

    Args:
        num_layers: L.
        hidden_size: D.
    """

    def __init__(self, num_layers: int, hidden_size: int) -> None:
        super().__init__(1 + 2 * (num_layers + 1) * hidden_size)
        self.shape = (2, num_layers + 1, hidden_size)

    def update(self, states: Tensor) -> None:
        """Adds a batch of trajectories, (B, L + 1, T, D)."""
        sums, squares = [], []
        # one layer at a time: float64 copies of all layers at once would not fit beside a teacher
        for layer in states.unbind(1):
            layer = in_float64(layer).flatten(0, 1)
            sums.append(layer.sum(0))
            squares.append(layer.square().sum(0))
        count = sums[0].new_full((1,), states.shape[0] * states.shape[2])
        self._add(torch.cat((count, *sums, *squares)))

    def compute(self) -> Tensor:
        """Variance of each layer 0..L, (L + 1,), float32."""
        self._require_any(self._sums[0], "images")
        mean, mean_square = self._sums[1:].view(self.shape) / self._sums[0]
        return (mean_square - mean.square()).clamp(min=0).mean(dim=1).float()
