"""Puts a student into its teacher's model of images and text, for zero-shot classification and retrieval.

    clip = AutoModel.from_pretrained("openai/clip-vit-base-patch32")
    student = student_from_teacher(clip, (6, 4, 2))           # then distilled
    model = with_student(clip, student)
    model.get_image_features(pixel_values=pixel_values)       # called as before; the text tower is the teacher's

Save the student, not the pair: `with_student` joins them again in a moment.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import FAMILIES, TWO_TOWERS, pooling_to_raptor, vision_config
from .modeling_raptor import RaptorForImageClassification, RaptorModel, RaptorModelOutput


class StudentTower(nn.Module):
    """Wraps a student so that it is called like the vision tower that it replaces.

    Args:
        student: without a head.
        takes_patches: whether the vision tower takes images as rows of patches, as SigLIP 2's does.
    """

    def __init__(self, student: RaptorModel, takes_patches: bool) -> None:
        super().__init__()
        self.student, self.takes_patches = student, takes_patches

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> RaptorModelOutput:
        """
        Args:
            pixel_values: images, (B, C, H, W), or rows of patches, (B, P, patch * patch * C), channels last.
            pixel_attention_mask: which patches are of the image and not padding, (B, P); it must be all of them.
            spatial_shapes: rows and columns of patches of every image, (B, 2); they must be alike.
            interpolate_pos_encoding: the tower's argument, without effect: a student always interpolates.

        Raises:
            ValueError: if images of a batch are of several shapes, or padded.
        """
        if self.takes_patches:
            pixel_values = self._images(pixel_values, pixel_attention_mask, spatial_shapes)
        return self.student(pixel_values, **kwargs)

    def _images(self, patches: Tensor, mask: Tensor | None, shapes: Tensor) -> Tensor:
        rows, columns = shapes[0].tolist()
        if (shapes != shapes[0]).any() or patches.shape[1] != rows * columns or (mask is not None and not mask.all()):
            raise ValueError(
                f"spatial_shapes is {shapes.tolist()} for {patches.shape[1]} patches per image; a student's batch must "
                "be of one shape, without padding: set max_num_patches to the number of patches of that shape"
            )
        patch, channels = self.student.config.patch_size, self.student.config.num_channels
        grid = patches.reshape(len(patches), rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return grid.reshape(len(patches), channels, rows * patch, columns * patch)


def with_student(model: PreTrainedModel, student: RaptorModel | RaptorForImageClassification) -> PreTrainedModel:
    """Puts a student in the place of the vision tower that it was made from.

    Args:
        model: of images and text, such as `CLIPModel`, which is left as it is.
        student: of its vision tower.

    Returns:
        A copy of the model whose vision tower is the student: the text tower and the projections are shared with
        `model`, and `get_image_features`, `get_text_features` and the model itself are called as before.

    Raises:
        ValueError: if the model has no two towers, or the student is of another tower or without its pooling.
    """
    if model.config.model_type not in TWO_TOWERS or not hasattr(model, "text_model"):
        raise ValueError(
            f"model is a {type(model).__name__}; it must be one of images and text: {', '.join(TWO_TOWERS)}"
        )
    tower, base, wanted = model.vision_model, student.base_model, vision_config(model.config)
    own = base.config
    if (own.embedding_type, own.hidden_size) != (wanted.model_type, wanted.hidden_size):
        raise ValueError(
            f"student is of a {own.embedding_type!r} model with hidden_size {own.hidden_size}; the tower of model is "
            f"of {wanted.model_type!r} with {wanted.hidden_size}: make the student from this model"
        )
    pooling = pooling_to_raptor(tower)
    kind = "cls" if pooling is None else pooling[0]
    if own.pooling_type != kind:
        raise ValueError(
            f"pooling_type of student is {own.pooling_type!r}; the tower's is {kind!r}. Make the student from the "
            "model of images and text, not from one with a classifier"
        )
    joined = copy.copy(model)
    joined._modules = dict(model._modules)
    joined.vision_model = StudentTower(base, FAMILIES[wanted.model_type].takes_patches)
    return joined


__all__ = ["StudentTower", "with_student"]
