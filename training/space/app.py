"""A Gradio app: upload photographs, and see what a teacher and its student make of them, step by step.

    pip install -e ".[demo]"
    TEACHER=facebook/dinov2-small STUDENT=you/raptor-dinov2-small-k3 python training/space/app.py

The page is that of `raptor explore`; without TEACHER and STUDENT the models are those of the digits that come with
raptor_hf. The folder makes a Space of the Hub, where both are variables of its settings; README.md says what it needs.
"""

import html
import os
from pathlib import Path

import gradio as gr
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from raptor_hf.data.images import check_image_size, load_image_processor, open_images
from raptor_hf.dynamics.explorer import explore
from raptor_hf.image_processing_raptor import viewed_image
from raptor_hf.teacher import Teacher, load_teacher

TEACHER, STUDENT = "model_cards/digits-teacher", "model_cards/digits-k3"
MAX_PHOTOGRAPHS = 4


class Explorer:
    """Two models, and the page of what they make of photographs.

    Args:
        teacher: model on the Hub or folder.
        student: its student; empty shows the teacher alone.
    """

    def __init__(self, teacher: str = TEACHER, student: str = STUDENT) -> None:
        # of these alone attention has weights
        self.names = [name for name in (teacher, student) if name]
        self.models: list[Teacher] = [load_teacher(name, attn_implementation="eager") for name in self.names]
        self.processor: BaseImageProcessor = load_image_processor(teacher)
        check_image_size(self.processor, self.models[0].patch_size)

    def page(self, files: list[str] | None) -> str:
        """The page of uploaded photographs, or of some digits where there are none, in a frame of its own.

        Raises:
            gradio.Error: one is no image, or there are too many.
        """
        if len(files or ()) > MAX_PHOTOGRAPHS:
            raise gr.Error(f"These are {len(files)} photographs; choose up to {MAX_PHOTOGRAPHS}.")
        if files:
            titles, pictures = [Path(file).name for file in files], [self.opened(file) for file in files]
        else:
            digits = open_images("digits", "test")
            titles = [digits.name(index) for index in range(MAX_PHOTOGRAPHS)]
            pictures = [digits.decode(index)[0] for index in range(MAX_PHOTOGRAPHS)]
        inputs = [self.processor(images=[picture], return_tensors="pt")["pixel_values"] for picture in pictures]
        page = explore(
            self.models[0],
            self.models[1] if len(self.models) > 1 else None,
            torch.cat(inputs),
            titles=titles,
            names=[Path(name).name for name in self.names],
            mean=self.processor.image_mean,
            std=self.processor.image_std,
        )
        return f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: 90vh; border: 0"></iframe>'

    def opened(self, file: str) -> Image.Image:
        """An uploaded image, as a viewer shows it."""
        try:
            with Image.open(file) as image:
                return viewed_image(image).convert("RGB")
        except OSError as error:
            raise gr.Error(f"{Path(file).name} is no readable image: {error}") from error

    def app(self) -> gr.Blocks:
        """The app, not yet launched."""
        with gr.Blocks(title="Raptor: depth as time") as app:
            gr.Markdown("# Depth as time\n\nUp to four photographs, and what both models make of them at every step.")
            files = gr.File(label="Photographs", file_count="multiple", file_types=["image"])
            frame = gr.HTML(padding=False)
            files.change(self.page, files, frame)
            app.load(self.page, files, frame)
        return app


if __name__ == "__main__":
    Explorer(os.environ.get("TEACHER", TEACHER), os.environ.get("STUDENT", STUDENT)).app().launch()
