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

from raptor_hf.data.images import check_image_size, load_image_processor, open_images
from raptor_hf.dynamics.explorer import explore
from raptor_hf.image_processing_raptor import viewed_image
from raptor_hf.recipes.files import write_text_atomically
from raptor_hf.recipes.settings import user_errors
from raptor_hf.teacher import load_teacher

logger = logging.getLogger("explore")


def main() -> None:
    settings = parse_settings(ExploreSettings)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with user_errors():
        teacher = load_teacher(settings.teacher, attn_implementation="eager")
        student = None if settings.student is None else load_teacher(settings.student, attn_implementation="eager")
        if not 1 <= settings.num_blocks <= teacher.num_layers:
            raise ValueError(f"num_blocks is {settings.num_blocks}; it must be in 1..{teacher.num_layers}, the layers")
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
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(settings.output, page)
    print(f"saved to {settings.output}: {len(titles)} photographs, {len(page) / 1e6:.1f} MB")


def open_photographs(
    settings: ExploreSettings, processor: BaseImageProcessor, patch_size: int
) -> tuple[list[str], Tensor]:
    """Open the photographs: their titles, and the processed images, (B, 3, H, W)."""
    if settings.image_size is not None:
        side = settings.image_size
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
            except OSError as error:
                raise ValueError(f"images has {path!r}, which is no readable image: {error}") from error
    return titles, torch.cat([processor(images=[p], return_tensors="pt")["pixel_values"] for p in pictures])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted") from None
