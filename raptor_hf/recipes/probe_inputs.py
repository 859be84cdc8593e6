"""Opens backbone, head, images and truth of a probe, and checks the settings against them."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from PIL.Image import Resampling
from raptor_settings.probe import ProbeSettings
from torch import nn

from ..configuration_raptor import as_pair
from ..data.dense import DenseSet, open_dense
from ..data.images import ImageSet, check_image_size, load_image_processor, open_images
from ..data.labels import keep_labelled, match_classes, name_classes, names_in_order
from ..data.loaders import ImageLoader, Steps, eval_loader, train_loader
from ..data.sources import open_splits
from ..data.transforms import Augmentations, ColorJitter, CropFlip, DepthCollate, SegmentationCollate
from ..hub.heads import check_head, check_variant
from ..image_processing_raptor import RaptorImageProcessor
from ..metrics import NYU_SIZE
from ..probing import TOP5_CLASSES, Backbone, Probe, bank_bytes, initialize_head, load_backbone, make_probe
from ..teacher import count_parameters
from .fingerprints import fingerprint_dataset
from .loop import usable_workers
from .models import model_of
from .run_metrics import METRICS_FILE, StudentMetrics


@dataclass(frozen=True)
class Inputs:
    """Backbone, head and images, all checked.

    Args:
        backbone: as loaded.
        probe: with a head that fits the task.
        start: classifier, or file of one, that the head starts from; None starts at random.
        processor: of the images that are not augmented.
        class_names: None for depth.
        image_size: height and width of the processed images in pixels.
        train_batches: `train_loader` with everything but seed and steps.
        plain_batches: the training images once, not augmented.
        test_batches: the test images once.
        num_train_images: N.
        test_split: name of the split that the metrics are for.
        num_test_images: of that split.
        steps: which images make up a step.
        num_steps: of one head.
        fingerprint: of the training images.
    """

    backbone: Backbone
    probe: Probe
    start: nn.Linear | str | None
    processor: RaptorImageProcessor
    class_names: list[str] | None
    image_size: tuple[int, int]
    train_batches: functools.partial
    plain_batches: ImageLoader
    test_batches: ImageLoader
    num_train_images: int
    test_split: str
    num_test_images: int
    steps: Steps
    num_steps: int
    fingerprint: str


def open_inputs(settings: ProbeSettings, accelerator: Accelerator) -> Inputs:
    """Load backbone, images and truth, and check every setting that depends on them."""
    check_variant(settings.variant)
    for name in ("batch_size", "eval_batch_size"):
        if getattr(settings, name) % accelerator.num_processes:
            raise ValueError(
                f"{name} is {getattr(settings, name)}; it must be a multiple of {accelerator.num_processes} processes"
            )
    backbone, start = open_backbone(settings)
    # one process of each node prepares the data set, the others find it in the cache
    with accelerator.local_main_process_first():
        opened = open_splits(functools.partial(open_split, settings), settings.train_split, settings.test_split)
    class_names, train_images, test_images = classes_of(settings, *opened, backbone)
    if isinstance(start, nn.Linear):
        start = reorder_classes(start, train_images, backbone, settings)
    processor = RaptorImageProcessor.from_teacher(load_image_processor(settings.model, settings.model_revision))
    collate, augment, train_processor = image_pipeline(settings, processor, backbone)
    share = {"num_workers": usable_workers(settings.num_workers), "max_failures": settings.max_decode_failures}
    share["pin_memory"] = accelerator.device.type == "cuda"
    share |= {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    once = functools.partial(eval_loader, batch_size=settings.eval_batch_size, collate=collate, **share)
    test_batches = once(test_images, processor)
    # the first image, for all processes
    first = functools.partial(once, batch_size=1, num_workers=0, process_index=0, num_processes=1)
    image_size = probe_image_size(first(test_images, processor), backbone)
    if (train_size := probe_image_size(first(train_images, processor), backbone)) != image_size:
        raise ValueError(f"training images are {train_size} after processing, test images {image_size}")
    if any(side % settings.loss_stride for side in image_size):
        raise ValueError(
            f"loss_stride is {settings.loss_stride}; it must divide both sides of the images, {image_size[0]} x "
            f"{image_size[1]} pixels"
        )
    padded = tuple(side + -side % patch for side, patch in zip(NYU_SIZE, patches_of(backbone), strict=True))
    if settings.eigen_crop and image_size != padded:
        raise ValueError(f"eigen_crop is for images of 480 x 640 pixels; these are {image_size}, padding included")
    probe = make_probe(
        backbone,
        settings.task,
        class_names=class_names,
        num_depth_bins=settings.num_depth_bins,
        min_depth=settings.min_depth,
        max_depth=settings.max_depth,
    )
    initialize_head(probe, settings.seeds[0], start)
    steps = Steps(train_images.num_images, settings.batch_size, settings.last_batch, accelerator.num_processes)
    num_steps = settings.epochs * steps.per_epoch
    if settings.warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_steps is {settings.warmup_steps}; it must be below the {num_steps} steps that {settings.epochs} "
            f"epochs of {train_images.num_images} images make"
        )
    if settings.metric == "top5_accuracy" and len(class_names) < TOP5_CLASSES:
        raise ValueError(
            f"metric is 'top5_accuracy', for which {len(class_names)} classes are too few; it must be 'accuracy'"
        )
    if settings.quick_checks and not fits_cache(settings, accelerator, probe, train_images.num_images, image_size):
        raise ValueError(
            f"quick_checks need the features in memory, which cache_gb={settings.cache_gb} forbids; raise it"
        )
    if backbone.folder is not None:
        check_head(probe.model, backbone.folder, settings.variant)
    return Inputs(
        backbone=backbone,
        probe=probe,
        start=start,
        processor=processor,
        class_names=class_names,
        image_size=image_size,
        train_batches=functools.partial(
            train_loader,
            train_images,
            train_processor,
            batch_size=settings.batch_size,
            collate=collate,
            augment=augment,
            last_batch=settings.last_batch,
            **share,
        ),
        plain_batches=once(train_images, processor),
        test_batches=test_batches,
        num_train_images=train_images.num_images,
        test_split=test_images.split,
        num_test_images=test_images.num_images,
        steps=steps,
        num_steps=num_steps,
        fingerprint=fingerprint_dataset(train_images),
    )


def open_backbone(settings: ProbeSettings) -> tuple[Backbone, nn.Linear | str | None]:
    """Open the backbone, and what the head starts from."""
    wanted = settings.init_head
    is_file = wanted is not None and (wanted.endswith((".pth", ".pt")) or Path(wanted).is_file())
    if is_file and not Path(wanted).is_file():
        raise FileNotFoundError(f"init_head={wanted!r} does not exist; it is a file, a variant of the model, or 'own'")
    variant = None if wanted in (None, "own") or is_file else wanted
    with model_of("model", settings.model):
        backbone = load_backbone(
            settings.model,
            revision=settings.model_revision,
            num_layers=settings.num_layers,
            variant=variant,
            reinitialize=settings.reinitialize,
        )
    if backbone.folder is not None and (backbone.folder / METRICS_FILE).exists():
        StudentMetrics.read(backbone.folder)  # the probe's numbers go there: a damaged one is found before any training
    if wanted is None or is_file:
        return backbone, wanted
    if backbone.classifier is None:
        raise ValueError(
            f"init_head is {wanted!r}, but {settings.model} has no such classifier; leave it out, or give a file"
        )
    return backbone, backbone.classifier


def open_split(settings: ProbeSettings, split: str) -> ImageSet | DenseSet:
    """Open images with their truth."""
    sources = {"config_name": settings.dataset_config, "revision": settings.dataset_revision}
    sources |= {"image_column": settings.image_column}
    if settings.task == "image-classification":
        images = open_images(settings.dataset, split, label_column=settings.label_column, **sources)
        if not images.has_labels:
            raise ValueError(f"{images.title} has no class labels; name their column with label_column")
        return images
    images = open_dense(
        settings.task,
        settings.dataset,
        split,
        target_column=settings.label_column,
        num_classes=settings.num_classes,
        ignore_label=settings.ignore_label,
        depth_unit=settings.depth_unit
        if split == settings.train_split
        else settings.test_depth_unit or settings.depth_unit,
        **sources,
    )
    depth_range = (settings.min_depth, settings.max_depth) if settings.task == "depth-estimation" else None
    images.check(depth_range=depth_range)
    return images


def classes_of(
    settings: ProbeSettings, train_images: ImageSet | DenseSet, test_images: ImageSet | DenseSet, backbone: Backbone
) -> tuple[list[str] | None, ImageSet | DenseSet, ImageSet | DenseSet]:
    """Check the images: return the names of classes, None for depth, and the training and test images with a truth."""
    if settings.task == "depth-estimation":
        return None, train_images, test_images
    if settings.task == "semantic-segmentation":
        return train_images.class_names, train_images, test_images
    names = name_classes(train_images, test_images)
    labelled = [keep_labelled(images, names) for images in (train_images, test_images)]
    own = backbone.model.config
    # where the data set does not tell them, the model may
    if train_images.class_names is None and own.num_labels == len(names):
        names = names_in_order(own.id2label)
    return names, *labelled


def reorder_classes(classifier: nn.Linear, images: ImageSet, backbone: Backbone, settings: ProbeSettings) -> nn.Linear:
    """Return the classifier to start from, with its classes in the data set's order."""
    match = match_classes(images, classifier.out_features, backbone.model.config.id2label)
    if match.classes is None:
        raise ValueError(f"init_head is {settings.init_head!r}, but its classes are not the data set's; {match.reason}")
    ordered = copy.deepcopy(classifier)
    ordered.weight.data, ordered.bias.data = (tensor.data[match.classes] for tensor in (ordered.weight, ordered.bias))
    return ordered


def image_pipeline(
    settings: ProbeSettings, processor: RaptorImageProcessor, backbone: Backbone
) -> tuple[Callable | None, Callable | None, RaptorImageProcessor]:
    """Choose how images and truth become batches: collate, augmentation, and the processor of augmented images."""
    side, patch = settings.image_size, patches_of(backbone)[0]
    interpolation = Resampling[settings.interpolation.upper()]
    cropped = processor
    if settings.task == "semantic-segmentation":
        collate, size = SegmentationCollate(processor, side, interpolation), side
    elif settings.task == "depth-estimation":
        collate, size = DepthCollate(processor, patch), tuple(settings.crop_size)
    else:
        processor.resample = interpolation
        if side is not None:
            processor.crop_size = {"height": side, "width": side}
        if side is not None or settings.resize_size is not None:
            processor.size = {"shortest_edge": settings.resize_size or side}
        collate, size = None, check_image_size(processor, patch)
        cropped = copy.deepcopy(processor)
        cropped.do_resize = cropped.do_center_crop = False
    if settings.augment == "none":
        return collate, None, processor
    area, ratio = tuple(settings.crop_area), tuple(settings.crop_ratio)
    crop = CropFlip(size, area, ratio, interpolation, settings.flip_probability)
    jitter = (ColorJitter(*settings.color_jitter),) if any(settings.color_jitter) else ()
    return collate, Augmentations((crop, *jitter)), cropped


def patches_of(backbone: Backbone) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    return as_pair(backbone.model.config.patch_size)


def fits_cache(
    settings: ProbeSettings, accelerator: Accelerator, probe: Probe, num_images: int, image_size: tuple[int, int]
) -> bool:
    """Whether the features of so many images may be kept: every process holds all, twice while they are gathered."""
    copies = 1 if accelerator.num_processes == 1 else 2 * accelerator.num_processes
    return copies * bank_bytes(probe, settings.task, num_images, image_size) <= settings.cache_gb * 1e9


def probe_image_size(batches: ImageLoader, backbone: Backbone) -> tuple[int, int]:
    """Height and width of the processed images, which must divide into patches."""
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("none of the images can be read")
    size = tuple(batch["pixel_values"].shape[-2:])
    for side, patch in zip(size, patches_of(backbone), strict=True):
        if side % patch:
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels do not divide into patches of {patch}; "
                f"set image_size to a multiple of it, such as {side // patch * patch + patch}"
            )
    return size


def disk_space(inputs: Inputs, settings: ProbeSettings) -> int:
    """Bytes that a run may take: checkpoints with head and two moments, one being written, heads, and the backbone."""
    head = sum(parameter.numel() for parameter in inputs.probe.head.parameters())
    copies = 3 * (settings.keep_checkpoints + 1) + len(settings.seeds) + 1
    return 4 * (head * copies + count_parameters(inputs.backbone.model)) + 10_000_000
