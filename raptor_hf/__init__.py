"""Raptor: Vision Transformers rewritten as a few recurrent blocks, at home in transformers.

Importing registers the Raptor classes with the Auto classes of transformers; nothing else happens.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

# the top-level name raises ImportError without torchvision in transformers 5.17; this one works everywhere
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_raptor import RaptorConfig
from .elastic import calibrate_exit, depth_for
from .image_processing_raptor import RaptorImageProcessor
from .modeling_raptor import (
    RaptorBackbone,
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
    RaptorPreTrainedModel,
)

__version__ = "0.1.0"

AutoConfig.register("raptor", RaptorConfig, exist_ok=True)
AutoModel.register(RaptorConfig, RaptorModel, exist_ok=True)
AutoBackbone.register(RaptorConfig, RaptorBackbone, exist_ok=True)
AutoModelForImageClassification.register(RaptorConfig, RaptorForImageClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(RaptorConfig, RaptorForSemanticSegmentation, exist_ok=True)
AutoModelForDepthEstimation.register(RaptorConfig, RaptorForDepthEstimation, exist_ok=True)
AutoImageProcessor.register(RaptorConfig, image_processor_classes={"pil": RaptorImageProcessor}, exist_ok=True)
# a saved processor thus names its code, and brings it, as a saved model does
RaptorImageProcessor.register_for_auto_class()

__all__ = [
    "RaptorBackbone",
    "RaptorConfig",
    "RaptorForDepthEstimation",
    "RaptorForImageClassification",
    "RaptorForSemanticSegmentation",
    "RaptorImageProcessor",
    "RaptorModel",
    "RaptorPreTrainedModel",
    "calibrate_exit",
    "depth_for",
]
