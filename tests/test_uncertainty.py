"""Intervals against their definition, a loop over resamples, and cases with a known answer."""

import math

import numpy as np
import pytest
from scipy import stats

from raptor_hf.uncertainty import difference_interval, mean_interval, rank_correlation, z_score


def test_mean_interval_is_the_percentiles_of_resampled_means():
    values = np.random.default_rng(1).normal(size=12)
    generator = np.random.default_rng(2)
    means = [generator.choice(values, 12).mean() for _ in range(20_000)]
    interval = mean_interval(values)
    assert interval.value == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.04)


def test_intervals_are_the_same_every_time():
    assert mean_interval([1.0, 2.0, 4.0]) == mean_interval([1.0, 2.0, 4.0])


def test_difference_of_far_groups_excludes_zero_and_of_one_group_does_not():
    generator = np.random.default_rng(0)
    first, second = generator.normal(0, 1, 10), generator.normal(5, 1, 10)
    assert difference_interval(first, second).excludes(0)
    assert not difference_interval(first, first).excludes(0)
    assert difference_interval(first, second).value == pytest.approx(second.mean() - first.mean())


def test_one_value_has_no_interval_and_equal_values_a_point():
    assert math.isnan(mean_interval([3.0]).low) and mean_interval([3.0]).to_dict()["low"] is None
    assert not mean_interval([3.0]).excludes(100)
    assert mean_interval([3.0, 3.0]).to_dict() == {"value": 3.0, "low": 3.0, "high": 3.0}
    assert difference_interval([1.0, 1.0], [2.0, 2.0]).excludes(0)


def test_rank_correlation_is_spearmans():
    generator = np.random.default_rng(3)
    x = generator.normal(size=15)
    y = x + generator.normal(size=15)
    interval = rank_correlation(x, y)
    assert interval.value == pytest.approx(stats.spearmanr(x, y).statistic)
    resamples = [stats.spearmanr(*np.stack((x, y))[:, generator.integers(15, size=15)]).statistic for _ in range(4000)]
    assert (interval.low, interval.high) == pytest.approx(np.nanpercentile(resamples, (2.5, 97.5)), abs=0.06)
    assert rank_correlation(x, x**3).value == pytest.approx(1)


def test_constant_values_have_no_rank_correlation():
    assert math.isnan(rank_correlation([1, 2, 3], [5, 5, 5]).value)


def test_z_score_counts_standard_deviations():
    assert z_score(5.0, [1.0, 2.0, 3.0]) == pytest.approx(3.0)
    assert math.isnan(z_score(5.0, [2.0, 2.0]))


@pytest.mark.parametrize("call", [lambda: mean_interval([]), lambda: rank_correlation([1, 2], [1, 2])])
def test_too_few_values_are_refused_by_name(call):
    with pytest.raises(ValueError, match="must be a list of at least"):
        call()
