"""Raptor in one file: a Vision Transformer of L layers rewritten as k blocks, each applied again and again.

    python training/raptor_minimal.py

runs the whole method of "Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941) in about a minute on one
CPU core, offline: it reads a teacher of 12 layers that recognises handwritten digits, finds the phases in its depth,
distils each phase into one block, and prints how much of the teacher's trajectory the student explains, layer by layer.

The file needs torch, transformers and scikit-learn (for the digits) and nothing of raptor_hf; the package does the same
for other teachers and images, and its tests and benchmarks compare it with this file. Sections are the paper's.
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


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.gamma * hidden


class Block(nn.Module):
    """Section 3, the tied block: x' = x + s_attn LS(Attn(LN x)), x'' = x' + s_mlp LS(FFN(LN x')), out = s_out x''."""

    def __init__(self, dim: int, num_heads: int, inner: int, ffn_type: str = "swiglu", depth_scaling: bool = True):
        super().__init__()
        is_gated = ffn_type == "swiglu"
        widen = nn.Linear(dim, 2 * inner if is_gated else inner)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = nn.Sequential(widen, SwiGLU() if is_gated else nn.GELU(), nn.Linear(inner, dim))
        self.t_proj = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 3 * dim)) if depth_scaling else None
        if depth_scaling:
            nn.init.normal_(self.t_proj[2].weight, std=1e-4)
            nn.init.normal_(self.t_proj[2].bias, std=1e-4)

    def forward(self, hidden: Tensor, layer: float) -> Tensor:
        """One step from (B, T, D) to `layer`, which scales the branches."""
        s_attn = s_mlp = s_out = 1.0
        if self.t_proj is not None:
            depth = hidden.new_full((hidden.shape[0], 1), float(layer))
            s_attn, s_mlp, s_out = (self.t_proj(depth) + 1).unsqueeze(1).chunk(3, dim=-1)
        normed = self.norm1(hidden)
        hidden = hidden + s_attn * self.ls1(self.attn(normed, normed, normed)[0])
        hidden = hidden + s_mlp * self.ls2(self.mlp(self.norm2(hidden)))
        return s_out * hidden


def run_blocks(blocks, phases, state: Tensor) -> list[Tensor]:
    """The recurrence: the state after each step, where a block takes one step for each layer of its phase."""
    states = []
    for block, layers in zip(blocks, phases, strict=True):
        for layer in layers:
            state = block(state, layer)
            states.append(state)
    return states


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
    loss = 0.0
    if forcing > 0:
        forced = [step_loss(block(states[i - 1], i), states[i], weights, num_registers) for i in layers]
        loss = loss + forcing * sum(forced) / len(layers)
    if forcing < 1:
        own = run_blocks([block], [layers], states[layers[0] - 1])
        rolled = [step_loss(state, states[i], weights, num_registers) for state, i in zip(own, layers, strict=True)]
        loss = loss + (1 - forcing) * sum(rolled) / len(layers)
    return loss


def stage2_loss(blocks, phases, states, num_registers: int) -> Tensor:
    """Section 4, all blocks: autoregressive from the embeddings through all L layers, the mean over the layers."""
    own = run_blocks(blocks, phases, states[0])
    losses = [step_loss(a, b, STAGE2_WEIGHTS, num_registers) for a, b in zip(own, states[1:], strict=True)]
    return sum(losses) / len(losses)


def make_optimizer(module: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=1e-4)


def take_step(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step, gradients clipped to norm 1; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(module: nn.Module, loss_at, states, num_steps: int, batch_size: int = 32, learning_rate: float = 3e-3):
    """Trains on random images; `loss_at` takes their states and the share of the steps that are done."""
    optimizer, losses = make_optimizer(module, learning_rate), []
    for step in range(num_steps):
        done = step / num_steps
        optimizer.param_groups[0]["lr"] = learning_rate * min(20 * (done + 1e-3), (1 + math.cos(math.pi * done)) / 2)
        images = torch.randint(len(states[0]), (batch_size,))
        losses.append(take_step(loss_at([state[images] for state in states], done), module, optimizer))
    print(f"  loss {losses[0]:.3f} -> {losses[-1]:.3f} in {num_steps} steps")


def r_squared(student, teacher) -> list[float]:
    """1 - squared error / the teacher's variance per feature over images and tokens, for each layer."""
    pairs = zip(student, teacher, strict=True)
    return [1 - ((a - b).square().sum() / (b - b.mean((0, 1))).square().sum()).item() for a, b in pairs]


def main(num_blocks: int = 3, stage1_steps: int = 120, stage2_steps: int = 240) -> list[float]:
    """The whole method on handwritten digits; returns R^2 of layers 1..L on the test images."""
    torch.manual_seed(0)
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = (pixels.float() / 8 - 1).view(-1, 1, 8, 8).expand(-1, 3, 8, 8)  # 0..16 -> -1..1
    train_images, test_images = train_test_split(range(len(images)), test_size=500, stratify=labels, random_state=0)

    model = AutoModelForImageClassification.from_pretrained(DIGITS_TEACHER).eval().requires_grad_(False)
    teacher, config = model.base_model, model.config
    dim, num_heads, num_registers = config.hidden_size, config.num_attention_heads, config.num_register_tokens
    states = teacher(images[train_images], output_hidden_states=True).hidden_states
    test_states = teacher(images[test_images], output_hidden_states=True).hidden_states

    phases = find_phases(layer_distance(states, num_registers), num_blocks)
    print("phases:", ", ".join(f"layers {layers[0]}-{layers[-1]}" for layers in phases))
    blocks = nn.ModuleList(Block(dim, num_heads, inner=config.mlp_ratio * dim) for _ in phases)
    for block, layers in zip(blocks, phases, strict=True):
        print(f"stage 1, layers {layers[0]}-{layers[-1]}")

        def stage1(batch, done, block=block, layers=layers):  # lambda falls from 1 to 0 over a quarter of the steps
            return stage1_loss(block, layers, batch, max(0.0, 1 - 4 * done), num_registers)

        train(block, stage1, states, stage1_steps)
    print("stage 2")
    train(blocks, lambda batch, done: stage2_loss(blocks, phases, batch, num_registers), states, stage2_steps)

    with torch.no_grad():
        student_states = run_blocks(blocks, phases, test_states[0])
        for name, last in (("teacher", test_states[-1]), ("student", student_states[-1])):
            tokens = teacher.layernorm(last)
            features = torch.cat([tokens[:, 0], tokens[:, 1 + num_registers :].mean(1)], dim=1)
            accuracy = (model.classifier(features).argmax(1) == labels[test_images]).float().mean()
            print(f"accuracy of the {name}: {accuracy:.1%}")
    explained = r_squared(student_states, test_states[1:])
    print(f"R2 of layers 1 to {len(explained)}:", " ".join(f"{value:.3f}" for value in explained))
    return explained


if __name__ == "__main__":
    main()
