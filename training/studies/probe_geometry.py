"""Measure how the crops, filters and colours of Pillow, which probes use, differ from those of tensors.

    python -m training.studies.probe_geometry

torchvision takes PIL images or tensors, and does not give the same pixels for both. The probes follow what it does
with PIL images (raptor_hf/data/transforms.py). This study crops, resizes and jitters one drawn picture with them, and
with a few lines of PyTorch that do what torchvision does with tensors; torchvision itself is not needed.
Writes training/results/probe_geometry in seconds.
"""

import colorsys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL.Image import Resampling

from raptor_hf.data.transforms import ColorJitter, random_resized_crop
from raptor_hf.figures import saved
from raptor_hf.recipes.files import write_json, write_text_atomically

from .conclusions import markdown_table

FOLDER = Path("training/results/probe_geometry")
SIZE = 224
# the published jitter of depth-estimation
JITTER = ColorJitter(0.2, 0.2, 0.2, 0.1)


def main() -> None:
    image, mask = draw()
    crop = {"size": SIZE, "scale": (0.5, 1.0), "ratio": (0.75, 1.33), "interpolation": Resampling.BILINEAR}
    ours, our_mask = random_resized_crop(image, mask, np.random.default_rng(0), **crop)
    left, top, width, height = rectangle(image.size, np.random.default_rng(0), crop["scale"], crop["ratio"])
    part = np.asarray(image)[top : top + height, left : left + width]
    resized = {antialias: resize_tensor(part, antialias) for antialias in (True, False)}
    tensor_mask = mask[top : top + height, left : left + width][
        np.ix_(np.arange(SIZE) * height // SIZE, np.arange(SIZE) * width // SIZE)
    ]
    jittered, _ = JITTER(ours, None, np.random.default_rng(3))
    order, factors = draws(np.random.default_rng(3))
    pixels = np.asarray(ours)
    same, opposite = (jitter_tensor(pixels, own, factors) for own in (order, order[::-1]))
    changes = {
        "bilinear, tensors with antialias": gap(ours, resized[True]),
        "bilinear, tensors without antialias": gap(ours, resized[False]),
        "jitter, tensors": gap(jittered, same),
        "jitter, tensors: two opposite orders": gap(opposite, same),
    }
    moved = our_mask != tensor_mask
    scores = {name: {"largest": float(own.max()), "mean": float(own.mean())} for name, own in changes.items()}
    share = float(moved.mean())

    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(FOLDER / "results.json", {"grey_levels": scores, "mask_pixels_that_differ": share})
    write_text_atomically(FOLDER / "table.md", page(scores, share))
    figure = Figure(figsize=(13.0, 6.6), layout="constrained")
    axes = figure.subplots(2, 4)
    axes[0, 0].imshow(image)
    axes[0, 0].add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="w", lw=2))
    panels = [("picture and crop", None), ("ours: crop, bilinear", ours), ("ours, jittered", jittered)]
    for ax, (title, shown) in zip((axes[0, 0], axes[0, 1], axes[1, 0]), panels, strict=True):
        ax.set_title(title, fontsize=9)
        if shown is not None:
            ax.imshow(shown)
    for ax, (title, own) in zip((axes[0, 2], axes[0, 3], axes[1, 1], axes[1, 2]), changes.items(), strict=True):
        drawn = ax.imshow(own, vmin=0, vmax=max(own.max(), 1), cmap="magma")
        ax.set_title(title, fontsize=9)
        figure.colorbar(drawn, ax=ax, shrink=0.75, label="grey levels of 255")
    axes[1, 3].imshow(moved, cmap="gray")
    axes[1, 3].set_title("mask: white where tensors differ", fontsize=9)
    for ax in axes.flat:
        ax.set_axis_off()
    saved(figure, FOLDER / "figure.png", dpi=110)
    print(f"saved to {FOLDER}: table.md, results.json and figure.png")


def page(scores: dict[str, dict[str, float]], share: float) -> str:
    """The page."""
    rows = [[name, f"{own['largest']:.0f}", f"{own['mean']:.2f}"] for name, own in scores.items()]
    table = markdown_table(["ours, as with PIL images, against", "largest difference", "mean difference"], rows)
    words = (
        "The probes crop, resize and jitter as torchvision does with PIL images. Tensors take the same rectangles, but "
        "other pixels: in grey levels of 255, on one drawn picture with fine rings,"
    )
    largest, without = (scores[f"bilinear, tensors {kind} antialias"]["largest"] for kind in ("with", "without"))
    caption = (
        f"The filters differ by at most {largest:.0f} of 255 with antialias, which PIL images always have, and by "
        f"{without:.0f} without it. Pillow's nearest pixel, which is ours, is the one under a new pixel's centre, that "
        f"of tensors the one under its corner: {share:.1%} of the mask's pixels differ. Colours of PIL images are "
        "rounded to bytes after each of the four changes, and hues turn by 1/256 of a turn at a time; those of tensors "
        "are not rounded. The order is drawn anew for each image: the panel of one order and the opposite one shows "
        "what it does."
    )
    command = "    python -m training.studies.probe_geometry"
    return "\n\n".join(["# Whose pixels", words, table, "![On one picture](figure.png)", caption, command]) + "\n"


def draw() -> tuple[PIL.Image.Image, np.ndarray]:
    """A picture of 480 x 640 pixels with rings finer and finer on coloured ground, and a mask of discs."""
    y, x = np.indices((480, 640)).astype(float)
    rings = 0.5 + 0.5 * np.cos(((x - 320) ** 2 + (y - 240) ** 2) / 260)
    image = np.stack([rings * (0.4 + 0.6 * x / 640), rings * (0.9 - 0.5 * y / 480), 0.3 + 0.5 * rings], axis=-1)
    mask = np.zeros((480, 640), np.int64)
    for index, (row, column, radius) in enumerate(((140, 180, 70), (330, 420, 90), (150, 480, 45), (380, 160, 30)), 1):
        disc = (y - row) ** 2 + (x - column) ** 2 < radius**2
        image[disc], mask[disc] = colorsys.hsv_to_rgb(index / 5, 0.8, 0.9), index
    return PIL.Image.fromarray(np.uint8(np.rint(255 * image))), mask


def rectangle(
    size: tuple[int, int], generator: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, width and height of the first rectangle drawn that fits: area, then the logarithm of its ratio."""
    width, height = size
    while True:
        area = width * height * generator.uniform(*scale)
        aspect = np.exp(generator.uniform(*np.log(ratio)))
        own = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if own[0] <= width and own[1] <= height:
            return int(generator.integers(width - own[0] + 1)), int(generator.integers(height - own[1] + 1)), *own


def resize_tensor(pixels: np.ndarray, antialias: bool) -> np.ndarray:
    """Bilinear, (H, W, 3) to (SIZE, SIZE, 3), of bytes that are rounded at the end."""
    values = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    resized = F.interpolate(values, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=antialias)
    return resized[0].permute(1, 2, 0).round().numpy()


def draws(generator: np.random.Generator) -> tuple[list[int], list[float]]:
    """The order of the four changes and their factors, as `ColorJitter` draws them."""
    order = generator.permutation(4).tolist()
    limits = (JITTER.brightness, JITTER.contrast, JITTER.saturation)
    return order, [
        *(generator.uniform(1 - limit, 1 + limit) for limit in limits),
        generator.uniform(-JITTER.hue, JITTER.hue),
    ]


def jitter_tensor(pixels: np.ndarray, order: list[int], factors: list[float]) -> np.ndarray:
    """Brightness, contrast, saturation and hue in floating point, clipped after each, (H, W, 3) in 0 .. 255."""
    values = pixels / 255
    for change in order:
        gray = values @ [0.2989, 0.587, 0.114]
        if change == 3:
            turned = [colorsys.rgb_to_hsv(*pixel) for pixel in values.reshape(-1, 3)]
            turned = [colorsys.hsv_to_rgb((hue + factors[3]) % 1, *rest) for hue, *rest in turned]
            values = np.array(turned).reshape(values.shape)
            continue
        other = (0.0, gray.mean(), gray[..., None])[change]
        values = (factors[change] * values + (1 - factors[change]) * other).clip(0, 1)
    return 255 * values


def gap(ours: PIL.Image.Image | np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Largest difference of the three colours, (H, W), in grey levels."""
    return np.abs(np.asarray(ours).astype(float) - theirs).max(-1)


if __name__ == "__main__":
    main()
