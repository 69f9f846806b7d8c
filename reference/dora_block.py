"""One band of rows of a DoRA merge in float64, with a proof for each entry that its rounding is the correct
one.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .dora import widened
from .dora_entries import RowMerger, is_ordinary
from .error_free import Float64
from .formats import Array, float_format, nonfinite_mask
from .rounding import round_float64
from .tiles import Position, Tile

# What is in float64 at once: so many entries of the weight, and of A.
_BLOCK_COLUMNS = 1 << 13
_PANEL_ENTRIES = 1 << 17
# A product of at most this many multiplications is too small for OpenBLAS to start threads of its own for.
_SERIAL_PRODUCT = 1 << 18
_U = 2.0**-53
_ETA = 2.0**-1074
# The most that a norm may be off, as a part of it.
_LARGEST_DOUBT = 1 / 8
# Underflows beside numbers that round to anything but zero in the narrower formats.
_TINY = 2.0**-1000


class BandMerger:
    """Merges bands of whole rows; shared by all threads.

    **Ziv's test for a rescaled row.** Let w = W0 + s (BA) be a row over the reals, v its float64 evaluation,
    and u = 2^-53. As for any merge, with B' = fl(s B) and b = ||B'||_1 max|A|,

        |v - w| <= e = u |v| + c,   c = 2 (r + 4) u b + 2 r eta (max|A| + 1)

    (r products, r - 1 sums in any order, the rounding of B' and of the last sum; an underflow in each B' and
    each product). Let t be the root of the sum of the v^2, added up pairwise, so that at most k roundings are
    on each path. Then, for t between 2^-250 and 2^450 where no underflow in it matters,

        | t - ||w|| | <= d t,   d = (k + 6) u + c sqrt(in) / t

    for || ||v|| - ||w|| || <= ||v - w|| <= u ||v|| + c sqrt(in). Where d <= 1/8, f = fl(m / t) and q~ = fl(v
    f) give

        | q~ - q | <= (8/7) (d + 2 u) |q~| + (8/7) |f| c + 3 u |q~|,   q = m w / ||w||

    and E = |q~| (2 d + 8 u) + 2 |f| c + 2^-1000 has room for that, for the roundings in E and in q~ -+ E, and
    for underflows. If fl(q~ - E) and fl(q~ + E) round to the same number of the target, sign included, so
    does q. What is left over, and all of float64, goes to `RowMerger`.
    """

    def __init__(self, W0: Array, A: Array, B: Array, scaling: float, magnitude: Array, out: Array) -> None:
        self._W0, self._A, self._B, self._scaling = W0, A, B, scaling
        self._magnitude, self._out, self._target = magnitude, out, float_format(out.dtype)

    def merge(self, tile: Tile) -> Position | None:
        """Write ``out[tile]``; return where it first has no norm (at its column 0) or overflows."""
        rows, columns = tile
        B, m = widened(self._B[rows]), widened(self._magnitude[rows])
        W0, out = self._W0[rows], self._out[rows]
        with np.errstate(all="ignore"):
            scaled = B * self._scaling
            norm, constant, doubt = self._norms(W0, scaled)
            sound = is_ordinary(norm) & (doubt <= _LARGEST_DOUBT)
            factor = m / norm
            relative, constant = _error_terms(factor, constant, np.where(sound, doubt, np.inf))
        single = RowMerger(W0, self._A, B, self._scaling, m, norm, self._target)
        for row in np.flatnonzero(~sound).tolist():
            if single.square(row) == 0:
                return row, 0
        overflows: list[Position] = []
        for panel, A in self._panels(columns.stop):
            with np.errstate(all="ignore"):
                rescaled = _evaluate(W0[:, panel], scaled, A) * factor[:, None]
                error = np.abs(rescaled) * relative[:, None] + constant[:, None]
                uncertain = _round_certain(rescaled, error, out[:, panel])
            i, j = np.nonzero(uncertain)
            out[i, j + panel.start] = single.entries(i, j + panel.start)
            first = np.argwhere(nonfinite_mask(out[:, panel]))[:1].tolist()
            overflows += [(row, column + panel.start) for row, column in first]
        return min(overflows, default=None)

    def _panels(self, columns: int) -> Iterator[tuple[slice, Float64]]:
        """Yield ranges of columns, and A there in float64."""
        width = min(_BLOCK_COLUMNS, -(-_PANEL_ENTRIES // len(self._A)))
        for start in range(0, columns, width):
            panel = slice(start, min(start + width, columns))
            yield panel, widened(self._A[:, panel])

    def _norms(self, W0: Array, scaled: Float64) -> tuple[Float64, Float64, Float64]:
        """Return t, c and d of each row."""
        total = np.zeros(len(W0))
        largest, depth, panels = 0.0, 0, 0
        for panel, A in self._panels(W0.shape[1]):
            values = _evaluate(W0[:, panel], scaled, A)
            total += _sum_rows(values * values)
            largest = max(largest, float(np.abs(A).max()))
            depth, panels = max(depth, (A.shape[1] - 1).bit_length()), panels + 1
        r, size, norm = scaled.shape[1], np.abs(scaled).sum(axis=1), np.sqrt(total)
        constant = 2 * (r + 4) * _U * size * largest + 2 * r * _ETA * (largest + 1)
        doubt = (1 + depth + panels + 6) * _U + constant * math.sqrt(W0.shape[1]) / norm
        return norm, constant, doubt


def _error_terms(factor: Float64, constant: Float64, doubt: Float64) -> tuple[Float64, Float64]:
    """Return a and b of the error E = a |q~| + b of each row."""
    return 2 * doubt + 8 * _U, 2 * np.abs(factor) * constant + _TINY


def _evaluate(W0: Array, scaled: Float64, A: Float64) -> Float64:
    """Return ``W0 + scaled @ A``, by products that OpenBLAS computes in the calling thread."""
    (rows, r), columns = scaled.shape, A.shape[1]
    values = np.empty((rows, columns))
    step = max(1, _SERIAL_PRODUCT // (r * columns))
    for start in range(0, rows, step):
        np.matmul(scaled[start : start + step], A, out=values[start : start + step])
    values += W0
    return values


def _round_certain(values: Float64, error: Float64, out: Array) -> NDArray[np.bool_]:
    """Round into ``out``; return where that is not proven right."""
    out[...] = round_float64(values - error, out.dtype)
    bits = float_format(out.dtype).bits
    other = round_float64(values + error, out.dtype)
    uncertain: NDArray[np.bool_] = np.ascontiguousarray(out).view(bits) != other.view(bits)
    uncertain |= ~np.isfinite(values) | ~np.isfinite(error)
    return uncertain


def _sum_rows(values: Float64) -> Float64:
    """Return the sum of each row, added up pairwise: log2 of the row's length roundings on each path."""
    while tail := values.shape[1] // 2:
        half = values.shape[1] - tail
        head = values[:, :half].copy()
        head[:, :tail] += values[:, half:]
        values = head
    return values[:, 0]
