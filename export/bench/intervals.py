"""Medians of paired ratios, with bootstrap intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
_RESAMPLES = 10_000


def bootstrap_median(
    values: ArrayLike, *, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """(median, low, high): of all values, and the 95% interval of it by bootstrap.

    Args:
        values: (n,), or (n, m) where the m of a row were measured together: rows are drawn with replacement,
            then the values of each drawn row, for what rows have in common does not average out within one.
    """
    array: NDArray[Any] = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    draws = array[rng.integers(0, len(array), (resamples, len(array)))]
    if array.ndim > 1:
        again = rng.integers(0, array.shape[1], draws.shape)
        draws = np.take_along_axis(draws, again, 2).reshape(resamples, -1)
    outside = (1 - LEVEL) / 2
    low, high = np.quantile(np.median(draws, axis=1), (outside, 1 - outside))
    return float(np.median(array)), float(low), float(high)
