"""How sure a comparison is: bootstrap intervals of differences and rank correlations.

    interval = difference_interval([0.975, 0.974, 0.976], [0.981, 0.979, 0.980])
    f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"

The generator of the bootstrap has a fixed seed, so that a table made again is the same table. With three seeds, the
usual number here, such intervals are too narrow (they have about 80 % coverage): read them as spreads.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

from raptor_hf.metrics import CONFIDENCE, bootstrap_interval

# what every report says of them
INTERVALS = (
    f"{100 * CONFIDENCE:g} % bootstrap intervals, too narrow for so few seeds and not corrected for the number of "
    "comparisons"
)


@dataclass(frozen=True)
class Estimate:
    """An estimate with its bootstrap interval.

    Args:
        value: the estimate from all observations.
        low: lower end of the percentile interval at `CONFIDENCE`; NaN where there are too few values for one.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether `value` is outside; False where there is no interval."""
        return value < self.low or value > self.high

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, None for what is not finite."""
        return {name: number if math.isfinite(number) else None for name, number in asdict(self).items()}


def difference_interval(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of `second` minus mean of `first`, two independent groups.

    Raises:
        ValueError: an empty group.
    """
    first, second = _checked("first", first, 1), _checked("second", second, 1)
    value = float(second.mean() - first.mean())
    if min(len(first), len(second)) < 2:
        return Estimate(value, math.nan, math.nan)
    # all resamples of equal values are equal: the interval is that point
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return Estimate(value, value, value)
    interval = bootstrap_interval((first, second), lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis))
    return Estimate(value, *interval)


def rank_correlation(x: Sequence[float], y: Sequence[float], groups: Sequence[str] | None = None) -> Estimate:
    """Spearman's rank correlation of paired observations; NaN where either does not vary.

    Args:
        x: one number per observation.
        y: the other one.
        groups: of every observation, the name of the group it belongs to, such as its variant. Then whole groups are
            resampled, as observations of one group are not independent; of a single group there is no interval. By
            default every pair is independent.

    Raises:
        ValueError: of different length, or fewer than 3 pairs.
    """
    x, y = _checked("x", x, 3), _checked("y", y, 3)
    if len(x) != len(y):
        raise ValueError(f"x and y have {len(x)} and {len(y)} values; they must be pairs")
    if groups is not None and len(groups) != len(x):
        raise ValueError(f"groups has {len(groups)} names; it must have one per pair, {len(x)}")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(stats.spearmanr(x, y).statistic)
    if groups is None:
        return Estimate(value, *bootstrap_interval((x, y), _spearman, paired=True))
    members = [np.flatnonzero(np.asarray(list(groups)) == name) for name in dict.fromkeys(groups)]
    if len(members) < 2:
        return Estimate(value, math.nan, math.nan)

    def of_drawn(replicas: np.ndarray, axis: int) -> np.ndarray:
        # few groups are drawn in few ways, if not for their order
        ways, way_of_replica = np.unique(np.sort(replicas, axis=axis), axis=0, return_inverse=True)
        pairs = (np.concatenate([members[group] for group in drawn]) for drawn in ways)
        values = np.array([_spearman(x[rows], y[rows], axis=axis) for rows in pairs])
        return values[way_of_replica.reshape(-1)]

    return Estimate(value, *bootstrap_interval([np.arange(len(members))], of_drawn))


def z_score(value: float, others: Sequence[float]) -> float:
    """Standard deviations of `others` by which `value` is above their mean; NaN if they do not vary.

    Raises:
        ValueError: fewer than 2 others.
    """
    others = _checked("others", others, 2)
    deviation = float(others.std(ddof=1))
    return (value - float(others.mean())) / deviation if deviation > 0 else math.nan


def _spearman(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    """Pearson's correlation of the ranks, over many resamples at once."""
    x, y = (stats.rankdata(values, axis=axis) for values in (x, y))
    x, y = (values - values.mean(axis=axis, keepdims=True) for values in (x, y))
    scale = np.sqrt((x**2).sum(axis=axis) * (y**2).sum(axis=axis))
    # a resample in which either does not vary has no correlation; it counts as 0
    return np.divide((x * y).sum(axis=axis), scale, out=np.zeros_like(scale), where=scale > 0)


def _checked(name: str, values: Sequence[float], least: int) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < least:
        raise ValueError(f"{name} has shape {values.shape}; it must be a list of at least {least} numbers")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has numbers that are not finite: {values.tolist()}")
    return values
