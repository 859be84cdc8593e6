"""Chooses the image sizes of a distillation: that of each training step, and those that fidelity is measured at."""

import copy

from raptor_settings.distill import DistillSettings
from transformers.image_processing_utils import BaseImageProcessor

from ..data.images import check_image_size, resized_processor
from ..data.sizes import SizedSteps, View, batch_size_at, draw_sizes
from ..data.transforms import CropFlip
from ..teacher import Teacher

# share of an image's area that --augment keeps, at least and at most
AUGMENT_AREA = (0.25, 1.0)
# test images at a further size, which may have many more tokens than the run's own
FURTHER_IMAGES = 128


def num_tokens(processor: BaseImageProcessor, teacher: Teacher) -> int:
    """Number of tokens, T, of the images that a processor gives."""
    return teacher.tokens.num_prefix_tokens + teacher.num_patches(*check_image_size(processor, teacher.patch_size))


def sized_steps(
    settings: DistillSettings, processor: BaseImageProcessor, teacher: Teacher, num_processes: int
) -> SizedSteps | None:
    """Size and number of the images of every step of both stages; None where all have the processor's own size.

    Args:
        settings: of the run; its batch size is for the processor's size, batches of other sizes have as many tokens.
        processor: of the teacher.
        teacher: to be distilled.
        num_processes: that share a batch; its number of images is a multiple of theirs.

    Raises:
        ValueError: a size is no multiple of the patch.
    """
    if settings.image_sizes is None and settings.final_image_size is None:
        return None
    sizes = settings.image_sizes or [min(check_image_size(processor, teacher.patch_size))]
    own_tokens, multiple = num_tokens(processor, teacher), num_processes * settings.gradient_accumulation_steps
    views = {}
    for size in {*sizes, settings.final_image_size} - {None}:
        setting = "image_sizes" if size in (settings.image_sizes or ()) else "final_image_size"
        resized = _resized(processor, size, teacher, setting)
        batch_size = batch_size_at(settings.batch_size, num_tokens(resized, teacher), own_tokens, multiple)
        cropped, crop = cropping(resized, teacher) if settings.augment else (resized, None)
        views[size] = View(cropped, batch_size, crop)
    drawn = draw_sizes(
        settings.stage1_steps + settings.stage2_steps,
        sizes,
        shares=settings.image_size_shares,
        final=settings.final_image_size,
        num_final=max(1, round(settings.final_share * (settings.stage2_steps or settings.stage1_steps))),
        seed=settings.seed,
    )
    return SizedSteps(drawn, views)


def cropping(processor: BaseImageProcessor, teacher: Teacher) -> tuple[BaseImageProcessor, CropFlip]:
    """Returns a copy of the processor that keeps the size of images, and random crops of the size that it gave."""
    cropped = copy.deepcopy(processor)
    cropped.do_resize = cropped.do_center_crop = False
    return cropped, CropFlip(check_image_size(processor, teacher.patch_size), scale=AUGMENT_AREA)


def further_processors(
    settings: DistillSettings, processor: BaseImageProcessor, teacher: Teacher
) -> dict[str, BaseImageProcessor]:
    """Image processors of the further sizes that the fidelity is measured at, by "HEIGHT x WIDTH" in pixels.

    Without `eval_sizes` these are twice the processor's own size, and those of the training.

    Raises:
        ValueError: a size is no multiple of the patch.
    """
    own = min(check_image_size(processor, teacher.patch_size))
    trained = {*(settings.image_sizes or []), settings.final_image_size} - {None}
    sizes = {2 * own} | trained if settings.eval_sizes is None else {*settings.eval_sizes}
    resized = [_resized(processor, size, teacher, "eval_sizes") for size in sorted(sizes - {own})]
    return {"{} x {}".format(*check_image_size(each, teacher.patch_size)): each for each in resized}


def _resized(processor: BaseImageProcessor, size: int, teacher: Teacher, setting: str) -> BaseImageProcessor:
    """`resized_processor` for the teacher; what it refuses is said of the setting that the size is from."""
    try:
        return resized_processor(processor, size, teacher.patch_size)
    except ValueError as error:
        raise ValueError(f"{setting} has {size}: {error}") from error
