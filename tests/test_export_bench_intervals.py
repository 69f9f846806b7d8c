"""The interval covers the median as often as it says, also where rounds have something in common."""

import numpy as np
import pytest

from loracle.export.bench.intervals import bootstrap_median


def test_values_that_are_equal_have_no_interval() -> None:
    assert bootstrap_median([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert bootstrap_median([[2.0, 2.0], [2.0, 2.0]]) == (2.0, 2.0, 2.0)


def test_the_median_is_of_all_values_and_lies_inside() -> None:
    values = [[1.0, 3.0], [2.0, 10.0], [4.0, 5.0]]
    median, low, high = bootstrap_median(values)
    assert median == 3.5
    assert 1.0 <= low < median < high <= 10.0
    assert bootstrap_median(values) == (median, low, high)
    assert bootstrap_median(values, seed=1) != (median, low, high)


def test_what_rounds_have_in_common_does_not_average_out_within_them() -> None:
    """Three rounds of a hundred values are three numbers, not three hundred."""
    rng = np.random.default_rng(0)
    rounds = np.array([[0.9], [1.0], [1.1]]) + rng.normal(0, 1e-4, (3, 100))
    _, low, high = bootstrap_median(rounds)
    assert low < 0.91
    assert high > 1.09
    _, low, high = bootstrap_median(rounds.ravel())
    assert high - low < 0.15


@pytest.mark.parametrize("common", [0.0, 0.05])
def test_coverage_is_near_95_percent(common: float) -> None:
    """Of 8 rounds with 2 blocks each: the bootstrap of few values is a little too narrow, and no more."""
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        values = 1 + rng.normal(0, common, (8, 1)) + rng.normal(0, 0.02, (8, 2))
        _, low, high = bootstrap_median(values, resamples=400, seed=trial)
        covered += low <= 1 <= high
    assert 0.88 < covered / 300 < 0.99
