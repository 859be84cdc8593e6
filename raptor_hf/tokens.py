"""Says which tokens of a state are the class token, registers and patches; no other module knows.

    tokens = teacher.tokens                            # or TokenLayout(num_registers=4)
    states[:, :, tokens.slices["patches"]]             # (B, L + 1, P, D)
    tokens.sizes(num_tokens=261)                       # (1, 4, 256)
    tokens.summaries(states)                           # (B, L + 1, 2, D): class token and mean patch

Every state, of teacher and student, has its tokens in the order class token, registers, patches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TOKEN_GROUPS = ("cls", "registers", "patches")


@dataclass(frozen=True)
class TokenLayout:
    """The order of the tokens in a state: class token, registers, patches.

    Args:
        num_registers: R, tokens between the class token and the patches.
        has_cls: whether the first token is a class token.

    Raises:
        ValueError: if `num_registers` is negative.
    """

    num_registers: int = 0
    has_cls: bool = True

    def __post_init__(self) -> None:
        if self.num_registers < 0:
            raise ValueError(f"num_registers is {self.num_registers}; it must be at least 0")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token and registers."""
        return self.has_cls + self.num_registers

    @property
    def slices(self) -> dict[str, slice]:
        """The tokens of each group that exists, "cls", "registers", "patches", in this order."""
        slices = {
            "cls": slice(0, int(self.has_cls)),
            "registers": slice(int(self.has_cls), self.num_prefix_tokens),
        }
        present = {name: tokens for name, tokens in slices.items() if tokens.stop > tokens.start}
        return present | {"patches": slice(self.num_prefix_tokens, None)}

    def sizes(self, num_tokens: int) -> tuple[int, int, int]:
        """Returns the number of tokens in each of `TOKEN_GROUPS`, 0 for a group that does not exist.

        Args:
            num_tokens: T.
        """
        return int(self.has_cls), self.num_registers, num_tokens - self.num_prefix_tokens

    def mean_patch(self, states: Tensor) -> Tensor:
        """Returns the mean of the patch tokens in at least float32, (..., T, D) -> (..., D)."""
        wide = torch.promote_types(states.dtype, torch.float32)
        return states[..., self.slices["patches"], :].mean(-2, dtype=wide)

    def summaries(self, states: Tensor) -> Tensor:
        """Summarises a state by its class token and the mean of its patches; registers are left out.

        Args:
            states: (..., T, D), tokens in the order class token, registers, patches.

        Returns:
            (..., S, D) in at least float32. S is 2, or 1 without a class token: the mean patch alone.
        """
        patches = self.mean_patch(states).unsqueeze(-2)
        return torch.cat([states[..., :1, :].to(patches.dtype), patches], -2) if self.has_cls else patches

    def check_states(self, states: Tensor, num_layers: int, name: str = "states") -> None:
        """Checks that a tensor is a trajectory with these tokens and at least one patch.

        Args:
            states: expected to be (B, L + 1, T, D).
            num_layers: L.
            name: what the message calls the tensor.

        Raises:
            ValueError: if it has another shape.
        """
        first = self.num_prefix_tokens
        if states.ndim != 4 or states.shape[1] != num_layers + 1 or states.shape[2] <= first:
            raise ValueError(
                f"{name} is {tuple(states.shape)}; it must be (B, {num_layers + 1}, T > {first}, D) for embeddings and "
                f"{num_layers} layers of {first} cls and register tokens and at least one patch"
            )
