"""Makes the "scenes": small pictures with exact masks or depth, to try dense probes without ADE20k and NYUv2.

    train, test = (load_scenes("depth-estimation", split) for split in ("train", "test"))
    train[0]["image"], train[0]["depth"]               # PIL images: RGB, and float32 metres

Made in a second or two from the two photographs and the handwritten digits that come with scikit-learn; the truth is
computed together with the picture. The same arguments always give the same pixels, and the splits share neither digits
nor parts of photographs. A linear head needs features of digits here: a backbone trained on them is far ahead of an
untrained one. The numbers say nothing about ADE20k or NYUv2.

Segmentation: a digit as coloured ink on a darkened photograph. The classes are the ten digits and the background.

Depth: a wall with a digit painted on it and the floor in front, seen by a pin-hole camera and textured with
photographs. A digit c is always `DIGIT_HEIGHTS[c]` metres high: once recognised, its apparent size tells its distance,
as the size of known things does in a photograph of a room.
"""

import io
import re
from dataclasses import dataclass

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image

SPLIT_SIZES = {"train": 400, "test": 100}
CLASS_NAMES = [*map(str, range(10)), "background"]
# Metres, by digit: far enough apart to tell the distance, in an order that the shape of the digits does not follow.
DIGIT_HEIGHTS = (0.6, 2.4, 1.0, 2.7, 0.8, 2.1, 1.5, 3.0, 1.2, 1.8)
_TARGET_COLUMNS = {"semantic-segmentation": "mask", "depth-estimation": "depth"}


def load_scenes(task: str, split: str, config_name: str | None = None) -> Dataset:
    """Makes one split of the scenes.

    Args:
        task: "semantic-segmentation" or "depth-estimation".
        split: "train", 400 scenes, or "test", 100.
        config_name: "segmentation-SIDE" or "depth-SIDE", as the task is, with the side of the square images in pixels;
            None is a side of 64.

    Returns:
        Columns `image`, PNG, and `mask`, PNG of classes as in `CLASS_NAMES`, or `depth`, float32 TIFF in metres.

    Raises:
        ValueError: if there is no such split or configuration.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"split={split!r} of 'scenes' does not exist; its splits are {sorted(SPLIT_SIZES)}")
    side = _side(task, config_name)
    source = _load_source(split)
    render = render_digit if task == "semantic-segmentation" else render_room
    column = _TARGET_COLUMNS[task]
    scenes = {"image": [], column: []}
    for index in range(SPLIT_SIZES[split]):
        # of its own for every scene, so that one does not depend on how many numbers another has drawn
        generator = np.random.default_rng((list(SPLIT_SIZES).index(split), index))
        image, target = render(source, generator, side)
        scenes["image"].append(_encoded(image, "PNG"))
        scenes[column].append(_encoded(target, "TIFF" if target.dtype == np.float32 else "PNG"))
    return Dataset.from_dict(scenes, features=Features({"image": Image(), column: Image()}))


@dataclass(frozen=True)
class SceneSource:
    """The photographs and digits that the scenes of one split are made from.

    Attributes:
        photographs: parts of photographs, each (H, W, 3), in [0, 1].
        digits: gray images of ink, (N, 8, 8), in [0, 1].
        labels: their digits, (N,).
    """

    photographs: list[np.ndarray]
    digits: np.ndarray
    labels: np.ndarray

    def texture(self, generator: np.random.Generator, size: tuple[int, int], zoom: float) -> np.ndarray:
        """A random part of a photograph, (height, width, 3) in [0, 1], shrunk by at most `zoom`."""
        photograph = self.photographs[generator.integers(len(self.photographs))]
        limit = min(photograph.shape[0] / size[0], photograph.shape[1] / size[1])
        shrink = min(limit, generator.uniform(1, zoom))
        height, width = int(size[0] * shrink), int(size[1] * shrink)
        top = generator.integers(photograph.shape[0] - height + 1)
        left = generator.integers(photograph.shape[1] - width + 1)
        part = PIL.Image.fromarray(np.uint8(photograph[top : top + height, left : left + width] * 255))
        return np.asarray(part.resize(size[::-1], PIL.Image.Resampling.BICUBIC), np.float64) / 255

    def ink(self, generator: np.random.Generator, height: int) -> tuple[np.ndarray, int]:
        """A random digit magnified to `height` pixels, (height, height) in [0, 1], and its class."""
        index = generator.integers(len(self.digits))
        digit = PIL.Image.fromarray(np.float32(self.digits[index]))
        ink = np.asarray(digit.resize((height, height), PIL.Image.Resampling.BILINEAR), np.float64)
        return ink, int(self.labels[index])


def render_digit(source: SceneSource, generator: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pastes a digit on a darkened photograph.

    Args:
        source: photographs and digits.
        generator: the only source of randomness.
        side: S, in pixels.

    Returns:
        Image, (S, S, 3), and classes, (S, S), both bytes; a pixel is of the digit where at least 35 % of it are ink.
    """
    image = source.texture(generator, (side, side), zoom=3) * generator.uniform(0, 0.2)
    height = round(side * generator.uniform(0.75, 1.0))
    top, left = generator.integers(side - height + 1, size=2)
    ink, label = source.ink(generator, height)
    _paint(image[top : top + height, left : left + height], ink, generator)
    classes = np.full((side, side), CLASS_NAMES.index("background"), np.uint8)
    classes[top : top + height, left : left + height][ink >= 0.35] = label
    return _as_bytes(image), classes


def render_room(source: SceneSource, generator: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders a wall with a digit painted on it, and the floor in front, by a pin-hole camera looking straight ahead.

    A pixel (x, y) sees the direction ((x - S / 2) / S, (y - S / 2) / S, 1), so depth z is along the optical axis, as a
    depth camera measures it. The wall is at z = S `DIGIT_HEIGHTS[c]` / h if the digit c on it appears h pixels high;
    the floor at z = S H / (y - S / 2), with the camera at a height H such that floor and wall meet in the picture.

    Args:
        source: photographs and digits.
        generator: the only source of randomness.
        side: S, in pixels, also the focal length.

    Returns:
        Image, (S, S, 3), bytes, and depth, (S, S), float32, in metres.
    """
    foot = side * generator.uniform(0.9, 0.97)  # row where floor and wall meet: alone, it does not tell how far
    height = int(foot * generator.uniform(0.9, 1.0))
    ink, label = source.ink(generator, height)
    wall = side * DIGIT_HEIGHTS[label] / height
    camera_height = wall * (foot - side / 2) / side
    centres = np.arange(side) + 0.5 - side / 2  # of the pixels, down or right from the middle
    floor = side * camera_height / np.maximum(centres, 1e-9)  # above the horizon beyond any wall
    depth = np.repeat(np.minimum(floor, wall)[:, None], side, axis=1)

    image = source.texture(generator, (side, side), zoom=3) * generator.uniform(0, 0.2)
    top = generator.integers(int(foot) - height + 1)
    left = generator.integers(side - height + 1)
    _paint(image[top : top + height, left : left + height], ink, generator)
    # A photograph lies on the floor, again and again, as wide as the wall that is seen.
    tile = source.texture(generator, (side, side), zoom=3) * 0.25
    near = floor < wall
    along, across = floor[near, None], centres[None] * floor[near, None] / side
    image[near] = tile[tuple(np.int64(np.floor(metres * side / wall)) % side for metres in (along, across))]
    return _as_bytes(image), depth.astype(np.float32)


def _paint(image: np.ndarray, ink: np.ndarray, generator: np.random.Generator) -> None:
    """Covers an image, (H, W, 3), with ink of a random bright colour, in place."""
    colour = generator.uniform(0.8, 1.0, size=3)
    image += ink[..., None] * (colour - image)


def _side(task: str, config_name: str | None) -> int:
    if config_name is None:
        return 64
    kind = {"semantic-segmentation": "segmentation", "depth-estimation": "depth"}[task]
    match = re.fullmatch(rf"{kind}-(\d+)", config_name)
    if match is None or not 16 <= (side := int(match[1])) <= 256:
        raise ValueError(
            f"config_name of 'scenes' is {config_name!r}; it must be '{kind}-SIDE' for {task}, with a side of 16 to "
            f"256 pixels, such as '{kind}-64'"
        )
    return side


def _load_source(split: str) -> SceneSource:
    # scikit-learn takes longer to import than everything else here, for this one data set
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # the split of the data set "digits", on whose training digits a teacher may have been trained
    parts = train_test_split(np.arange(len(digits.target)), test_size=500, stratify=digits.target, random_state=0)
    rows = parts[list(SPLIT_SIZES).index(split)]
    photographs = [photograph / 255 for photograph in load_sample_images().images]  # (427, 640, 3)
    columns = {"train": slice(None, 360), "test": slice(360, None)}[split]
    return SceneSource([part[:, columns] for part in photographs], digits.images[rows] / 16, digits.target[rows])


def _as_bytes(image: np.ndarray) -> np.ndarray:
    return np.uint8(np.rint(np.clip(image, 0, 1) * 255))


def _encoded(values: np.ndarray, format: str) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    PIL.Image.fromarray(values).save(buffer, format)
    return {"bytes": buffer.getvalue(), "path": None}
