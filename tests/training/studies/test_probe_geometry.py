"""The page of what depends on PIL images or tensors: its reference is the crop and the jitter of the probes."""

import json

import numpy as np
import PIL.Image
import pytest
from PIL.Image import Resampling

from raptor_hf.data.transforms import random_resized_crop
from training.studies import probe_geometry
from training.studies.probe_geometry import JITTER, draw, draws, jitter_tensor, main, rectangle


@pytest.mark.parametrize("seed", range(3))
def test_the_rectangle_shown_is_the_one_that_probes_crop(seed):
    image, mask = draw()
    scale, ratio = (0.5, 1.0), (0.75, 1.33)
    left, top, width, height = rectangle(image.size, np.random.default_rng(seed), scale, ratio)
    expected = image.crop((left, top, left + width, top + height)).resize((32, 32), Resampling.BILINEAR)
    generator = np.random.default_rng(seed)
    found, _ = random_resized_crop(
        image, mask, generator, size=32, scale=scale, ratio=ratio, interpolation=Resampling.BILINEAR
    )
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_jitter_of_tensors_is_that_of_the_probes_but_for_rounding():
    pixels = np.asarray(draw()[0].resize((40, 30)))
    for seed in range(4):
        ours, _ = JITTER(PIL.Image.fromarray(pixels), None, np.random.default_rng(seed))
        order, factors = draws(np.random.default_rng(seed))
        gaps = np.abs(np.asarray(ours).astype(float) - jitter_tensor(pixels, order, factors))
        assert gaps.mean() < 3 < np.abs(np.asarray(ours).astype(float) - pixels).mean()


def test_the_page_has_the_numbers_of_its_results(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_geometry, "FOLDER", tmp_path)
    main()
    results = json.loads((tmp_path / "results.json").read_text())
    text = (tmp_path / "table.md").read_text()
    levels = results["grey_levels"]
    assert (
        levels["bilinear, tensors with antialias"]["largest"]
        <= 1
        < levels["bilinear, tensors without antialias"]["mean"]
    )
    assert f"{results['mask_pixels_that_differ']:.1%} of the mask's pixels" in text
    assert all(f"| {name} | {own['largest']:.0f} | {own['mean']:.2f} |" in text for name, own in levels.items())
