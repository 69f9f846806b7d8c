"""A few hundred entries by which a matrix is known again, and how like one another two of them are.

A weight that an adapter changed, or that was rounded, is not equal to the base's but like it. Of matrices
that have nothing to do with one another the entries are as good as independent: then the similarity of `k`
entries is about `1 / sqrt(k)`, and `least_similarity` lies well above.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Signature = np.ndarray[Any, np.dtype[np.float32]]

ROUNDED = 1e-5
"""What similarity lacks to 1 where two matrices differ by rounding, to bfloat16 at the worst."""

_ENTRIES = 576
_SIDE = 24
_RUN = 4
_LARGEST = 1e15


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without its axes of one entry."""
    return tuple(size for size in shape if size != 1)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor as a matrix: the first axis longer than 1, and the others as one."""
    first, *others = squeezed(shape) or (1,)
    return first, math.prod(others)


def layouts(shape: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """Return (rows, columns, transposed) of the matrices that a tensor may be: as it lies; a matrix's
    transpose; of a stack of matrices all their rows."""
    sizes = squeezed(shape)
    found = [(*matrix_shape(shape), False)]
    if len(sizes) == 2:
        found.append((sizes[1], sizes[0], True))
    if len(sizes) == 3:
        found.append((sizes[0] * sizes[1], sizes[2], False))
    return found


def as_matrix(array: Array, columns: int, *, transposed: bool) -> Array:
    """Return an array as a matrix of so many columns, without copying it where it lies in one piece."""
    return array.reshape(columns, -1).T if transposed else array.reshape(-1, columns)


@lru_cache(maxsize=4096)
def sampled(rows: int, columns: int) -> tuple[Array, Array]:
    """Return the indices of rows and columns whose crossings are a matrix's signature, in runs of
    neighbours, which share pages."""
    few = min(rows, _SIDE)
    across = min(columns, max(_SIDE, _ENTRIES // few))
    down = min(rows, max(_SIDE, _ENTRIES // across))
    return _spread(rows, down), _spread(columns, across)


def _spread(size: int, count: int) -> Array:
    if size <= count:
        return np.arange(size)
    runs = count // _RUN
    starts = np.arange(runs) * (size - _RUN) // (runs - 1)
    indices: Array = (starts[:, None] + np.arange(_RUN)).reshape(-1)
    return indices


def signature(matrix: Array) -> Signature:
    """Return the sampled entries of a matrix, (k,): k is that of every matrix of its shape.

    What is no finite number is 0, so that one NaN does not hide the rest.
    """
    rows, columns = sampled(*matrix.shape)
    return as_signature(matrix[np.ix_(rows, columns)])


def as_signature(entries: Array) -> Signature:
    """Return entries that were sampled elsewhere as `signature` has them."""
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = entries.astype(np.float32).reshape(-1)
    return np.clip(np.where(np.isfinite(numbers), numbers, np.float32(0)), -_LARGEST, _LARGEST)


def similarity(found: Array, wanted: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return (n, m): for each row of `found` (n, k) and of `wanted` (m, k) `2 x.y / (x.x + y.y)`.

    It is 1 for equal rows alone, `1 - |x - y|^2 / (x.x + y.y)` for others, and about 0 for rows that have
    nothing to do with each other.
    """
    left, right = found.astype(np.float64), wanted.astype(np.float64)
    sizes = np.square(left).sum(1)[:, None] + np.square(right).sum(1)[None, :]
    result = np.ones(sizes.shape)
    np.divide(2 * (left @ right.T), sizes, out=result, where=sizes > 0)
    return result


def least_similarity(entries: int) -> float:
    """Return what two signatures of so many entries must have in common to be taken for one weight: five
    times what unrelated ones have by chance, and no less than a weight and its own with an update of almost
    three times its size."""
    return min(0.9, max(0.2, 5 / math.sqrt(entries)))
