"""Optimizers of the distillation: AdamW, and Muon for what has two dimensions with AdamW for everything else.

    optimizer = make_optimizer("muon", parameters, learning_rate=1e-2, weight_decay=1e-4)

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; PyTorch's own, from 2.9 on) orthogonalises the
momentum of each matrix. Its steps are scaled to the size of AdamW's, so that one learning rate serves for both. Of a
student it takes the weights of the blocks' linear layers and the tables of gains and shifts by layer; vectors, and the
stacks of low-rank factors, go under AdamW.
"""

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from raptor_settings.distill import OptimizerName


def check_optimizer(name: OptimizerName, *, sharded: bool = False) -> None:
    """Refuses an optimizer that cannot be had, before anything is built for it.

    Args:
        name: as in `make_optimizer`.
        sharded: whether the parameters are shards, as under FSDP.

    Raises:
        ValueError: an unknown name, or Muon with a PyTorch that does not have it, or on shards.
    """
    if name not in get_args(OptimizerName):
        raise ValueError(f"optimizer is {name!r}; it must be one of {', '.join(get_args(OptimizerName))}")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer is 'muon', which needs PyTorch 2.9 or newer; this is {torch.__version__}")
    if name == "muon" and sharded:
        raise ValueError("optimizer is 'muon', which needs whole matrices; with FSDP take 'adamw'")


def make_optimizer(
    name: OptimizerName,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """
    Args:
        name: "adamw", or "muon".
        parameters: to train.
        learning_rate: of all of them.
        weight_decay: decoupled, of all of them.
        fused: whether AdamW updates all its parameters in one kernel.

    Raises:
        ValueError: as `check_optimizer`, or Muon without a matrix.
    """
    check_optimizer(name)
    parameters = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    return MuonWithAdamW(parameters, learning_rate=learning_rate, weight_decay=weight_decay, fused=fused)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for parameters of two dimensions, AdamW for all others, as one optimizer with a parameter group for each.

    Args:
        parameters: to train.
        learning_rate: of both.
        weight_decay: of both.
        fused: of AdamW.

    Raises:
        ValueError: no matrix among the parameters.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float, fused: bool = False
    ) -> None:
        parameters = list(parameters)
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        if not matrices:
            raise ValueError("there is no matrix among the parameters for Muon; take 'adamw'")
        common = {"lr": learning_rate, "weight_decay": weight_decay}
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common)
        ]
        if others:
            self._parts.append(torch.optim.AdamW(others, fused=fused, **common))
        # each group brings all settings of its own algorithm
        super().__init__([part.param_groups[0] for part in self._parts], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Takes one step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # groups and state are this optimizer's, whatever was loaded into it
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the groups that `__init__` makes.

        Raises:
            ValueError: any other.
        """
        if len(self.param_groups) == len(self._parts):
            raise ValueError("MuonWithAdamW takes all its parameters at once")
        super().add_param_group(param_group)
