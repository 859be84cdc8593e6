"""Phase discovery against the published matrix and partitions, exhaustive searches and float64 loops."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats

from raptor_hf.figures import plot_phases
from raptor_hf.phases import (
    Partition,
    boundary_stability,
    find_phases,
    other_phases,
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


def test_dp_finds_planted_phases_of_a_thousand_layers():
    boundaries = [90, 250, 300, 512, 640, 777, 900]
    labels = np.array(Partition.from_boundaries(boundaries, 1000).layer_to_block)
    distance = random_distance(1000, seed=0) + 2 * (labels[:, None] != labels)
    partition = find_phases(distance, 8)
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
        ({"num_blocks": 0}, "num_blocks is 0; it must be at least 1"),
        ({"num_blocks": 5, "min_size": 3}, r"num_blocks=5 with min_size=3 needs 15 layers.*num_blocks <= 4 works"),
        ({"num_blocks": 3, "min_size": 0}, "min_size is 0; it must be at least 1"),
        ({"num_blocks": 3, "method": "spectral"}, "method is 'spectral'; it must be one of normalized, cut, bisection"),
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


def test_partitions_survive_json(official):
    for partition in (random_fragmented(12, 4, seed=0), find_phases(official, 3)):
        assert Partition.from_dict(json.loads(json.dumps(partition.to_dict()))) == partition
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


def test_partition_reads_as_its_layers():
    assert str(Partition.from_boundaries([7, 10], 12)) == "[1-7][8-10][11-12]"
    assert str(Partition(((1, 3), (2,)), "random_fragmented")) == "[1, 3] [2]"


def test_other_phases_are_those_of_the_other_searches_where_they_differ(official):
    partition = find_phases(official, 3)
    others = other_phases(official, partition)
    # bisection agrees, so it is not there; section 2 of the paper gives what the plain cut finds
    assert {name: str(other) for name, other in others.items()} == {
        "cut": "[1-5][6-9][10-12]",
        "normalized, min_size 1": str(find_phases(official, 3, min_size=1)),
    }
    for other in others.values():
        assert other.objective == pytest.approx(partition_objective(official, other, "normalized"))
    assert others["normalized, min_size 1"].objective < partition.objective < others["cut"].objective


def test_a_smallest_block_that_does_not_bind_is_not_among_the_others():
    labels = np.repeat([0, 1, 2], 4)
    distance = (labels[:, None] != labels).astype(float)
    for method in ("normalized", "cut", "bisection"):
        assert other_phases(distance, find_phases(distance, 3, method)) == {}


def test_phases_of_25_layers_are_compared_without_bisection():
    distance = random_distance(25, seed=0)
    assert "bisection" not in other_phases(distance, find_phases(distance, 3))


def test_only_a_partition_that_was_searched_has_others(official):
    with pytest.raises(ValueError, match=r"partition.method is 'manual'; it must be one of"):
        other_phases(official, Partition.from_boundaries([7, 10], 12))
