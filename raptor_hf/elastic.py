"""Chooses how deep a student runs: the number of steps for a budget, and when an image may stop early.

    num_steps = depth_for(model, images, max_macs=1.5e7)            # or min_agreement=0.99
    model(pixel_values, num_steps=num_steps)

    calibrate_exit(model, held_out, "head_margin", max_disagreement=0.005)   # kept in model.config, and saved with it
    model(pixel_values, exit_criterion="head_margin").num_steps              # of every image

The student of the first two lines is elastic (`step_scaling` in its configuration); early exit needs no such training.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .modeling_raptor import ExitRule, RaptorForImageClassification, RaptorPreTrainedModel
from .teacher import macs

# thresholds that are tried: so many quantiles of what is measured
NUM_THRESHOLDS = 400


@torch.no_grad()
def depth_for(
    model: RaptorPreTrainedModel,
    images: Tensor,
    *,
    max_macs: float | None = None,
    min_agreement: float | None = None,
) -> int:
    """Chooses a number of steps, from one per block to the trained L, for a budget or for a wanted agreement.

    Args:
        model: elastic, on the device of the images; for `min_agreement` a `RaptorForImageClassification`.
        images: normalised, (B, C, H, W); for `max_macs` their size alone matters, and one is enough.
        max_macs: multiply-accumulates per image, heads included; the largest number of steps within it is chosen.
        min_agreement: share of the images that must be given the same class as with L steps; the smallest number of
            steps that reaches it is chosen.

    Returns:
        The number of steps, for `model(images, num_steps=...)`.

    Raises:
        ValueError: not exactly one of the two is given, the model is not elastic or has no classifier, or no number of
            steps is within the budget.
    """
    config = model.config
    if (max_macs is None) == (min_agreement is None):
        raise ValueError(f"max_macs is {max_macs} and min_agreement is {min_agreement}; give one of them.")
    if not config.step_scaling:
        raise ValueError(
            "step_scaling is False in the model's configuration, so that fewer steps end before its last layer; train "
            "a student with distill.py --elastic."
        )
    depths = range(config.num_blocks, config.num_hidden_layers + 1)
    if max_macs is not None:
        costs = {num_steps: macs(partial(model, num_steps=num_steps), images) for num_steps in depths}
        within = [num_steps for num_steps, cost in costs.items() if cost <= max_macs]
        if not within:
            raise ValueError(
                f"max_macs is {max_macs:.3g}; it must be at least {costs[depths[0]]:.3g}, which {depths[0]} steps need."
            )
        return within[-1]
    if not 0 <= min_agreement <= 1:
        raise ValueError(f"min_agreement is {min_agreement}; it must be between 0 and 1.")
    _check_classifier(model, "min_agreement")
    trained = model(images).logits.argmax(dim=1)
    for num_steps in depths:
        if (model(images, num_steps=num_steps).logits.argmax(dim=1) == trained).float().mean() >= min_agreement:
            return num_steps
    return depths[-1]


@dataclass(frozen=True)
class ExitCalibration:
    """What early exit saves and costs on the images that it was calibrated on.

    Args:
        threshold: limit of the criterion at which an image stops, as in `ExitRule`.
        mean_steps: number of steps per image, mean over images.
        agreement: share of the images that are given the same class as without early exit.
    """

    threshold: float
    mean_steps: float
    agreement: float


@torch.no_grad()
def calibrate_exit(
    model: RaptorForImageClassification,
    batches: Iterable[Tensor],
    criterion: str,
    max_disagreement: float = 0.005,
    num_steps: int | None = None,
) -> ExitCalibration:
    """Finds the threshold of early exit that saves the most steps for a permitted loss of agreement, and keeps it in
    `model.config.exit_thresholds`.

    Args:
        model: in eval mode, on the device of the images.
        batches: held-out images, normalised, each (B, C, H, W).
        criterion: one of `raptor_hf.configuration_raptor.EXIT_CRITERIA`.
        max_disagreement: share of the images that may be given another class than without early exit.
        num_steps: steps of an image that does not stop early; None takes L.

    Returns:
        The threshold, with the agreement and the steps per image that it has on these images.

    Raises:
        ValueError: the model has no classifier, there are no images, or another argument is out of range.
    """
    if not 0 <= max_disagreement <= 1:
        raise ValueError(f"max_disagreement is {max_disagreement}; it must be between 0 and 1.")
    _check_classifier(model, "criterion")
    measured, changed = [], []
    for images in batches:
        output = model(images, num_steps=num_steps, output_hidden_states=True)
        rule = ExitRule(criterion, classify=model.classify)
        steps = zip(pairwise(output.hidden_states), output.depths.diff().tolist(), strict=True)
        measured.append(torch.stack([rule.measure(*states, size or 1.0) for states, size in steps]).cpu())
        classes = torch.stack([model.classify(state).argmax(dim=1) for state in output.hidden_states[1:]])
        changed.append((classes != classes[-1]).cpu())
    if not measured:
        raise ValueError("batches is empty; it must hold images.")
    measured, changed = torch.cat(measured, dim=1), torch.cat(changed, dim=1)
    outcomes = [
        _outcome(ExitRule(criterion, threshold, model.classify), measured, changed)
        for threshold in _thresholds(criterion, measured)
    ]
    best = min((o for o in outcomes if o.agreement >= 1 - max_disagreement), key=lambda o: o.mean_steps)
    model.config.exit_thresholds = {**(model.config.exit_thresholds or {}), criterion: best.threshold}
    return best


def _thresholds(criterion: str, measured: Tensor) -> list[float]:
    """Quantiles of what was measured, and a threshold with which no image stops early."""
    known = measured[measured.isfinite()].sort().values
    ranks = torch.linspace(0, len(known) - 1, NUM_THRESHOLDS).round().long()
    return [2.0 if criterion == "head_margin" else 0.0, *known[ranks].unique().tolist()]


def _outcome(rule: ExitRule, measured: Tensor, changed: Tensor) -> ExitCalibration:
    """What early exit does to images of which all steps are known.

    Args:
        rule: fresh.
        measured: after every step, (steps, N).
        changed: whether the class after every step is another than that after the last, (steps, N).
    """
    settled = torch.stack([rule.is_settled(values) for values in measured])
    settled[-1] = True
    exits = settled.to(torch.uint8).argmax(dim=0)
    lost = changed.gather(0, exits[None])[0]
    return ExitCalibration(rule.threshold, (exits + 1).float().mean().item(), 1 - lost.float().mean().item())


def _check_classifier(model: RaptorPreTrainedModel, name: str) -> None:
    if not hasattr(model, "classify") or model.config.num_labels < 2:
        raise ValueError(
            f"{name} needs the classes that a RaptorForImageClassification predicts; model is a "
            f"{type(model).__name__} with num_labels {model.config.num_labels}."
        )
