"""Dynamic mode decomposition along depth: fits one linear map to each phase, and measures how far it predicts.

    accumulator = DMDAccumulator(hidden_size=768, spans=[(0, 7), (7, 10), (10, 12)])
    for states in trajectories:                        # (B, L + 1, T, D)
        accumulator.update(states)
    operators = accumulator.fit(ridge=1e-4, rank=64)
    errors = DMDErrors(operators, teacher.tokens, max_steps=4)
    for states in other_trajectories:
        errors.update(states)

For every span (start, end] of layers one operator K minimises sum ||x_l K - x_(l+1)||^2 + ridge over all tokens of all
images and the layers of the span: normal equations, which stream (Schmid, 2010; along depth, arXiv 2605.07556).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..accumulators import Curve, MatrixAccumulator, MomentAccumulator, in_float64
from ..teacher import Teacher
from ..tokens import TokenLayout
from .motion import Result, layer_first_chunks

BASELINES = ("identity", "endpoint")


@dataclass(frozen=True, eq=False)
class SpanOperator(Result):
    """The linear model of one span.

    Attributes:
        span: (start, end], in the numbering of states.
        operator: K, (D, D); a state is a row, so a step is x @ K.
        endpoint: one map fitted from the first state of the span to its last, (D, D), which need not be a power of
            another map.
        eigenvalues: of K on the directions that were kept, complex, by descending modulus, (r,).
    """

    span: tuple[int, int]
    operator: Tensor
    endpoint: Tensor
    eigenvalues: Tensor

    def to_dict(self) -> dict:
        """Returns span and eigenvalues; the operators are too large for a report."""
        return {"span": list(self.span), "eigenvalues": torch.view_as_real(self.eigenvalues).tolist()}


class DMDAccumulator(MatrixAccumulator):
    """Streams trajectories into the normal equations of every span: 4 matrices (D, D) each.

    Args:
        hidden_size: D.
        spans: (start, end] of each, in the numbering of states.

    Raises:
        ValueError: if a span holds no layer.
    """

    def __init__(self, hidden_size: int, spans: Sequence[tuple[int, int]]):
        self.hidden_size, self.spans = hidden_size, [(int(start), int(end)) for start, end in spans]
        if not self.spans or any(not 0 <= start < end for start, end in self.spans):
            raise ValueError(f"spans is {list(spans)}; it must be one or more (start, end] with 0 <= start < end")
        super().__init__((len(self.spans), 4, hidden_size, hidden_size))

    @torch.no_grad()
    def update(self, states: Tensor) -> None:
        """Adds a batch of trajectories, (B, L + 1, T, D), before the final norm.

        Raises:
            ValueError: if the spans do not fit, or D is another.
        """
        last = max(end for _, end in self.spans)
        if states.ndim != 4 or states.shape[1] <= last or states.shape[3] != self.hidden_size:
            raise ValueError(
                f"states must be (B, L + 1 > {last}, T, {self.hidden_size}) for spans={self.spans}, "
                f"but is {tuple(states.shape)}"
            )
        matrices = self._matrices(states.device)
        for x in map(in_float64, layer_first_chunks(states)):
            for index, (start, end) in enumerate(self.spans):
                inputs, outputs = x[start:end].flatten(0, 2), x[start + 1 : end + 1].flatten(0, 2)
                first, final = x[start].flatten(0, 1), x[end].flatten(0, 1)
                later = inputs[len(first) :]
                of_first, product = first.T @ first, inputs.T @ outputs
                # in a span of one layer they are the same
                to_final = product if end == start + 1 else first.T @ final
                for sums, values in zip(
                    matrices[index], (of_first + later.T @ later, product, of_first, to_final), strict=True
                ):
                    sums += values

    def fit(self, ridge: float = 1e-4, rank: int | None = None) -> list[SpanOperator]:
        """Solves for the operators, in float64.

        Args:
            ridge: added to the eigenvalues of X^T X, as a share of their mean.
            rank: directions of largest variance of X that K acts on; the others are dropped. None keeps all.

        Raises:
            ValueError: if ridge is negative, rank is not in 1 .. D, or no image was seen.
        """
        if not ridge >= 0 or not (rank is None or 1 <= rank <= self.hidden_size):
            raise ValueError(
                f"ridge is {ridge} and rank is {rank}; they must be at least 0, and in 1..{self.hidden_size} or None"
            )
        self._require_any(self._matrices().abs().sum(), "images")
        operators = []
        for span, (xx, xy, first, final) in zip(self.spans, self._matrices(), strict=True):
            operator, basis = _solve(xx, xy, ridge, rank)
            eigenvalues = torch.linalg.eigvals(basis.T @ operator @ basis)
            eigenvalues = eigenvalues[eigenvalues.abs().argsort(descending=True)]
            operators.append(SpanOperator(span, operator, _solve(first, final, ridge, rank)[0], eigenvalues))
        return operators


def _solve(xx: Tensor, xy: Tensor, ridge: float, rank: int | None) -> tuple[Tensor, Tensor]:
    """K = V (S + ridge)^-1 V^T X^T Y with the leading eigenvectors V of X^T X, and V."""
    eigenvalues, eigenvectors = torch.linalg.eigh(xx)
    kept = len(xx) if rank is None else rank
    values, basis = eigenvalues[-kept:], eigenvectors[:, -kept:]
    # float32 rounds states by so much: what is smaller holds nothing but rounding, and has no dynamics to fit
    usable = values > len(xx) * torch.finfo(torch.float32).eps ** 2 * eigenvalues[-1]
    values, basis = values[usable], basis[:, usable]
    values = values + ridge * eigenvalues.mean()
    return basis @ ((basis.T @ xy) / values[:, None]), basis


@dataclass(frozen=True, eq=False)
class DMDSpanErrors(Result):
    """How well K^p predicts p steps ahead in one span, from every layer that has so many left, by token group.

    Every mapping goes from "dmd", "identity" (the state itself) and, for the whole span, "endpoint" (one map fitted
    for just this) to the token groups.

    Attributes:
        span: (start, end].
        cosine_error: 1 - cos between prediction and state for p = 1 .. P, curves (P,).
        relative_error: ||prediction - state|| / ||state||, curves (P,).
        whole_cosine_error: 1 - cos after the whole span, curves of shape ().
    """

    span: tuple[int, int]
    cosine_error: dict[str, dict[str, Curve]]
    relative_error: dict[str, dict[str, Curve]]
    whole_cosine_error: dict[str, dict[str, Curve]]


class DMDErrors(MomentAccumulator):
    """Streams trajectories into the errors of operators, best on other images than they were fitted on.

    Args:
        operators: of `DMDAccumulator.fit`.
        tokens: which tokens are cls, registers, patches.
        max_steps: P; a span of fewer layers has fewer.
    """

    def __init__(self, operators: Sequence[SpanOperator], tokens: TokenLayout, max_steps: int = 4):
        self.operators, self.max_steps = list(operators), max_steps
        self.groups = tokens.slices
        shapes = {}
        for index, operator in enumerate(self.operators):
            steps = (self._num_steps(operator),)
            for group in self.groups:
                for kind, error in itertools.product(("dmd", "identity"), ("cosine", "relative")):
                    shapes[f"{index}.{error}.{kind}.{group}"] = steps
                for kind in ("dmd", *BASELINES):
                    shapes[f"{index}.whole.{kind}.{group}"] = ()
        super().__init__(shapes)

    def _num_steps(self, operator: SpanOperator) -> int:
        return min(self.max_steps, operator.span[1] - operator.span[0])

    @torch.no_grad()
    def update(self, states: Tensor) -> None:
        """Adds a batch of trajectories, (B, L + 1, T, D), before the final norm."""
        for x in layer_first_chunks(states):
            for index, operator in enumerate(self.operators):
                self._add_span(index, operator, x)

    def _add_span(self, index: int, operator: SpanOperator, x: Tensor) -> None:
        start, end = operator.span
        step = operator.operator.to(x)
        curves: dict[str, list[Tensor]] = {}
        predicted = x[start:end]
        for p in range(1, self._num_steps(operator) + 1):
            # from states start .. end - p, by one step more than the round before
            predicted = predicted[: end - start - p + 1] @ step
            truth = x[start + p : end + 1]
            for kind, guess in (("dmd", predicted), ("identity", x[start : end - p + 1])):
                for error, values in (("cosine", _cosine_error(guess, truth)), ("relative", _relative(guess, truth))):
                    curves.setdefault(f"{index}.{error}.{kind}", []).append(values.mean(0))
        for name, steps in curves.items():
            per_token = torch.stack(steps, -1)  # (b, T, P)
            for group, tokens in self.groups.items():
                self.add(f"{name}.{group}", per_token[:, tokens].mean(1))
        guesses = {"dmd": roll_out(x[start], operator), "identity": x[start]}
        guesses["endpoint"] = x[start] @ operator.endpoint.to(x)
        for kind, guess in guesses.items():
            error = _cosine_error(guess, x[end])
            for group, tokens in self.groups.items():
                self.add(f"{index}.whole.{kind}.{group}", error[:, tokens].mean(1))

    def compute(self) -> list[DMDSpanErrors]:
        """Returns the errors of every span over all images seen.

        Raises:
            ValueError: if no image was seen.
        """

        def curves(index: int, error: str, kinds: Sequence[str]) -> dict[str, dict[str, Curve]]:
            return {
                kind: {group: self.curve(f"{index}.{error}.{kind}.{group}") for group in self.groups} for kind in kinds
            }

        return [
            DMDSpanErrors(
                operator.span,
                curves(index, "cosine", ("dmd", "identity")),
                curves(index, "relative", ("dmd", "identity")),
                curves(index, "whole", ("dmd", *BASELINES)),
            )
            for index, operator in enumerate(self.operators)
        ]


@dataclass(frozen=True, eq=False)
class DMDContinuation(Result):
    """Error of a linear phase where it ends, and after the model's own remaining layers have run.

    Attributes:
        span: (start, end] that was replaced by K^(end - start), the operator applied once per layer.
        error_at_end: 1 - cos to the true state, mean over tokens, where the span ends; curve of shape ().
        error_at_last: the same after the remaining layers.
        identity_at_last: the same if the span is left out altogether.
        agreement: fraction of predictions that stay, None without a classifier.
    """

    span: tuple[int, int]
    error_at_end: Curve
    error_at_last: Curve
    identity_at_last: Curve
    agreement: Curve | None


class ContinuationExperiment(MomentAccumulator):
    """Replaces every span in turn by its linear model, and runs the remaining layers of the model.

    Args:
        teacher: the model the operators are of.
        operators: of `DMDAccumulator.fit`.
    """

    def __init__(self, teacher: Teacher, operators: Sequence[SpanOperator]):
        self.teacher, self.operators = teacher, list(operators)
        names = ("end", "last", "identity") + (("agreement",) if teacher.classifier is not None else ())
        super().__init__({f"{index}.{name}": () for index in range(len(self.operators)) for name in names})

    @torch.no_grad()
    def update(self, states: Tensor) -> None:
        """Adds a batch of the teacher's trajectories, (B, L + 1, T, D)."""
        truth = self.teacher.logits(states[:, -1])
        wide = torch.promote_types(states.dtype, torch.float32)
        for index, operator in enumerate(self.operators):
            start, end = operator.span
            rest = range(end + 1, self.teacher.num_layers + 1)
            # the powers in at least float32: the error is to be that of the operator, not of its rounding
            predicted = roll_out(states[:, start].to(wide), operator)
            last = self.teacher.run_layers(predicted.to(states.dtype), rest)[:, -1]
            skipped = self.teacher.run_layers(states[:, start], rest)[:, -1]
            self.add(f"{index}.end", _cosine_error(predicted, states[:, end]).mean(1))
            self.add(f"{index}.last", _cosine_error(last, states[:, -1]).mean(1))
            self.add(f"{index}.identity", _cosine_error(skipped, states[:, -1]).mean(1))
            if truth is not None:
                same = self.teacher.logits(last).argmax(1) == truth.argmax(1)
                self.add(f"{index}.agreement", same)

    def compute(self) -> list[DMDContinuation]:
        """Returns the errors of every span, over all images seen.

        Raises:
            ValueError: if no image was seen.
        """
        return [
            DMDContinuation(
                operator.span,
                *(self.curve(f"{index}.{name}") for name in ("end", "last", "identity")),
                agreement=self.curve(f"{index}.agreement") if self.teacher.classifier is not None else None,
            )
            for index, operator in enumerate(self.operators)
        ]


def roll_out(state: Tensor, operator: SpanOperator) -> Tensor:
    """Applies the operator once for every layer of its span to a state, (..., D)."""
    start, end = operator.span
    step = operator.operator.to(state)
    for _ in range(start, end):
        state = state @ step
    return state


def _cosine_error(guess: Tensor, truth: Tensor) -> Tensor:
    wide = torch.promote_types(guess.dtype, torch.float32)
    return 1 - F.cosine_similarity(guess.to(wide), truth.to(wide), dim=-1)


def _relative(guess: Tensor, truth: Tensor) -> Tensor:
    return torch.linalg.vector_norm(guess - truth, dim=-1) / torch.linalg.vector_norm(truth, dim=-1)
