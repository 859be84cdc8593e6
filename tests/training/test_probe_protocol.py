"""The three published probes, step by step, against loops in double precision that are written from their table.

The images are small stand-ins, laid out as the real data sets are, and the sizes are small with them; everything else
is what the published configurations say. The order of the images and the random numbers of a crop are this package's,
so they are drawn here as it documents them; what is made of them is written anew.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from PIL import ImageEnhance
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from transformers import AutoModel, AutoModelForImageClassification
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf.data.loaders import EpochOrder
from tests.support.dense_layouts import noise, write_ade20k, write_kaggle_nyuv2
from tests.support.tiny_models import tiny_dinov2
from training import probe

CONFIGS = Path(__file__).parents[2] / "training" / "configs" / "probe"
NUM_IMAGES, BATCH = 10, 4
DEPTH_SIZE = (15, 20)  # with patches of 2 pixels, one row of padding
EPOCHS = {"drop": 10, "keep": 7}  # of 2 and of 3 steps: at least 20
SMALL = {"batch_size": BATCH, "eval_batch_size": 4, "num_workers": 0, "mixed_precision": "no", "log_every": 10}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("protocol") / "teacher"
    options = {"num_labels": 3, "id2label": {0: "cat", 1: "dog", 2: "fox"}, "patch_size": 2}
    tiny_dinov2(hidden_size=16, num_attention_heads=2, image_size=16, **options).save_pretrained(folder)
    half, size = [0.5, 0.5, 0.5], {"height": 16, "width": 16}
    BitImageProcessorPil(size={"shortest_edge": 16}, crop_size=size, image_mean=half, image_std=half).save_pretrained(
        folder
    )
    return folder


def train(monkeypatch, config: str, teacher: Path, dataset: Path, output: Path, **changes) -> dict[str, Tensor]:
    """The recipe, as its published configuration has it but for sizes; the head that it ends with."""
    settings = SMALL | {"model": teacher, "dataset": dataset, "output_dir": output} | changes
    arguments = [str(CONFIGS / f"{config}.yaml")]
    for name, value in settings.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no_{name}")
        else:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr("sys.argv", ["probe.py", *arguments])
    monkeypatch.setattr(probe, "draw_predictions", lambda run, path: None)
    probe.main()
    return load_file(output / "heads" / "seed-0.safetensors")


def places(epochs: int, last_batch: str) -> Iterator[list[tuple[int, int]]]:
    """Batches of (place in the sequence, row), of epochs that end with a smaller batch or without it."""
    order = EpochOrder(NUM_IMAGES, seed=0)
    for epoch in range(epochs):
        for start in range(0, NUM_IMAGES, BATCH):
            here = range(epoch * NUM_IMAGES + start, epoch * NUM_IMAGES + min(start + BATCH, NUM_IMAGES))
            if len(here) == BATCH or last_batch == "keep":
                yield [(place, order(place)) for place in here]


def crop_and_flip(
    image: PIL.Image.Image, target: PIL.Image.Image | None, generator, size, area, ratio, filter
) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """RandomResizedCrop and RandomHorizontalFlip, of PIL images as torchvision has them; the target as it is stored."""
    width, height = image.size
    left, top, w, h = 0, 0, width, height  # after ten draws: of depth alone, whose images have the ratio 4 : 3
    for _ in range(10):
        wanted = width * height * generator.uniform(*area)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        try_w, try_h = round(math.sqrt(wanted * aspect)), round(math.sqrt(wanted / aspect))
        if 0 < try_w <= width and 0 < try_h <= height:
            w, h = try_w, try_h
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            break
    pair = [(image, filter), (target, PIL.Image.Resampling.NEAREST)]
    box, size = (left, top, left + w, top + h), (size[1], size[0])
    pair = [picture and picture.crop(box).resize(size, how) for picture, how in pair]
    if generator.random() < 0.5:
        pair = [picture and picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) for picture in pair]
    return tuple(pair)


def jitter(image: PIL.Image.Image, generator) -> PIL.Image.Image:
    """ColorJitter(.2, .2, .2, hue .1)."""
    order = generator.permutation(4)
    factors = [generator.uniform(0.8, 1.2) for _ in range(3)]
    turn = generator.uniform(-0.1, 0.1)
    for change in order:
        if change < 3:
            enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
            image = enhancer(image).enhance(factors[change])
        else:
            values = np.array(image.convert("HSV")).astype(int)
            values[..., 0] = (values[..., 0] + int(turn * 255)) % 256
            image = PIL.Image.fromarray(values.astype(np.uint8), "HSV").convert("RGB")
    return image


def normalized(image: PIL.Image.Image) -> Tensor:
    return (torch.tensor(np.asarray(image)).double().permute(2, 0, 1) / 255 - 0.5) / 0.5


def reference_head(
    weight: Tensor,
    bias: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    teacher: Path,
    loss_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    *,
    learning_rate: float,
    weight_decay: float,
    max_norm: float | None,
    warmup: int | None,
) -> tuple[Tensor, Tensor]:
    """Trains a linear layer on the tokens after the last norm; batches of pixel values and truth, all in float64."""
    backbone = AutoModel.from_pretrained(teacher).double().eval()
    weight, bias = (value.double().clone().requires_grad_() for value in (weight, bias))
    optimizer = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=weight_decay)
    if warmup is None:
        scheduler = LinearLR(optimizer, start_factor=1.0, total_iters=1)
    else:
        up = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
        down = CosineAnnealingLR(optimizer, T_max=len(batches) - warmup, eta_min=0.01 * learning_rate)
        scheduler = SequentialLR(optimizer, [up, down], milestones=[warmup])
    for pixels, truth in batches:
        with torch.no_grad():
            tokens = backbone(pixels).last_hidden_state
        loss = loss_of(tokens, truth, weight, bias)
        optimizer.zero_grad()
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([weight, bias], max_norm)
        optimizer.step()
        scheduler.step()
    return weight.detach(), bias.detach()


def assert_same_head(found: dict[str, Tensor], start: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """To a thousandth of the way that the weights have gone."""
    for name, before, after in zip(("weight", "bias"), start, expected, strict=True):
        moved = (after - before).abs().max()
        assert moved > 1e-4 and (found[name].double() - after).abs().max() < 1e-3 * moved


def random_start(num_outputs: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_outputs, width, generator=generator) * 0.02, torch.zeros(num_outputs)


def num_prefix(teacher: Path) -> int:
    return 1 + AutoModel.from_pretrained(teacher).config.num_register_tokens


def test_imagenet_is_trained_as_published(monkeypatch, teacher, tmp_path):
    names = ["cat", "dog", "fox"]
    for split in ("train", "validation"):
        for i in range(NUM_IMAGES):
            path = tmp_path / "data" / split / names[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(i, (20 + i, 24)).save(path)
    changes = {"epochs": EPOCHS["keep"], "warmup_steps": 5, "image_size": 16, "resize_size": 20}
    found = train(monkeypatch, "imagenet", teacher, tmp_path / "data", tmp_path / "run", **changes)

    paths, batches = sorted((tmp_path / "data" / "train").glob("*/*.png")), []
    for batch in places(EPOCHS["keep"], "keep"):
        pixels = []
        for place, row in batch:
            image, generator = PIL.Image.open(paths[row]), np.random.default_rng((0, place))
            bicubic = PIL.Image.Resampling.BICUBIC
            image, _ = crop_and_flip(image, None, generator, (16, 16), (0.08, 1), (3 / 4, 4 / 3), bicubic)
            pixels.append(normalized(image))
        labels = [names.index(paths[row].parent.name) for _, row in batch]
        batches.append((torch.stack(pixels), torch.tensor(labels)))

    def loss_of(tokens, labels, weight, bias):
        features = torch.cat([tokens[:, 0], tokens[:, num_prefix(teacher) :].mean(dim=1)], dim=-1)
        return F.cross_entropy(features @ weight.T + bias, labels)

    classifier = AutoModelForImageClassification.from_pretrained(teacher).classifier  # as Meta's head, the start
    start = classifier.weight.detach(), classifier.bias.detach()
    recipe = {"learning_rate": 1e-4, "weight_decay": 1e-2, "max_norm": 1.0, "warmup": 5}
    assert len(batches) >= 20
    assert_same_head(found, start, reference_head(*start, batches, teacher, loss_of, **recipe))


def test_ade20k_is_trained_as_published(monkeypatch, teacher, tmp_path):
    write_ade20k(tmp_path / "data", NUM_IMAGES)
    changes = {"epochs": EPOCHS["drop"], "warmup_steps": 5, "image_size": 16}
    found = train(monkeypatch, "ade20k", teacher, tmp_path / "data", tmp_path / "run", **changes)

    paths, batches = sorted((tmp_path / "data" / "images" / "training").glob("*.jpg")), []
    for batch in places(EPOCHS["drop"], "drop"):
        pixels, masks = [], []
        for place, row in batch:
            image, generator = PIL.Image.open(paths[row]).convert("RGB"), np.random.default_rng((0, place))
            mask = PIL.Image.open(tmp_path / "data/annotations/training" / f"{paths[row].stem}.png")
            bilinear = PIL.Image.Resampling.BILINEAR
            image, mask = crop_and_flip(image, mask, generator, (16, 16), (0.5, 1), (0.75, 1.33), bilinear)
            pixels.append(normalized(image))
            mask = torch.tensor(np.asarray(mask).astype(int))
            masks.append(torch.where(mask == 0, 255, mask - 1))
        batches.append((torch.stack(pixels), torch.stack(masks)))

    def loss_of(tokens, masks, weight, bias):
        logits = tokens[:, num_prefix(teacher) :] @ weight.T + bias
        grid = logits.transpose(1, 2).reshape(len(masks), 3, 8, 8)
        grid = F.interpolate(grid, size=(16, 16), mode="bilinear", align_corners=False)
        return F.cross_entropy(grid, masks, ignore_index=255)

    start = random_start(3, 16)
    recipe = {"learning_rate": 1e-3, "weight_decay": 1e-2, "max_norm": 1.0, "warmup": 5}
    assert len(batches) == 20
    assert_same_head(found, start, reference_head(*start, batches, teacher, loss_of, **recipe))


def test_nyuv2_is_trained_as_published(monkeypatch, teacher, tmp_path):
    write_kaggle_nyuv2(tmp_path / "data", NUM_IMAGES, DEPTH_SIZE)
    changes = {"epochs": EPOCHS["keep"], "crop_size": list(DEPTH_SIZE), "eigen_crop": False}
    found = train(monkeypatch, "nyuv2", teacher, tmp_path / "data", tmp_path / "run", **changes)

    height, width = DEPTH_SIZE
    batches = []
    for batch in places(EPOCHS["keep"], "keep"):
        pixels, depths = [], []
        for place, row in batch:
            base, generator = tmp_path / "data/data/nyu2_train", np.random.default_rng((0, place))
            image = PIL.Image.open(base / f"{row}.jpg").convert("RGB")
            depth = PIL.Image.open(base / f"{row}.png")
            bilinear = PIL.Image.Resampling.BILINEAR
            image, depth = crop_and_flip(image, depth, generator, DEPTH_SIZE, (0.5, 2), (4 / 3, 4 / 3), bilinear)
            pixels.append(F.pad(normalized(jitter(image, generator)), (0, 0, 0, 1)))
            depths.append(F.pad(torch.tensor(np.asarray(depth) / 255 * 10), (0, 0, 0, 1)))
        batches.append((torch.stack(pixels), torch.stack(depths)))

    def loss_of(tokens, depths, weight, bias):
        patches = tokens[:, num_prefix(teacher) :]
        features = torch.cat([patches, tokens[:, :1].expand_as(patches)], dim=-1)
        rows, columns = (height + 1) // 2, width // 2
        grid = features.transpose(1, 2).reshape(len(depths), 32, rows, columns)
        grid = F.interpolate(grid, scale_factor=4, mode="bilinear", align_corners=False)
        logits = torch.einsum("nd,bdhw->bnhw", weight, grid) + bias[:, None, None]
        bins = torch.linspace(1e-3, 10, 256, dtype=torch.float64)
        predicted = (logits.softmax(dim=1) * bins[:, None, None]).sum(dim=1)
        predicted = F.interpolate(predicted[:, None], size=depths.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        valid = depths > 0  # the padding is not
        gap = predicted[valid].log() - depths[valid].log()
        scale_invariant = (gap.square().mean() - 0.85 * gap.mean().square()).sqrt()
        nearest = F.interpolate(depths[:, None], size=logits.shape[2:], mode="nearest")[:, 0]
        classes = (nearest[:, None] - bins[:, None, None]).abs().argmin(dim=1)  # the nearest bin
        return 10 * scale_invariant + F.cross_entropy(logits, torch.where(nearest > 0, classes, -100))

    start = random_start(256, 32)
    recipe = {"learning_rate": 1e-3, "weight_decay": 1e-3, "max_norm": None, "warmup": None}
    assert len(batches) >= 20
    assert_same_head(found, start, reference_head(*start, batches, teacher, loss_of, **recipe))
