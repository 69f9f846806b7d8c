"""Integer arrays that select rows: token ids and the expert of each row."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DTypeError, ShapeError
from .formats import Array

Indices = NDArray[np.intp]


def check_indices(name: str, values: NDArray[Any], count: int, weight: Array) -> Indices:
    """Return ``values`` as array indices into the first axis of ``weight``, ``count`` long.

    Raises:
        DTypeError: they are not integers (booleans are none).
        ShapeError: the first that is negative, or ``count`` or more, is named with its position.
    """
    if values.dtype.kind not in ("i", "u"):
        raise DTypeError(f"{name}: expected integers, got {values.dtype}; convert it")
    # NumPy would take -1 for the last row.
    outside = np.argwhere((values < 0) | (values >= count))
    if len(outside):
        position = tuple(map(int, outside[0]))
        raise ShapeError(
            f"{name}: expected integers from 0 to {count - 1} to fit W0 {weight.shape}, "
            f"got {values[position]} at {position}; check where they come from"
        )
    return values.astype(np.intp)


def most_in_one(indices: Indices) -> int:
    """Return how often the most frequent index occurs; 0 where there is none."""
    return int(np.bincount(indices.ravel()).max(initial=0))
