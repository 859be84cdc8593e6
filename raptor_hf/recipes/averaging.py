"""Keeps a running average of the weights in training, which is evaluated and saved in their place.

    update_average(optimizer, decay, step)             # after each step of the optimizer
    with averaged_weights(optimizer):                  # the model computes with the average
        evaluate(model)

The average is in the optimizer's state, beside the moments of each parameter, so that checkpoints carry it and sharded
parameters have sharded averages.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

# of the average in the state of a parameter
AVERAGE = "average"


@torch.no_grad()
def update_average(optimizer: Optimizer, decay: float, step: int) -> None:
    """Moves the average of every parameter towards it: average <- d average + (1 - d) weight.

    Early on d = (1 + step) / (10 + step) is smaller than the decay, so that the start is soon forgotten.

    Args:
        optimizer: that has taken this step; the average begins with the weights after its first one.
        decay: d of a long run, at least 0 and below 1.
        step: 0-based.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for parameter, state in _updated(optimizer):
        if AVERAGE in state:
            state[AVERAGE].lerp_(parameter, 1 - decay)
        else:
            state[AVERAGE] = parameter.detach().clone()


@contextmanager
@torch.no_grad()
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """Gives every parameter the value of its average for a while; those without one stay as they are."""
    pairs = [(parameter, state[AVERAGE]) for parameter, state in _updated(optimizer) if AVERAGE in state]
    kept = [parameter.detach().clone() for parameter, _ in pairs]
    for parameter, average in pairs:
        parameter.copy_(average)
    try:
        yield
    finally:
        for (parameter, _), own in zip(pairs, kept, strict=True):
            parameter.copy_(own)


def _updated(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, dict]]:
    """The parameters that have a state, with it: an optimizer takes an empty one for a sign that it must begin."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                yield parameter, state
