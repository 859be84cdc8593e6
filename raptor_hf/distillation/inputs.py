"""Opens the teacher and the images of a distillation, and checks the settings against them."""

import functools
import logging
import math

import torch
from accelerate import Accelerator
from raptor_settings.distill import DistillSettings
from raptor_settings.resources import find_model
from transformers import AutoConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..accumulators import has_float64
from ..data.images import ImageSet, check_image_size, load_image_processor, open_images
from ..data.labels import ClassMatch, match_classes
from ..data.loaders import check_readable
from ..data.sources import open_splits
from ..families import check_family, vision_config
from ..recipes.models import model_of
from ..teacher import Teacher, count_parameters, load_teacher
from .student import make_student, trial_partition

logger = logging.getLogger(__name__)


def open_inputs(
    settings: DistillSettings, accelerator: Accelerator
) -> tuple[Teacher, BaseImageProcessor, ImageSet, ImageSet]:
    """Load teacher and data, and check every setting that depends on them.

    Returns:
        The teacher, its image processor, the training images and the test images.

    Raises:
        ValueError: a setting does not fit them.
        OSError: teacher or images cannot be read.
    """
    dtype = getattr(torch, settings.teacher_dtype)
    with model_of("teacher", settings.teacher):
        teacher = load_teacher(
            settings.teacher,
            revision=settings.teacher_revision,
            dtype=dtype,
            device=accelerator.device,
            layers=settings.target_layers,
        )
    layers = teacher.num_layers
    check_blocks(settings, layers)
    share = accelerator.num_processes * settings.gradient_accumulation_steps
    if settings.batch_size % share:
        raise ValueError(
            f"batch_size is {settings.batch_size}; it must be a multiple of {share}, "
            f"{accelerator.num_processes} processes times {settings.gradient_accumulation_steps} accumulation steps"
        )
    if settings.eval_batch_size % accelerator.num_processes:
        raise ValueError(
            f"eval_batch_size is {settings.eval_batch_size}; "
            f"it must be a multiple of {accelerator.num_processes} processes"
        )
    # what a partition or a student of these settings would be refused for, before images are read to find the real one
    student = make_student(teacher, trial_partition(settings, layers), settings)
    if (settings.loss == "normed_mse" or settings.normed_mse_weight) and student.config.final_norm != "tokens":
        raise ValueError(
            f"loss is {settings.loss!r} and normed_mse_weight {settings.normed_mse_weight:g}, but teacher "
            f"{settings.teacher!r} has no final norm of its tokens; take another loss and normed_mse_weight 0"
        )
    if "fitted" in (settings.init, settings.partition) and not has_float64(accelerator.device):
        raise ValueError(
            f"init is {settings.init!r} and partition {settings.partition!r}; 'fitted' needs float64, which "
            f"{accelerator.device.type} lacks: take init middle and partition normalized there, or the CPU"
        )
    processor = load_image_processor(settings.teacher, settings.teacher_revision)
    if not all(math.isfinite(value) and value > 0 for value in getattr(processor, "image_std", None) or [1]):
        raise ValueError(f"image_std of {settings.teacher!r} is {processor.image_std}; it must be numbers above 0")
    check_image_size(processor, teacher.patch_size, teacher.config.num_channels)
    # one process of each node prepares the data set, the others find it in the cache
    with accelerator.local_main_process_first():
        open_split = functools.partial(
            open_images,
            settings.dataset,
            config_name=settings.dataset_config,
            revision=settings.dataset_revision,
            image_column=settings.image_column,
            label_column=settings.label_column,
            streaming=settings.streaming,
        )
        train_images, test_images = open_splits(open_split, settings.train_split, settings.test_split)
    # now, for they are used last
    check_readable(test_images, processor, limit=settings.eval_images, max_failures=settings.max_decode_failures)
    if accelerator.is_main_process:
        logger.info("training on %s, testing on %s", train_images.title, test_images.title)
        if reason := class_match(teacher, test_images).reason:
            logger.warning(reason)
    return teacher, processor, train_images, test_images


def class_match(teacher: Teacher, images: ImageSet) -> ClassMatch:
    """Finds which classes of the teacher's classifier the labels of the images mean."""
    if teacher.classifier is None:
        return ClassMatch(None)
    return match_classes(images, teacher.classifier.out_features, teacher.config.id2label)


def disk_space(settings: DistillSettings, teacher: Teacher) -> int:
    """Bytes that a run may take: the model, and checkpoints of weights, two moments and average, one being written."""
    student = make_student(teacher, trial_partition(settings, teacher.num_layers), settings)
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    copies = 4 if settings.ema_decay else 3
    return 4 * (copies * trained * (settings.keep_checkpoints + 1) + count_parameters(student)) + 10_000_000


def check_blocks(settings: DistillSettings, num_layers: int) -> None:
    """Refuse blocks that a teacher of so many layers cannot have.

    Raises:
        ValueError: there are more blocks than layers, or their layers do not add up.
    """
    if settings.num_blocks is not None and not 1 <= settings.num_blocks <= num_layers:
        raise ValueError(
            f"num_blocks is {settings.num_blocks}; it must be between 1 and the teacher's {num_layers} layers"
        )
    if settings.block_repeats is not None and sum(settings.block_repeats) != num_layers:
        raise ValueError(
            f"block_repeats is {settings.block_repeats}, which sums to {sum(settings.block_repeats)}; "
            f"it must sum to the teacher's {num_layers} layers"
            + (f", target_layers {settings.target_layers}" if settings.target_layers else "")
        )
    num_blocks = settings.num_blocks or len(settings.block_repeats)
    if settings.train_block is not None and not 0 <= settings.train_block < num_blocks:
        raise ValueError(f"train_block is {settings.train_block}; it must be between 0 and {num_blocks - 1}")


def count_layers(settings: DistillSettings) -> int:
    """Reads the number of layers to learn from the teacher's configuration alone.

    Raises:
        ValueError: the teacher is of no supported family.
        OSError: there is no such teacher.
    """
    if settings.target_layers is not None:
        return len(settings.target_layers)
    config = AutoConfig.from_pretrained(find_model(settings.teacher), revision=settings.teacher_revision)
    check_family(config, settings.teacher)
    return vision_config(config).num_hidden_layers
