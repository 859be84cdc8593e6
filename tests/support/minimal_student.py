"""Blocks of training/raptor_minimal.py with the weights of a RaptorModel, the independent reference of the tests."""

import torch
from torch import Tensor

from raptor_hf import RaptorModel
from raptor_hf.research_checkpoints import BLOCK_NAMES, CONDITIONER_NAMES
from training.raptor_minimal import Block

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
    """One step of the minimal block; what a conditioning tabulates by layer is added to its weights."""
    block = Block(config.hidden_size, config.num_attention_heads, config.intermediate_size, config.ffn_type)
    for norm in (block.norm1, block.norm2):
        norm.eps = config.block_layer_norm_eps
    own = {theirs: weights[ours] for theirs, ours in BLOCK_NAMES.items() if ours in weights}
    own.setdefault("attn.in_proj_bias", tokens.new_zeros(3 * config.hidden_size))
    conditioner = {
        name.removeprefix("conditioner."): w for name, w in weights.items() if name.startswith("conditioner")
    }
    if config.depth_conditioning == "scale":
        own |= {theirs: conditioner[ours] for theirs, ours in CONDITIONER_NAMES.items()}
    else:
        own |= {name: tokens.new_zeros(block.get_parameter(name).shape) for name in CONDITIONER_NAMES}  # scales of 1
        table = _table(conditioner, depth, layers, config.depth_conditioning)
        tokens = tokens + table.pop("depth_embeddings", 0)
        for index in (1, 2):
            own[f"norm{index}.weight"] = own[f"norm{index}.weight"] * (1 + table.pop(f"norm{index}_gain", 0))
            own[f"norm{index}.bias"] = own[f"norm{index}.bias"] + table.pop(f"norm{index}_shift", 0)
            own[f"ls{index}.gamma"] = own[f"ls{index}.gamma"] * (1 + table.pop(f"layer_scale{index}_gain", 0))
        own["attn.in_proj_weight"] = own["attn.in_proj_weight"] + table.pop("qkv", 0)
        own["mlp.0.weight"] = own["mlp.0.weight"] + table.pop("ffn", 0)
        own["attn.out_proj.weight"] = own["attn.out_proj.weight"] * (1 + table.pop("heads_gain", 0))
        own["mlp.2.weight"] = own["mlp.2.weight"] * (1 + table.pop("neurons_gain", 0))
        assert not table, f"the reference does not know {sorted(table)}"
    return torch.func.functional_call(block.to(tokens.dtype), own, (tokens, depth), strict=True)


def _table(conditioner: Tensors, depth: float, layers: tuple[int, ...], conditioning: str) -> Tensors:
    """What is tabulated by layer, at a depth: linear between the block's layers."""
    if conditioning == "low_rank":
        for name in ("qkv", "ffn"):
            conditioner[name] = conditioner.pop(f"{name}_up") @ conditioner.pop(f"{name}_down")
    return {name: _between(rows, layers, depth) for name, rows in conditioner.items()}


def _between(rows: Tensor, layers: tuple[int, ...], depth: float) -> Tensor:
    """Row of `depth` in a table with a row per layer: held outside of the layers, linear between neighbours."""
    if depth <= layers[0]:
        return rows[0]
    for i in range(1, len(layers)):
        if depth <= layers[i]:
            share = (depth - layers[i - 1]) / (layers[i] - layers[i - 1])
            return (1 - share) * rows[i - 1] + share * rows[i]
    return rows[-1]
