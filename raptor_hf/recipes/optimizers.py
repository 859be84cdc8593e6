"""Optimizers of the distillation: AdamW, and Muon for the blocks' weight matrices with AdamW for everything else.

    optimizer = make_optimizer("muon", student, learning_rate=2e-2, weight_decay=1e-4)

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of each matrix. Here a
learning rate is relative: at rate lr a step changes a matrix by lr times the root mean square that its entries had at
the start. Trained matrices of a Vision Transformer have entries of .1 at width 96 and of .012 to .02 at width 384,
smaller than width alone explains; a step of one absolute size would be slow for the first and diverge for the second.
AdamW takes the tables of gains, shifts and low-rank factors, the norms, LayerScales and biases, at a fixed fraction of
that rate.

`torch.optim.Muon` orthogonalises in bf16 everywhere. On a CPU that does not multiply in bf16 that takes 15 to 40 times
as long as in float32, most of a training step; ours does it in the precision of the run.
"""

from collections.abc import Callable
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from raptor_settings.distill import OptimizerName
from torch import Tensor, nn

from ..modeling_raptor import RaptorBlock

# the learning rate of what Muon leaves to AdamW, relative to Muon's
ADAMW_SHARE = 0.5
# of Muon, as its author and PyTorch have them; coefficients of x, x x^T x and x x^T x x^T x in each iteration
MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def check_optimizer(name: OptimizerName, *, sharded: bool = False) -> None:
    """Refuse an optimizer that is not available here, before anything is built for it.

    Args:
        name: as in `make_optimizer`.
        sharded: whether the parameters are shards, as under FSDP.

    Raises:
        ValueError: an unknown name, or Muon on shards.
    """
    if name not in get_args(OptimizerName):
        raise ValueError(f"optimizer is {name!r}; it must be one of {', '.join(get_args(OptimizerName))}")
    if name == "muon" and sharded:
        raise ValueError("optimizer is 'muon', which needs whole matrices; with FSDP take 'adamw'")


def make_optimizer(
    name: OptimizerName,
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    mixed_precision: str = "no",
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Makes the optimizer of a model's trainable parameters.

    Args:
        name: "adamw", or "muon".
        model: whose parameters that require gradients are trained.
        learning_rate: for AdamW alone, the size of a step; for Muon relative to each matrix, see this module's head.
        weight_decay: decoupled, of all of them.
        mixed_precision: of the run, in accelerate's words; Muon orthogonalises in bf16 if it is "bf16".
        fused: whether AdamW updates all its parameters in one kernel.

    Raises:
        ValueError: as `check_optimizer`, or Muon without a matrix.
    """
    check_optimizer(name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    matrices = block_matrices(model)
    own = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in own]
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    common = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    return MuonWithAdamW(matrices, others, **common, dtype=dtype, fused=fused)


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the linear layers of all blocks, as far as they require gradients; conditioners have none."""
    blocks = [module for module in model.modules() if isinstance(module, RaptorBlock)]
    linears = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
    return [linear.weight for linear in linears if linear.weight.requires_grad]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices, AdamW for all others, as one optimizer with a parameter group for each.

    Args:
        matrices: of two dimensions, for Muon.
        others: for AdamW.
        learning_rate: of Muon, relative: the root mean square of a matrix's step over that of the matrix itself when it
            was first updated; of a matrix of zeros, over that of PyTorch's initialisation, (3 in)^-1/2. AdamW's is
            `ADAMW_SHARE` of it.
        weight_decay: of both.
        dtype: that matrices are orthogonalised in.
        fused: of AdamW.

    Raises:
        ValueError: no matrix.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        fused: bool = False,
    ) -> None:
        if not matrices:
            raise ValueError("there is no matrix in a block for Muon among the parameters; take 'adamw'")
        common = {"lr": learning_rate, "weight_decay": weight_decay}
        self._dtype = dtype
        self._adamw = torch.optim.AdamW(others, fused=fused, **common) if others else None
        groups = [{"params": matrices, **common}]
        # the second brings all settings of AdamW
        super().__init__(groups if self._adamw is None else [*groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Takes one step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # groups and state are this optimizer's, whatever was loaded into it
        muon, *adamw = self.param_groups
        for matrix in muon["params"]:
            if matrix.grad is not None:
                self._step_matrix(matrix, muon["lr"], muon["weight_decay"])
        if adamw:
            self._adamw.state = self.state
            self._adamw.param_groups = [adamw[0] | {"lr": ADAMW_SHARE * adamw[0]["lr"]}]
            self._adamw.step()
        return loss

    def _step_matrix(self, matrix: nn.Parameter, learning_rate: float, weight_decay: float) -> None:
        state = self.state[matrix]
        if "start_rms" not in state:
            rms = matrix.float().square().mean().sqrt()
            state["start_rms"] = torch.where(rms > 0, rms, (3 * matrix.shape[1]) ** -0.5).cpu()
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
        update = orthogonalized(matrix.grad.lerp(momentum, MOMENTUM).to(self._dtype))  # Nesterov's
        # entries of an orthogonal matrix have a root mean square of 1 over the root of its longer side
        size = float(state["start_rms"]) * max(matrix.shape) ** 0.5
        matrix.mul_(1 - learning_rate * weight_decay).add_(update, alpha=-learning_rate * size)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes only the groups that `__init__` makes.

        Raises:
            ValueError: any other.
        """
        if len(self.param_groups) == 1 + (self._adamw is not None):
            raise ValueError("MuonWithAdamW takes all its parameters at once")
        super().add_param_group(param_group)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The orthogonal factor of a matrix's polar decomposition, roughly: all singular values become about 1.

    A few Newton-Schulz iterations, after which those that were not tiny lie between .7 and 1.2.

    Args:
        matrix: (m, n).

    Returns:
        (m, n), of the same type.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x.mT if is_tall else x


def has_fused_adamw(accelerator: Accelerator) -> bool:
    """Whether AdamW updates all weights in one kernel here; it does not take FSDP's sharded tensors everywhere."""
    return accelerator.device.type in ("cpu", "cuda") and accelerator.distributed_type != DistributedType.FSDP
