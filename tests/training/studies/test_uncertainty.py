"""Intervals against their definition, a loop over resamples, and cases with a known answer."""

import math

import numpy as np
import pytest
from scipy import stats

from training.studies.uncertainty import difference_interval, rank_correlation, z_score


def test_difference_interval_is_the_percentiles_of_resampled_differences():
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=12), generator.normal(1, 1, size=9)
    resampled = [generator.choice(second, 9).mean() - generator.choice(first, 12).mean() for _ in range(20_000)]
    interval = difference_interval(first, second)
    assert interval.value == pytest.approx(second.mean() - first.mean())
    assert (interval.low, interval.high) == pytest.approx(np.percentile(resampled, (2.5, 97.5)), abs=0.05)


def test_intervals_are_the_same_every_time():
    groups = ([1.0, 2.0, 4.0], [1.0, 5.0, 3.0])
    assert difference_interval(*groups) == difference_interval(*groups)
    assert rank_correlation(*groups, groups="abb") == rank_correlation(*groups, groups="abb")


def test_difference_of_far_groups_excludes_zero_and_of_one_group_does_not():
    generator = np.random.default_rng(0)
    first, second = generator.normal(0, 1, 10), generator.normal(5, 1, 10)
    assert difference_interval(first, second).excludes(0)
    assert not difference_interval(first, first).excludes(0)
    assert difference_interval(first, second).value == pytest.approx(second.mean() - first.mean())


def test_one_value_has_no_interval_and_equal_values_a_point():
    single = difference_interval([1.0, 2.0], [4.5])
    assert single.value == 3.0 and math.isnan(single.low) and single.to_dict()["low"] is None
    assert not single.excludes(100)
    assert difference_interval([1.0, 1.0], [4.0, 4.0]).to_dict() == {"value": 3.0, "low": 3.0, "high": 3.0}


def test_rank_correlation_is_spearmans():
    generator = np.random.default_rng(3)
    x = generator.normal(size=15)
    y = x + generator.normal(size=15)
    interval = rank_correlation(x, y)
    assert interval.value == pytest.approx(stats.spearmanr(x, y).statistic)
    resamples = [stats.spearmanr(*np.stack((x, y))[:, generator.integers(15, size=15)]).statistic for _ in range(4000)]
    assert (interval.low, interval.high) == pytest.approx(np.nanpercentile(resamples, (2.5, 97.5)), abs=0.06)
    assert rank_correlation(x, x**3).value == pytest.approx(1)


def test_groups_are_resampled_whole():
    generator = np.random.default_rng(4)
    sizes = [3, 2, 4, 3, 3]
    groups = np.repeat(list("abcde"), sizes)
    x = np.repeat(generator.normal(size=5), sizes) + 0.1 * generator.normal(size=15)
    y = np.repeat(generator.normal(size=5), sizes) + 0.1 * generator.normal(size=15)
    interval = rank_correlation(x, y, groups=groups)
    resamples = []
    for _ in range(4000):
        drawn = np.concatenate([np.flatnonzero(groups == name) for name in generator.choice(list("abcde"), 5)])
        resamples.append(stats.spearmanr(x[drawn], y[drawn]).statistic)
    assert interval.value == rank_correlation(x, y).value
    assert (interval.low, interval.high) == pytest.approx(np.percentile(resamples, (2.5, 97.5)), abs=0.06)


def test_repeats_of_a_pair_in_its_group_do_not_narrow_the_interval():
    x, y = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 1.0, 4.0, 5.0, 3.0])
    once, pairs = rank_correlation(x, y), [np.repeat(values, 6) for values in (x, y)]
    clustered = rank_correlation(*pairs, groups=np.repeat(list("abcde"), 6))
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high), abs=0.1)
    alone = rank_correlation(*pairs)
    assert alone.high - alone.low < 0.6 * (clustered.high - clustered.low)


def test_single_group_has_no_interval():
    only = rank_correlation([1, 2, 3], [1, 3, 2], groups="aaa")
    assert only.value == pytest.approx(0.5) and math.isnan(only.low) and not only.excludes(0)


def test_groups_that_are_not_one_per_pair_are_refused():
    with pytest.raises(ValueError, match="groups has 2 names; it must have one per pair, 3"):
        rank_correlation([1, 2, 3], [1, 3, 2], groups="ab")


def test_constant_values_have_no_rank_correlation():
    assert math.isnan(rank_correlation([1, 2, 3], [5, 5, 5]).value)


def test_z_score_counts_standard_deviations():
    assert z_score(5.0, [1.0, 2.0, 3.0]) == pytest.approx(3.0)
    assert math.isnan(z_score(5.0, [2.0, 2.0]))


@pytest.mark.parametrize("call", [lambda: difference_interval([], [1]), lambda: rank_correlation([1, 2], [1, 2])])
def test_too_few_values_are_refused_by_name(call):
    with pytest.raises(ValueError, match="must be a list of at least"):
        call()
