"""Single entries of a merge in about 106 bits, with a running error bound; exactly where even that cannot
decide."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .error_free import Float64, two_product, two_sum
from .exact import exact_entry
from .formats import Array, FloatFormat
from .rounding import round_float64, round_sum_to_odd

Index = NDArray[np.intp]
Spans = Sequence[tuple[slice, float]]


def merged_entries(
    w: Float64, rows: Index, columns: Index, A: Float64, B: Float64, spans: Spans, target: FloatFormat
) -> Array:
    """Return ``w[n] + sum_g scaling_g * sum_k B[rows[n], k] A[k, columns[n]]``, each rounded once.

    Args:
        w: (n,) the frozen entries; rows, columns: (n,) where they sit in B (m, r) and A (r, c). All finite.
        spans: the range of the r components that each group g is, and its scaling, finite.

    Signs of zeros as in `exact_entry`; an overflow is an infinity.
    """
    with np.errstate(all="ignore"):
        high, low, error = sum_in_double_double(w, rows, columns, A, B, spans)
        inexact = error > 0
        # One step outwards covers the rounding of low -+ error; where nothing was lost there is no interval
        # at all.
        below = np.where(inexact, np.nextafter(low - error, -np.inf), low)
        above = np.where(inexact, np.nextafter(low + error, np.inf), low)
        result, other = round_sum(high, below, target), round_sum(high, above, target)
    zero = (high == 0) & (low == 0) & (error == 0)
    result[zero] = np.where(w == 0, w, 0.0)[zero].astype(target.dtype)
    decided = zero | (result.view(target.bits) == other.view(target.bits))
    # An unsafe product, or an overflow of float64 on the way, has left a NaN or an infinity: nothing is
    # known there.
    decided &= np.isfinite(high) & np.isfinite(low) & np.isfinite(error)
    for n in np.flatnonzero(~decided):
        groups = [(B[rows[n], span], A[span, columns[n]], scaling) for span, scaling in spans]
        result[n] = exact_entry(w[n], groups, target.dtype)
    return result


def sum_in_double_double(
    w: Float64, rows: Index, columns: Index, A: Float64, B: Float64, spans: Spans
) -> tuple[Float64, Float64, Float64]:
    """Return ``high = fl(high + low)``, ``low`` and ``error`` with ``|exact - (high + low)| <= error``.

    Every operation is error-free but the additions to ``low``; their residuals are known, and ``error`` is
    the sum of their magnitudes. So it is zero when nothing was lost, and an exact tie is seen to be one.
    """
    high, low, error = w, np.zeros_like(w), np.zeros_like(w)
    for span, scaling in spans:
        update, update_low, update_error = _scaled_product(rows, columns, A[span], B[:, span], scaling)
        high, rest = two_sum(high, update)
        low, lost = _add_all(low, rest, *update_low)
        error = error + update_error + lost
    # The error's own roundings are fewer than 4 r + 16 for each group, each of relative size 2^-53.
    error = error * (1.0 + (4 * A.shape[0] + 16 * len(spans)) * 2.0**-53)
    high, low = two_sum(high, low)
    return high, low, np.where(error > 0, np.nextafter(error, np.inf), error)


def _scaled_product(
    rows: Index, columns: Index, A: Float64, B: Float64, scaling: float
) -> tuple[Float64, tuple[Float64, Float64, Float64], Float64]:
    """Return ``scaling * sum_k B[rows, k] A[k, columns]`` as a sum of four, and a bound on its error."""
    r = A.shape[0]
    high, low = two_product(np.ascontiguousarray(B[rows].T), A[:, columns])
    error = np.zeros_like(high)
    count = r
    while count > 1:  # pairwise, so that the number of steps grows with the logarithm of r
        half = (count + 1) // 2
        head, tail = slice(0, count - half), slice(half, count)
        high[head], rest = two_sum(high[head], high[tail])
        error[head] += error[tail]
        low[head], lost = _add_all(low[head], low[tail], rest)
        error[head] += lost
        count = half
    high, high_rest = two_product(high[0], scaling)
    low, low_rest = two_product(low[0], scaling)
    # Up by one step, lest an underflow turn "a little was lost" into "nothing was lost".
    scaled = np.where(error[0] > 0, np.nextafter(error[0] * abs(scaling), np.inf), error[0])
    return high, (low, high_rest, low_rest), scaled


def _add_all(total: Float64, *terms: Float64) -> tuple[Float64, Float64]:
    """Return ``total`` plus the terms, added one by one, and the magnitudes of all losses, summed."""
    lost = np.zeros_like(total)
    for term in terms:
        total, residual = two_sum(total, term)
        lost += np.abs(residual)
    return total, lost


def round_sum(high: Float64, low: Float64, target: FloatFormat) -> Array:
    """Round the exact sum ``high + low`` once: float64's own addition does it for float64."""
    if target.precision == 53:
        total: Array = high + low
        return total
    return round_float64(round_sum_to_odd(high, low), target.dtype)
