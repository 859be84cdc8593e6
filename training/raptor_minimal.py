"""Raptor in one file: a Vision Transformer of L layers rewritten as k blocks, each applied again and again.

    python training/raptor_minimal.py

runs the method of "Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941) in about a minute on one CPU,
offline: it finds the phases in the depth of a teacher of handwritten digits, distils each into one block, and prints
how much of the teacher's trajectory the student explains. Sections are the paper's; nothing here needs raptor_hf.
`states` are states 0..L before the final norm, each (B, T, D); `phases` are runs of layers 1..L.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

DIGITS_TEACHER = Path(__file__).parents[1] / "model_cards" / "digits-teacher"
LAST_BLOCK_WEIGHTS = (0.34, 0.33, 0.33)  # of cls, registers and patches, in stage 1
STAGE2_WEIGHTS = (0.45, 0.10, 0.45)


def layer_distance(states, num_registers: int) -> Tensor:
    """Section 2: 1 - cosine between layers of cls and of the mean patch, averaged over both and over images; (L, L)."""
    layers = torch.stack(list(states[1:]), dim=1).double()
    summaries = torch.stack([layers[:, :, 0], layers[:, :, 1 + num_registers :].mean(2)], dim=1)  # (B, 2, L, D)
    unit = F.normalize(summaries, dim=-1)
    return 1 - (unit @ unit.transpose(2, 3)).mean((0, 1))


def find_phases(distance: Tensor, num_blocks: int, min_size: int = 2) -> list[list[int]]:
    """Section 2: the contiguous phases with the least sum of (distances within the phase / its layers), exactly."""
    best = {0: (0.0, ())}  # dynamic programming over {last layer so far: (least cost, last layers of the phases)}
    for _ in range(num_blocks):
        longer = {}
        for end in range(1, len(distance) + 1):
            for start in sorted((start for start in best if start <= end - min_size), reverse=True):
                cost = best[start][0] + distance[start:end, start:end].sum().item() / 2 / (end - start)
                if end not in longer or cost < longer[end][0] - 1e-9:  # of equally good cuts, the later one
                    longer[end] = cost, (*best[start][1], end)
        best = longer
    ends = best[len(distance)][1]
    return [list(range(start + 1, end + 1)) for start, end in zip((0, *ends), ends, strict=False)]


class SwiGLU(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value


class Block(nn.Module):
    """Section 3, the tied block: x' = x + s_attn LS(Attn(LN x)), x'' = x' + s_mlp LS(FFN(LN x')), out = s_out x''."""

    def __init__(self, dim: int, num_heads: int, inner: int, ffn_type: str = "swiglu"):
        super().__init__()
        is_gated = ffn_type == "swiglu"
        widen = nn.Linear(dim, 2 * inner if is_gated else inner)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.full((dim,), 1e-5)}) for _ in range(2))  # LayerScale
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = nn.Sequential(widen, SwiGLU() if is_gated else nn.GELU(), nn.Linear(inner, dim))
        self.t_proj = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3 * dim))
        for parameter in self.t_proj[2].parameters():
            nn.init.normal_(parameter, std=1e-4)

    def forward(self, hidden: Tensor, layer: float) -> Tensor:
        depth = hidden.new_full((hidden.shape[0], 1), float(layer))
        s_attn, s_mlp, s_out = (self.t_proj(depth) + 1).unsqueeze(1).chunk(3, dim=-1)
        normed = self.norm1(hidden)
        hidden = hidden + s_attn * (self.ls1.gamma * self.attn(normed, normed, normed)[0])
        hidden = hidden + s_mlp * (self.ls2.gamma * self.mlp(self.norm2(hidden)))
        return s_out * hidden


def run_blocks(blocks, phases, state: Tensor) -> list[Tensor]:
    """The recurrence: the state after each step, where a block takes one step for each layer of its phase."""
    states = [state]
    for block, layers in zip(blocks, phases, strict=True):
        for layer in layers:
            states.append(block(states[-1], layer))
    return states[1:]


def step_loss(student: Tensor, teacher: Tensor, weights, num_registers: int) -> Tensor:
    """Mean squared error of one state: over all tokens, or a weighted sum over cls, registers and patches."""
    if weights is None:
        return F.mse_loss(student, teacher)
    first_patch = 1 + num_registers
    groups = slice(0, 1), slice(1, first_patch), slice(first_patch, None)
    return sum(w * F.mse_loss(student[:, group], teacher[:, group]) for w, group in zip(weights, groups, strict=True))


def stage1_loss(block: Block, layers, states, forcing: float, num_registers: int) -> Tensor:
    """Section 4, a block on its own: lambda L_TF + (1 - lambda) L_AR, teacher forcing against autoregression."""
    weights = LAST_BLOCK_WEIGHTS if layers[-1] == len(states) - 1 else None
    own = run_blocks([block], [layers], states[layers[0] - 1])
    rolled = [step_loss(state, states[i], weights, num_registers) for state, i in zip(own, layers, strict=True)]
    loss = (1 - forcing) * sum(rolled) / len(layers)
    if forcing > 0:
        forced = [step_loss(block(states[i - 1], i), states[i], weights, num_registers) for i in layers]
        loss = loss + forcing * sum(forced) / len(layers)
    return loss


def stage2_loss(blocks, phases, states, num_registers: int) -> Tensor:
    """Section 4, all blocks: autoregressive from the embeddings through all L layers, the mean over the layers."""
    own = run_blocks(blocks, phases, states[0])
    losses = [step_loss(a, b, STAGE2_WEIGHTS, num_registers) for a, b in zip(own, states[1:], strict=True)]
    return sum(losses) / len(losses)


def make_optimizer(module: nn.Module, learning_rate: float = 3e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=1e-4)


def take_step(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step, gradients clipped to norm 1; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def batches(states, optimizer: torch.optim.Optimizer, num_steps: int, size: int = 32):
    """Yields the states of random images and the share of the steps that is done, which sets the learning rate."""
    peak = optimizer.param_groups[0]["lr"]
    for done in (step / num_steps for step in range(num_steps)):
        optimizer.param_groups[0]["lr"] = peak * min(20 * (done + 1e-3), (1 + math.cos(math.pi * done)) / 2)
        images = torch.randint(len(states[0]), (size,))
        yield [state[images] for state in states], done


def r_squared(student, teacher) -> list[float]:
    """1 - squared error / the teacher's variance per feature over images and tokens, for each layer."""
    pairs = zip(student, teacher, strict=True)
    return [1 - ((a - b).square().sum() / (b - b.mean((0, 1))).square().sum()).item() for a, b in pairs]


def main(num_blocks: int = 3, stage1_steps: int = 120, stage2_steps: int = 240) -> list[float]:
    """The whole method on handwritten digits; returns R^2 of layers 1..L on the test images."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    splits = train_test_split(pixels / 8 - 1, test_size=500, stratify=labels, random_state=0)  # 0..16 -> -1..1
    images = [torch.tensor(split).float().view(-1, 1, 8, 8).expand(-1, 3, 8, 8) for split in splits]
    teacher = AutoModelForImageClassification.from_pretrained(DIGITS_TEACHER).base_model.eval().requires_grad_(False)
    states, test_states = (teacher(split, output_hidden_states=True).hidden_states for split in images)
    config, num_registers = teacher.config, teacher.config.num_register_tokens

    phases = find_phases(layer_distance(states, num_registers), num_blocks)
    print("phases:", ", ".join(f"layers {layers[0]}-{layers[-1]}" for layers in phases))
    sizes = config.hidden_size, config.num_attention_heads, config.mlp_ratio * config.hidden_size
    blocks = nn.ModuleList(Block(*sizes) for _ in phases)
    for block, layers in zip(blocks, phases, strict=True):
        optimizer = make_optimizer(block)
        for batch, done in batches(states, optimizer, stage1_steps):
            forcing = max(0.0, 1 - 4 * done)  # lambda falls from 1 to 0 over a quarter of the steps
            loss = take_step(stage1_loss(block, layers, batch, forcing, num_registers), block, optimizer)
        print(f"stage 1, layers {layers[0]}-{layers[-1]}: loss {loss:.3f}")
    optimizer = make_optimizer(blocks)
    for batch, _ in batches(states, optimizer, stage2_steps):
        loss = take_step(stage2_loss(blocks, phases, batch, num_registers), blocks, optimizer)
    print(f"stage 2, all layers: loss {loss:.3f}")

    with torch.no_grad():
        explained = r_squared(run_blocks(blocks, phases, test_states[0]), test_states[1:])
    print(f"R2 of layers 1 to {len(explained)}:", " ".join(f"{value:.3f}" for value in explained))
    return explained


if __name__ == "__main__":
    main()
