"""Models small enough for tests, none of whose parameters is zero or neutral."""

from typing import Any

import torch

from raptor_hf import (
    RaptorBackbone,
    RaptorConfig,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
    RaptorPreTrainedModel,
)
from raptor_hf.configuration_raptor import DEPTH_CONDITIONINGS, FFN_TYPES

HEADS = [RaptorForImageClassification, RaptorForSemanticSegmentation, RaptorForDepthEstimation]
ALL_CLASSES = [RaptorModel, RaptorBackbone, *HEADS]
# every conditioning and both FFNs, without the whole product
KINDS = [(conditioning, "mlp") for conditioning in DEPTH_CONDITIONINGS] + [("low_rank", FFN_TYPES[1])]

# (block, depth index) of every step, worked out by hand for the blocks of 3, 1 and 2 layers below
PLANS = {
    "trained": ({}, [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (2, 6)]),
    "one step": ({"num_steps": 1}, [(0, 1)]),
    "fewer steps": ({"num_steps": 4}, [(0, 1), (0, 2), (0, 3), (1, 4)]),
    "as many steps": ({"num_steps": 6}, [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (2, 6)]),
    "more steps": ({"num_steps": 8}, [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (2, 6), (2, 6), (2, 6)]),
    "re-timed as trained": ({"block_repeats": (3, 1, 2)}, [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (2, 6)]),
    "slower": ({"block_repeats": [6, 2, 1]}, [*((0, i / 2) for i in range(1, 7)), (1, 3.5), (1, 4), (2, 6)]),
    "faster": ({"block_repeats": (1, 1, 3)}, [(0, 3), (1, 4), (2, 14 / 3), (2, 16 / 3), (2, 6)]),
    "re-timed, cut": ({"block_repeats": (2, 1, 1), "num_steps": 3}, [(0, 1.5), (0, 3), (1, 4)]),
    "re-timed, on": ({"block_repeats": (1, 1, 1), "num_steps": 5}, [(0, 3), (1, 4), (2, 6), (2, 6), (2, 6)]),
}


def tiny_config(**fields: Any) -> RaptorConfig:
    """Three blocks, six steps, 4 x 4 patches; `fields` replace the defaults."""
    tiny = {
        "block_repeats": (3, 1, 2),
        "hidden_size": 24,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "conditioning_rank": 3,
        "block_layer_norm_eps": 1e-5,
        "image_size": 16,
        "patch_size": 4,
        "num_register_tokens": 2,
        "layerscale_value": 0.5,
        "num_labels": 4,
        "num_segmentation_labels": 5,
        "num_depth_bins": 7,
    }
    return RaptorConfig(**(tiny | fields))


def tiny_model(model_class: type[RaptorPreTrainedModel], seed: int = 0, **fields: Any) -> RaptorPreTrainedModel:
    """A model of `tiny_config(**fields)` for inference; noise is added to all its parameters."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tiny_images(batch: int = 2, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Standard normal images, (batch, 3, height, width)."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def tiny_labels(model_class: type, height: int = 16, width: int = 16) -> torch.Tensor:
    """Labels of two images that every head can train on."""
    generator = torch.Generator().manual_seed(1)
    if model_class is RaptorForImageClassification:
        return torch.tensor([0, 3])
    if model_class is RaptorForSemanticSegmentation:
        return torch.randint(0, 5, (2, height, width), generator=generator)
    return torch.rand(2, height, width, generator=generator) * 9 + 0.5
