"""Small DINOv2 models with random weights, none of them zero or one, so that a weight left out shows."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel

FAMILIES = ("dinov2", "dinov2_with_registers")
# the size the position embeddings are for, a larger square, and two that are not square
IMAGE_SIZES = ((28, 28), (42, 42), (28, 56), (70, 14))
DIM, NUM_LAYERS, NUM_HEADS, PATCH = 24, 4, 3, 14


def tiny_dinov2(
    family: str = "dinov2_with_registers", num_labels: int | None = None, seed: int = 0, **fields
) -> PreTrainedModel:
    """A DINOv2 model of width 24 with 4 layers, in eval mode; with `num_labels`, one with a classifier."""
    registers = {"num_register_tokens": 2} if family == "dinov2_with_registers" else {}
    options = {
        "hidden_size": DIM,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "image_size": 2 * PATCH,
        "patch_size": PATCH,
    }
    labels = {} if num_labels is None else {"id2label": {i: f"thing {i}" for i in range(num_labels)}}
    config = AutoConfig.for_model(family, **(options | registers | labels | fields))
    model = (AutoModel if num_labels is None else AutoModelForImageClassification).from_config(config)
    return randomize(model, seed).eval()


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Sets every parameter to normal random numbers, those of norms and LayerScale around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in name and name.endswith("weight") or name.endswith(("lambda1", "gamma")):
                parameter.add_(1)
    return model


def images(size: tuple[int, int] = (28, 28), batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random images (batch, 3, *size)."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def hidden_states(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the model itself returns as its hidden states, (B, L + 1, T, D)."""
    with torch.no_grad():
        return torch.stack(model(pixel_values, output_hidden_states=True).hidden_states, 1)
