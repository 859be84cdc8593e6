"""Claims about augmentation and collation: images and their maps keep together, and the numbers are those published."""

import colorsys
import math
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from PIL import ImageEnhance
from PIL.Image import Resampling
from raptor_settings.probe import PUBLISHED
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf import RaptorImageProcessor
from raptor_hf.data.transforms import (
    Augmentations,
    ColorJitter,
    CropFlip,
    DepthCollate,
    SegmentationCollate,
    center_pad,
    random_resized_crop,
    resize_nearest,
)

PROCESSORS = [RaptorImageProcessor(), BitImageProcessorPil()]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(seed: int, size: tuple[int, int]) -> PIL.Image.Image:
    return PIL.Image.fromarray(rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def coordinates(size: tuple[int, int]) -> tuple[PIL.Image.Image, np.ndarray]:
    """An image whose red and green are column and row, and the map of 1000 row + column."""
    rows, columns = np.indices(size)
    image = np.stack([columns, rows, np.zeros(size, int)], axis=-1).astype(np.uint8)
    return PIL.Image.fromarray(image), (1000 * rows + columns).astype(np.int64)


def normalized(processor, image: PIL.Image.Image) -> torch.Tensor:
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    return (torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255.0 - mean) / std


class TestCropFlip:
    def test_the_map_goes_where_the_image_goes(self):
        image, target = coordinates((40, 60))
        augment = CropFlip((9, 13), interpolation=Resampling.NEAREST)
        flips = set()
        for seed in range(50):
            found_image, found = augment(image, target, rng(seed))
            assert found_image.size == (13, 9) and found.shape == (9, 13) and found.dtype == np.int64
            pixels = np.asarray(found_image).astype(int)
            np.testing.assert_array_equal(1000 * pixels[..., 1] + pixels[..., 0], found)
            flips.add(pixels[0, 0, 0] > pixels[0, -1, 0])
        assert flips == {False, True}

    def test_depth_keeps_its_values_and_type(self):
        depth = rng().uniform(1, 9, (30, 20)).astype(np.float32)
        _, found = CropFlip(8)(noise(0, (30, 20)), depth, rng())
        assert found.dtype == np.float32 and np.isin(found, depth).all()

    def test_a_class_label_and_none_are_handed_on(self):
        image = noise(0, (20, 20))
        assert CropFlip(8)(image, 7, rng())[1] == 7 and CropFlip(8)(image, None, rng())[1] is None
        # whether there is a map must not change what happens to the image
        with_map, _ = CropFlip(8)(image, np.zeros((20, 20), np.int64), rng(3))
        np.testing.assert_array_equal(np.asarray(with_map), np.asarray(CropFlip(8)(image, 0, rng(3))[0]))

    def test_all_randomness_comes_from_the_generator(self):
        image, augment = noise(0, (30, 40)), pickle.loads(pickle.dumps(CropFlip(16)))
        np.random.seed(0)
        state = np.random.get_state()[1].copy()
        one, two, other = (np.asarray(augment(image, None, rng(seed))[0]) for seed in (5, 5, 6))
        assert np.array_equal(one, two) and not np.array_equal(one, other)
        assert np.array_equal(np.random.get_state()[1], state)

    def test_half_of_the_images_are_mirrored_and_none_at_probability_0(self):
        image, _ = coordinates((10, 10))

        def is_mirrored(augment, seed):
            pixels = np.asarray(augment(image, None, rng(seed))[0]).astype(int)
            return pixels[0, 0, 0] > pixels[0, -1, 0]

        whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
        counts = [
            sum(is_mirrored(CropFlip(10, **whole, flip_probability=p), s) for s in range(400)) for p in (0, 0.5, 1)
        ]
        assert counts[0] == 0 and counts[2] == 400 and 150 < counts[1] < 250

    def test_wrong_ranges_are_refused(self):
        for wrong, message in (
            ({"size": 0}, "size is 0"),
            ({"scale": (0.5, 0.1)}, "scale is"),
            ({"scale": (0.0, 1.0)}, "scale is"),
            ({"ratio": (2.0, 1.0)}, "ratio is"),
            ({"flip_probability": 1.5}, "flip_probability is 1.5"),
        ):
            with pytest.raises(ValueError, match=message):
                CropFlip(**{"size": 8} | wrong)


class TestRandomResizedCrop:
    def test_area_ratio_and_place_are_distributed_as_published(self):
        image, target = coordinates((100, 120))
        areas, ratios, lefts = [], [], []
        for seed in range(1000):
            # resized to many pixels, the map tells where the rectangle began and ended
            _, found = random_resized_crop(image, target, rng(seed), size=120, scale=(0.08, 0.5))
            rows, columns = np.unique(found[:, 0] // 1000), np.unique(found[0] % 1000)
            areas.append(len(rows) * len(columns) / (100 * 120))
            ratios.append(len(columns) / len(rows))
            lefts.append(columns[0] / max(1, 120 - len(columns)))
        assert 0.075 < min(areas) and max(areas) < 0.51 and 0.73 < min(ratios) and max(ratios) < 1.36
        assert np.mean(areas) == pytest.approx((0.08 + 0.5) / 2, abs=0.01)
        assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.02)
        np.testing.assert_allclose(np.quantile(lefts, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)

    def test_the_image_is_the_rectangle_resized_alone(self):
        image, target = noise(0, (50, 50)), np.arange(2500).reshape(50, 50)
        found, places = random_resized_crop(image, target, rng(4), size=100, scale=(0.2, 0.4))
        rows, columns = np.unique(places // 50), np.unique(places % 50)
        part = np.asarray(image)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        expected = PIL.Image.fromarray(part).resize((100, 100), Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))

    @pytest.mark.parametrize(("size", "expected"), [((20, 400), (20, 27)), ((400, 20), (27, 20))])
    def test_an_image_that_no_rectangle_fits_gives_its_centre(self, size, expected):
        image, target = coordinates((size[0], size[1]))
        target = np.arange(size[0] * size[1]).reshape(size)
        _, found = random_resized_crop(image, target, rng(), size=(400, 400), scale=(1.0, 1.0))
        rows, columns = np.unique(found // size[1]), np.unique(found % size[1])
        assert (len(rows), len(columns)) == expected
        for places, side in ((rows, size[0]), (columns, size[1])):
            assert abs(places[0] - (side - 1 - places[-1])) <= 1

    def test_a_map_of_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"shape \(20, 30\), its image 30 x 20"):
            random_resized_crop(noise(0, (30, 20)), np.zeros((20, 30)), rng(), size=8)


@pytest.mark.parametrize(("size", "new"), [((7, 5), (13, 9)), ((30, 41), (14, 14)), ((6, 6), (6, 6)), ((1, 3), (4, 2))])
def test_nearest_is_that_of_pillow_and_torch(size, new):
    values = rng().integers(0, 2**31, size, dtype=np.int32)
    found = resize_nearest(values, new)
    expected = PIL.Image.fromarray(values).resize(new[::-1], Resampling.NEAREST)
    np.testing.assert_array_equal(found, np.asarray(expected))
    as_torch = F.interpolate(torch.tensor(values)[None, None].double(), size=new, mode="nearest-exact")[0, 0]
    np.testing.assert_array_equal(found, as_torch.numpy().astype(np.int64))


def reference_rectangle(size, generator, scale, ratio):
    """`RandomResizedCrop.get_params` of torchvision, line by line, with NumPy's random numbers."""
    width, height = size
    area = height * width
    for _ in range(10):
        target_area = area * generator.uniform(scale[0], scale[1])
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target_area * aspect)), round(math.sqrt(target_area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(0, width - w + 1))
            return left, int(generator.integers(0, height - h + 1)), w, h
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, round(width / min(ratio))
    elif in_ratio > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("size", [(48, 64), (40, 90), (90, 40)])
@pytest.mark.parametrize("task", sorted(PUBLISHED))
def test_published_crops_are_those_of_torchvision(task, size):
    """Area up to 2 at the ratio of the image, as for depth, gives the whole image where ten draws are too large."""
    area, ratio = (tuple(PUBLISHED[task][name]) for name in ("crop_area", "crop_ratio"))
    image, target = coordinates(size)
    whole = 0
    for seed in range(60):
        left, top, width, height = reference_rectangle(image.size, rng(seed), area, ratio)
        part = image.crop((left, top, left + width, top + height)).resize((32, 24), Resampling.BILINEAR)
        found, places = random_resized_crop(
            image, target, rng(seed), size=(24, 32), scale=area, ratio=ratio, interpolation=Resampling.BILINEAR
        )
        np.testing.assert_array_equal(np.asarray(found), np.asarray(part))
        stored = PIL.Image.fromarray(target.astype(np.int32)).crop((left, top, left + width, top + height))
        np.testing.assert_array_equal(places, np.asarray(stored.resize((32, 24), Resampling.NEAREST)))
        whole += (width, height) == image.size
    assert task != "depth-estimation" or size != (48, 64) or whole > 0


def test_filters_are_those_of_torchvision_with_antialias():
    image = noise(0, (120, 160))
    tensor = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float()
    for name, filter in (("bilinear", Resampling.BILINEAR), ("bicubic", Resampling.BICUBIC)):
        ours = torch.tensor(np.asarray(image.resize((40, 30), filter))).permute(2, 0, 1)[None].float()
        gaps = {}
        for antialias in (True, False):
            theirs = F.interpolate(tensor, size=(30, 40), mode=name, align_corners=False, antialias=antialias)
            gaps[antialias] = (ours - theirs.clamp(0, 255)).abs().mean().item()
        assert gaps[True] < 0.5 < 10 < gaps[False]  # of 255


class TestColorJitter:
    @staticmethod
    def reference(image: PIL.Image.Image, kind: str, factor: float) -> np.ndarray:
        """The change in floating point, by its definition."""
        values = np.asarray(image).astype(float)
        gray = values @ [0.299, 0.587, 0.114]
        if kind == "brightness":
            return values * factor
        if kind == "contrast":
            return gray.mean() + (values - gray.mean()) * factor
        if kind == "saturation":
            return gray[..., None] + (values - gray[..., None]) * factor
        turned = [colorsys.rgb_to_hsv(*pixel) for pixel in values.reshape(-1, 3) / 255]
        turned = [colorsys.hsv_to_rgb((hue + factor) % 1, saturation, value) for hue, saturation, value in turned]
        return 255 * np.array(turned).reshape(values.shape)

    @pytest.mark.parametrize("place, kind", list(enumerate(["brightness", "contrast", "saturation", "hue"])))
    def test_each_change_is_what_its_name_says(self, place, kind):
        image = noise(0, (12, 15))
        for seed in range(5):
            generator = rng(seed)
            generator.permutation(4)
            limits = [0.4 * (kind == name) for name in ("brightness", "contrast", "saturation")]
            factors = [generator.uniform(1 - limit, 1 + limit) for limit in limits]
            turn = 0.3 * (kind == "hue")
            factors.append(generator.uniform(-turn, turn))
            found, label = ColorJitter(*limits, turn)(image, "label", rng(seed))
            expected = self.reference(image, kind, factors[place]).clip(0, 255)
            gap = np.abs(np.asarray(found).astype(float) - expected)
            assert label == "label" and gap.mean() < (4 if kind == "hue" else 1)
            assert np.abs(np.asarray(image) - expected).mean() > 3 * gap.mean()  # it does change

    def test_changes_come_in_a_random_order(self):
        image, jitter = noise(0, (12, 15)), ColorJitter(0.2, 0.2, 0.2, 0.1)
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        orders = set()
        for seed in range(40):
            generator = rng(seed)
            order = generator.permutation(4).tolist()
            factors = [generator.uniform(0.8, 1.2) for _ in range(3)] + [generator.uniform(-0.1, 0.1)]
            expected = image
            for change in order:
                if change == 3:
                    hue, saturation, value = np.asarray(expected.convert("HSV")).astype(int).transpose(2, 0, 1)
                    turned = np.stack([(hue + int(factors[3] * 255)) % 256, saturation, value], axis=-1)
                    expected = PIL.Image.fromarray(turned.astype(np.uint8), "HSV").convert("RGB")
                else:
                    expected = enhance[change](expected).enhance(factors[change])
            np.testing.assert_array_equal(np.asarray(jitter(image, None, rng(seed))[0]), np.asarray(expected))
            orders.add(tuple(order))
        assert len(orders) > 15

    def test_nothing_asked_changes_nothing(self):
        image = noise(0, (12, 15))
        np.testing.assert_array_equal(np.asarray(ColorJitter()(image, None, rng())[0]), np.asarray(image))

    @pytest.mark.parametrize("wrong", [{"brightness": -0.1}, {"hue": 0.6}])
    def test_impossible_numbers_are_refused(self, wrong):
        with pytest.raises(ValueError, match="no negative number, and hue at most 0.5"):
            ColorJitter(**wrong)


def test_augmentations_share_one_generator_in_their_order():
    image, depth = noise(0, (30, 40)), rng(1).uniform(1, 9, (30, 40)).astype(np.float32)
    crop, jitter = CropFlip((10, 12)), ColorJitter(0.2, 0.2, 0.2, 0.1)
    found = Augmentations((crop, jitter))(image, depth, rng(7))
    generator = rng(7)
    expected = jitter(*crop(image, depth, generator), generator)
    np.testing.assert_array_equal(np.asarray(found[0]), np.asarray(expected[0]))
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("processor", PROCESSORS, ids=["raptor", "bit"])
class TestSegmentationCollate:
    @pytest.mark.parametrize("filter", [Resampling.BILINEAR, Resampling.BICUBIC], ids=["bilinear", "bicubic"])
    def test_image_filtered_mask_nearest_then_normalised(self, processor, filter):
        images = [noise(0, (30, 41)), noise(1, (25, 20))]
        masks = [rng(i).integers(0, 256, (image.height, image.width)) for i, image in enumerate(images)]
        options = () if filter == Resampling.BILINEAR else (filter,)  # bilinear is the default, as published
        batch = SegmentationCollate(processor, 28, *options)(images, masks)
        assert batch["pixel_values"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
        for i in range(2):
            expected = normalized(processor, images[i].resize((28, 28), filter))
            torch.testing.assert_close(batch["pixel_values"][i].double(), expected, atol=1e-5, rtol=0)
            nearest = PIL.Image.fromarray(masks[i].astype(np.int32)).resize((28, 28), Resampling.NEAREST)
            assert batch["labels"][i].tolist() == np.asarray(nearest).tolist()

    def test_a_rectangle_is_height_and_width(self, processor):
        batch = SegmentationCollate(processor, (14, 42))([noise(0, (9, 9))], [np.zeros((9, 9), np.int64)])
        assert batch["pixel_values"].shape == (1, 3, 14, 42) and batch["labels"].shape == (1, 14, 42)

    def test_a_mask_of_another_size_is_refused(self, processor):
        with pytest.raises(ValueError, match="shape"):
            SegmentationCollate(processor, 14)([noise(0, (9, 8))], [np.zeros((8, 9), np.int64)])


@pytest.mark.parametrize("processor", PROCESSORS, ids=["raptor", "bit"])
class TestDepthCollate:
    def test_nyu_becomes_490_x_644_with_the_image_in_the_centre_and_invalid_depth_around(self, processor):
        image, depth = noise(0, (480, 640)), rng().uniform(0.5, 10, (480, 640)).astype(np.float32)
        batch = DepthCollate(processor, 14)([image], [depth])
        assert batch["pixel_values"].shape == (1, 3, 490, 644) and batch["labels"].shape == (1, 490, 644)
        inside = (slice(5, 485), slice(2, 642))
        torch.testing.assert_close(
            batch["pixel_values"][0][:, *inside].double(), normalized(processor, image), atol=1e-5, rtol=0
        )
        np.testing.assert_array_equal(batch["labels"][0][inside], depth)
        for values in (batch["pixel_values"][0].abs().sum(0), batch["labels"][0]):
            outside = values.clone()
            outside[inside] = 0
            assert not outside.any()

    def test_images_of_whole_patches_are_left_as_they_are(self, processor):
        batch = DepthCollate(processor, 8)([noise(0, (16, 24))] * 2, [np.ones((16, 24), np.float32)] * 2)
        assert batch["pixel_values"].shape == (2, 3, 16, 24) and batch["labels"].all()

    def test_images_of_two_sizes_are_refused(self, processor):
        images, depths = [noise(0, (8, 8)), noise(0, (8, 9))], [np.ones((8, 8)), np.ones((8, 9))]
        with pytest.raises(ValueError, match="8 x 8 and 8 x 9"):
            DepthCollate(processor, 8)(images, depths)
        with pytest.raises(ValueError, match="shape"):
            DepthCollate(processor, 8)(images[:1], depths[1:])


def test_odd_padding_has_its_last_pixel_right_and_below():
    padded = center_pad(torch.ones(2, 5, 6), 9, value=-1.0)
    assert padded.shape == (2, 9, 9)
    assert torch.equal(padded[0], F.pad(torch.ones(5, 6), (1, 2, 2, 2), value=-1.0))
