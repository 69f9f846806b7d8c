"""The interval of real numbers that round to a tuned entry, as an update has to reach it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def rounding_intervals(before: NDArray[Any], after: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Return c and h, float64: where ``|delta - c| < h``, ``before + delta`` rounds to ``after``.

    The ends of the interval, c - h and c + h, are half way to the neighbours of ``after`` in its dtype, less
    ``before``. At a power of two one neighbour is nearer, and c is not ``after - before``.

    Args:
        before, after: of one shape; ``after`` float16, bfloat16 or float32, and finite.
    """
    wide = after.astype(np.float64)
    with np.errstate(over="ignore"):
        above, below = (_neighbour(after, towards) for towards in (np.inf, -np.inf))
    # beyond the largest number a neighbour would be as far as the one on the other side
    above = np.where(np.isinf(above), 2 * wide - below, above)
    below = np.where(np.isinf(below), 2 * wide - above, below)
    upper, lower = (wide + above) / 2, (wide + below) / 2
    centre = (upper + lower) / 2 - before.astype(np.float64)
    return torch.from_numpy(centre), torch.from_numpy((upper - lower) / 2)


def _neighbour(values: NDArray[Any], towards: float) -> NDArray[np.float64]:
    found = np.nextafter(values, np.asarray(towards, values.dtype))
    return np.asarray(found, np.float64)
