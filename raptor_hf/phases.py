"""Finds phases from the distances between layers: runs of layers that one recurrent block can stand for.

    partition = find_phases(distance, num_blocks=3)    # (L, L), from raptor_hf.similarity
    partition.phases                                   # [(0, 7), (7, 10), (10, 12)]

The method is the max-cut of "Block-Recurrent Dynamics in Vision Transformers" (arXiv 2512.19941): layers that resemble
each other go to one block. Random partitions serve as controls, and an online bootstrap over images tells how stable
the boundaries are.
"""

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from .similarity import check_at_least, check_choice

Method = Literal["normalized", "cut", "bisection"]
# bisection tries every cut of a cluster in two: 2^23 at this number of layers
MAX_BISECTION_LAYERS = 24


@dataclass(frozen=True)
class Partition:
    """A partition of the layers: those that each block stands for.

    Args:
        blocks: the 1-based layers of every block; kept sorted, blocks by their first layer.
        method: how the partition was found.
        objective: what `partition_objective` gives for it, lower is better; None if nothing was minimised.

    Raises:
        ValueError: unless every layer of 1..L is in exactly one block and no block is empty.
    """

    blocks: tuple[tuple[int, ...], ...]
    method: str = "manual"
    objective: float | None = None

    def __post_init__(self) -> None:
        blocks = tuple(sorted(tuple(sorted(map(operator.index, block))) for block in self.blocks))
        layers = sorted(layer for block in blocks for layer in block)
        if not layers or not all(blocks) or layers != list(range(1, len(layers) + 1)):
            raise ValueError(
                f"blocks is {self.blocks}; it must hold every layer of 1..L exactly once and no empty block"
            )
        if self.objective is not None and not math.isfinite(self.objective):
            raise ValueError(f"objective is {self.objective}; it must be finite, or None if nothing was minimised")
        object.__setattr__(self, "blocks", blocks)

    @classmethod
    def from_boundaries(
        cls, boundaries: Sequence[int], num_layers: int, method: str = "manual", objective: float | None = None
    ) -> "Partition":
        """Builds a contiguous partition, e.g. [7, 10] of 12 layers: (0, 7], (7, 10], (10, 12].

        Args:
            boundaries: last layer of every phase but the last, increasing.
            num_layers: L.
            method: as in the class.
            objective: as in the class.

        Raises:
            ValueError: if the boundaries do not increase within 1..L - 1.
        """
        ends = [0, *boundaries, num_layers]
        if any(start >= end for start, end in pairwise(ends)):
            raise ValueError(f"boundaries is {list(boundaries)}; it must increase within 1..{num_layers - 1}")
        return cls(tuple(tuple(range(start + 1, end + 1)) for start, end in pairwise(ends)), method, objective)

    @property
    def num_layers(self) -> int:
        """L."""
        return sum(map(len, self.blocks))

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.blocks)

    @property
    def block_repeats(self) -> tuple[int, ...]:
        """How many layers every block stands for."""
        return tuple(map(len, self.blocks))

    @property
    def layer_to_block(self) -> list[int]:
        """The 0-based block of layers 1..L, in this order."""
        owner = {layer: index for index, block in enumerate(self.blocks) for layer in block}
        return [owner[layer] for layer in range(1, self.num_layers + 1)]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The layers whose next layer belongs to another block; fragmented partitions have K or more."""
        return tuple(layer for layer, (a, b) in enumerate(pairwise(self.layer_to_block), start=1) if a != b)

    @property
    def is_contiguous(self) -> bool:
        """Whether every block is a run of consecutive layers, that is a phase."""
        return len(self.boundaries) == self.num_blocks - 1

    @property
    def phases(self) -> list[tuple[int, int]]:
        """The (start, end] of every block in the numbering of states.

        Raises:
            ValueError: if the partition is fragmented.
        """
        if not self.is_contiguous:
            raise ValueError(f"blocks={self.blocks} are fragmented and have no phases; use layer_to_block")
        return [(block[0] - 1, block[-1]) for block in self.blocks]

    def __str__(self) -> str:
        """Phases as [1-7][8-10], in layers; the layers of each block where they are no phases."""
        if self.is_contiguous:
            return "".join(f"[{start + 1}-{end}]" for start, end in self.phases)
        return " ".join(str(list(layers)) for layers in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` reads, in JSON types only."""
        return {"blocks": [list(block) for block in self.blocks], "method": self.method, "objective": self.objective}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Partition":
        """Builds the partition that `to_dict` described; other entries are ignored.

        Raises:
            ValueError: if an entry is missing or the blocks are no partition.
        """
        if missing := {"blocks", "method", "objective"} - data.keys():
            raise ValueError(f"data lacks {sorted(missing)}; it has {sorted(data)}")
        return cls(blocks=data["blocks"], method=data["method"], objective=data["objective"])


def as_distance_matrix(distance: Any) -> np.ndarray:
    """Checks a matrix of distances between layers and returns it as (L, L) float64, exactly symmetric.

    Raises:
        ValueError: unless it is square, finite, symmetric, not negative and zero on the diagonal, up to rounding.
    """
    matrix = np.asarray(distance, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"distance must be a square matrix (L, L) with L >= 1, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"distance must be finite, got {(~np.isfinite(matrix)).sum()} NaN or infinite values")
    rounding = 1e-6 * np.abs(matrix).max()
    asymmetry = np.abs(matrix - matrix.T).max()
    if asymmetry > rounding:
        raise ValueError(f"distance must be symmetric, got differences up to {asymmetry:.3g} from its transpose")
    diagonal = np.abs(np.diagonal(matrix)).max()
    if diagonal > rounding or matrix.min() < -rounding:
        raise ValueError(
            "distance must be zero on the diagonal and not negative, got up to "
            f"{diagonal:.3g} on the diagonal and a minimum of {matrix.min():.3g}; for a similarity pass 1 - similarity"
        )
    return (matrix + matrix.T) / 2


def find_phases(
    distance: np.ndarray,
    num_blocks: int | None = None,
    method: Method = "normalized",
    min_size: int | None = None,
    eps: float | None = None,
) -> Partition:
    """Partitions the layers so that similar ones share a block.

    - `"normalized"`: contiguous; minimises the sum over blocks of (distance within the block) / (layers in the block),
      where "within" sums over the pairs i < j. Exact, by dynamic programming in O(K L^2).
    - `"cut"`: contiguous; minimises the distance within blocks, undivided, that is maximises the cut. Exact.
    - `"bisection"`: splits the cluster whose best cut is largest in two, by exhaustive max-cut, until there are
      `num_blocks` clusters or that cut weighs no more than `eps`. Blocks may be fragmented. At most 24 layers.

    For DINOv2 ViT-B/14 with registers, `"normalized"` with 2, 3, 4 blocks and `"bisection"` with eps .20, .10, .09 give
    the partitions that the paper published; `"cut"` gives another one for 3 blocks.

    Objectives that differ by less than 1e-9 of the largest distance count as tied. Of tied partitions the one with the
    later boundaries wins, the last boundary deciding first; of tied cuts in two, the one that keeps the earliest layers
    together.

    Args:
        distance: (L, L) between layers.
        num_blocks: K; required, except for `"bisection"` with `eps`.
        method: the search, one of the three above.
        min_size: fewest layers in a block. Default: 1 for `"cut"`; for the others 2 while 2 K <= L, else 1.
        eps: where `"bisection"` stops, as a fraction of the sum of all distances i < j.

    Raises:
        ValueError: for a matrix that holds no distances, a number of blocks that does not fit, both or none of
            `num_blocks` and `eps`, or more than 24 layers for `"bisection"`.
    """
    distance = as_distance_matrix(distance)
    num_layers = len(distance)
    check_choice("method", method, get_args(Method))
    if eps is not None and (method != "bisection" or not (math.isfinite(eps) and eps >= 0)):
        raise ValueError(f"eps={eps} needs method='bisection' and a finite value >= 0, got method={method!r}")
    if (num_blocks is None) == (eps is None):
        raise ValueError(f"num_blocks={num_blocks}, eps={eps}: give one of them (eps for method='bisection' only)")
    if min_size is None:
        crowded = num_blocks is not None and 2 * num_blocks > num_layers
        min_size = 1 if method == "cut" or crowded else 2
    _check_sizes(num_layers, 1 if num_blocks is None else num_blocks, min_size)
    if method == "bisection":
        blocks = _bisect(distance, num_blocks, min_size, eps)
    else:
        boundaries = _best_boundaries(_segment_costs(distance, method), num_blocks, min_size, _tie_width(distance))
        blocks = Partition.from_boundaries(boundaries, num_layers).blocks
    return Partition(blocks, method, _within(distance, blocks, method))


def cheapest_phases(costs: np.ndarray, num_blocks: int, min_size: int = 1) -> Partition:
    """Finds the contiguous partition with the least sum of costs; exact, by dynamic programming in O(K L^2).

    Args:
        costs: (L, L), entry [s, e] of layers s + 1..e + 1 as one block, as `raptor_hf.distillation.tied_costs` measures
            them for both kinds of blocks; entries below the diagonal are not read.
        num_blocks: K.
        min_size: fewest layers in a block.

    Raises:
        ValueError: the costs are not square or not finite above the diagonal, or so many blocks do not fit.
    """
    costs = np.asarray(costs, dtype=np.float64)
    upper = costs[np.triu_indices(len(costs))] if costs.ndim == 2 and costs.shape[0] == costs.shape[1] else None
    if upper is None or not np.isfinite(upper).all():
        raise ValueError(f"costs has the shape {costs.shape}; it must be (L, L), finite on and above the diagonal")
    _check_sizes(len(costs), num_blocks, min_size)
    boundaries = _best_boundaries(costs, num_blocks, min_size, 1e-9 * upper.max())
    partition = Partition.from_boundaries(boundaries, len(costs))
    return Partition(partition.blocks, "fitted", phases_cost(costs, partition))


def phases_cost(costs: np.ndarray, partition: Partition) -> float | None:
    """Returns what `cheapest_phases` minimises, for any partition; None for one that is not contiguous."""
    if not partition.is_contiguous:
        return None
    return float(sum(costs[start, end - 1] for start, end in partition.phases))


def other_phases(distance: np.ndarray, partition: Partition) -> dict[str, Partition]:
    """Returns what the other searches find with as many blocks, where that is another partition.

    A partition that depends on how it was searched is a choice, not a fact about the layers: say so beside it.

    Args:
        distance: (L, L) between layers.
        partition: that `find_phases` found on it with the default `min_size`.

    Returns:
        By the name of the search, the partitions that differ; empty where all agree. "METHOD, min_size 1" is the search
        that found `partition` without the smallest number of layers per block: if it is there, `min_size` binds. All
        objectives are those of `partition.method`, so that they compare. Beyond 24 layers there is no bisection.

    Raises:
        ValueError: if `partition` was not found by a search, or has another number of layers.
    """
    distance, num_blocks = _matching(distance, partition), partition.num_blocks
    check_choice("partition.method", partition.method, get_args(Method))
    searches = {f"{partition.method}, min_size 1": (partition.method, 1)}
    searches |= {method: (method, None) for method in get_args(Method) if method != partition.method}
    others = {}
    for name, (method, min_size) in searches.items():
        if method == "bisection" and len(distance) > MAX_BISECTION_LAYERS:
            continue
        try:
            blocks = find_phases(distance, num_blocks, method, min_size).blocks
        except ValueError:
            if method != "bisection":
                raise
            continue  # bisection ends in other numbers of blocks
        if blocks != partition.blocks:
            others[name] = Partition(blocks, method, _within(distance, blocks, partition.method))
    return others


def partition_objective(distance: np.ndarray, partition: Partition, method: Method = "normalized") -> float:
    """Returns what `find_phases` minimises, for any partition, contiguous or not; lower is better.

    `"normalized"`: sum over blocks of the distance within (pairs i < j) / layers in the block. `"cut"` and
    `"bisection"`: the same, undivided.

    Args:
        distance: (L, L) between layers.
        partition: of the same L layers.
        method: whose objective.

    Raises:
        ValueError: if the partition has another number of layers, or the method is unknown.
    """
    check_choice("method", method, get_args(Method))
    return _within(_matching(distance, partition), partition.blocks, method)


def phase_contrast(distance: np.ndarray, partition: Partition) -> float:
    """Returns the mean distance across blocks minus the mean within, over pairs of layers; positive if blocks are real.

    Args:
        distance: (L, L) between layers.
        partition: of the same L layers.

    Raises:
        ValueError: if the layers do not match, or there is no pair within or none across blocks.
    """
    distance = _matching(distance, partition)
    labels = np.array(partition.layer_to_block)
    first, second = np.triu_indices(len(distance), 1)
    across = labels[first] != labels[second]
    if across.all() or not across.any():
        raise ValueError(
            f"partition has {partition.num_blocks} blocks for {partition.num_layers} layers: a contrast needs pairs of "
            "layers both within and across blocks"
        )
    weights = distance[first, second]
    return float(weights[across].mean() - weights[~across].mean())


def random_contiguous(
    num_layers: int, num_blocks: int, seed: int | np.random.Generator, min_size: int = 1
) -> Partition:
    """Draws a contiguous partition, uniform over all with at least `min_size` layers in every block.

    Raises:
        ValueError: if the blocks do not fit in the layers.
    """
    _check_sizes(num_layers, num_blocks, min_size)
    # Without the layers that every block has anyway, any choice of distinct cuts is a valid partition.
    spare = num_layers - num_blocks * (min_size - 1)
    cuts = np.sort(np.random.default_rng(seed).choice(spare - 1, num_blocks - 1, replace=False)) + 1
    cuts += np.arange(1, num_blocks) * (min_size - 1)
    return Partition.from_boundaries(cuts.tolist(), num_layers, "random_contiguous")


def random_fragmented(num_layers: int, num_blocks: int, seed: int | np.random.Generator) -> Partition:
    """Draws a partition that is not contiguous: block sizes as in `random_contiguous`, their layers anywhere.

    Raises:
        ValueError: unless 1 < num_blocks < num_layers; else every partition is contiguous.
    """
    if not 1 < num_blocks < num_layers:
        raise ValueError(f"num_blocks is {num_blocks}; it must be in 2..{num_layers - 1} for a fragmented partition")
    generator = np.random.default_rng(seed)
    sizes = random_contiguous(num_layers, num_blocks, generator).block_repeats
    while True:
        layers = np.split(generator.permutation(num_layers) + 1, np.cumsum(sizes)[:-1])
        partition = Partition(tuple(tuple(block.tolist()) for block in layers), "random_fragmented")
        if not partition.is_contiguous:
            return partition


@dataclass(frozen=True)
class BoundaryStability:
    """How often the replicas of a bootstrap agree.

    Args:
        boundary_frequency: (L - 1,), the share of replicas in which layers l and l + 1 are in different blocks; entry 0
            is for l = 1.
        modal: the partition found most often.
        modal_frequency: the share of replicas that gave exactly the modal partition.
    """

    boundary_frequency: tuple[float, ...]
    modal: Partition
    modal_frequency: float


def boundary_stability(
    matrices: np.ndarray, num_blocks: int, method: Method = "normalized", min_size: int | None = None
) -> BoundaryStability:
    """Searches the phases of every replica and counts how often they agree.

    Args:
        matrices: (N, L, L) distances, as `SimilarityAccumulator.bootstrap` gives them.
        num_blocks: K.
        method: as in `find_phases`.
        min_size: as in `find_phases`.

    Raises:
        ValueError: for no replica, or as `find_phases`.
    """
    if len(matrices) == 0:
        raise ValueError("matrices holds no replica; (N, L, L) with N >= 1 works")
    found = [find_phases(matrix, num_blocks, method, min_size) for matrix in matrices]
    crossings = np.array([np.diff(partition.layer_to_block) != 0 for partition in found])
    # Replicas of one partition differ in the objective, so the blocks alone are compared.
    modal, count = Counter(partition.blocks for partition in found).most_common(1)[0]
    return BoundaryStability(tuple(crossings.mean(0).tolist()), Partition(modal, method), count / len(found))


def _tie_width(distance: np.ndarray) -> float:
    return 1e-9 * distance.max()


def _within(distance: np.ndarray, blocks: Sequence[Sequence[int]], method: str) -> float:
    """The objective of `method`; see `partition_objective`."""
    total = 0.0
    for block in blocks:
        index = np.array(block) - 1
        weight = distance[np.ix_(index, index)].sum() / 2
        total += weight / len(block) if method == "normalized" else weight
    return float(total)


def _segment_costs(distance: np.ndarray, method: str) -> np.ndarray:
    """(L, L) -> (L, L); entry [s, e] is the cost of layers s + 1..e + 1 as one block, infinite for e < s."""
    num_layers = len(distance)
    to_last = np.cumsum(np.triu(distance, 1)[::-1], 0)[::-1]  # [s, e]: sum of distance[i, e] over s <= i < e
    # Only sums of what is not negative, so that long depths do not cancel to noise as differences of prefix sums do.
    within = np.cumsum(np.triu(to_last), 1)
    sizes = 1 + np.arange(num_layers) - np.arange(num_layers)[:, None]
    costs = within / np.maximum(sizes, 1) if method == "normalized" else within
    return np.where(sizes >= 1, costs, np.inf)


def _best_boundaries(costs: np.ndarray, num_blocks: int, min_size: int, tie_width: float) -> list[int]:
    """Boundaries of the cheapest cut of L layers in `num_blocks` runs; of all within `tie_width`, the latest."""
    num_layers = len(costs)
    costs = np.where(np.triu(np.ones_like(costs, dtype=bool), min_size - 1), costs, np.inf)
    # best[k][e]: least cost of the first e layers in k + 1 runs.
    best = [np.append(np.inf, costs[0])]
    for _ in range(1, num_blocks):
        best.append(np.append(np.inf, (best[-1][:-1, None] + costs).min(0)))
    budget = best[-1][-1] + tie_width
    boundaries: list[int] = []
    end = num_layers
    for previous in reversed(best[:-1]):
        affordable = previous[:-1] + costs[:, end - 1] <= budget
        start = int(np.flatnonzero(affordable)[-1])
        # The subtraction may round to below what is left to pay; the least cost is always affordable.
        budget = max(budget - costs[start, end - 1], previous[start])
        boundaries.insert(0, start)
        end = start
    return boundaries


def _bisect(
    distance: np.ndarray, num_blocks: int | None, min_size: int, eps: float | None
) -> tuple[tuple[int, ...], ...]:
    """Recursive max-cut; stops at `num_blocks` clusters or at cuts of at most `eps` of the total weight."""
    num_layers = len(distance)
    if num_layers > MAX_BISECTION_LAYERS:
        raise ValueError(
            f"distance has {num_layers} layers; method='bisection' is exhaustive and takes at most "
            f"{MAX_BISECTION_LAYERS}"
        )
    threshold = -np.inf if eps is None else eps * distance.sum() / 2
    tie_width = _tie_width(distance)
    clusters = [np.arange(num_layers)]
    cuts = [_max_cut(distance, min_size, tie_width)]
    while len(clusters) != num_blocks:
        gains = [gain for gain, _ in cuts]
        index = int(np.argmax(gains))
        if gains[index] == -np.inf and num_blocks is not None:
            raise ValueError(
                f"num_blocks={num_blocks} is out of reach of method='bisection' with min_size={min_size}: it ends with "
                f"{len(clusters)} clusters of {[len(cluster) for cluster in clusters]} layers; lower min_size"
            )
        if gains[index] <= threshold:
            break
        cluster, (_, side) = clusters.pop(index), cuts.pop(index)
        for half in (cluster[~side], cluster[side]):
            clusters.append(half)
            cuts.append(_max_cut(distance[np.ix_(half, half)], min_size, tie_width))
    return tuple(tuple((cluster + 1).tolist()) for cluster in clusters)


def _max_cut(weights: np.ndarray, min_size: int, tie_width: float) -> tuple[float, np.ndarray]:
    """Heaviest cut of n nodes in two sides of at least `min_size`, over all 2^(n - 1).

    With x = 1 on one side, the cut weighs x W 1 - x W x. Writing x = (a, b), a for the first half of the nodes, splits
    that in a term of a, a term of b and -2 a W_ab b: a matrix product over all pairs of halves.

    Returns:
        The weight and the side (n,), False for the first node; minus infinity if the cluster is too small to split.
    """
    n = len(weights)
    if n < 2 * min_size:
        return -np.inf, np.zeros(n, dtype=bool)
    split = (n + 1) // 2
    heads = np.pad(_binary_rows(split - 1), ((0, 0), (1, 0)))
    tails = _binary_rows(n - split)
    degrees = weights.sum(1)
    head_terms = heads @ degrees[:split] - ((heads @ weights[:split, :split]) * heads).sum(1)
    tail_terms = tails @ degrees[split:] - ((tails @ weights[split:, split:]) * tails).sum(1)
    coupling = 2 * weights[:split, split:] @ tails.T
    head_sizes, tail_sizes = heads.sum(1), tails.sum(1)

    def cuts_of(rows: slice) -> np.ndarray:
        sizes = head_sizes[rows, None] + tail_sizes
        weight = head_terms[rows, None] + tail_terms - heads[rows] @ coupling
        return np.where((sizes >= min_size) & (sizes <= n - min_size), weight, -np.inf)

    # At most 2^19 cuts at a time, 4 MB, however many there are.
    chunk = max(1, 2**19 // len(tails))
    row_best = np.concatenate([cuts_of(slice(i, i + chunk)).max(1) for i in range(0, len(heads), chunk)])
    # Rows are in lexicographic order: the first of the tied cuts keeps the earliest layers on the first layer's side.
    gain = row_best.max()
    row = int(np.flatnonzero(row_best >= gain - tie_width)[0])
    column = int(np.flatnonzero(cuts_of(slice(row, row + 1))[0] >= gain - tie_width)[0])
    return float(gain), np.concatenate([heads[row], tails[column]]) > 0


def _binary_rows(width: int) -> np.ndarray:
    """All (2^width, width) rows of zeros and ones, float64, in lexicographic order."""
    return (np.arange(2**width)[:, None] >> np.arange(width)[::-1] & 1).astype(np.float64)


def _matching(distance: np.ndarray, partition: Partition) -> np.ndarray:
    distance = as_distance_matrix(distance)
    if len(distance) != partition.num_layers:
        raise ValueError(f"distance has {len(distance)} layers, partition has {partition.num_layers}; they must agree")
    return distance


def _check_sizes(num_layers: int, num_blocks: int, min_size: int) -> None:
    check_at_least("num_blocks", num_blocks, 1)
    check_at_least("min_size", min_size, 1)
    if num_blocks * min_size > num_layers:
        raise ValueError(
            f"num_blocks={num_blocks} with min_size={min_size} needs {num_blocks * min_size} layers, there are "
            f"{num_layers}; num_blocks <= {num_layers // min_size} works"
        )
