"""How sure a comparison is: bootstrap intervals of means, differences and rank correlations, by scipy.stats.

    interval = mean_interval([0.975, 0.974, 0.976])
    f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"

The generator of the bootstrap has a fixed seed, so that a table made again is the same table. With three seeds, the
usual number here, such intervals are too narrow (they have about 80 % coverage): read them as spreads.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """An estimate with its bootstrap interval.

    Args:
        value: the estimate from all observations.
        low: lower end of the percentile interval at `CONFIDENCE`; NaN where it cannot be had.
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


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean over independent observations, such as seeds.

    Raises:
        ValueError: no values.
    """
    values = _checked("values", values, 1)
    mean = float(values.mean())
    # all resamples of equal values are equal: the interval is that point
    if len(values) < 2 or np.ptp(values) == 0:
        return Estimate(mean, mean, mean) if len(values) > 1 else Estimate(mean, math.nan, math.nan)
    return _bootstrap((values,), lambda sample, axis: sample.mean(axis=axis), mean, paired=False)


def difference_interval(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of `second` minus mean of `first`, two independent groups.

    Raises:
        ValueError: an empty group.
    """
    first, second = _checked("first", first, 1), _checked("second", second, 1)
    value = float(second.mean() - first.mean())
    if min(len(first), len(second)) < 2:
        return Estimate(value, math.nan, math.nan)
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return Estimate(value, value, value)
    return _bootstrap((first, second), lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis), value, paired=False)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman's rank correlation of paired observations; NaN where either does not vary.

    Raises:
        ValueError: of different length, or fewer than 3 pairs.
    """
    x, y = _checked("x", x, 3), _checked("y", y, 3)
    if len(x) != len(y):
        raise ValueError(f"x and y have {len(x)} and {len(y)} values; they must be pairs")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(stats.spearmanr(x, y).statistic)
    return _bootstrap((x, y), _spearman, value, paired=True)


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
    # a resample of one pair alone has no correlation; it counts as none
    return np.divide((x * y).sum(axis=axis), scale, out=np.zeros_like(scale), where=scale > 0)


def _bootstrap(samples: tuple[np.ndarray, ...], statistic, value: float, *, paired: bool) -> Estimate:
    result = stats.bootstrap(
        samples,
        statistic,
        n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        paired=paired,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return Estimate(value, float(result.confidence_interval.low), float(result.confidence_interval.high))


def _checked(name: str, values: Sequence[float], least: int) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < least:
        raise ValueError(f"{name} has shape {values.shape}; it must be a list of at least {least} numbers")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has numbers that are not finite: {values.tolist()}")
    return values
