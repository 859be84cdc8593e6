"""Says in the first lines of a report what an analysed model is, and what not to expect of it.

Every line follows from facts of the model, the images and the phases; none is about one model in particular.
"""

from collections.abc import Mapping

from ..configuration_raptor import as_pair
from ..phases import Partition
from ..teacher import Teacher

# what the findings were first seen on (arXiv 2512.19941)
PAPER_LAYERS, PAPER_SIZE, PAPER_REGISTERS, PAPER_IMAGE_SIZE = 12, 768, 4, 224


def describe_model(name: str, model: Teacher, image_size: tuple[int, int]) -> str:
    """Says in one sentence what a model is.

    Args:
        name: of the model in the report.
        model: any supported one.
        image_size: height and width in pixels of the images that it was given.
    """
    config = model.config
    registers = {0: "no registers", 1: "1 register"}.get(model.num_registers, f"{model.num_registers} registers")
    tokens = f"{'a class token' if model.has_cls else 'no class token'} and {registers}"
    width = f" of {config.head_dim}" if model.family == "raptor" and config.head_dim is not None else ""
    blocks = f"{config.num_blocks} blocks applied {model.num_layers} times" if model.family == "raptor" else ""
    return (
        f"{name}: a {model.family} model of {blocks or f'{model.num_layers} layers'}, {model.hidden_size} wide with "
        f"{model.num_heads} heads{width}, {tokens}, patches of {_size(model.patch_size)} px, "
        f"{model.num_parameters / 1e6:.2f} M parameters; given images of {_size(image_size)} px."
    )


def cautions(
    model: Teacher,
    image_size: tuple[int, int],
    has_labels: bool,
    knows_labels: bool,
    partition: Partition,
    others: Mapping[str, Partition],
) -> list[str]:
    """Returns sentences on what not to expect of an analysis; an empty list where there is nothing to say.

    Args:
        model: the reference.
        image_size: height and width in pixels of its images.
        has_labels: whether the images have class labels.
        knows_labels: whether these are classes of the model's classifier.
        partition: the phases.
        others: other partitions that were found, as `other_phases` returns them.
    """
    lines = []
    ours = (model.num_layers, model.hidden_size, model.num_registers)
    if ours != (PAPER_LAYERS, PAPER_SIZE, PAPER_REGISTERS):
        lines.append(
            f"The paper's findings are of DINOv2 ViT-B/14 ({PAPER_LAYERS} layers, {PAPER_SIZE} wide, "
            f"{PAPER_REGISTERS} registers, {PAPER_IMAGE_SIZE} px); a finding that fails here says nothing against them."
        )
    if model.num_registers == 0:
        lines.append("There are no registers, so nothing is said of them.")
    if not model.has_cls:
        lines.append("There is no class token: findings about it are of the patches or left out.")
    trained = as_pair(model.image_size)
    if trained != tuple(image_size):
        before, now = (model.num_patches(*size) for size in (trained, image_size))
        lines.append(
            f"Positions are made for {_size(trained)} px and interpolated: {now:,} patches in place of {before:,}, on "
            "which ranks per image and coherence depend."
        )
    if model.classifier is None:
        lines.append("There is no classifier: scores are cosines to the model's own last state, not accuracies.")
    elif not knows_labels:
        lines.append("The images have no labels of the classifier's classes: there are agreements, but no accuracies.")
    if has_labels and not knows_labels:
        lines.append("Basins are those of the images' classes, which the model may never have been taught.")
    if not has_labels:
        lines.append("The images have no labels: nothing is said of basins.")
    if others:
        found = "; ".join(f"{name}: {other}" for name, other in others.items())
        lines.append(f"The phases {partition} are a choice, for other searches find others ({found}).")
    return lines


def _size(size: int | tuple[int, int]) -> str:
    height, width = as_pair(size)
    return str(height) if height == width else f"{height} x {width}"
