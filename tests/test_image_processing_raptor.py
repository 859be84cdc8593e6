"""The image processor against transformers' own processors, Pillow and plain arithmetic."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    GLPNConfig,
    GLPNForDepthEstimation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.levit.image_processing_pil_levit import LevitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from raptor_hf import image_processing_raptor
from raptor_hf.configuration_raptor import RaptorConfig
from raptor_hf.image_processing_raptor import ImageError, RaptorImageProcessor, viewed_image

SOURCE = Path(image_processing_raptor.__file__)
# preprocessor_config.json of facebook/dinov2-with-registers-base
DINOV2 = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}


@pytest.fixture
def dinov2_processor() -> BitImageProcessorPil:
    return BitImageProcessorPil(**DINOV2)


@pytest.fixture
def processor() -> RaptorImageProcessor:
    return RaptorImageProcessor()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A random RGB image."""
    return Image.fromarray(noise(height, width, 3, seed=seed))


def special_image(kind: str, tmp_path: Path) -> Image.Image:
    """An image of one of the kinds that files come in."""
    if kind == "palette with transparency":
        photo(60, 80).quantize(16).save(tmp_path / "image.png", transparency=3)
        return Image.open(tmp_path / "image.png")
    if kind == "RGB with a transparent colour":
        image = photo(60, 80)
        image.save(tmp_path / "image.png", transparency=image.getpixel((5, 5)))
        return Image.open(tmp_path / "image.png")
    if kind in ("RGBA", "LA"):
        return Image.fromarray(noise(60, 80, len(kind)))
    return photo(60, 80).convert(kind)


def assert_same_output(ours, reference, images, **kwargs) -> None:
    """Both processors give the same bits, as the same kind of container."""
    actual, expected = ours(images, **kwargs)["pixel_values"], reference(images, **kwargs)["pixel_values"]
    assert type(actual) is type(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (256, 256), (3, 5), (1, 1), (10, 700), (701, 11)])
def test_photo_is_bit_equal_to_dinov2s_processor(processor, dinov2_processor, height, width):
    assert_same_output(processor, dinov2_processor, photo(height, width), return_tensors="pt")


@pytest.mark.parametrize(
    "kind",
    [
        *("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"),
        *("palette with transparency", "RGB with a transparent colour"),
    ],
)
def test_every_kind_of_file_is_bit_equal_to_dinov2s_processor(processor, dinov2_processor, tmp_path, kind):
    assert_same_output(processor, dinov2_processor, special_image(kind, tmp_path), return_tensors="pt")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_photo_is_upright_from_a_path_and_as_an_image(processor, dinov2_processor, tmp_path, orientation):
    """DINOv2's processor turns what it opens itself, and takes a PIL image as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.jpg"
    photo(60, 80).save(path, exif=exif)
    upright = dinov2_processor(str(path), return_tensors="pt")["pixel_values"]
    for given in (str(path), Image.open(path), ImageOps.exif_transpose(Image.open(path))):
        assert torch.equal(processor(given, return_tensors="pt")["pixel_values"], upright)
    stored = dinov2_processor(Image.open(path), return_tensors="pt")["pixel_values"]
    assert torch.equal(stored, upright) == (orientation == 1)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_the_same_image_as_in_8(processor, tmp_path, format):
    grey = noise(60, 80)
    path = tmp_path / "image"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path, format=format)
    expected = processor(Image.fromarray(grey), return_tensors="pt")["pixel_values"]
    for given in (str(path), Image.open(path)):
        assert torch.equal(processor(given, return_tensors="pt")["pixel_values"], expected)
    # big-endian, as some TIFFs are; values between two bytes go to the nearer one
    image = Image.frombytes("I;16B", (4, 1), np.array([0, 128, 129, 65535], dtype=">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(viewed_image(image)), [[0, 0, 1, 255]])


@pytest.mark.parametrize("mode", ["I", "F"])
def test_image_without_a_range_is_refused_by_its_mode_and_file(processor, tmp_path, mode):
    path = tmp_path / "depth.tiff"
    photo(60, 80).convert(mode).save(path)
    with pytest.raises(ImageError, match=f"depth.tiff' has mode '{mode}', .* 8 bits per channel or 16 bits of grey"):
        processor(Image.open(path))
    with pytest.raises(ImageError, match=f"image has mode '{mode}'"):
        processor(photo(60, 80).convert(mode))


@pytest.mark.timeout(30)
def test_image_that_would_be_huge_once_resized_is_refused(processor, tmp_path):
    path = tmp_path / "line.png"
    photo(1, 3000).save(path)
    with pytest.raises(ImageError, match="line.png' is 1 x 3000 pixels large; .* at most 200 times the shorter"):
        processor(Image.open(path))
    with pytest.raises(ImageError, match=r"images\[1\] is 3000 x 1 pixels large"):
        processor([noise(30, 40, 3), noise(3000, 1, 3)])
    with pytest.raises(ImageError, match=r"images\[0\] is 20 x 3000 pixels large and would be 2000 x 300000"):
        processor(photo(20, 3000), size={"shortest_edge": 2000})
    assert processor(photo(2, 400), return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"image_std": [0.2, 0.0, 0.2]}, r"image_std is \(0.2, 0.0, 0.2\); it must be above 0 and finite"),
        ({"image_std": 0.0}, "image_std is 0.0"),
        ({"image_std": [0.2, float("nan"), 0.2]}, "image_std is .*nan"),
        ({"image_mean": [0.5, float("inf"), 0.5]}, "image_mean is .*inf.*; it must be finite"),
        ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
        ({"rescale_factor": 0.0}, "rescale_factor is 0.0"),
        ({"size": {"shortest_edge": 10**9}}, "size is {'shortest_edge': 1000000000}; each side must be from 1 to 8192"),
        ({"size": {"height": -4, "width": 8}}, "size is {'height': -4"),
        ({"crop_size": {"height": 10**9, "width": 1}}, "crop_size is {'height': 1000000000"),
    ],
    ids=str,
)
def test_impossible_setting_is_refused_by_name_in_a_call_and_in_a_file(processor, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RaptorImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        processor(photo(60, 80), **settings)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        RaptorImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize(
    "array",
    [
        noise(50, 70, 3),
        noise(3, 50, 70),
        noise(50, 70, 3).astype(np.int64),
        noise(50, 70, 3).astype(np.float32),
        noise(50, 70, 3) / 255,
        torch.from_numpy(noise(3, 50, 70)),
        torch.from_numpy(noise(3, 50, 70)).float() / 255,
    ],
    ids=["hwc", "chw", "int64", "float", "unit", "tensor", "unit tensor"],
)
def test_arrays_and_tensors_are_bit_equal_to_dinov2s_processor(processor, dinov2_processor, array, batch):
    images = array[None].repeat(2, 1, 1, 1) if batch and torch.is_tensor(array) else array
    images = np.stack([array, array[::-1]]) if batch and not torch.is_tensor(array) else images
    assert_same_output(processor, dinov2_processor, images, return_tensors="pt")


def test_batch_of_different_sizes_equals_its_images_one_by_one(processor, dinov2_processor):
    images = [photo(40, 90, seed=1), photo(300, 200, seed=2), photo(224, 224, seed=3).convert("L"), photo(9, 9, seed=4)]
    batch = processor(images, return_tensors="pt")["pixel_values"]
    for image, row in zip(images, batch, strict=True):
        assert torch.equal(row, dinov2_processor(image, return_tensors="pt")["pixel_values"][0])
    assert_same_output(processor, dinov2_processor, images, return_tensors="pt")
    assert_same_output(processor, dinov2_processor, images, return_tensors="np")


@pytest.mark.parametrize(
    "settings",
    [
        {"do_center_crop": False},
        {"do_resize": False},
        {"do_resize": False, "crop_size": {"height": 61, "width": 33}},
        {"size": {"shortest_edge": 32}, "crop_size": 57},
        {"size": {"shortest_edge": 100, "longest_edge": 110}},
        {"size": {"height": 98, "width": 70}, "do_center_crop": False},
        {"size": 77, "resample": Image.Resampling.BILINEAR},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": 0.5, "image_std": 0.25},
    ],
    ids=str,
)
def test_settings_are_bit_equal_to_dinov2s_processor(settings, dinov2_processor):
    images = [photo(40, 90, seed=1), photo(50, 30, seed=2), photo(300, 310, seed=3)]
    reference = BitImageProcessorPil(**(DINOV2 | settings))
    assert_same_output(RaptorImageProcessor(**settings), reference, images)
    # the same as arguments of one call, on floats that cannot use the table of bytes
    floats = [np.asarray(image) / 255 for image in images]
    for image in floats:
        assert_same_output(RaptorImageProcessor(), dinov2_processor, image, return_tensors="np", **settings)


@pytest.mark.parametrize("resample", Image.Resampling, ids=lambda resample: resample.name)
@pytest.mark.parametrize("size", [{"height": 40, "width": 60}, {"shortest_edge": 40}], ids=str)
def test_bytes_of_the_target_size_are_not_resized_and_have_the_same_bits(size, resample, monkeypatch):
    settings = {"size": size, "resample": resample, "do_center_crop": False}
    images = [photo(40, 60), noise(40, 60, 3, seed=1), noise(3, 40, 60, seed=2)]
    expected = BitImageProcessorPil(**(DINOV2 | settings))(images, return_tensors="pt")["pixel_values"]
    monkeypatch.setattr(RaptorImageProcessor, "resize", None)
    assert torch.equal(RaptorImageProcessor(**settings)(images, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    "size", [{"height": 60, "width": 40}, {"shortest_edge": 60}, {"shortest_edge": 40, "longest_edge": 50}], ids=str
)
def test_bytes_of_another_size_and_floats_are_resized(size, dinov2_processor):
    settings = {"size": size, "do_center_crop": False}
    for image in (photo(40, 60), noise(40, 60, 3) / 255):
        assert_same_output(RaptorImageProcessor(**settings), BitImageProcessorPil(**(DINOV2 | settings)), image)
    # floats are rounded to bytes on their way through Pillow, also where they have the size
    size = {"height": 40, "width": 60}
    assert_same_output(RaptorImageProcessor(), dinov2_processor, noise(40, 60, 3) / 777, **settings | {"size": size})


@pytest.mark.parametrize("crop_size", [30, None])
def test_result_shares_no_memory_with_the_callers_array(crop_size):
    image = noise(40, 60, 3)
    off = {"do_rescale": False, "do_normalize": False, "do_center_crop": crop_size is not None, "crop_size": crop_size}
    for size in ({"shortest_edge": 40}, {"shortest_edge": 50}):
        assert not np.shares_memory(RaptorImageProcessor(size=size, **off)(image)["pixel_values"][0], image)


def test_photo_equals_pillow_and_plain_arithmetic(processor):
    image = photo(300, 500)
    resized = image.resize((int(256 * 500 / 300), 256), Image.Resampling.BICUBIC)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float64)
    expected = (pixels / 255 - np.array(DINOV2["image_mean"])) / np.array(DINOV2["image_std"])
    actual = processor(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(actual, expected.transpose(2, 0, 1), rtol=0, atol=1e-6)


def test_labels_lie_on_their_pixels_also_where_the_crop_is_larger():
    labels = noise(90, 61) % 251
    processor = RaptorImageProcessor(size={"shortest_edge": 40}, crop_size=51, do_rescale=False, do_normalize=False)
    image = Image.fromarray(np.stack([labels] * 3, axis=-1))
    # With the nearest neighbour for the image too, pixels and labels must come out identical.
    outputs = processor(image, Image.fromarray(labels), resample=Image.Resampling.NEAREST, return_tensors="pt")
    pixels, result = outputs["pixel_values"][0, 0].long(), outputs["labels"][0]
    assert outputs["labels"].dtype == torch.int64
    assert result.shape == (51, 51)
    inside = result != 255
    assert inside.sum() == 40 * 51
    assert torch.equal(pixels[inside], result[inside])
    assert inside[:, 6:46].all()


@pytest.mark.parametrize("kind", ["PIL", "palette", "I;16", "array", "tensor", "batch"])
def test_labels_come_from_every_kind_of_map(processor, kind):
    labels = noise(64, 80, seed=5) % 20
    palette = Image.fromarray(labels)
    palette.putpalette(noise(256, 3).tobytes())
    maps = {
        "PIL": Image.fromarray(labels),
        "palette": palette,
        "I;16": Image.fromarray(labels.astype(np.uint16)),
        "array": labels.astype(np.int64),
        "tensor": torch.from_numpy(labels),
        "batch": [labels],
    }
    result = processor(photo(64, 80), segmentation_maps=maps[kind], do_resize=False, crop_size=64)["labels"][0]
    np.testing.assert_array_equal(result, labels[:, 8:72])


def test_labels_beyond_a_byte_and_negative_ones_survive(processor):
    labels = np.array([[-100, 1000], [70000, 255]])
    result = processor(photo(2, 2), labels, size=4, do_center_crop=False)["labels"][0]
    np.testing.assert_array_equal(result, labels.repeat(2, axis=0).repeat(2, axis=1))


def test_reduced_labels_equal_dpts_and_leave_the_callers_map_alone():
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    settings = {"do_resize": False, "do_reduce_labels": True}
    expected = DPTImageProcessorPil(**settings)(photo(16, 16), labels.copy())["labels"][0]
    ours = RaptorImageProcessor(do_center_crop=False, **settings)
    np.testing.assert_array_equal(ours(photo(16, 16), labels)["labels"][0], expected)
    np.testing.assert_array_equal(labels.flatten(), np.arange(256))


def test_padding_is_ignored_with_reduced_labels():
    processor = RaptorImageProcessor(do_resize=False, crop_size=8, do_reduce_labels=True)
    result = processor(photo(4, 4), np.full((4, 4), 7))["labels"][0]
    expected = np.full((8, 8), 255)
    expected[2:6, 2:6] = 6
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    "teacher",
    [
        BitImageProcessorPil(**DINOV2),
        BitImageProcessorPil(do_rescale=False, do_normalize=False),
        ViTImageProcessorPil(size=252),
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
        DPTImageProcessorPil(size=518, ensure_multiple_of=14),
        BeitImageProcessorPil(do_center_crop=True, crop_size=200),
        RaptorImageProcessor(size=98, do_center_crop=False, resample=2),
    ],
    ids=lambda teacher: type(teacher).__name__,
)
def test_processor_from_teacher_gives_the_teachers_bits_also_once_saved(teacher, tmp_path):
    student = RaptorImageProcessor.from_teacher(teacher)
    student.save_pretrained(tmp_path)
    for image in (photo(300, 500), photo(90, 70)):
        assert_same_output(student, teacher, image, return_tensors="pt")
        assert_same_output(RaptorImageProcessor.from_pretrained(tmp_path), teacher, image, return_tensors="pt")


@pytest.mark.parametrize(
    "teacher, step",
    [
        (DPTImageProcessorPil(do_pad=True, size_divisor=14), "do_pad"),
        (DPTImageProcessorPil(keep_aspect_ratio=True), "keep_aspect_ratio"),
        (ConvNextImageProcessorPil(size={"shortest_edge": 224}), "crop_pct"),
        (EfficientNetImageProcessorPil(), "include_top"),
        (LevitImageProcessorPil(), "LevitImageProcessorPil"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_processor_from_teacher_refuses_a_step_it_lacks_by_name(teacher, step):
    with pytest.raises(ValueError, match=step):
        RaptorImageProcessor.from_teacher(teacher)


def test_processor_from_teacher_refuses_what_is_no_image_processor():
    with pytest.raises(TypeError, match="teacher must be an image processor, got dict"):
        RaptorImageProcessor.from_teacher(DINOV2)


def test_segmentation_equals_dpts():
    outputs = SimpleNamespace(logits=torch.randn(3, 5, 8, 9, generator=torch.Generator().manual_seed(0)))
    dense = RaptorImageProcessor(do_center_crop=False)
    reference = DPTImageProcessorPil()
    sizes = [(30, 20), (8, 9), (1, 50)]
    # a tensor of sizes fails in DPT's processor, so it is compared with the list
    for target_sizes, same_sizes in ((None, None), (sizes, sizes), (torch.tensor(sizes), sizes)):
        actual = dense.post_process_semantic_segmentation(outputs, target_sizes)
        expected = reference.post_process_semantic_segmentation(outputs, same_sizes)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_depth_is_resized_within_its_range_and_kept_without_target_sizes():
    depth = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(0)) * 10
    dense = RaptorImageProcessor(do_center_crop=False)
    outputs = SimpleNamespace(predicted_depth=depth)
    results = dense.post_process_depth_estimation(outputs, [(1, 9), (50, 60)])
    for result, one, size in zip(results, depth, [(1, 9), (50, 60)], strict=True):
        resized = result["predicted_depth"]
        assert torch.equal(resized, F.interpolate(one[None, None], size=size, mode="bilinear")[0, 0])
        assert one.min() - 1e-5 <= resized.min() and resized.max() <= one.max() + 1e-5
    for result, one in zip(dense.post_process_depth_estimation(outputs), depth, strict=True):
        assert torch.equal(result["predicted_depth"], one)


def test_half_precision_predictions_become_maps():
    dense = RaptorImageProcessor(do_center_crop=False)
    values = torch.rand(1, 4, 6, 7).bfloat16()
    segmentation = dense.post_process_semantic_segmentation(SimpleNamespace(logits=values), [(12, 14)])[0]
    depth = dense.post_process_depth_estimation(SimpleNamespace(predicted_depth=values[:, 0]), [(12, 14)])[0]
    assert segmentation.dtype == torch.int64
    assert depth["predicted_depth"].dtype == torch.float32


def test_stretching_the_prediction_of_a_crop_warns(processor):
    outputs = SimpleNamespace(predicted_depth=torch.rand(1, 4, 4))
    with pytest.warns(UserWarning, match="do_center_crop=True"):
        processor.post_process_depth_estimation(outputs, [(40, 60)])


def test_saved_processor_comes_back(tmp_path):
    processor = RaptorImageProcessor(size={"height": 98, "width": 70}, do_center_crop=False, do_reduce_labels=True)
    processor.save_pretrained(tmp_path)
    loaded = RaptorImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert_same_output(loaded, processor, photo(50, 60), return_tensors="pt")


def test_dinov2s_own_file_loads_as_the_default(processor, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(DINOV2 | {"image_processor_type": "X"}))
    assert RaptorImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_registered_processor_loads_by_type_by_configuration_and_before_remote_code(tmp_path):
    AutoImageProcessor.register(RaptorConfig, image_processor_classes={"pil": RaptorImageProcessor}, exist_ok=True)
    RaptorImageProcessor(size=98).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    assert json.loads(path.read_text())["image_processor_type"] == "RaptorImageProcessor"
    by_type = AutoImageProcessor.from_pretrained(tmp_path)
    values = json.loads(path.read_text())
    values["auto_map"] = {"AutoImageProcessor": "image_processing_raptor.RaptorImageProcessor"}
    path.write_text(json.dumps(values))
    despite_remote_code = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    del values["image_processor_type"], values["auto_map"]
    path.write_text(json.dumps(values))
    RaptorConfig().save_pretrained(tmp_path)
    by_configuration = AutoImageProcessor.from_pretrained(tmp_path)
    for loaded in (by_type, despite_remote_code, by_configuration):
        assert type(loaded) is RaptorImageProcessor
        assert dict(loaded.size) == {"shortest_edge": 98}


REMOTE = """
import sys
import numpy as np
from PIL import Image
from transformers import pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder = sys.argv[1]
image = Image.open(f"{folder}/image.png")
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
np.save(f"{folder}/pixels.npy", processor(image, return_tensors="np")["pixel_values"])
processor.save_pretrained(f"{folder}/again")
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
assert type(classify.image_processor).__name__ == "RaptorImageProcessor", type(classify.image_processor)
assert len(classify(image)) == 2
assert "raptor_hf" not in sys.modules
"""


def test_remote_code_alone_gives_the_same_pixels(tmp_path, monkeypatch):
    processor = RaptorImageProcessor(size=98, crop_size=84)
    monkeypatch.setattr(RaptorImageProcessor, "_auto_class", None)  # undone after the test
    RaptorImageProcessor.register_for_auto_class()
    folder = tmp_path / "model"
    tiny_classifier().save_pretrained(folder)
    processor.save_pretrained(folder)
    image = photo(120, 150)
    image.save(folder / "image.png")

    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", REMOTE, str(folder)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load(folder / "pixels.npy"), processor(image, return_tensors="np")["pixel_values"])
    assert (folder / "again" / SOURCE.name).read_text() == SOURCE.read_text()


def test_file_imports_only_what_the_hub_has():
    nodes = list(ast.walk(ast.parse(SOURCE.read_text())))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    packages = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert packages == {"numpy", "torch", "PIL", "transformers"}


def tiny_dinov2_config() -> Dinov2WithRegistersConfig:
    return Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_labels=2
    )


def tiny_classifier() -> Dinov2WithRegistersForImageClassification:
    return Dinov2WithRegistersForImageClassification(tiny_dinov2_config()).eval()


@torch.no_grad()
def test_classification_and_feature_pipelines_give_the_models_output(processor):
    image = photo(120, 150)
    inputs = processor(image, return_tensors="pt")
    model = tiny_classifier()
    scores = {
        one["label"]: one["score"] for one in pipeline("image-classification", model, image_processor=processor)(image)
    }
    expected = model(**inputs).logits.softmax(-1)[0]
    assert [scores["LABEL_0"], scores["LABEL_1"]] == pytest.approx(expected.tolist(), rel=1e-5)
    model = Dinov2WithRegistersModel(tiny_dinov2_config()).eval()
    features = pipeline("image-feature-extraction", model, image_processor=processor)(image, return_tensors=True)
    torch.testing.assert_close(features, model(**inputs).last_hidden_state)


@torch.no_grad()
def test_segmentation_pipeline_gives_masks_of_the_images_size():
    processor = RaptorImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    config = SegformerConfig(hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=8, depths=[1] * 4, num_labels=3)
    model = SegformerForSemanticSegmentation(config).eval()
    image = photo(50, 90)
    results = pipeline("image-segmentation", model, image_processor=processor)(image)
    logits = model(**processor(image, return_tensors="pt")).logits
    expected = F.interpolate(logits, size=(50, 90), mode="bilinear").argmax(1)[0]
    assert {result["label"] for result in results} == {f"LABEL_{label}" for label in expected.unique()}
    for result in results:
        np.testing.assert_array_equal(np.asarray(result["mask"]) == 255, expected == int(result["label"][-1]))


@torch.no_grad()
def test_depth_pipeline_gives_metres_of_the_images_size():
    processor = RaptorImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    config = GLPNConfig(hidden_sizes=[8] * 4, decoder_hidden_size=8, depths=[1] * 4, num_attention_heads=[1] * 4)
    model = GLPNForDepthEstimation(config).eval()
    image = photo(50, 90)
    result = pipeline("depth-estimation", model, image_processor=processor)(image)
    depth = model(**processor(image, return_tensors="pt")).predicted_depth
    torch.testing.assert_close(result["predicted_depth"], F.interpolate(depth[None], (50, 90), mode="bilinear")[0, 0])
    assert result["depth"].size == (90, 50)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (3, TypeError, "images cannot be read, got 3"),
        ([None], TypeError, r"images cannot be read, got \[None\]"),
        ("no/such/file.png", ValueError, "images cannot be read, got 'no/such/file.png'"),
        (np.zeros((8, 8), np.uint8), ValueError, r"images cannot be read, got an array of shape \(8, 8\)"),
        (np.zeros((8, 8, 7), np.uint8), ValueError, r"images cannot be read, got an array of shape \(8, 8, 7\)"),
        ([], ValueError, "images is empty"),
    ],
    ids=["int", "none", "path", "2-D", "channels", "empty"],
)
def test_what_is_no_image_is_refused(processor, images, error, message):
    with pytest.raises(error, match=message):
        processor(images, return_tensors="pt")


@pytest.mark.parametrize(
    "maps, message",
    [
        (np.zeros((4, 5), np.int64), r"segmentation_maps\[0\] has shape \(1, 4, 5\), its image \(3, 4, 4\)"),
        (Image.new("RGB", (4, 4)), r"segmentation_maps\[0\] has shape"),
        (np.zeros((2, 4, 4), np.int64), "2 segmentation_maps for 1 images"),
        (np.zeros((4, 4), np.float32), r"segmentation_maps\[0\] has dtype float32"),
        (np.zeros(4, np.int64), r"segmentation_maps cannot be read, got an array of shape \(4,\)"),
        ([], "segmentation_maps is empty"),
    ],
    ids=["size", "RGB", "count", "float", "1-D", "empty"],
)
def test_map_that_does_not_fit_its_image_is_refused(processor, maps, message):
    with pytest.raises(ValueError, match=message):
        processor(photo(4, 4), segmentation_maps=maps)


@pytest.mark.parametrize("target_sizes", [[(4, 4)], [], torch.ones(3, 2)], ids=["short", "empty", "long"])
def test_target_sizes_of_another_length_are_refused(processor, target_sizes):
    message = f"target_sizes has {len(target_sizes)} entries for a batch of 2"
    with pytest.raises(ValueError, match=message):
        processor.post_process_semantic_segmentation(SimpleNamespace(logits=torch.rand(2, 3, 4, 4)), target_sizes)
    with pytest.raises(ValueError, match=message):
        processor.post_process_depth_estimation(SimpleNamespace(predicted_depth=torch.rand(2, 4, 4)), target_sizes)


def test_padding_is_refused_at_construction_and_at_the_call(processor):
    with pytest.raises(ValueError, match="do_pad=True"):
        RaptorImageProcessor(do_pad=True)
    with pytest.raises(ValueError, match="do_pad=True"):
        processor(photo(4, 4), do_pad=True)
