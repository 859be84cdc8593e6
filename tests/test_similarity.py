"""Distances between layers against float64 loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from raptor_hf.similarity import SimilarityAccumulator
from raptor_hf.tokens import TokenLayout

NUM_LAYERS, NUM_REGISTERS, DIM = 3, 2, 5
TOKENS = TokenLayout(NUM_REGISTERS)


def random_states(num_images: int, seed: int = 0, num_patches: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, NUM_LAYERS + 1, 1 + NUM_REGISTERS + num_patches, DIM)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 1


def accumulate(kind: str, *batches: torch.Tensor, tokens=TOKENS, **settings) -> SimilarityAccumulator:
    accumulator = SimilarityAccumulator(NUM_LAYERS, tokens, kind, **settings)
    for batch in batches:
        accumulator.update(batch)
    return accumulator


def cosine_by_loops(states: np.ndarray) -> np.ndarray:
    """(N, L + 1, T, D) -> (N, L, L), one distance matrix per image."""
    num_images, num_states, _, _ = states.shape
    distances = np.zeros((num_images, num_states - 1, num_states - 1))
    for n, i, j in np.ndindex(distances.shape):
        a, b = states[n, i + 1], states[n, j + 1]
        for u, v in ((a[0], b[0]), (a[1 + NUM_REGISTERS :].mean(0), b[1 + NUM_REGISTERS :].mean(0))):
            distances[n, i, j] += (1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v)) / 2
    return distances


def hsic_by_quadruples(kernel_a: np.ndarray, kernel_b: np.ndarray) -> float:
    """The U-statistic that defines unbiased HSIC, over all ordered quadruples of distinct images."""
    quadruples = list(itertools.permutations(range(len(kernel_a)), 4))
    terms = [kernel_a[i, j] * (kernel_b[i, j] + kernel_b[q, r] - 2 * kernel_b[i, q]) for i, j, q, r in quadruples]
    return sum(terms) / len(quadruples)


def test_cosine_distance_matches_a_float64_loop():
    states = random_states(9)
    expected = cosine_by_loops(states.numpy()).mean(0)
    np.testing.assert_allclose(accumulate("cosine", states).compute(), expected, atol=1e-12)


def test_mse_distance_matches_a_float64_loop():
    states = random_states(9)
    layers = states[:, 1:].numpy()
    expected = [[((layers[:, i] - layers[:, j]) ** 2).mean() for j in range(NUM_LAYERS)] for i in range(NUM_LAYERS)]
    np.testing.assert_allclose(accumulate("mse", states).compute(), expected, atol=1e-12)


def test_cka_distance_is_built_from_the_unbiased_hsic_of_each_batch():
    batches = random_states(6, seed=1), random_states(5, seed=2)
    hsic = np.zeros((NUM_LAYERS, NUM_LAYERS))
    for states in batches:
        layers = states[:, 1:].numpy()
        features = np.concatenate([layers[:, :, 0], layers[:, :, 1 + NUM_REGISTERS :].mean(2)], axis=-1)
        kernels = np.einsum("nld,mld->lnm", features, features)
        for i, j in np.ndindex(hsic.shape):
            hsic[i, j] += len(states) * hsic_by_quadruples(kernels[i], kernels[j])
    expected = 1 - hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))
    np.testing.assert_allclose(accumulate("cka", *batches).compute(), expected, atol=1e-10)


def test_cka_ignores_rotation_and_scale_but_not_independent_layers():
    states = random_states(64)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    states[:, 2] = 3 * states[:, 1] @ rotation.Q + 100
    distance = accumulate("cka", states).compute()
    assert distance[0, 1] == pytest.approx(0, abs=1e-9)
    assert distance[0, 2] > 0.5


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_streaming_in_batches_equals_all_images_at_once(kind):
    settings = {"num_bootstraps": 8, "seed": 3}
    states = random_states(13)
    whole, parts = accumulate(kind, states, **settings), accumulate(kind, *states.split(4), **settings)
    np.testing.assert_allclose(parts.compute(), whole.compute(), atol=1e-13)
    assert parts.num_images == 13
    np.testing.assert_allclose(parts.bootstrap(), whole.bootstrap(), atol=1e-13)


@pytest.mark.parametrize(("kind", "uses_registers"), [("cosine", False), ("cka", False), ("mse", True)])
def test_only_mse_sees_the_registers_and_nothing_sees_layer_zero(kind, uses_registers):
    states = random_states(8)
    distance = accumulate(kind, states).compute()
    states[:, 0] = torch.inf
    np.testing.assert_array_equal(accumulate(kind, states).compute(), distance)
    states[:, 1, 1 : 1 + NUM_REGISTERS] += 7
    assert (accumulate(kind, states).compute() != distance).any() == uses_registers


def test_without_cls_only_the_patch_mean_counts():
    states = random_states(6)
    distance = accumulate("cosine", states[:, :, 1:], tokens=TokenLayout(NUM_REGISTERS, has_cls=False)).compute()
    # A cls token equal to the patch mean adds the same distance once more, so the mean stays.
    states[:, :, 0] = states[:, :, 1 + NUM_REGISTERS :].mean(2)
    np.testing.assert_allclose(distance, cosine_by_loops(states.numpy()).mean(0), atol=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "mse", "cka"])
def test_bfloat16_states_lose_nothing_more_even_under_autocast(kind):
    states = random_states(32, num_patches=256).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = accumulate(kind, states).compute()
    np.testing.assert_allclose(distance, accumulate(kind, states.double()).compute(), atol=1e-6)


def test_replicas_of_the_mse_are_that_of_images_drawn_again():
    states = random_states(7)
    replicas = accumulate("mse", states, num_bootstraps=3, seed=5).bootstrap()
    draws = np.random.default_rng(5).poisson(1.0, (7, 3))
    for draw, replica in zip(draws.T, replicas, strict=True):
        again = accumulate("mse", states.repeat_interleave(torch.from_numpy(draw), 0)).compute()
        np.testing.assert_allclose(replica, again, atol=1e-12)


def test_summed_sums_of_two_processes_equal_one_pass():
    states = random_states(11)
    halves = [accumulate("cosine", half, num_bootstraps=4, seed=rank) for rank, half in enumerate(states.split(6))]
    merged = SimilarityAccumulator(NUM_LAYERS, TOKENS, num_bootstraps=4)
    merged.load_sums(halves[0].sums() + halves[1].sums())
    np.testing.assert_allclose(merged.compute(), accumulate("cosine", states).compute(), atol=1e-13)
    draws = np.concatenate([np.random.default_rng(rank).poisson(1.0, (n, 4)) for rank, n in enumerate((6, 5))])
    replicas = np.einsum("nb,nij->bij", draws / draws.sum(0), cosine_by_loops(states.numpy()))
    np.testing.assert_allclose(merged.bootstrap(), replicas, atol=1e-12)
    with pytest.raises(ValueError, match=r"sums has shape \(1, 10\), but this SimilarityAccumulator keeps 5 x 10 sums"):
        merged.load_sums(torch.zeros(1, 10))


def test_bootstrap_spread_is_the_standard_error_of_the_mean():
    states = random_states(300)
    accumulator = accumulate("cosine", states, num_bootstraps=2000)
    replicas = accumulator.bootstrap()
    standard_error = cosine_by_loops(states.numpy()).std(0) / math.sqrt(300)
    off_diagonal = ~np.eye(NUM_LAYERS, dtype=bool)
    np.testing.assert_allclose(replicas.std(0)[off_diagonal], standard_error[off_diagonal], rtol=0.1)
    assert (np.abs(replicas.mean(0) - accumulator.compute()) <= 0.1 * standard_error + 1e-12).all()


def test_the_accumulator_refuses_what_it_cannot_use():
    accumulator = SimilarityAccumulator(NUM_LAYERS, TOKENS)
    with pytest.raises(ValueError, match="num_images=0 is too few"):
        accumulator.compute()
    with pytest.raises(ValueError, match="build the accumulator with num_bootstraps > 0"):
        accumulator.bootstrap()
    for states in (torch.zeros(2, NUM_LAYERS, 8, DIM), torch.zeros(2, NUM_LAYERS + 1, 3, DIM), torch.zeros(2, 4, 8)):
        with pytest.raises(ValueError, match=r"states is .*; it must be \(B, 4, T > 3, D\)"):
            accumulator.update(states)
    with pytest.raises(ValueError, match="3 images; kind='cka' needs at least 4"):
        accumulate("cka", random_states(3))
    with pytest.raises(ValueError, match="do not vary over images"):
        accumulate("cka", random_states(1).expand(8, -1, -1, -1)).compute()
    with pytest.raises(ValueError, match="NaN or infinite"):
        accumulate("mse", random_states(2) * torch.nan).compute()
    with pytest.raises(ValueError, match="kind is 'l2'; it must be one of cosine, mse, cka"):
        SimilarityAccumulator(NUM_LAYERS, TOKENS, kind="l2")
    with pytest.raises(ValueError, match="num_bootstraps is 5; it must be 0 for kind='cka'"):
        SimilarityAccumulator(NUM_LAYERS, TOKENS, kind="cka", num_bootstraps=5)
