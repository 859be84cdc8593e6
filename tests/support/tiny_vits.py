"""Small models of the families beside DINOv2, every parameter of theirs random."""

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPForImageClassification,
    DeiTForImageClassification,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    ViTForImageClassification,
)

from raptor_hf.families import FAMILIES
from tests.support.tiny_models import DIM, NUM_HEADS, NUM_LAYERS, randomize

# family -> tokens before the patches, of which cls
PREFIX = {
    "vit": (1, 1),
    "deit": (2, 1),
    "vit_mae": (1, 1),
    "clip_vision_model": (1, 1),
    "siglip_vision_model": (0, 0),
    "dinov3_vit": (3, 1),
}
VITS = tuple(PREFIX)
STUDENTS = tuple(family for family in VITS if FAMILIES[family].block_parts)
WITH_CLASSIFIER = ("vit", "deit", "clip_vision_model", "siglip_vision_model")
WIDTH, PATCH, IMAGE = 40, 7, 28
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 50}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
TWO_TOWERS = {
    "clip_vision_model": (CLIPConfig, CLIPForImageClassification),
    "siglip_vision_model": (SiglipConfig, SiglipForImageClassification),
}


def vit_fields(family: str) -> dict:
    """Fields of a model of width 24 with 4 layers, for images of 28 x 28 pixels, 4 x 4 patches."""
    fields = {
        "hidden_size": DIM,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": WIDTH,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    return fields | ({"num_register_tokens": 2} if family == "dinov3_vit" else {})


def two_towers(family: str, **fields) -> CLIPConfig | SiglipConfig:
    """The configuration of a model of images and text, its vision tower of `vit_fields`."""
    return TWO_TOWERS[family][0](vision_config=vit_fields(family), text_config=TEXT, **fields)


def tiny_vit(family: str, num_labels: int | None = None, seed: int = 0, **fields) -> PreTrainedModel:
    """A model of one of `VITS`, in eval mode; with `num_labels`, one with a classifier."""
    labels = {} if num_labels is None else {"id2label": {i: f"thing {i}" for i in range(num_labels)}}
    if num_labels is not None and family in TWO_TOWERS:
        model = TWO_TOWERS[family][1](two_towers(family, **labels))
    else:
        config = AutoConfig.for_model(family, **(vit_fields(family) | labels | fields))
        classes = {"vit": ViTForImageClassification, "deit": DeiTForImageClassification}
        model = AutoModel.from_config(config) if num_labels is None else classes[family](config)
    return randomize(model, seed).eval()


def own_hidden_states(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What a model of `VITS` itself returns as its hidden states, all patches in order, (B, L + 1, T, D)."""
    arguments = {}
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
        num_patches = pixel_values.shape[2] // PATCH * (pixel_values.shape[3] // PATCH)
        arguments["noise"] = torch.arange(num_patches).float().repeat(len(pixel_values), 1)
    if model.config.model_type != "dinov3_vit" and pixel_values.shape[2:] != (IMAGE, IMAGE):
        arguments["interpolate_pos_encoding"] = True
    with torch.no_grad():
        return torch.stack(model(pixel_values, output_hidden_states=True, **arguments).hidden_states, 1)
