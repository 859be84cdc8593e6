"""Phase discovery against the published matrix and partitions, exhaustive searches and float64 loops."""

import itertools
import math
import time

import numpy as np
import pytest
import scipy.stats
import torch

from raptor_hf.figures import plot_phases
from raptor_hf.phases import (
    Partition,
    SimilarityAccumulator,
    boundary_stability,
    find_phases,
    partition_objective,
    phase_contrast,
    random_contiguous,
    random_fragmented,
)

# 1 - cos between the layers of DINOv2 ViT-B/14 with registers, read off the heat map of arXiv 2512.19941.
OFFICIAL_ROWS = """
    0.00 0.08 0.20 0.26 0.32 0.37 0.45 0.63 0.70 0.81 0.82 1.08
    0.08 0.00 0.11 0.16 0.21 0.27 0.36 0.54 0.64 0.75 0.75 1.09
    0.20 0.11 0.00 0.05 0.15 0.19 0.32 0.56 0.70 0.81 0.79 1.11
    0.26 0.16 0.05 0.00 0.09 0.15 0.28 0.52 0.67 0.78 0.76 1.11
    0.32 0.21 0.15 0.09 0.00 0.09 0.20 0.39 0.53 0.65 0.69 1.07
    0.37 0.27 0.19 0.15 0.09 0.00 0.10 0.30 0.45 0.58 0.62 1.06
    0.45 0.36 0.32 0.28 0.20 0.10 0.00 0.17 0.30 0.45 0.54 1.04
    0.63 0.54 0.56 0.52 0.39 0.30 0.17 0.00 0.14 0.30 0.45 0.94
    0.70 0.64 0.70 0.67 0.53 0.45 0.30 0.14 0.00 0.16 0.35 0.86
    0.81 0.75 0.81 0.78 0.65 0.58 0.45 0.30 0.16 0.00 0.25 0.81
    0.82 0.75 0.79 0.76 0.69 0.62 0.54 0.45 0.35 0.25 0.00 0.75
    1.08 1.09 1.11 1.11 1.07 1.06 1.04 0.94 0.86 0.81 0.75 0.00
"""
PUBLISHED = {2: (7,), 3: (7, 10), 4: (4, 7, 10)}
NUM_LAYERS, NUM_REGISTERS, DIM = 3, 2, 5


@pytest.fixture
def official() -> np.ndarray:
    return np.array(OFFICIAL_ROWS.split(), dtype=float).reshape(12, 12)


def random_distance(num_layers: int, seed: int, digits: int = 6) -> np.ndarray:
    """Few digits give many ties."""
    upper = np.triu(np.random.default_rng(seed).random((num_layers, num_layers)), 1).round(digits)
    return upper + upper.T


def random_states(num_images: int, seed: int = 0, num_patches: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, NUM_LAYERS + 1, 1 + NUM_REGISTERS + num_patches, DIM)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + 1


def accumulate(kind: str, *batches: torch.Tensor, **settings) -> SimilarityAccumulator:
    accumulator = SimilarityAccumulator(NUM_LAYERS, NUM_REGISTERS, kind, **settings)
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


def exhaustive_boundaries(distance: np.ndarray, num_blocks: int, method: str, min_size: int) -> tuple[int, ...]:
    """The best partition by its definition; of tied ones the latest, the last boundary deciding first."""
    num_layers = len(distance)
    costs = {}
    for boundaries in itertools.combinations(range(1, num_layers), num_blocks - 1):
        segments = list(itertools.pairwise((0, *boundaries, num_layers)))
        if min(end - start for start, end in segments) >= min_size:
            within = [sum(distance[i, j] for j in range(s, e) for i in range(s, j)) for s, e in segments]
            sizes = [end - start if method == "normalized" else 1 for start, end in segments]
            costs[boundaries] = sum(w / size for w, size in zip(within, sizes, strict=True))
    least = min(costs.values())
    return max((b for b, cost in costs.items() if cost <= least + 1e-9), key=lambda b: b[::-1])


def bisect_by_loops(distance: np.ndarray, min_size: int, eps: float) -> set[frozenset[int]]:
    """Recursive max-cut over all subsets, on sets of 1-based layers."""

    def best_cut(cluster: frozenset[int]) -> tuple[float, frozenset[int]]:
        sizes = range(min_size, len(cluster) - min_size + 1)
        sides = [frozenset(side) for size in sizes for side in itertools.combinations(sorted(cluster), size)]
        weights = [sum(distance[i - 1, j - 1] for i in side for j in cluster - side) for side in sides]
        return max(zip(weights, sides, strict=True), key=lambda cut: cut[0], default=(-math.inf, frozenset()))

    clusters = {frozenset(range(1, len(distance) + 1))}
    while True:
        gain, side, cluster = max((*best_cut(cluster), cluster) for cluster in clusters)
        if gain <= eps * np.triu(distance).sum():
            return clusters
        clusters = (clusters - {cluster}) | {side, cluster - side}


def test_the_official_matrix_weighs_what_was_published(official):
    assert np.triu(official, 1).sum() == pytest.approx(33.88)


@pytest.mark.parametrize("method", ["normalized", "bisection"])
@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_normalized_and_bisection_find_the_published_phases(official, method, num_blocks):
    assert find_phases(official, num_blocks, method).boundaries == PUBLISHED[num_blocks]


@pytest.mark.parametrize(("eps", "num_blocks"), [(0.20, 2), (0.10, 3), (0.09, 4)])
def test_bisection_with_the_published_thresholds_stops_at_the_published_phases(official, eps, num_blocks):
    partition = find_phases(official, method="bisection", eps=eps)
    assert partition.is_contiguous
    assert partition.boundaries == PUBLISHED[num_blocks]


@pytest.mark.parametrize(("num_blocks", "boundaries"), [(2, (7,)), (3, (5, 9)), (4, (4, 7, 10))])
def test_plain_cut_differs_from_the_published_phases_at_three_blocks(official, num_blocks, boundaries):
    assert find_phases(official, num_blocks, "cut").boundaries == boundaries


def test_of_tied_partitions_the_later_boundaries_win(official):
    tied = [partition_objective(official, Partition.from_boundaries(b, 12)) for b in ([6, 10], [7, 10])]
    assert tied[0] == pytest.approx(tied[1], abs=1e-12)
    # A difference far below the tolerance, in favour of the earlier boundary, does not break the tie.
    official[0, 6] = official[6, 0] = official[0, 6] + 1e-11
    assert find_phases(official, 3).boundaries == (7, 10)
    assert find_phases(np.zeros((7, 7)), 3).boundaries == (3, 5)
    assert find_phases(np.zeros((7, 7)), 3, "cut").boundaries == (5, 6)
    assert find_phases(np.zeros((7, 7)), 2, "bisection").boundaries == (5,)


def test_min_size_defaults_to_two_until_the_layers_run_out(official):
    assert min(find_phases(official, 6).block_repeats) == 2
    assert min(find_phases(official, 7).block_repeats) == 1
    assert find_phases(official, 3, min_size=1).boundaries == (7, 11)
    assert find_phases(official, 12).block_repeats == (1,) * 12
    assert find_phases(official, 1).phases == [(0, 12)]


@pytest.mark.parametrize("method", ["normalized", "cut"])
@pytest.mark.parametrize("digits", [1, 6])
@pytest.mark.parametrize(("num_layers", "num_blocks"), [(6, 2), (8, 3), (9, 5), (11, 4), (12, 3)])
def test_dp_matches_exhaustive_search(method, digits, num_layers, num_blocks):
    for seed in range(5):
        distance = random_distance(num_layers, seed, digits)
        for min_size in range(1, num_layers // num_blocks + 1):
            partition = find_phases(distance, num_blocks, method, min_size)
            assert partition.boundaries == exhaustive_boundaries(distance, num_blocks, method, min_size)
            assert partition.objective == partition_objective(distance, partition, method)


def test_dp_finds_planted_phases_of_a_thousand_layers_in_seconds():
    boundaries = [90, 250, 300, 512, 640, 777, 900]
    labels = np.array(Partition.from_boundaries(boundaries, 1000).layer_to_block)
    distance = random_distance(1000, seed=0) + 2 * (labels[:, None] != labels)
    start = time.perf_counter()
    partition = find_phases(distance, 8)
    assert time.perf_counter() - start < 4
    assert list(partition.boundaries) == boundaries


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("min_size", [1, 2])
def test_bisection_matches_a_brute_force_search(eps, min_size):
    for num_layers, seed in itertools.product((5, 8), range(4)):
        distance = random_distance(num_layers, seed)
        partition = find_phases(distance, method="bisection", min_size=min_size, eps=eps)
        assert set(map(frozenset, partition.blocks)) == bisect_by_loops(distance, min_size, eps)


@pytest.mark.parametrize("outlier", [0, 3, 6])
def test_bisection_never_leaves_an_outlying_layer_alone(outlier):
    distance = random_distance(7, seed=0)
    distance[outlier] += 10
    distance[:, outlier] += 10
    distance[outlier, outlier] = 0
    assert min(find_phases(distance, 2, "bisection", min_size=1).block_repeats) == 1
    for num_blocks in (2, 3):
        assert min(find_phases(distance, num_blocks, "bisection").block_repeats) == 2


def test_bisection_finds_fragmented_blocks_of_24_layers():
    labels = np.arange(24) % 3
    partition = find_phases((labels[:, None] != labels).astype(float), 3, "bisection")
    assert partition.layer_to_block == labels.tolist()
    assert partition.objective == 0
    assert not partition.is_contiguous


def test_bisection_refuses_more_than_24_layers():
    with pytest.raises(ValueError, match=r"25 layers.*at most 24"):
        find_phases(random_distance(25, seed=0), 2, "bisection")


def test_bisection_says_when_its_clusters_cannot_be_split_further(official):
    with pytest.raises(ValueError, match=r"num_blocks=6 .*min_size=2.* 5 clusters"):
        find_phases(official, 6, "bisection")
    assert find_phases(official, 6, "bisection", min_size=1).num_blocks == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 13}, r"num_blocks=13 .*num_blocks <= 12 works"),
        ({"num_blocks": 0}, "num_blocks=0 must be at least 1"),
        ({"num_blocks": 5, "min_size": 3}, r"num_blocks=5 with min_size=3 needs 15 layers.*num_blocks <= 4 works"),
        ({"num_blocks": 3, "min_size": 0}, "min_size=0 must be at least 1"),
        ({"num_blocks": 3, "method": "spectral"}, "method='spectral' must be one of normalized, cut, bisection"),
        ({}, "num_blocks=None, eps=None: give one"),
        ({"num_blocks": 3, "method": "bisection", "eps": 0.1}, "num_blocks=3, eps=0.1: give one"),
        ({"method": "bisection", "eps": -0.1}, "eps=-0.1 needs"),
        ({"method": "cut", "eps": 0.1}, "eps=0.1 needs method='bisection'"),
    ],
)
def test_a_search_that_cannot_work_says_what_would(official, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_phases(official, **arguments)


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        (np.zeros((3, 4)), r"square matrix .* got shape \(3, 4\)"),
        (np.array([[0, np.nan], [np.nan, 0]]), "finite, got 2 NaN"),
        (np.array([[0.0, 1.0], [0.5, 0.0]]), "symmetric, got differences up to 0.5"),
        (np.array([[1.0, 0.2], [0.2, 1.0]]), "zero on the diagonal .* pass 1 - similarity"),
        (np.array([[0.0, -0.5], [-0.5, 0.0]]), "minimum of -0.5"),
    ],
)
def test_what_is_no_distance_matrix_is_refused(distance, message):
    with pytest.raises(ValueError, match=message):
        find_phases(distance, 1)


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
    settings = {"num_bootstraps": 8, "seed": 3} if kind == "cosine" else {}
    states = random_states(13)
    whole, parts = accumulate(kind, states, **settings), accumulate(kind, *states.split(4), **settings)
    np.testing.assert_allclose(parts.compute(), whole.compute(), atol=1e-13)
    assert parts.num_images == 13
    if settings:
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
    distance = accumulate("cosine", states[:, :, 1:], has_cls=False).compute()
    # A cls token equal to the patch mean adds the same distance once more, so the mean stays.
    states[:, :, 0] = states[:, :, 1 + NUM_REGISTERS :].mean(2)
    np.testing.assert_allclose(distance, cosine_by_loops(states.numpy()).mean(0), atol=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "mse", "cka"])
def test_bfloat16_states_lose_nothing_more_even_under_autocast(kind):
    states = random_states(32, num_patches=256).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = accumulate(kind, states).compute()
    np.testing.assert_allclose(distance, accumulate(kind, states.double()).compute(), atol=1e-6)


def test_summed_sums_of_two_processes_equal_one_pass():
    states = random_states(11)
    halves = [accumulate("cosine", half, num_bootstraps=4, seed=rank) for rank, half in enumerate(states.split(6))]
    merged = SimilarityAccumulator(NUM_LAYERS, NUM_REGISTERS, num_bootstraps=4)
    merged.load_sums(halves[0].sums() + halves[1].sums())
    np.testing.assert_allclose(merged.compute(), accumulate("cosine", states).compute(), atol=1e-13)
    draws = np.concatenate([np.random.default_rng(rank).poisson(1.0, (n, 4)) for rank, n in enumerate((6, 5))])
    replicas = np.einsum("nb,nij->bij", draws / draws.sum(0), cosine_by_loops(states.numpy()))
    np.testing.assert_allclose(merged.bootstrap(), replicas, atol=1e-12)
    with pytest.raises(ValueError, match=r"sums must be \(5, 10\)"):
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
    accumulator = SimilarityAccumulator(NUM_LAYERS, NUM_REGISTERS)
    with pytest.raises(ValueError, match="num_images=0 is too few"):
        accumulator.compute()
    with pytest.raises(ValueError, match="build the accumulator with num_bootstraps > 0"):
        accumulator.bootstrap()
    for states in (torch.zeros(2, NUM_LAYERS, 8, DIM), torch.zeros(2, NUM_LAYERS + 1, 3, DIM), torch.zeros(2, 4, 8)):
        with pytest.raises(ValueError, match=r"states must be \(B, 4, T > 3, D\)"):
            accumulator.update(states)
    with pytest.raises(ValueError, match="3 images; kind='cka' needs at least 4"):
        accumulate("cka", random_states(3))
    with pytest.raises(ValueError, match="do not vary over images"):
        accumulate("cka", random_states(1).expand(8, -1, -1, -1)).compute()
    with pytest.raises(ValueError, match="NaN or infinite"):
        accumulate("mse", random_states(2) * torch.nan).compute()
    with pytest.raises(ValueError, match="kind='l2' must be one of cosine, mse, cka"):
        SimilarityAccumulator(NUM_LAYERS, kind="l2")
    with pytest.raises(ValueError, match="num_bootstraps=5 needs kind='cosine'"):
        SimilarityAccumulator(NUM_LAYERS, kind="mse", num_bootstraps=5)


def test_partition_describes_its_phases_and_repeats():
    partition = Partition.from_boundaries([7, 10], 12)
    assert partition.blocks == ((1, 2, 3, 4, 5, 6, 7), (8, 9, 10), (11, 12))
    assert partition.phases == [(0, 7), (7, 10), (10, 12)]
    assert partition.block_repeats == (7, 3, 2)
    assert partition.layer_to_block == [0] * 7 + [1] * 3 + [2] * 2
    assert (partition.num_layers, partition.num_blocks, partition.is_contiguous) == (12, 3, True)


def test_blocks_are_sorted_and_a_fragmented_partition_has_no_phases():
    partition = Partition(((4, 2), (5, 3, 1)))
    assert partition.blocks == ((1, 3, 5), (2, 4))
    assert partition.layer_to_block == [0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="fragmented"):
        _ = partition.phases


@pytest.mark.parametrize("blocks", [(), ((1, 2), ()), ((1, 2), (2, 3)), ((1, 2), (4,)), ((0, 1),)])
def test_blocks_that_are_no_partition_are_refused(blocks):
    with pytest.raises(ValueError, match="every layer of 1..L exactly once"):
        Partition(blocks)


@pytest.mark.parametrize("boundaries", [[0], [12], [10, 7], [7, 7]])
def test_boundaries_out_of_order_are_refused(boundaries):
    with pytest.raises(ValueError, match=r"must increase within 1\.\.11"):
        Partition.from_boundaries(boundaries, 12)


def test_partitions_survive_json_and_leave_no_other_file(tmp_path, official):
    path = tmp_path / "phases.json"
    for partition in (random_fragmented(12, 4, seed=0), find_phases(official, 3)):
        partition.save_json(path)
        assert Partition.load_json(path) == partition
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"data lacks \['blocks'\]"):
        Partition.from_dict({"method": "cut", "objective": None})


def test_random_contiguous_partitions_are_uniform():
    for num_layers, num_blocks, min_size, total in ((6, 3, 1, 10), (9, 3, 2, 10), (5, 1, 1, 1), (4, 4, 1, 1)):
        draws = [random_contiguous(num_layers, num_blocks, seed, min_size) for seed in range(2000)]
        blocks, counts = np.unique([draw.block_repeats for draw in draws], axis=0, return_counts=True)
        assert blocks.min() >= min_size
        assert len(blocks) == total
        assert total == 1 or scipy.stats.chisquare(counts).pvalue > 1e-3


def test_random_partitions_repeat_with_their_seed():
    assert random_contiguous(24, 5, seed=1) == random_contiguous(24, 5, seed=1) != random_contiguous(24, 5, seed=2)
    assert random_fragmented(24, 5, seed=1) == random_fragmented(24, 5, seed=1) != random_fragmented(24, 5, seed=2)


def test_random_fragmented_partitions_are_never_contiguous():
    for num_layers in range(3, 9):
        for num_blocks, seed in itertools.product(range(2, num_layers), range(20)):
            partition = random_fragmented(num_layers, num_blocks, seed)
            assert (partition.num_layers, partition.num_blocks) == (num_layers, num_blocks)
            assert not partition.is_contiguous
    for num_blocks in (1, 8):
        with pytest.raises(ValueError, match=r"must be in 2\.\.7 for a fragmented partition"):
            random_fragmented(8, num_blocks, seed=0)


def test_the_objective_of_a_fragmented_partition_is_the_sum_of_its_definition(official):
    partition = random_fragmented(12, 4, seed=1)
    within = [sum(official[i - 1, j - 1] for i, j in itertools.combinations(block, 2)) for block in partition.blocks]
    normalized = sum(w / len(block) for w, block in zip(within, partition.blocks, strict=True))
    assert partition_objective(official, partition) == pytest.approx(normalized)
    assert partition_objective(official, partition, "cut") == pytest.approx(sum(within))
    with pytest.raises(ValueError, match="distance has 12 layers, partition has 8"):
        partition_objective(official, random_fragmented(8, 3, seed=0))


def test_phase_contrast_is_across_minus_within():
    distance = np.array([[0, 1, 5, 6], [1, 0, 7, 8], [5, 7, 0, 3], [6, 8, 3, 0]])
    assert phase_contrast(distance, Partition(((1, 2), (3, 4)))) == (5 + 6 + 7 + 8) / 4 - (1 + 3) / 2
    for num_blocks in (1, 4):
        with pytest.raises(ValueError, match=f"partition has {num_blocks} blocks for 4 layers"):
            phase_contrast(distance, random_contiguous(4, num_blocks, seed=0))


def test_boundary_stability_counts_the_replicas(official):
    flipped = official[::-1, ::-1]
    stability = boundary_stability(np.stack([official, flipped, official, official]), 4)
    assert find_phases(flipped, 4).boundaries == (2, 5, 8)
    expected = {2: 0.25, 4: 0.75, 5: 0.25, 7: 0.75, 8: 0.25, 10: 0.75}
    assert stability.boundary_frequency == tuple(expected.get(layer, 0.0) for layer in range(1, 12))
    assert stability.modal.boundaries == PUBLISHED[4]
    assert stability.modal_frequency == 0.75
    with pytest.raises(ValueError, match="no replica"):
        boundary_stability(np.zeros((0, 12, 12)), 3)


def test_the_phase_figure_outlines_every_phase_and_writes_the_distances(tmp_path, official):
    partition = find_phases(official, 3)
    figure = plot_phases(official, partition, tmp_path / "phases.png", title="three phases")
    axes = figure.axes[0]
    outlines = {(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches}
    assert outlines == {(start + 0.5, start + 0.5, end - start, end - start) for start, end in partition.phases}
    assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for value in official.flat]
    assert (tmp_path / "phases.png").read_bytes().startswith(b"\x89PNG")


def test_the_phase_figure_shows_the_block_of_every_layer_if_they_are_fragmented(official):
    partition = random_fragmented(12, 4, seed=0)
    axes = plot_phases(official, partition).axes[0]
    assert not axes.patches
    assert [int(text.get_text()) - 1 for text in axes.child_axes[0].texts] == partition.layer_to_block
    assert not plot_phases(random_distance(17, seed=0), random_contiguous(17, 2, seed=0)).axes[0].texts
    with pytest.raises(ValueError, match="distance has 12 layers, partition has 8"):
        plot_phases(official, random_contiguous(8, 2, seed=0))
