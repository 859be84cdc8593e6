"""Linear probes: a frozen backbone, a linear head on its features, and the metric of the task.

    backbone = load_backbone("runs/digits_k3")         # or a teacher, as the Raptor with one block per layer
    probe = make_probe(backbone, "image-classification", class_names)
    loss, prediction = probe(probe.features(pixel_values), image_size, labels)

One code for all backbones: a DINOv2 teacher becomes the Raptor that computes the same (`student_from_teacher` with one
block per layer), so that teacher and student are measured, saved and loaded alike. The protocols are the published ones
(arXiv 2512.19941).
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from raptor_settings.probe import METRICS, PUBLISHED, Task
from raptor_settings.resources import find_model
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .accumulators import Accumulator
from .conversion import load_meta_linear_head, student_from_teacher
from .families import find_classifier
from .hub.heads import list_heads
from .image_processing_raptor import IGNORE_INDEX
from .metrics import NYU_SIZE, DepthErrors, MeanIoU, TopKAccuracy
from .modeling_raptor import (
    RaptorForDepthEstimation,
    RaptorForImageClassification,
    RaptorForSemanticSegmentation,
    RaptorModel,
    RaptorPreTrainedModel,
)
from .teacher import load_teacher, untrained

TOP5_CLASSES = 6  # with fewer, every label is among the five highest scores


@dataclass(frozen=True)
class Protocol:
    """How the paper probes for a task.

    Args:
        head: class of the model with the head.
        metrics: what is measured, as the task's accumulator names it, and whether more of it is better; the published
            number first.
        settings: of the recipe, by their names.
    """

    head: type[RaptorPreTrainedModel]
    metrics: Mapping[str, bool]
    settings: Mapping[str, float | str | list[float]]


HEADS = {
    "image-classification": RaptorForImageClassification,
    "semantic-segmentation": RaptorForSemanticSegmentation,
    "depth-estimation": RaptorForDepthEstimation,
}
PROTOCOLS = {task: Protocol(head, METRICS[task], PUBLISHED[task]) for task, head in HEADS.items()}


def scheduled_rate(
    step: int,
    *,
    num_steps: int,
    base_lr: float,
    schedule: Literal["cosine", "constant"],
    warmup_steps: int,
    start_fraction: float,
    final_fraction: float,
) -> float:
    """Learning rate of one step, as torch's LinearLR and then CosineAnnealingLR over all steps that are left set it.

    Args:
        step: 0-based.
        num_steps: N; the cosine would end at step N, one after the last.
        base_lr: the full rate, which step `warmup_steps` has.
        schedule: what follows the warm-up.
        warmup_steps: W, over which the rate rises in a line; 0 for none.
        start_fraction: of the full rate, that step 0 of a warm-up has.
        final_fraction: of the full rate, that the cosine ends with.
    """
    if step < warmup_steps:
        return base_lr * (start_fraction + (1 - start_fraction) * step / warmup_steps)
    if schedule == "constant":
        return base_lr
    wave = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))
    return base_lr * (final_fraction + (1 - final_fraction) * wave)


@dataclass(frozen=True)
class Backbone:
    """A frozen backbone and where it is from.

    Args:
        model: the Raptor without a head, float32, eval mode, on the CPU.
        classifier: linear layer on [cls, mean patch] that came with it, None if there was none.
        folder: the local folder of a student, into which its heads go; None for a teacher or a student on the Hub.
        name: name or folder that it was loaded from.
        revision: commit it is from, if known.
    """

    model: RaptorModel
    classifier: nn.Linear | None
    folder: Path | None
    name: str
    revision: str | None = None


def load_backbone(
    name_or_path: str,
    *,
    revision: str | None = None,
    num_layers: int | None = None,
    variant: str | None = None,
    reinitialize: bool = False,
) -> Backbone:
    """Loads a student as it is, and a teacher as the Raptor with one block per layer, which computes the same.

    Args:
        name_or_path: folder or name on the Hub, of a Raptor or of a supported teacher.
        revision: branch, tag or commit.
        num_layers: keep only the first of the teacher's layers, a compression baseline; None keeps all.
        variant: head of a student to load with it; None is its own.
        reinitialize: replace a teacher's weights by random ones, seed 0, for the measure of what training gave it.

    Raises:
        ValueError: if a student is to be cut, there are not so many layers, or the model is of no supported family.
        OSError: if there is no such model.
    """
    layers = None if num_layers is None else tuple(range(1, num_layers + 1))
    if num_layers is not None and num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; it must be at least 1")
    local = Path(find_model(name_or_path))
    if variant is None and local.is_dir() and "teacher" in list_heads(local):
        variant = "teacher"  # the name that a student's own head gets when others join it
    teacher = load_teacher(name_or_path, revision=revision, layers=layers, variant=variant)
    if teacher.family == "raptor":
        if num_layers is not None or reinitialize:
            raise ValueError(
                f"num_layers is {num_layers} and reinitialize {reinitialize}, but {name_or_path} is a Raptor; only a "
                "teacher can be cut or reinitialized"
            )
        model, folder = teacher.model, local if local.is_dir() else None
    else:
        teacher = untrained(teacher) if reinitialize else teacher
        student = student_from_teacher(teacher, (1,) * teacher.num_layers, init="first")
        # a ViT's is on cls alone; the student has it in its own form
        return Backbone(student.base_model.eval(), find_classifier(student), None, name_or_path, teacher.revision)
    return Backbone(model.eval(), teacher.classifier, folder, name_or_path, teacher.revision)


class Probe(nn.Module):
    """A frozen backbone and the linear head that is trained on its features.

    Args:
        model: the head on its backbone; the backbone's parameters are frozen.

    Attributes:
        head: the parameters that train.
    """

    def __init__(self, model: RaptorPreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval()
        self.model.requires_grad_(False)
        for parameter in self.head.parameters():
            parameter.requires_grad_(True)

    @property
    def head(self) -> nn.Module:
        """The linear layer."""
        return self.model.bins if isinstance(self.model, RaptorForDepthEstimation) else self.model.classifier

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Returns what the head reads, in the precision of the backbone or of the caller's autocast.

        Args:
            pixel_values: normalised images, (B, C, H, W).

        Returns:
            (B, 2 D) for classification, (B, P, D) for segmentation, (B, 1 + P, D), cls first, for depth.
        """
        return self.model.features(self.model.raptor(pixel_values).last_hidden_state)

    def forward(
        self, features: Tensor, image_size: tuple[int, int], labels: Tensor, loss_stride: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Loss and prediction of the head, in float32.

        Args:
            features: as `features` gives them, in any precision.
            image_size: height and width of the images in pixels.
            labels: classes (B,) or (B, H, W), integers, or depth in metres (B, H, W).
            loss_stride: of masks, the loss and the scores are of every so many-th pixel in both directions. An odd one
                takes the middle of each square of pixels, where the scores are those of the whole image.

        Returns:
            The mean loss; class scores (B, C) or (B, C, H, W), or depth in metres (B, H', W').
        """
        if loss_stride > 1:
            labels = labels[:, loss_stride // 2 :: loss_stride, loss_stride // 2 :: loss_stride]
        if not labels.is_floating_point():
            labels = labels.long()
        output = self._predict(features, image_size, labels)
        return output.loss, self._prediction(output)

    def predict(self, features: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The prediction alone, as `forward` gives it, of the whole image."""
        return self._prediction(self._predict(features, image_size))

    def _predict(self, features: Tensor, image_size: tuple[int, int], labels: Tensor | None = None) -> ModelOutput:
        with torch.autocast(features.device.type, enabled=False):
            return self.model.predict(features.float(), image_size, labels)

    def _prediction(self, output: ModelOutput) -> Tensor:
        return output.predicted_depth if isinstance(self.model, RaptorForDepthEstimation) else output.logits


def make_probe(
    backbone: Backbone,
    task: Task,
    *,
    class_names: Sequence[str] | None = None,
    num_depth_bins: int = 256,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
) -> Probe:
    """Puts a new head for a task on a backbone.

    Args:
        backbone: as `load_backbone` gives it; its model is used, not copied.
        task: which head.
        class_names: of classification and segmentation, in the order of the labels.
        num_depth_bins: bins of the depth head, evenly spaced.
        min_depth: of the first bin, in metres.
        max_depth: of the last bin, in metres.

    Raises:
        ValueError: if the task needs class names, or the numbers make no head.
    """
    config = copy.deepcopy(backbone.model.config)
    if task == "depth-estimation":
        config.num_depth_bins, config.min_depth, config.max_depth = num_depth_bins, min_depth, max_depth
    elif not class_names:
        raise ValueError(f"class_names is {class_names}; a head for {task} needs at least one class")
    elif task == "semantic-segmentation":
        config.num_segmentation_labels = len(class_names)
        config.segmentation_id2label = dict(enumerate(class_names))
    else:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: label for label, name in enumerate(class_names)}
    config.validate_architecture()
    model = PROTOCOLS[task].head(config)
    model.raptor = backbone.model
    return Probe(model)


@torch.no_grad()
def initialize_head(probe: Probe, seed: int, source: nn.Linear | str | None = None) -> None:
    """Sets the weights that training starts from.

    Args:
        probe: whose head is set, in place.
        seed: of a random start: weights normal with the configuration's initializer_range, biases zero.
        source: a classifier to start from instead, or the path of one in Meta's format; the paper's fine-tuned probe.

    Raises:
        ValueError: if the source has other classes or another width, or its file holds no head.
    """
    if isinstance(source, str):
        load_meta_linear_head(_read_head(source), probe.model)
    elif source is not None:
        if source.weight.shape != probe.head.weight.shape:
            raise ValueError(
                f"the classifier to start from is {tuple(source.weight.shape)}, but the head needs "
                f"{tuple(probe.head.weight.shape)}: other classes, or another width"
            )
        probe.head.load_state_dict(source.state_dict())
    else:
        # drawn on the CPU, so that the seed means the same on every device
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(probe.head.weight.shape, generator=generator) * probe.model.config.initializer_range
        probe.head.weight.copy_(weight)
        probe.head.bias.zero_()


def _read_head(path: str) -> dict[str, Tensor]:
    """Weight and bias in a file of Meta's format."""
    try:
        head = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # of a file that is no checkpoint, or whose pickle would run code, torch and pickle raise nearly anything; what
        # torch advises then, to load it all the same, is not for files from elsewhere
        raise ValueError(
            f"init_head is {path!r}, which is no file of weights that can be read safely ({type(error).__name__}); it "
            "must hold 'weight' and 'bias' of a linear head, saved by torch.save"
        ) from error
    tensors = head.values() if isinstance(head, Mapping) else [None]
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors):
        raise ValueError(f"init_head is {path!r}, which holds no tensors 'weight' and 'bias' of a linear head")
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"init_head is {path!r}, whose weights are NaN or infinite in part")
    return head


class ProbeMetric:
    """The metric of a task, fed with predictions as a `Probe` gives them.

    Args:
        task: of the probe.
        num_classes: C.
        min_depth: nearest true depth that counts, in metres.
        max_depth: farthest true depth that counts, in metres.
        eigen_crop: count the Eigen crop only; images padded beyond 480 x 640 are cut back to that first.
    """

    def __init__(
        self, task: Task, num_classes: int, min_depth: float = 1e-3, max_depth: float = 10.0, eigen_crop: bool = False
    ) -> None:
        self.task, self.eigen_crop = task, eigen_crop
        self.accumulator: Accumulator
        if task == "image-classification":
            self.accumulator = TopKAccuracy((1, 5) if num_classes >= TOP5_CLASSES else (1,))
        elif task == "semantic-segmentation":
            self.accumulator = MeanIoU(num_classes)
        else:
            self.accumulator = DepthErrors(min_depth, max_depth, eigen_crop)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Adds a batch of predictions and labels as `Probe.forward` gives and takes them."""
        if self.task == "semantic-segmentation":
            predictions = predictions.argmax(dim=1)
        elif self.task == "depth-estimation":
            size = labels.shape[1:]
            predictions = F.interpolate(predictions[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
            if self.eigen_crop:
                predictions, labels = (center_crop(maps, NYU_SIZE) for maps in (predictions, labels))
        self.accumulator.update(predictions, labels)

    def compute(self) -> dict[str, Any]:
        """Returns the metrics; a mean IoU comes without the numbers of single classes."""
        return {name: value for name, value in self.accumulator.compute().items() if name != "per_class_iou"}


def center_crop(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Cuts centre-padded maps, (B, H, W), back to at most (height, width); the odd pixel of padding is the last one."""
    top, left = (
        (there - wanted) // 2 if there > wanted else 0 for there, wanted in zip(maps.shape[1:], size, strict=True)
    )
    return maps[:, top : top + size[0], left : left + size[1]]


@dataclass(frozen=True)
class FeatureBank:
    """Features of a whole set of images, computed once.

    Args:
        features: (N, ...) as `Probe.features` gives them, on the CPU.
        labels: (N, ...), on the CPU; masks in uint8 where their classes allow it.
        names: of the N images.
        image_size: height and width of the images in pixels.
        failures: name to reason, for the images that could not be read.
    """

    features: Tensor
    labels: Tensor
    names: list[str]
    image_size: tuple[int, int]
    failures: dict[str, str]

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.features)

    @classmethod
    def joined(cls, shares: Sequence["FeatureBank"]) -> "FeatureBank":
        """The banks of several processes, one after the other."""
        return cls(
            torch.cat([share.features for share in shares]),
            torch.cat([share.labels for share in shares]),
            [name for share in shares for name in share.names],
            shares[0].image_size,
            {name: reason for share in shares for name, reason in share.failures.items()},
        )


def pool_features(probe: Probe, batches: Iterable[dict[str, Any]], device: torch.device) -> FeatureBank:
    """Runs the backbone once over all images.

    Args:
        probe: whose features are wanted.
        batches: with pixel_values, labels, names and failures; images of one size.
        device: where the probe is.

    Raises:
        ValueError: if there are no images.
    """
    features, labels, names, failures, size = [], [], [], {}, None
    for batch in batches:
        size = tuple(batch["pixel_values"].shape[-2:])
        features.append(probe.features(batch["pixel_values"].to(device)).cpu())
        labels.append(_compact(batch["labels"]))
        names += batch["names"]
        failures |= batch["failures"]
    if size is None:
        raise ValueError("there are no images to compute features of")
    return FeatureBank(torch.cat(features), torch.cat(labels), names, size, failures)


def bank_bytes(probe: Probe, task: Task, num_images: int, image_size: tuple[int, int]) -> int:
    """Memory that the features and labels of so many images take, in bytes, at most; in float32."""
    config = probe.model.config
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    patches, pixels = (image_size[0] // patch) * (image_size[1] // patch), image_size[0] * image_size[1]
    if task == "image-classification":
        return num_images * (2 * config.hidden_size * 4 + 8)
    label_bytes = 4
    if task == "semantic-segmentation":
        label_bytes = 1 if config.num_segmentation_labels <= IGNORE_INDEX else 8
    return num_images * ((1 + patches) * config.hidden_size * 4 + pixels * label_bytes)


def _compact(labels: Tensor) -> Tensor:
    """Masks, (B, H, W), in an eighth of their memory where all labels are below 256; other labels as they are."""
    is_mask = labels.ndim == 3 and not labels.is_floating_point()
    return labels.to(torch.uint8) if is_mask and 0 <= labels.min() and labels.max() < 256 else labels
