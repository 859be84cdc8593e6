"""A Vision Transformer that was trained on photographs: a ViT-S/14 fine-tuned for saliency by a third party.

It is no part of the project: the test reads it from the folder that RAPTOR_DATA names.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from raptor_hf.data.images import load_image_processor, open_images
from raptor_hf.phases import find_phases, other_phases
from raptor_hf.similarity import SimilarityAccumulator
from raptor_hf.teacher import load_teacher

TEACHER = Path(os.environ.get("RAPTOR_DATA", "")) / "saliency_vits14"


@pytest.mark.skipif(not (TEACHER / "config.json").is_file(), reason="set RAPTOR_DATA to the folder of saliency_vits14")
def test_a_real_teacher_s_last_layer_is_a_phase_that_the_smallest_block_hides():
    images = open_images(str(TEACHER.parent / "caltech101-test.parquet"), "train")
    teacher = load_teacher(TEACHER)
    processor = load_image_processor(str(TEACHER))
    accumulator = SimilarityAccumulator(12, teacher.tokens)
    for index in range(24):
        pixels = processor(images=[images.decode(index)[0]], return_tensors="pt")["pixel_values"]
        accumulator.update(teacher.trajectory(pixels))
    distance = accumulator.compute()
    # of 200 other photographs; 24 give it to a few hundredths
    expected = [
        [0.25, 0.30, 0.13, 0.11, 0.12, 0.28, 0.16, 0.25, 0.25, 0.24, 1.10],
        [1.03, 1.02, 1.11, 1.09, 1.08, 1.06],
    ]
    np.testing.assert_allclose(np.diagonal(distance, 1), expected[0], atol=0.05)
    np.testing.assert_allclose(distance[:6, 11], expected[1], atol=0.05)
    partition = find_phases(distance, 3)
    others = other_phases(distance, partition)
    assert partition.block_repeats[-1] == 2
    assert others["normalized, min_size 1"].block_repeats[-1] == 1
    assert others["normalized, min_size 1"].objective < partition.objective
    assert "bisection" in others
