"""Single entries of a merge, wherever they lie: by the cheapest way that proves each."""

from collections.abc import Iterator

import numpy as np

from .factors import Factors, norm_bound
from .formats import Array, FloatFormat, nonfinite_mask
from .merge_entries import Index, merged_entries
from .merge_proof import evaluation_error, prove_entries

_PRODUCTS_AT_ONCE = 1 << 16


def single_entries(factors: Factors, W0: Array, i: Index, j: Index, target: FloatFormat) -> Array:
    """Return the entries at (i, j) of ``W0`` plus the factors, each rounded once; an overflow is an infinity.

    Args:
        factors, W0: what the factors update, finite where it is read. i, j: (n,).
    """
    entries = np.empty(len(i), target.dtype)
    for some in _pieces(len(i), factors.r):
        entries[some] = _piece(factors, W0, i[some], j[some], target)
    return entries


def _piece(factors: Factors, W0: Array, i: Index, j: Index, target: FloatFormat) -> Array:
    """For 16 bits in float64 first, and in more what that does not prove."""
    w, B, A = W0[i, j].astype(np.float64), factors.left(i), factors.panel(j)
    if target.dtype.itemsize > 2:
        own = np.arange(len(i))
        return merged_entries(w, own, own, A, B, factors.spans, target)
    b = B * factors.scalings
    error = evaluation_error(A.dtype, len(A), norm_bound(b, axis=1), norm_bound(A, axis=0))
    entries, proven = prove_entries(w, b, A.T, error, target)
    rest = np.flatnonzero(~(proven & ~nonfinite_mask(entries)))
    if len(rest):
        own = np.arange(len(rest))
        entries[rest] = merged_entries(w[rest], own, own, A[:, rest], B[rest], factors.spans, target)
    return entries


def _pieces(count: int, r: int) -> Iterator[slice]:
    """Cut a list of entries so that the products of each piece, r of an entry, fit the cache."""
    step = max(1, _PRODUCTS_AT_ONCE // r)
    return (slice(start, start + step) for start in range(0, count, step))
