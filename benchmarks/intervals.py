"""Medians of few measurements, with the interval that their order gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVEL = 0.95


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, coverage) for the median of a continuous distribution, from order statistics.

    The narrowest symmetric pair of order statistics that covers with `LEVEL`; the extremes, with what they
    cover, where there are too few values. ``[x_(k), x_(n+1-k)]`` misses the median with
    ``2 P(Binomial(n, 1/2) < k)``.
    """
    ordered, n = sorted(values), len(values)
    k, coverage = 1, 1 - 2.0 ** (1 - n)
    while 2 * (k + 1) <= n:
        wider = 1 - 2 * sum(math.comb(n, j) for j in range(k + 1)) / 2**n
        if wider < LEVEL:
            break
        k, coverage = k + 1, wider
    return ordered[k - 1], ordered[n - k], coverage


def ratio_text(median: float | None, interval: Sequence[float] | None) -> str:
    """A ratio and its interval as a table has them; nothing where there is none."""
    if median is None or interval is None:
        return ""
    return f"{median:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
