"""Tiny folders laid out exactly as ADE20k (ADEChallengeData2016) and NYUv2 (for depth networks, and at Kaggle) are."""

from pathlib import Path

import numpy as np
import PIL.Image

ADE_NAMES = ("wall", "building, edifice", "sky")
ADE_TABLE = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(
    f"{label}\t0.1\t10\t1\t1\t{name}\n" for label, name in enumerate(ADE_NAMES, start=1)
)


def noise(seed: int, size: tuple[int, int]) -> PIL.Image.Image:
    """An RGB image of (height, width)."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_ade20k(folder: Path, num_images: int = 3, *, names: bool = True) -> dict[str, list[np.ndarray]]:
    """Images of several sizes with masks of 0 (none) to 3; returns the stored masks of the splits."""
    masks = {}
    for split, word in (("training", "train"), ("validation", "val")):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        masks[split] = []
        for i in range(num_images):
            size = (20 + i, 30)
            mask = np.random.default_rng(i + 100 * len(word)).integers(0, 4, size, dtype=np.uint8)
            noise(i, size).save(folder / "images" / split / f"ADE_{word}_{i + 1:08d}.jpg")
            PIL.Image.fromarray(mask).save(folder / "annotations" / split / f"ADE_{word}_{i + 1:08d}.png")
            masks[split].append(mask)
    if names:
        (folder / "objectInfo150.txt").write_text(ADE_TABLE)
    (folder / "sceneCategories.txt").write_text("ADE_train_00000001 hall\n")
    return masks


def write_nyuv2(folder: Path, *, lists: bool = False, size: tuple[int, int] = (12, 16)) -> dict[str, list[np.ndarray]]:
    """Two scenes of two images per split, depth in millimetres with a frame of zeros; returns the stored depth.

    With `lists`, also BTS's lists of pairs; that of the training images refers to the folder `sync`.
    """
    depths = {}
    for split in ("train", "test"):
        base = folder / ("sync" if lists and split == "train" else f"official_splits/{split}")
        lines, depths[split] = [], []
        for scene in ("bathroom", "kitchen_0028b"):
            (base / scene).mkdir(parents=True)
            for number in (45, 46):
                seed = len(depths[split]) + 10 * len(split)
                depth = np.zeros(size, np.uint16)
                depth[1:-1, 1:-1] = np.random.default_rng(seed).integers(500, 9500, (size[0] - 2, size[1] - 2))
                noise(seed, size).save(base / scene / f"rgb_{number:05d}.jpg")
                PIL.Image.fromarray(depth).save(base / scene / f"sync_depth_{number:05d}.png")
                lines.append(f"/{scene}/rgb_{number:05d}.jpg /{scene}/sync_depth_{number:05d}.png 518.8579\n")
                depths[split].append(depth)
        if lists:
            (folder / f"nyudepthv2_{split}_files_with_gt.txt").write_text("".join(lines))
    return depths


def write_kaggle_nyuv2(
    folder: Path, num_images: int = 3, size: tuple[int, int] = (12, 16)
) -> dict[str, list[np.ndarray]]:
    """Kaggle's copy: lists of pairs, depth in bytes for training and 16-bit millimetres for testing; returns metres."""
    metres = {}
    for split in ("train", "test"):
        base, lines, metres[split] = folder / "data" / f"nyu2_{split}", [], []
        base.mkdir(parents=True)
        for i in range(num_images):
            generator = np.random.default_rng(i + 10 * len(split))
            if split == "train":
                stored, unit = generator.integers(20, 256, size, dtype=np.uint8), 10 / 255
                stored[0, 0] = 255  # the largest depth, 10 m
            else:
                stored, unit = generator.integers(700, 9900, size).astype(np.uint16), 0.001
            noise(i, size).save(base / f"{i}.jpg")
            PIL.Image.fromarray(stored).save(base / f"{i}.png")
            lines.append(f"data/nyu2_{split}/{i}.jpg,data/nyu2_{split}/{i}.png\n")
            metres[split].append(stored * unit)
        (folder / "data" / f"nyu2_{split}.csv").write_text("".join(lines))
    return metres
