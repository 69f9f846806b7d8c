"""The last few entries of a merge, whose intervals are hardly wider than the spacing of float64 factors."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import merge

from .intervals import rounding_intervals

_ROUNDS = 4
_MOST = 1000
_FINE = 0.25  # of half an interval, the most that a spacing may move an entry


def nudged(
    before: NDArray[Any], after: NDArray[Any], A: NDArray[np.float64], B: NDArray[np.float64], scaling: float
) -> NDArray[np.float64]:
    """Return B with single numbers moved by a few of their spacings, for entries that merge to a neighbour.

    An entry near zero, between large numbers that cancel, has an interval far narrower than its row's others,
    which do not notice. Of the row's numbers whose spacing moves the entry by little, the one is moved that
    has to move least.

    Args:
        before, after: (out, in).
        A: (r, in). B: (out, r), such that nearly all entries of the merge are those of ``after``.
        scaling: not 0.
    """
    B = B.copy()
    bits = np.dtype(f"u{after.dtype.itemsize}")
    for _ in range(_ROUNDS):
        merged = merge(before, A, B, scaling, dtype=after.dtype)
        wrong = np.argwhere(merged.view(bits) != np.ascontiguousarray(after).view(bits))
        if not 0 < len(wrong) <= _MOST:
            break
        for i, j in wrong:
            own = np.ix_([i], [j])
            centre, width = (float(value[0, 0]) for value in rounding_intervals(before[own], after[own]))
            # in the widest arithmetic there is: float64 would be off by more than the interval
            product = np.dot(B[i].astype(np.longdouble), A[:, j].astype(np.longdouble)) * scaling
            reach = np.abs(scaling * A[:, j])
            fine = np.spacing(np.abs(B[i])) * reach <= _FINE * width
            k = int(np.where(fine, reach, 0).argmax())
            if fine[k] and reach[k]:
                B[i, k] -= float((product - np.longdouble(centre)) / (scaling * A[k, j]))
    return B
