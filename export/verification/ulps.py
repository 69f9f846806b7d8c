"""How many representable numbers lie between what a candidate holds and what it should hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_POWERS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """The array's numbers as unsigned integers of their size, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(np.dtype(f"u{array.dtype.itemsize}"))


def ulp_distance(got: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.uint64]:
    """Return, of two arrays of one floating-point dtype, how many steps from one representable number to the
    next lead from each entry of one to that of the other.

    The two zeros are neighbours, one step apart. Infinity follows the largest number; NaN is beyond it.
    """
    one, other = _ordered(got), _ordered(expected)
    distance = np.where(one > other, one - other, other - one).view(np.uint64)
    return distance.reshape(got.shape)


def _ordered(array: NDArray[Any]) -> NDArray[np.int64]:
    """Integers in the order of the numbers."""
    size = array.dtype.itemsize
    signed = np.ascontiguousarray(array).reshape(-1).view(np.dtype(f"i{size}")).astype(np.int64)
    magnitude = signed & np.int64(2 ** (8 * size - 1) - 1)
    return np.where(signed < 0, ~magnitude, magnitude)


def histogram(distance: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return how many distances are 0; 1; 2; 3 or 4; 5 to 8; and so on, for powers of two."""
    flat = distance.reshape(-1)
    bucket = np.where(flat > 0, np.searchsorted(_POWERS, flat) + 1, 0)
    return np.bincount(bucket, minlength=len(_POWERS) + 2)


def named(counts: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Return (k, entries) of the buckets that are not empty: so many are at most k steps away."""
    return tuple(
        (0 if place == 0 else 2 ** (place - 1), int(count)) for place, count in enumerate(counts) if count
    )
