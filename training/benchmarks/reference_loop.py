"""The method as a plain loop, what benchmark.py measures this package against.

Written from sections 3 and 4 of the paper (arXiv 2512.19941) in the way of its research code: fp32,
`nn.MultiheadAttention` with its default arguments, one block after the other in stage 1, each with an optimizer of its
own, the teacher's activations handed in, nothing compiled. Its parameters have the names of the research checkpoints.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raptor_hf.modeling_raptor import RaptorModel
from raptor_hf.research_checkpoints import BLOCK_NAMES, CONDITIONER_NAMES


class SwiGLU(nn.Module):
    """silu(first half) * second half."""

    def forward(self, hidden: Tensor) -> Tensor:
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value


class LayerScale(nn.Module):
    """gamma * x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.gamma * hidden


class ReferenceBlock(nn.Module):
    """x' = x + s_attn LS1(Attn(LN1 x)), x'' = x' + s_mlp LS2(FFN(LN2 x')), out = s_out x''.

    Args:
        dim: D.
        num_heads: attention heads.
        inner: width inside the FFN.
        ffn_type: "swiglu" or "mlp".
    """

    def __init__(self, dim: int, num_heads: int, inner: int, ffn_type: str) -> None:
        super().__init__()
        gated = ffn_type == "swiglu"
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * inner if gated else inner), SwiGLU() if gated else nn.GELU(), nn.Linear(inner, dim)
        )
        self.ls2 = LayerScale(dim)
        self.t_proj = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3 * dim))

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """One step to `layer`, 1 .. L; hidden is (B, T, D)."""
        depth = torch.full((hidden.shape[0], 1), float(layer), device=hidden.device)
        s_attn, s_mlp, s_out = (self.t_proj(depth) + 1).unsqueeze(1).chunk(3, dim=-1)
        normed = self.norm1(hidden)
        hidden = hidden + s_attn * self.ls1(self.attn(normed, normed, normed)[0])
        hidden = hidden + s_mlp * self.ls2(self.mlp(self.norm2(hidden)))
        return s_out * hidden


class ReferenceLoop:
    """The two stages over activations of the teacher.

    Args:
        model: a student whose weights the blocks start from, with "scale" conditioning, contiguous phases, and a
            teacher with registers.
        learning_rate: of AdamW, with the published weight decay.
    """

    def __init__(self, model: RaptorModel, learning_rate: float) -> None:
        config = model.config
        self.layers, self.num_registers = config.block_layers, config.num_register_tokens
        self.num_layers = config.num_hidden_layers
        self.blocks = nn.ModuleList()
        for block, conditioner in zip(model.encoder.blocks, model.encoder.conditioners, strict=True):
            own = ReferenceBlock(
                config.hidden_size, config.num_attention_heads, config.intermediate_size, config.ffn_type
            )
            weights, gains = block.state_dict(), conditioner.state_dict()
            own.load_state_dict(
                {name: weights[ours] for name, ours in BLOCK_NAMES.items()}
                | {name: gains[ours] for name, ours in CONDITIONER_NAMES.items()}
            )
            for norm in (own.norm1, own.norm2):
                norm.eps = config.block_layer_norm_eps
            self.blocks.append(own.to(model.device))
        self.block_optimizers = [self._optimizer(block, learning_rate) for block in self.blocks]
        self.optimizer = self._optimizer(self.blocks, learning_rate)

    @staticmethod
    def _optimizer(module: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=1e-4)

    def stage1_step(self, activations: Sequence[Tensor], forcing: float) -> float:
        """Takes one step of every block, one after the other.

        Args:
            activations: states 0..L of the teacher, each (B, T, D).
            forcing: lambda.

        Returns:
            The sum of the blocks' losses.
        """
        total = 0.0
        for index, (block, optimizer) in enumerate(zip(self.blocks, self.block_optimizers, strict=True)):
            loss = self.stage1_loss(index, activations, forcing)
            self._step(loss, block, optimizer)
            total += loss.item()
        return total

    def stage1_loss(self, index: int, activations: Sequence[Tensor], forcing: float) -> Tensor:
        """lambda L_TF + (1 - lambda) L_AR of the block number `index`, a part of weight 0 left out."""
        block, layers = self.blocks[index], self.layers[index]
        weights = (0.34, 0.33, 0.33) if layers[-1] == self.num_layers else None
        loss = 0.0
        if forcing > 0:
            forced = [self._loss(block(activations[i - 1], i), activations[i], weights) for i in layers]
            loss = loss + forcing * sum(forced) / len(layers)
        if forcing < 1:
            state, rolled = activations[layers[0] - 1], []
            for i in layers:
                state = block(state, i)
                rolled.append(self._loss(state, activations[i], weights))
            loss = loss + (1 - forcing) * sum(rolled) / len(layers)
        return loss

    def stage2_step(self, activations: Sequence[Tensor]) -> float:
        """Takes one step of all blocks together; activations as in stage 1. Returns the loss."""
        loss = self.stage2_loss(activations)
        self._step(loss, self.blocks, self.optimizer)
        return loss.item()

    def stage2_loss(self, activations: Sequence[Tensor]) -> Tensor:
        """Autoregressive from state 0, the mean over the steps."""
        state, losses = activations[0], []
        for block, layers in zip(self.blocks, self.layers, strict=True):
            for i in layers:
                state = block(state, i)
                losses.append(self._loss(state, activations[i], (0.45, 0.10, 0.45)))
        return sum(losses) / self.num_layers

    def _loss(self, student: Tensor, teacher: Tensor, weights: tuple[float, float, float] | None) -> Tensor:
        if weights is None:
            return F.mse_loss(student, teacher)
        first = 1 + self.num_registers
        parts = slice(0, 1), slice(1, first), slice(first, None)
        return sum(
            weight * F.mse_loss(student[:, part], teacher[:, part]) for weight, part in zip(weights, parts, strict=True)
        )

    @staticmethod
    def _step(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
