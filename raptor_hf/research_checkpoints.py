"""Reads checkpoints of the method's research code, without running code of theirs, and loads them into a RaptorModel.

    model = load_research_state_dict(read_research_file(path), block_repeats=(7, 3, 2), teacher=teacher)

They hold the blocks only, as a state dict or as a pickled module; embeddings and final norm are the teacher's.
"""

import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .conversion import student_from_teacher
from .modeling_raptor import RaptorModel
from .phases import Partition
from .teacher import Teacher

BLOCK_NAMES = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.in_proj_weight": "attention.qkv.weight",
    "attn.in_proj_bias": "attention.qkv.bias",
    "attn.out_proj.weight": "attention.proj.weight",
    "attn.out_proj.bias": "attention.proj.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.0.weight": "ffn.fc1.weight",
    "mlp.0.bias": "ffn.fc1.bias",
    "mlp.2.weight": "ffn.fc2.weight",
    "mlp.2.bias": "ffn.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
CONDITIONER_NAMES = {
    "t_proj.0.weight": "fc1.weight",
    "t_proj.0.bias": "fc1.bias",
    "t_proj.2.weight": "fc2.weight",
    "t_proj.2.bias": "fc2.bias",
}
# PyTorch's default, which the research code leaves in place
BLOCK_LAYER_NORM_EPS = 1e-5

PICKLED_CLASSES = (
    "raptor.Raptor",
    "block.Block",
    "block.SwiGLU",
    "block.LayerScale",
    "torch.nn.modules.activation.GELU",
    "torch.nn.modules.activation.MultiheadAttention",
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    "torch.nn.modules.normalization.LayerNorm",
)


class PickledModule:
    """Stands in for every module class of a pickle: it keeps the attributes that were stored and can do nothing."""


def read_research_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a state dict, from a file that holds one or a whole pickled module.

    PyTorch's weights-only unpickler reads the file, and no module class is looked up: each class that a whole model
    may refer to (`PICKLED_CLASSES`) becomes a `PickledModule`. Anything else in a file is refused, not run.

    Args:
        path: file that `torch.save` wrote.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ValueError: if the file refers to anything else, or holds neither a state dict nor a module.
    """
    with torch.serialization.safe_globals([(PickledModule, name) for name in PICKLED_CLASSES]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # PyTorch's own message proposes to load the file without protection
            reference = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it refers to {reference[1]}" if reference else "it is no plain pickle of torch.save"
            raise ValueError(
                f"path={str(path)!r} is refused, nothing in it was run: {reason}. Allowed are tensors and the classes "
                f"{', '.join(PICKLED_CLASSES)}"
            ) from error
    if isinstance(content, PickledModule):
        return dict(_tensors(content))
    if isinstance(content, Mapping) and all(isinstance(tensor, Tensor) for tensor in content.values()):
        return dict(content)
    raise ValueError(
        f"path is {str(path)!r}, which holds a {type(content).__name__}; it must hold a state dict or a module"
    )


def load_research_state_dict(
    state_dict: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    *,
    block_repeats: Sequence[int] | Partition,
    teacher: Teacher | PreTrainedModel,
    num_heads: int | None = None,
) -> RaptorModel:
    """Loads weights of the research code, whose FFN is always SwiGLU, into a RaptorModel.

    Args:
        state_dict: of a whole model, its names beginning with `blocks.I.`; or those of single blocks, one per block.
        block_repeats: the partition that the blocks were trained for, which their weights do not tell.
        teacher: whose embeddings and final norm to take.
        num_heads: attention heads; None takes the teacher's.

    Returns:
        The model, in float32 and eval mode, its depth conditioning "scale" if the blocks have `t_proj`, else "none".

    Raises:
        ValueError: if weights are missing, unknown or of another shape than the teacher and `block_repeats` ask for.
    """
    blocks = _split_blocks(state_dict)
    num_blocks = block_repeats.num_blocks if isinstance(block_repeats, Partition) else len(block_repeats)
    if len(blocks) != num_blocks:
        raise ValueError(f"block_repeats={block_repeats} has {num_blocks} blocks; state_dict has {len(blocks)}")
    conditioned = any("t_proj.0.weight" in block for block in blocks)
    expected = BLOCK_NAMES.keys() | (CONDITIONER_NAMES.keys() if conditioned else set())
    for index, block in enumerate(blocks):
        if block.keys() != expected:
            raise ValueError(
                f"state_dict is not of the research code: block {index} lacks {sorted(expected - block.keys())} and "
                f"has the unknown {sorted(block.keys() - expected)}"
            )
    options = {} if num_heads is None else {"num_attention_heads": num_heads}
    model = student_from_teacher(
        teacher,
        block_repeats,
        ffn_type="swiglu",
        intermediate_size=blocks[0]["mlp.2.weight"].shape[-1],
        depth_conditioning="scale" if conditioned else "none",
        block_layer_norm_eps=BLOCK_LAYER_NORM_EPS,
        **options,
    ).base_model
    for index, block in enumerate(blocks):
        _load(model.encoder.blocks[index], block, BLOCK_NAMES, index)
        if conditioned:
            _load(model.encoder.conditioners[index], block, CONDITIONER_NAMES, index)
    return model


def _split_blocks(state_dict: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    if not isinstance(state_dict, Mapping):
        return list(state_dict)
    if not any(name.startswith("blocks.") for name in state_dict):
        return [state_dict]
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None:
            raise ValueError(f"state_dict has {name!r}, which belongs to no block: all names must begin with blocks.I.")
        blocks.setdefault(int(match[1]), {})[match[2]] = tensor
    if sorted(blocks) != list(range(len(blocks))):
        raise ValueError(f"state_dict has the blocks {sorted(blocks)}; they must be numbered from 0 without a gap")
    return [blocks[index] for index in range(len(blocks))]


def _load(module: torch.nn.Module, weights: Mapping[str, Tensor], names: Mapping[str, str], index: int) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, our_name in names.items():
        if weights[name].shape != shapes[our_name]:
            raise ValueError(
                f"state_dict: {name} of block {index} is {tuple(weights[name].shape)}; the teacher's width and SwiGLU "
                f"ask for {shapes[our_name]}"
            )
    module.load_state_dict({our_name: weights[name] for name, our_name in names.items()})


def _tensors(module: PickledModule, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The parameters under the names of `nn.Module.state_dict`, read from attributes alone; there are no buffers."""
    state: dict[str, Any] = vars(module)
    for name, tensor in state.get("_parameters", {}).items():
        if tensor is not None:
            yield prefix + name, tensor.detach()
    for name, child in state.get("_modules", {}).items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")
