"""Write one HTML page that shows what a teacher and its student make of your photographs, step by step.

    python training/explore.py --teacher facebook/dinov2-small --student runs/k3 --images cat.jpg street.jpg
    python training/explore.py --teacher model_cards/digits-teacher --student model_cards/digits-k3

Costs seconds on a CPU. The page needs neither network nor server. Without --student it shows the teacher alone, without
--images some of the embedded digits.
"""

from raptor_settings.explore import ExploreSettings
from raptor_settings.parse import parse_settings

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(ExploreSettings)

import logging
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from raptor_hf.configuration_raptor import as_pair
from raptor_hf.data.images import check_image_size, load_image_processor, open_images
from raptor_hf.dynamics.explorer import explore
from raptor_hf.image_processing_raptor import viewed_image
from raptor_hf.recipes.files import write_text_atomically
from raptor_hf.recipes.models import model_of
from raptor_hf.recipes.settings import check_output_dir, user_errors
from raptor_hf.teacher import Teacher, load_teacher

logger = logging.getLogger("explore")


def main() -> None:
    settings = parse_settings(ExploreSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        teacher = open_model("teacher", settings.teacher)
        student = None if settings.student is None else open_model("student", settings.student)
        if student is not None:
            check_pair(settings, teacher, student)
        if not 1 <= settings.num_blocks <= teacher.num_layers:
            raise ValueError(f"num_blocks is {settings.num_blocks}; it must be in 1..{teacher.num_layers}, the layers")
        check_output_dir(Path(settings.output).parent, setting="folder of output")
        processor = load_image_processor(settings.teacher)
        titles, pixel_values = open_photographs(settings, processor, teacher.patch_size)
        page = explore(
            teacher,
            student,
            pixel_values,
            titles=titles,
            names=[Path(name).name for name in (settings.teacher, settings.student) if name is not None],
            mean=processor.image_mean,
            std=processor.image_std,
            num_blocks=settings.num_blocks,
        )
        write_text_atomically(settings.output, page)
    print(f"saved to {settings.output}: {len(titles)} photographs, {len(page) / 1e6:.1f} MB")


def open_model(setting: str, name: str) -> Teacher:
    """Open the model that a setting names, with an attention that shows its weights."""
    with model_of(setting, name):
        return load_teacher(name, attn_implementation="eager")


def check_pair(settings: ExploreSettings, teacher: Teacher, student: Teacher) -> None:
    """Refuse a student that cannot look at the teacher's images, or whose states cannot lie beside the teacher's."""
    for name in ("patch_size", "hidden_size"):
        theirs, own = getattr(teacher, name), getattr(student, name)
        if own != theirs:
            raise ValueError(
                f"student is {settings.student!r}, of {name} {own}; that of teacher {settings.teacher!r} is {theirs}: "
                "give a student and its own teacher"
            )


def open_photographs(
    settings: ExploreSettings, processor: BaseImageProcessor, patch_size: int
) -> tuple[list[str], Tensor]:
    """Open the photographs: their titles, and the processed images, (B, 3, H, W)."""
    if settings.image_size is not None:
        side = settings.image_size
        for patch in as_pair(patch_size):
            if side % patch:
                raise ValueError(f"image_size is {side}; it must be a multiple of the patch, {patch}")
        processor.size, processor.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    check_image_size(processor, patch_size)
    if settings.images is None:
        digits = open_images("digits", "test")
        pictures = [digits.decode(index)[0] for index in range(4)]
        titles = [digits.name(index) for index in range(4)]
    else:
        pictures, titles = [], [Path(path).name for path in settings.images]
        for path in settings.images:
            try:
                with Image.open(path) as image:
                    pictures.append(viewed_image(image).convert("RGB"))
            except (OSError, Image.DecompressionBombError) as error:
                raise ValueError(f"images has {path!r}, which is no readable image: {error}") from error
    return titles, torch.cat([processor(images=[p], return_tensors="pt")["pixel_values"] for p in pictures])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted") from None
