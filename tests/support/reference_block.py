"""The recurrence written again, from the paper (arXiv 2512.19941) and PyTorch's own modules, one step at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raptor_hf import RaptorModel

Tensors = dict[str, Tensor]


def step_weights(model: RaptorModel, block: int) -> Tensors:
    """Copies, as leaves, of all that block number `block` and its conditioner have."""
    parts = {"": model.encoder.blocks[block], "conditioner.": model.encoder.conditioners[block]}
    return {
        prefix + name: parameter.detach().clone().requires_grad_()
        for prefix, part in parts.items()
        for name, parameter in part.named_parameters()
    }


def reference_states(model: RaptorModel, images: Tensor, plan: list[tuple[int, float]]) -> tuple[list[Tensor], list]:
    """
    States 0..n and the weights of every step of a plan, no two steps sharing a tensor.

    Returns:
        the states, n + 1 of (B, T, D), and the weights that each step used, to read their gradients.
    """
    states, weights = [model.embeddings(images)], []
    for block, depth in plan:
        weights.append(step_weights(model, block))
        states.append(reference_step(states[-1], weights[-1], depth, model.config.block_layers[block], model.config))
    return states, weights


def reference_step(tokens: Tensor, weights: Tensors, depth: float, layers: tuple[int, ...], config) -> Tensor:
    """x' = x + s_attn LS1(Attn(LN1 x)), x'' = x' + s_ffn LS2(FFN(LN2 x')), out = s_out x'', section 3 of the paper."""
    s_attn, s_ffn, s_out, table = _conditioning(weights, depth, layers, config)
    tokens = tokens + table.get("depth_embeddings", 0)

    def norm(x: Tensor, index: int) -> Tensor:
        gain, shift = table.get(f"norm{index}_gain", 0), table.get(f"norm{index}_shift", 0)
        weight = weights[f"norm{index}.weight"] * (1 + gain)
        bias = weights[f"norm{index}.bias"] + shift
        return F.layer_norm(x, x.shape[-1:], weight, bias, config.block_layer_norm_eps)

    def gamma(index: int) -> Tensor:
        return weights[f"layer_scale{index}.lambda1"] * (1 + table.get(f"layer_scale{index}_gain", 0))

    tokens = tokens + s_attn * gamma(1) * _attention(norm(tokens, 1), weights, table, config)
    tokens = tokens + s_ffn * gamma(2) * _ffn(norm(tokens, 2), weights, table, config)
    return s_out * tokens


def _attention(x: Tensor, weights: Tensors, table: Tensors, config) -> Tensor:
    attention = nn.MultiheadAttention(x.shape[-1], config.num_attention_heads, batch_first=True, dtype=x.dtype)
    parameters = {
        "in_proj_weight": weights["attention.qkv.weight"] + table.get("qkv", 0),
        "in_proj_bias": weights.get("attention.qkv.bias", x.new_zeros(3 * x.shape[-1])),
        "out_proj.weight": weights["attention.proj.weight"],
        "out_proj.bias": weights["attention.proj.bias"],
    }
    return torch.func.functional_call(attention, parameters, (x, x, x), {"need_weights": False})[0]


def _ffn(x: Tensor, weights: Tensors, table: Tensors, config) -> Tensor:
    hidden = F.linear(x, weights["ffn.fc1.weight"] + table.get("ffn", 0), weights["ffn.fc1.bias"])
    if config.ffn_type == "swiglu":
        width = hidden.shape[-1] // 2
        hidden = F.silu(hidden[..., :width]) * hidden[..., width:]
    else:
        hidden = F.gelu(hidden)
    return F.linear(hidden, weights["ffn.fc2.weight"], weights["ffn.fc2.bias"])


def _conditioning(weights: Tensors, depth: float, layers: tuple[int, ...], config):
    """The three gains, and whatever is tabulated by layer, at a depth: linear between the block's layers."""
    own = {name.removeprefix("conditioner."): w for name, w in weights.items() if name.startswith("conditioner.")}
    if config.depth_conditioning == "scale":
        z = next(iter(own.values())).new_tensor([depth])
        hidden = F.silu(F.linear(z, own["fc1.weight"], own["fc1.bias"]))
        return *(F.linear(hidden, own["fc2.weight"], own["fc2.bias"]) + 1).split(config.hidden_size), {}
    if config.depth_conditioning == "low_rank":
        for name in ("qkv", "ffn"):
            own[name] = own.pop(f"{name}_up") @ own.pop(f"{name}_down")
    return 1, 1, 1, {name: _between(rows, layers, depth) for name, rows in own.items()}


def _between(rows: Tensor, layers: tuple[int, ...], depth: float) -> Tensor:
    """Row of `depth` in a table with a row per layer: held outside of the layers, linear between neighbours."""
    if depth <= layers[0]:
        return rows[0]
    for i in range(1, len(layers)):
        if depth <= layers[i]:
            share = (depth - layers[i - 1]) / (layers[i] - layers[i - 1])
            return (1 - share) * rows[i - 1] + share * rows[i]
    return rows[-1]
