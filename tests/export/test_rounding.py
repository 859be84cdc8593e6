"""Weights in four bits: rounding to the nearest where inputs are unrelated, and less lost where they are not."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from raptor_hf.export.rounding import gptq  # noqa: E402


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((48, 20)).astype(np.float32)


def nearest(weight: np.ndarray, block_size: int) -> np.ndarray:
    """What onnxruntime's own quantiser makes of a weight, block by block."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer

    blocks = weight.T.reshape(-1, block_size)
    quantized, scale, zero = DefaultWeightOnlyQuantizer.quant_slice_asymmetric(blocks)
    return (scale * (quantized.astype(np.float32) - zero)).reshape(weight.T.shape).T


@pytest.mark.parametrize("block_size", [16, 48])
def test_inputs_that_are_unrelated_make_it_rounding_to_the_nearest(weight, block_size):
    np.testing.assert_allclose(gptq(weight, np.eye(48), block_size), nearest(weight, block_size), atol=1e-5)


def test_outputs_of_related_inputs_lose_a_fraction_of_what_rounding_to_the_nearest_loses(weight):
    inputs = np.random.default_rng(1).standard_normal((500, 6)) @ np.random.default_rng(2).standard_normal((6, 48))
    inputs += 0.1 * np.random.default_rng(3).standard_normal(inputs.shape)
    lost = [
        np.square(inputs @ (rounded - weight)).sum()
        for rounded in (gptq(weight, inputs.T @ inputs, 16), nearest(weight, 16))
    ]
    assert 0 < lost[0] < 0.5 * lost[1]


def test_blocks_have_at_most_sixteen_values_an_output(weight):
    inputs = np.random.default_rng(1).standard_normal((500, 48)) @ weight[:, :1] * weight[:, 0]
    rounded = gptq(weight, inputs.T @ inputs + np.eye(48), 48)
    assert max(len(np.unique(column)) for column in rounded.T) <= 16


def test_inputs_that_are_always_zero_are_allowed(weight):
    assert np.isfinite(gptq(weight, np.zeros((48, 48)), 16)).all()
