"""Exports models as programs of PyTorch: images in, named tensors out, for any batch and, if wanted, any image size.

save_pt2(model, "model.pt2")
torch.export.load("model.pt2").module()(images)    # a tuple, named as output_names(model) says
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from ..configuration_raptor import as_pair
from ..modeling_raptor import RaptorEmbeddings, RaptorEncoder, StepModulation

MAX_BATCH = 1024
# rows and columns of patches
MAX_PATCHES = 512


class FrozenConditioner(nn.Module):
    """Holds what a conditioner gives at the steps of its block, computed once: a tensor for each step and field."""

    def __init__(self, modulations: list[StepModulation]) -> None:
        super().__init__()
        self.num_steps = len(modulations)
        for step, modulation in enumerate(modulations):
            for name, value in modulation._asdict().items():
                self.register_buffer(f"{name}_{step}", None if value is None else value.detach().clone())

    def forward(self, depths: tuple[float, ...], device: torch.device | None = None) -> list[StepModulation]:
        return [
            StepModulation(*(getattr(self, f"{name}_{step}") for name in StepModulation._fields))
            for step in range(self.num_steps)
        ]


class ImageProgram(nn.Module):
    """The module that exporters trace, from pixel_values (B, C, H, W) to a tuple of the tensors of a model's output.

    Args:
        model: a Raptor or any other image model of transformers; it is copied.
        image_size: height and width of the only images that the program will take. None leaves them open, which other
            models than Raptor may not allow.
    """

    def __init__(self, model: PreTrainedModel, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.image_size = image_size
        self.eval()
        for module in self.model.modules():
            if isinstance(module, RaptorEncoder):
                for block, conditioner in enumerate(module.conditioners):
                    depths = tuple(depth for owner, depth in module.plan if owner == block)
                    module.conditioners[block] = FrozenConditioner(conditioner(depths))
            elif isinstance(module, RaptorEmbeddings) and image_size and module.position_embeddings is not None:
                # not every runtime interpolates as PyTorch does
                name = "cropped_positions" if module.position_type == "learned_cropped" else "interpolate_pos_encoding"
                positions = nn.Parameter(getattr(module, name)(*image_size).clone(), requires_grad=False)
                module.position_embeddings = positions
                setattr(module, name, lambda height, width, positions=positions: positions)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in _named_tensors(self.model(pixel_values)))

    def example(self, batch_size: int = 2) -> Tensor:
        """Images to trace with, (B, C, H, W)."""
        config = self.model.config
        height, width = self.image_size or as_pair(config.image_size)
        return torch.zeros(batch_size, config.num_channels, height, width)

    def open_dimensions(self) -> dict[str, Any]:
        """The dimensions of the images that a program leaves open, for `torch.export` and `torch.onnx.export`."""
        dimensions = {0: Dim("batch", min=1, max=MAX_BATCH)}
        if self.image_size is None:
            patch = as_pair(self.model.config.patch_size)
            for axis, (name, pixels) in enumerate(zip(("rows", "columns"), patch, strict=True), start=2):
                dimensions[axis] = pixels * Dim(name, min=2, max=MAX_PATCHES)
        return {"pixel_values": dimensions}

    @torch.no_grad()
    def export(self) -> ExportedProgram:
        """The exported program, without the places in the code that its nodes came from."""
        program = torch.export.export(self, (self.example(),), dynamic_shapes=self.open_dimensions(), strict=False)
        for node in program.graph.nodes:
            # they are half of a small file, and name folders of this machine
            for origin in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
                node.meta.pop(origin, None)
        return program


@torch.no_grad()
def output_names(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that a program of the model returns, in their order."""
    program = ImageProgram(model)
    return [name for name, _ in _named_tensors(program.model(program.example(1)))]


def parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters of a model, each counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def save_pt2(model: PreTrainedModel, path: str | Path, image_size: tuple[int, int] | None = None) -> None:
    """Write a program that `torch.export.load` reads, without this package.

    Args:
        model: as in `ImageProgram`.
        path: of the file, which ends in .pt2.
        image_size: as in `ImageProgram`.
    """
    torch.export.save(ImageProgram(model, image_size).export(), path)


def _named_tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's output; those of a tuple get the name of the tuple and a number."""
    for name, value in output.items():
        if isinstance(value, tuple):
            yield from ((f"{name}_{index}", each) for index, each in enumerate(value))
        else:
            yield name, value
