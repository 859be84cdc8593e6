"""Small models of the families beside DINOv2, every parameter of theirs random."""

import torch
from transformers import (
    Aimv2Config,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    MetaClip2Config,
    MetaClip2ForImageClassification,
    MetaClip2VisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2Config,
    Siglip2ForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    Tipsv2Config,
)

from raptor_hf.families import FAMILIES
from tests.support.tiny_models import DIM, NUM_HEADS, NUM_LAYERS, randomize

# family -> tokens before the patches, of which cls
PREFIX = {
    "vit": (1, 1),
    "deit": (2, 1),
    "vit_mae": (1, 1),
    "vit_msn": (1, 1),
    "ijepa": (0, 0),
    "beit": (1, 1),
    "data2vec-vision": (1, 1),
    "clip_vision_model": (1, 1),
    "metaclip_2_vision_model": (1, 1),
    "mlcd_vision_model": (1, 1),
    "siglip_vision_model": (0, 0),
    "siglip2_vision_model": (0, 0),
    "aimv2_vision_model": (0, 0),
    "tipsv2_vision_model": (3, 1),
    "radio": (5, 1),
    "dinov3_vit": (3, 1),
}
VITS = tuple(PREFIX)
STUDENTS = tuple(family for family in VITS if FAMILIES[family].block_parts)
WITH_CLASSIFIER = ("vit", "deit", "vit_msn", "ijepa", "beit", "data2vec-vision", "clip_vision_model")
WITH_CLASSIFIER += ("metaclip_2_vision_model", "siglip_vision_model", "siglip2_vision_model")
WIDTH, PATCH, IMAGE = 40, 7, 28
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 50}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
# vision tower -> configuration of both, and the class with a classifier, if there is one
TWO_TOWERS = {
    "clip_vision_model": (CLIPConfig, CLIPForImageClassification),
    "metaclip_2_vision_model": (MetaClip2Config, MetaClip2ForImageClassification),
    "siglip_vision_model": (SiglipConfig, SiglipForImageClassification),
    "siglip2_vision_model": (Siglip2Config, Siglip2ForImageClassification),
    "aimv2_vision_model": (Aimv2Config, None),
    "tipsv2_vision_model": (Tipsv2Config, None),
}
# what a family calls otherwise, or what makes its model one that can be distilled
OWN_FIELDS = {
    "dinov3_vit": {"num_register_tokens": 2},
    "beit": {"use_absolute_position_embeddings": True},
    "data2vec-vision": {"use_absolute_position_embeddings": True},
    "mlcd_vision_model": {"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
    "siglip2_vision_model": {"num_patches": (IMAGE // PATCH) ** 2},
    "aimv2_vision_model": {"is_native": True},
    "tipsv2_vision_model": {"num_register_tokens": 2, "mlp_ratio": WIDTH / DIM},
    "radio": {"max_img_size": 2 * IMAGE, "num_cls_tokens": 3, "num_registers": 2, "mlp_ratio": WIDTH / DIM},
}
# those that take images of any size without being told to interpolate
ANY_SIZE = {"dinov3_vit", "mlcd_vision_model", "siglip2_vision_model", "aimv2_vision_model", "tipsv2_vision_model"}
ANY_SIZE |= {"radio", "beit", "data2vec-vision"}


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
    return fields | OWN_FIELDS.get(family, {})


def two_towers(family: str, **fields) -> PreTrainedConfig:
    """The configuration of a model of images and text, its vision tower of `vit_fields`."""
    # without projections, both towers have one width
    alike = family in ("siglip_vision_model", "siglip2_vision_model", "tipsv2_vision_model")
    text = TEXT | ({"hidden_size": DIM, "num_attention_heads": NUM_HEADS} if alike else {})
    return TWO_TOWERS[family][0](vision_config=vit_fields(family), text_config=text, **fields)


def tiny_vit(family: str, num_labels: int | None = None, seed: int = 0, **fields) -> PreTrainedModel:
    """A model of one of `VITS`, in eval mode; with `num_labels`, one with a classifier."""
    labels = {} if num_labels is None else {"id2label": {i: f"thing {i}" for i in range(num_labels)}}
    if num_labels is not None and family in TWO_TOWERS:
        model = TWO_TOWERS[family][1](two_towers(family, **labels))
    else:
        config = AutoConfig.for_model(family, **(vit_fields(family) | labels | fields))
        if num_labels is not None:
            # of two with one head or two, as a checkpoint would say
            config.architectures = ["DeiTForImageClassification"]
        if family == "metaclip_2_vision_model":
            model = MetaClip2VisionModel(config)
        else:
            model = (AutoModel if num_labels is None else AutoModelForImageClassification).from_config(config)
    return randomize(model, seed).eval()


def own_inputs(model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor | bool]:
    """How a model of `VITS` is given images so that it sees all patches in order."""
    config = getattr(model.config, "vision_config", model.config)
    arguments, family = {}, config.model_type
    rows, columns = (pixels // PATCH for pixels in pixel_values.shape[2:])
    if family == "vit_mae":
        config.mask_ratio = 0.0
        arguments["noise"] = torch.arange(rows * columns).float().repeat(len(pixel_values), 1)
    if family not in ANY_SIZE and pixel_values.shape[2:] != (IMAGE, IMAGE):
        arguments["interpolate_pos_encoding"] = True
    if family == "siglip2_vision_model":
        # as its image processor cuts them, channels last
        cut = [row.split(PATCH, 3) for row in pixel_values.split(PATCH, 2)]
        pixel_values = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for row in cut for patch in row], 1)
        arguments["pixel_attention_mask"] = torch.ones(pixel_values.shape[:2], dtype=torch.long)
        arguments["spatial_shapes"] = torch.tensor([[rows, columns]] * len(pixel_values))
    return arguments | {"pixel_values": pixel_values}


def own_hidden_states(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What a model of `VITS` itself returns as its hidden states, all patches in order, (B, L + 1, T, D)."""
    with torch.no_grad():
        outputs = model(output_hidden_states=True, **own_inputs(model, pixel_values))
    return torch.stack(outputs.hidden_states, 1)
