"""Fits each block to the layers of its phase before training, so that the student follows its teacher from the start.

    student = student_from_teacher(teacher, (6, 4, 2), init="middle", depth_conditioning="low_rank")
    fit_to_teacher(teacher, student, batches_of_pixel_values)

The weights of the layers of a phase are nearly orthogonal, so they give no common block directly. What a branch adds to
the tokens, however, is linear in the weight of its last projection. Ridge regression finds this weight, which all steps
of a phase share, and a gain and a shift of each step where the conditioning has them. No gradient is taken. The first
projections stay those that the student started with.
"""

import copy
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from raptor_settings.distill import DistillSettings
from torch import Tensor, nn

from ..configuration_raptor import RaptorConfig
from ..modeling_raptor import RaptorBlock, RaptorEncoder, RaptorPreTrainedModel, StepModulation
from ..recipes.loop import progress_bar
from ..teacher import Teacher
from .task import LayerVariance, runs
from .units import UnitScores, check_units, gather_units, inverse_variance, lasting_weights

# the last projection of each branch, with what the "low_rank" conditioning changes of it
BRANCHES = {
    "attention": ("attention.proj", "layer_scale1", "layer_scale1_gain", "attention_shift"),
    "ffn": ("ffn.fc2", "layer_scale2", "layer_scale2_gain", "ffn_shift"),
}

# the modules that see what the last projections read, before any gain by step, and the tables of these gains
UNITS = {"attention": ("attention.heads", "heads_gain"), "ffn": ("ffn.neurons", "neurons_gain")}

# how many times gains of units and the projection are fitted in turn, and how strongly these gains are pulled to
# what they were, as in `solve_ridge`
GATE_ROUNDS, GATE_RIDGE = 2, 0.03

# of each image, the tokens whose rows enter a regression: those of one image tell much the same
TOKENS_PER_IMAGE = 32

# what `RaptorEncoder.positions` gives: cosines and sines, or None
Positions = tuple[Tensor, Tensor] | None


class NormalEquations:
    """Float64 sums of a linear regression with an intercept, which `solve_tied` weights, adds and solves.

    Args:
        num_features: F.
        num_targets: D.
        device: of the sums.
    """

    def __init__(self, num_features: int, num_targets: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_features + 1, num_targets, dtype=torch.float64, device=device)
        self.square = torch.zeros(num_targets, dtype=torch.float64, device=device)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Adds rows: features, (..., F), and targets, (..., D)."""
        features, targets = features.flatten(0, -2).float(), targets.flatten(0, -2).float()
        features = torch.cat((features, features.new_ones(len(features), 1)), dim=1)
        with torch.autocast(features.device.type, enabled=False):
            self.gram += (features.T @ features).double()
            self.cross += (features.T @ targets).double()
        self.square += targets.square().sum(dim=0, dtype=torch.float64)

    def fade(self, factor: float) -> None:
        """Multiplies the weight of all rows so far by a factor."""
        for total in (self.gram, self.cross, self.square):
            total *= factor

    def gated(self, gate: Tensor) -> "NormalEquations":
        """The sums that the rows would have if each feature were multiplied by its gate, (F,)."""
        result = copy.copy(self)
        gate = torch.cat((gate.double(), gate.new_ones(1, dtype=torch.float64)))
        result.gram, result.cross = self.gram * gate[:, None] * gate, self.cross * gate[:, None]
        result.square = self.square.clone()
        return result

    def gate(self, weight: Tensor, start: Tensor, ridge: float) -> Tensor:
        """The gate, (F,), with which (features * gate) @ weight and an intercept fit the targets best.

        Args:
            weight: (F, D).
            start: what the gate is pulled to, (F,).
            ridge: strength of that pull, as in `solve_ridge`.
        """
        gram, cross = centred(self.gram, self.cross)
        needed = (cross * weight).sum(1, keepdim=True)
        return solve_ridge(gram * (weight @ weight.T), needed, start[:, None].double(), ridge)[:, 0]

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of the features, (F,), and of the targets, (D,)."""
        return self.gram[-1, :-1] / self.gram[-1, -1], self.cross[-1] / self.gram[-1, -1]

    def spread(self) -> float:
        """Root of the targets' squared deviations from their mean, summed over rows and targets."""
        return float(self._squared_deviations().sum().sqrt())

    def products(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Squared deviations of features @ weight from their mean, and their products with those of the targets.

        Both are sums over rows, (D,). The deviations are not formed, which would cost as much as the products.
        """
        count, (features, targets) = self.gram[-1, -1], self.means
        mean = features @ weight
        fitted = (weight * (self.gram[:-1, :-1] @ weight)).sum(0) - count * mean.square()
        return fitted, (weight * self.cross[:-1]).sum(0) - count * mean * targets

    def residual(self, gain: Tensor, fitted: Tensor, needed: Tensor) -> float:
        """Squared error per row of the targets by (features @ weight) * gain and an intercept, summed over targets.

        Args:
            gain: (D,).
            fitted, needed: `products` of the weight.
        """
        error = self._squared_deviations() - 2 * gain * needed + gain.square() * fitted
        return float(error.sum().clamp(min=0) / self.gram[-1, -1])

    def _squared_deviations(self) -> Tensor:
        return (self.square - self.gram[-1, -1] * self.means[1].square()).clamp(min=0)


class TokenSample:
    """Draws the tokens of a batch that enter a regression; the draws are the same in every process and every run."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, states: Tensor) -> Tensor:
        """At most `TOKENS_PER_IMAGE` positions of states, (B, T, D): the first, where a cls token is, and others."""
        others = 1 + torch.randperm(states.shape[1] - 1, generator=self.generator)
        return torch.cat((torch.zeros(1, dtype=torch.long), others))[:TOKENS_PER_IMAGE].to(states.device)


def solve_ridge(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Minimises |X W - Y|^2 + ridge m |W - prior|^2, where m is the mean of the features' sums of squares.

    Args:
        gram: X^T X, (F, F), float64.
        cross: X^T Y, (F, D), float64.
        prior: what W is pulled to, (F, D).
        ridge: at least 0; above 0 unless the rows determine all of W.

    Returns:
        W, (F, D), float64.
    """
    strength = (ridge * gram.diagonal().mean()).clamp(min=1e-30)  # without any feature, W is the prior
    regularised = gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(regularised, cross + strength * prior)


@torch.no_grad()
def fit_to_teacher(
    teacher: Teacher,
    student: RaptorPreTrainedModel,
    batches: Iterable[Tensor],
    *,
    rounds: int = 2,
    ridge: float | None = None,
    memory: float = 0.5,
) -> None:
    """Fits the last projections of both branches of every block to the teacher's trajectory, in place.

    The blocks are fitted one after the other, each in several rounds. The first round starts from the teacher's states.
    Every further round starts from the states that the student reaches with the weights so far, and its targets are the
    differences to the teacher's next states. Earlier rounds keep some weight: without them the student would leave the
    states that it was fitted on. LayerScale becomes one.

    With `unit_gains`, a block first takes the most important heads and neurons of all layers of its phase, and the
    gains by step of each are fitted too.

    Args:
        teacher: of a family whose layers can become blocks.
        student: of its shape, with blocks that start from its layers, as `student_from_teacher` makes it with any
            `init` but "random", or by any with `unit_gains`. Gains by step are fitted with the conditioning "low_rank",
            shifts with its `branch_shifts`, and gains of units with its `unit_gains`.
        batches: of pixel values, (B, C, H, W), on the device: of a hundred photographs, with `unit_gains` of 500 or
            more. Two trajectories of each image are kept in memory, and at most `TOKENS_PER_IMAGE` of its tokens enter
            a fit.
        rounds: number of rounds after the first one.
        ridge: strength of the pull towards the start, relative to the features' mean square; None takes 0.3, or 0.1
            with `unit_gains`, whose start is nearer.
        memory: weight of the rows of each round in the next one, from 0 to below 1.

    Raises:
        ValueError: if there is no batch, or the teacher's layers cannot become such blocks.
    """
    encoder, config = student.base_model.encoder, student.config
    if config.unit_gains:
        check_units(teacher, config)  # before the teacher runs
    was_training = student.training
    student.eval()
    trajectories, positions, variance = run_teacher(teacher, encoder, batches)
    weights = (lasting_weights if config.unit_gains else inverse_variance)(variance)
    scores = UnitScores() if config.unit_gains else None
    middles = between_branches(teacher, trajectories, positions, scores)
    if scores is not None:
        for block in range(config.num_blocks):
            gather_units(teacher, encoder, block, scores, weights)
    ridge = (0.3 if scores is None else 0.1) if ridge is None else ridge
    states = [trajectory[0].float() for trajectory in trajectories]
    known = 0  # layers before which the student has states of its own
    for block, layers in enumerate(config.block_layers):
        fit = _BlockFit(encoder, block, layers, weights, ridge)
        own = states if layers[0] == known + 1 and len(runs(layers)) == 1 else None
        for turn in range(rounds + 1):
            for branch in BRANCHES:
                fit.fade(branch, memory)
                for index, trajectory in enumerate(trajectories):
                    start = None if own is None or turn == 0 else own[index]
                    fit.collect(branch, trajectory, middles[index], start, positions[index])
                fit.solve(branch)
        if own is not None:
            states, known = [fit.advance(*pair) for pair in zip(states, positions, strict=True)], layers[-1]
    student.train(was_training)


class _BlockFit:
    """The fit of one block."""

    def __init__(self, encoder: Any, block: int, layers: tuple[int, ...], weights: Tensor, ridge: float) -> None:
        self.encoder, self.layers, self.weights, self.ridge = encoder, layers, weights, ridge
        self.block: RaptorBlock = encoder.blocks[block]
        self.conditioner: nn.Module = encoder.conditioners[block]
        self.plan = tuple((block, float(layer)) for layer in layers)
        self.sample = TokenSample()
        self.prior, self.sums = {}, {}
        for branch, (name, scale_name, _, _) in BRANCHES.items():
            projection, scale = self.block.get_submodule(name), getattr(self.block, scale_name).lambda1
            self.prior[branch] = (projection.weight * scale[:, None]).double().T
            projection.weight.copy_(projection.weight * scale[:, None])
            if projection.bias is not None:
                projection.bias.copy_(projection.bias * scale)
            scale.fill_(1.0)
            shape = projection.in_features, projection.out_features
            self.sums[branch] = [NormalEquations(*shape, device=projection.weight.device) for _ in layers]

    def modulations(self) -> list[StepModulation]:
        return self.encoder.modulations(self.plan)

    def advance(self, state: Tensor, positions: Positions) -> Tensor:
        """The state after all steps of the block."""
        for modulation in self.modulations():
            state = self.block(state, *modulation, positions=positions)[0].float()
        return state

    def fade(self, branch: str, memory: float) -> None:
        for equations in self.sums[branch]:
            equations.fade(memory)

    def collect(
        self, branch: str, trajectory: Tensor, middles: Tensor, start: Tensor | None, positions: Positions
    ) -> None:
        """Adds a batch to the normal equations, from the student's own states, or with None from the teacher's."""
        state = start
        for index, (layer, modulation) in enumerate(zip(self.layers, self.modulations(), strict=True)):
            if start is None:
                state = trajectory[layer - 1].float()
            with watch_branches(self.block) as seen:
                output = self.block(state, *modulation, positions=positions)[0].float()
            if branch == "attention":
                features, target = seen["attention"], middles[layer].float() - state
            else:
                features, target = seen["ffn"], trajectory[layer].float() - seen["middle"].float()
            chosen = self.sample(target)
            self.sums[branch][index].add(features[:, chosen], target[:, chosen])
            state = output

    def solve(self, branch: str) -> None:
        """The projection that fits all steps best, then each step's gain and shift; and the gains of units in turn."""
        gates, steps = getattr(self.conditioner, UNITS[branch][1], None), self.sums[branch]
        if gates is None:
            self.solve_projection(branch, steps)
            return
        self.solve_projection(branch, _gated(steps, gates))
        for _ in range(GATE_ROUNDS):
            weight = self.block.get_submodule(BRANCHES[branch][0]).weight.double().T
            for equations, gate, gain in zip(steps, gates, getattr(self.conditioner, BRANCHES[branch][2]), strict=True):
                gate.copy_(equations.gate(weight * (1 + gain.double()), 1 + gate, GATE_RIDGE) - 1)
            self.solve_projection(branch, _gated(steps, gates))

    def solve_projection(self, branch: str, steps: list[NormalEquations]) -> None:
        """The projection, and each step's gain and shift, for these equations."""
        name, _, gain_name, shift_name = BRANCHES[branch]
        projection, prior = self.block.get_submodule(name), self.prior[branch]
        gains, shifts = getattr(self.conditioner, gain_name, None), getattr(self.conditioner, shift_name, None)
        importance, bias = [self.weights[layer] for layer in self.layers], None
        if shifts is not None:
            weight, fitted, _ = solve_tied(steps, importance, prior, self.ridge)
            for index, (equations, gain) in enumerate(zip(steps, fitted, strict=True)):
                features, targets = equations.means
                shifts[index] = targets - gain * (features @ weight)
                gains[index] = gain - 1
        else:
            scales = [1.0] * len(steps) if gains is None else _relative_spreads(steps)
            rows = list(zip(steps, scales, importance, strict=True))
            gram = sum(share * scale**2 * equations.gram for equations, scale, share in rows)
            cross = sum(share * scale * equations.cross for equations, scale, share in rows)
            if projection.bias is None:
                weight = solve_ridge(gram[:-1, :-1], cross[:-1], prior, self.ridge)
            else:
                weight, bias = solve_with_intercept(gram, cross, prior, self.ridge)
            if gains is not None:
                gains.copy_(torch.tensor(scales)[:, None].expand_as(gains) - 1)
        projection.weight.copy_(weight.T)
        if projection.bias is not None:
            projection.bias.copy_(torch.zeros_like(projection.bias) if bias is None else bias)
        torch.clear_autocast_cache()  # which has a half-precision copy of the weight before


def _gated(steps: list[NormalEquations], gates: Iterable[Tensor]) -> list[NormalEquations]:
    return [equations.gated(1 + gate) for equations, gate in zip(steps, gates, strict=True)]


def _relative_spreads(steps: list[NormalEquations]) -> list[float]:
    """How far the targets of every step spread, relative to all: the scale of a step before any gain is fitted."""
    spreads = [equations.spread() for equations in steps]
    reference = (sum(spread * spread for spread in spreads) / len(spreads)) ** 0.5
    return [spread / reference if reference else 1.0 for spread in spreads]


class TiedFit(NamedTuple):
    """One weight for all steps of a block, (F, D), and each step's gains, (D,), and squared error per row."""

    weight: Tensor
    gains: list[Tensor]
    errors: list[float]


def solve_tied(steps: list[NormalEquations], importance: list[Tensor], prior: Tensor, ridge: float) -> TiedFit:
    """Finds one weight for all steps, and for each step an intercept and a gain of every target.

    The gains are fitted after the weight, and are pulled a little to the spread of the step's targets.

    Args:
        steps: the normal equations of each step.
        importance: of the squared error of each step.
        prior: what the weight is pulled to, (F, D): that of the step in the middle.
        ridge: strength of that pull, as in `solve_ridge`.

    Returns:
        Weight and gains in float64.
    """
    scales = _relative_spreads(steps)
    gram, cross = prior.new_zeros(len(prior), len(prior)), torch.zeros_like(prior)
    for equations, scale, share in zip(steps, scales, importance, strict=True):
        share, count, (features, targets) = float(share) * scale, float(equations.gram[-1, -1]), equations.means
        gram.add_(equations.gram[:-1, :-1], alpha=share * scale)
        gram.addr_(features, features, alpha=-share * scale * count)
        cross.add_(equations.cross[:-1], alpha=share).addr_(features, targets, alpha=-share * count)
    weight = solve_ridge(gram, cross, prior, ridge)
    gains, errors = [], []
    for equations, scale in zip(steps, scales, strict=True):
        fitted, needed = equations.products(weight)
        pull = 0.01 * fitted.mean().clamp(min=1e-30)
        gains.append((needed + pull * scale) / (fitted + pull))
        errors.append(equations.residual(gains[-1], fitted, needed))
    return TiedFit(weight, gains, errors)


def solve_with_intercept(gram: Tensor, cross: Tensor, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Solves for W, (F, D), and b, (D,), from sums whose last feature is one; b is not pulled to anything."""
    features, targets = gram[-1, :-1] / gram[-1, -1], cross[-1] / gram[-1, -1]
    weight = solve_ridge(*centred(gram, cross), prior, ridge)
    return weight, targets - features @ weight


def centred(gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Sums about the means, (F, F) and (F, D), from sums whose last feature is one."""
    count = gram[-1, -1]
    features, targets = gram[-1, :-1] / count, cross[-1] / count
    return gram[:-1, :-1] - count * torch.outer(features, features), cross[:-1] - count * torch.outer(features, targets)


def run_teacher(
    teacher: Teacher, encoder: RaptorEncoder, batches: Iterable[Tensor]
) -> tuple[list[Tensor], list[Positions], Tensor]:
    """Runs a teacher on all batches.

    Args:
        teacher: L layers.
        encoder: of a student of it, which knows the positions.
        batches: of pixel values, (B, C, H, W).

    Returns:
        The trajectory of each batch, (L + 1, B, T, D), its positions, and the variance of each layer, (L + 1,).

    Raises:
        ValueError: if there is no batch.
    """
    variance = LayerVariance(teacher.num_layers, teacher.hidden_size)
    trajectories, positions = [], []
    for pixel_values in batches:
        states = teacher.trajectory(pixel_values)
        positions.append(encoder.positions(states[:, 0].float(), pixel_values.shape[2:]))
        variance.update(states)
        trajectories.append(states.transpose(0, 1))
    if not trajectories:
        raise ValueError("batches is empty; it must give at least one batch of images to fit blocks to")
    return trajectories, positions, variance.compute()


def between_branches(
    teacher: Teacher, trajectories: list[Tensor], positions: list[Positions], scores: UnitScores | None = None
) -> list[Tensor]:
    """Returns the teacher's tokens after the attention of every layer, (L + 1, B, T, D); entry 0 is not defined.

    What the layers' heads and neurons add is counted in `scores`.
    """
    middles, sample = [torch.empty_like(trajectory) for trajectory in trajectories], TokenSample()
    for layer, block, batches in watch_layers(teacher, trajectories, positions):
        for middle, seen in zip(middles, batches, strict=True):
            middle[layer] = seen["middle"]
            if scores is not None:
                chosen = sample(seen["middle"])
                scores.add(layer, block, seen["attention"][:, chosen], seen["ffn"][:, chosen])
    return middles


def watch_layers(
    teacher: Teacher, trajectories: list[Tensor], positions: list[Positions]
) -> Iterator[tuple[int, RaptorBlock, Iterator[dict[str, Tensor]]]]:
    """Runs every layer 1..L of a teacher as a block; gives its number, the block, and what is seen in each batch.

    The block and what `watch_branches` sees in it are those of a layer only until the next one is asked for.
    """
    # without gradients, or autocast would go on with the half-precision copy of the first layer's weights
    config = RaptorConfig.from_teacher(teacher.config, (teacher.num_layers,), attn_implementation="sdpa")
    block = RaptorBlock(config).to(trajectories[0].device).eval().requires_grad_(False)
    for layer in range(1, teacher.num_layers + 1):
        *before, last = teacher.span(layer)
        states = [trajectory[layer - 1].float() for trajectory in trajectories]
        for original in before:
            block.load_state_dict(teacher.block_state_dict(original))
            states = [block(state, positions=own)[0] for state, own in zip(states, positions, strict=True)]
        block.load_state_dict(teacher.block_state_dict(last))
        yield layer, block, _watch(block, states, positions)


def _watch(block: RaptorBlock, states: list[Tensor], positions: list[Positions]) -> Iterator[dict[str, Tensor]]:
    for state, own in zip(states, positions, strict=True):
        with watch_branches(block) as seen:
            block(state, positions=own)
        yield seen


@contextmanager
def watch_branches(block: RaptorBlock) -> Iterator[dict[str, Tensor]]:
    """Records what the last projection of each branch reads, and as "middle" the tokens between the branches."""
    seen: dict[str, Tensor] = {}
    places = {branch: block.get_submodule(name) for branch, (name, _) in UNITS.items()} | {"middle": block.norm2}
    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.__setitem__(name, inputs[0]))
        for name, module in places.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def fit_student(
    teacher: Teacher,
    student: nn.Module,
    loader: functools.partial,
    settings: DistillSettings,
    accelerator: Accelerator,
) -> None:
    """Fit the blocks on the first `fit_images` training images, in whole batches, the same on every process."""
    num_steps = max(1, settings.fit_images // settings.batch_size)
    batches = loader(num_steps=num_steps, process_index=0, num_processes=1)
    student.to(accelerator.device)
    # without graphs of compiled blocks, which could neither take the hooks of the fit in nor lose them afterwards
    with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
        images = (batch["pixel_values"].to(accelerator.device) for batch in batches)
        fit_to_teacher(teacher, student, progress_bar(images, "fit", accelerator, num_steps))
    if accelerator.num_processes > 1:  # kernels may differ in the last bits from process to process
        for parameter in student.parameters():
            broadcast(parameter.data)
