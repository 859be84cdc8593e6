"""Reads predictions, attention and outlying tokens at every state of a trajectory.

    states = model.trajectory(pixel_values)            # (B, L + 1, T, D), of a teacher or of a student
    readings(model, states)                            # (B, L + 1, num_labels), the logit lens
    patch_readings(model, states)                      # (B, L + 1, P, num_labels), patch by patch
    tuned = TunedLens(model.num_layers, model.hidden_size)
    for batch in trajectories:
        tuned.update(batch)
    readings(model, tuned.fit().apply(states))         # the tuned lens
    rollout(attention_maps(model, pixel_values))       # (B, L, T, T), from every state back to the embeddings
    artefacts(states, model.tokens)                    # (B, L + 1, P), patches of an outlying norm

The logit lens is nostalgebraist's (2020), the tuned lens that of arXiv 2303.08112, here in closed form; rollout is of
arXiv 2005.00928, artefacts are those of arXiv 2309.16588.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..accumulators import MatrixAccumulator, in_float64
from ..teacher import Teacher
from ..tokens import TokenLayout
from .motion import Result, layer_first_chunks

# what a linear map from the model's head features to scores is called with
Classifier = Callable[[Tensor], Tensor]
# of a median absolute deviation, what the standard deviation of a normal distribution is
MAD_TO_STD = 1.4826


@torch.no_grad()
def readings(model: Teacher, states: Tensor, classifier: Classifier | None = None) -> Tensor:
    """Returns what the model's head answers at every state, as if the model ended there.

    Args:
        model: teacher or student.
        states: (B, L + 1, T, D), before the final norm.
        classifier: a probe on `Teacher.features`; None takes the model's own.

    Returns:
        Scores, (B, L + 1, C).

    Raises:
        ValueError: if there is no classifier.
    """
    classifier = _classifier(model, classifier)
    return torch.stack([classifier(model.features(state)) for state in states.unbind(1)], 1)


@torch.no_grad()
def patch_readings(model: Teacher, states: Tensor, classifier: Classifier | None = None) -> Tensor:
    """Returns what the model's head answers for each patch, as if all patches were like it.

    Each patch stands in for the mean patch, beside the class token, where the head has one; so the mean over patches is
    the answer of `readings`, for a head that is linear. For a head on the class token alone, the patch stands in for
    this token.

    Args:
        model: teacher or student.
        states: (B, L + 1, T, D), before the final norm.
        classifier: a probe on `Teacher.features`; None takes the model's own.

    Returns:
        Scores, (B, L + 1, P, C).

    Raises:
        ValueError: if there is no classifier.
    """
    classifier, groups = _classifier(model, classifier), model.tokens.slices
    scores = []
    for state in states.unbind(1):
        patches = state[:, groups["patches"]]
        prefix = state[:, : model.num_prefix_tokens]
        if "patches" not in model.head:
            prefix = prefix[:, 1:]
        images, num_patches = patches.shape[:2]
        parts = [prefix[:, None].expand(-1, num_patches, -1, -1), patches[:, :, None]]
        parts = parts if "patches" in model.head else [parts[1], parts[0], parts[1]]
        scores.append(classifier(model.features(torch.cat(parts, 2).flatten(0, 1))).unflatten(0, (images, num_patches)))
    return torch.stack(scores, 1)


def _classifier(model: Teacher, classifier: Classifier | None) -> Classifier:
    found = model.classifier if classifier is None else classifier
    if found is None:
        raise ValueError(f"{model.name} has no classifier; give a probe on its features")
    return found


@dataclass(frozen=True, eq=False)
class LinearLens(Result):
    """One affine map for each state, which predicts the last state from it.

    Attributes:
        weight: (L + 1, D, D); a state is a row. That of the last state is the identity.
        bias: (L + 1, D).
        explained: share of the last state's variance that the map explains on the images it was fitted on, (L + 1,).
    """

    weight: Tensor
    bias: Tensor
    explained: Tensor

    def apply(self, states: Tensor) -> Tensor:
        """Predicts the last state from each, (B, L + 1, T, D) -> the same shape, before the final norm."""
        weight, bias = self.weight.to(states), self.bias.to(states)
        return torch.einsum("bltd,lde->blte", states, weight) + bias[:, None]


class TunedLens(MatrixAccumulator):
    """Streams trajectories into the normal equations of a `LinearLens`, over all tokens alike.

    Args:
        num_layers: L.
        hidden_size: D.
    """

    def __init__(self, num_layers: int, hidden_size: int):
        self.num_layers, self.hidden_size = num_layers, hidden_size
        # of [x, 1]: the products with itself and with the last state's
        super().__init__((num_layers + 1, 2, hidden_size + 1, hidden_size + 1))

    @torch.no_grad()
    def update(self, states: Tensor) -> None:
        """Adds a batch of trajectories, (B, L + 1, T, D), before the final norm.

        Raises:
            ValueError: if they are of another depth or width.
        """
        if states.ndim != 4 or (states.shape[1], states.shape[3]) != (self.num_layers + 1, self.hidden_size):
            expected = f"(B, {self.num_layers + 1}, T, {self.hidden_size})"
            raise ValueError(f"states is {tuple(states.shape)}; it must be {expected}")
        matrices = self._matrices(states.device)
        for chunk in map(in_float64, layer_first_chunks(states)):
            x = torch.nn.functional.pad(chunk.flatten(1, 2), (0, 1), value=1.0)
            for sums, own in zip(matrices, x, strict=True):
                sums[0] += own.T @ own
                sums[1] += own.T @ x[-1]

    def fit(self, ridge: float = 1e-4) -> LinearLens:
        """Solves min ||x W + b - x_L||^2 + ridge ||W||^2 for every state, in float64.

        Args:
            ridge: as a share of the mean variance of x.

        Raises:
            ValueError: if ridge is negative or no image was seen.
        """
        if not ridge >= 0:
            raise ValueError(f"ridge is {ridge}; it must be at least 0")
        sums = self._matrices()
        count = sums[0, 0, -1, -1]
        self._require_any(count, "images")
        mean = sums[:, 0, -1, :-1] / count
        variance = sums[:, 0, :-1, :-1] / count - mean[:, :, None] * mean[:, None]
        covariance = sums[:, 1, :-1, :-1] / count - mean[:, :, None] * mean[-1]
        eye = torch.eye(self.hidden_size, dtype=variance.dtype)
        scale = variance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(variance.dtype).tiny)
        weight = torch.linalg.solve(variance + ridge * scale[:, None, None] * eye, covariance)
        left = variance[-1].trace() - 2 * (weight * covariance).sum((1, 2)) + ((variance @ weight) * weight).sum((1, 2))
        weight[-1] = eye
        left[-1] = 0
        bias = mean[-1] - torch.einsum("ld,lde->le", mean, weight)
        return LinearLens(weight, bias, 1 - left / variance[-1].trace())


@torch.no_grad()
def attention_maps(model: Teacher, pixel_values: Tensor) -> Tensor:
    """Attention weights of every step and head, (B, L, heads, T, T): the token of a row attends to that of a column.

    Args:
        model: loaded with `attn_implementation="eager"`; the other implementations have no weights.
        pixel_values: normalised images, (B, C, H, W).

    Raises:
        ValueError: if the implementation is another.
    """
    attentions = model(pixel_values, output_attentions=True).attentions
    if not attentions or attentions[0] is None:
        own = model.model.config._attn_implementation
        raise ValueError(f"attn_implementation is {own!r}, which keeps no weights; it must be 'eager'")
    return torch.stack([attentions[layer - 1] for layer in model.layers], 1).float()


def rollout(attentions: Tensor, residual: float = 0.5) -> Tensor:
    """Estimates how much of each embedded token is in each token after every step, if attention alone mixes them.

    The product over steps of (1 - residual) * mean over heads + residual * identity; its rows sum to 1.

    Args:
        attentions: (B, L, heads, T, T).
        residual: share that stays where it is, in 0..1.

    Returns:
        (B, L, T, T), after steps 1..L; row t tells what token t is made of.
    """
    mean = attentions.mean(2)
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    steps = (1 - residual) * mean + residual * eye
    rolled = [steps[:, 0]]
    for step in range(1, steps.shape[1]):
        rolled.append(steps[:, step] @ rolled[-1])
    return torch.stack(rolled, 1)


def token_norms(states: Tensor) -> Tensor:
    """The norm of every token, (B, L + 1, T), in at least float32."""
    return torch.linalg.vector_norm(states, dim=-1, dtype=torch.promote_types(states.dtype, torch.float32))


def artefacts(states: Tensor, tokens: TokenLayout, threshold: float = 8.0) -> Tensor:
    """Finds patches whose norm is far above the others'; large models without registers keep global information there.

    Args:
        states: (B, L + 1, T, D).
        tokens: which tokens are patches.
        threshold: in standard deviations above the median patch of the image and step, estimated by the median absolute
            deviation.

    Returns:
        (B, L + 1, P), bool.
    """
    norms = token_norms(states)[..., tokens.slices["patches"]]
    median = norms.median(-1, keepdim=True).values
    spread = MAD_TO_STD * (norms - median).abs().median(-1, keepdim=True).values
    # patches that are all alike have no outliers
    return norms > median + threshold * spread.clamp(min=1e-3 * median.abs())
