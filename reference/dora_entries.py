"""Single entries of a DoRA merge in about 106 bits, with an error bound; exactly where even that cannot
decide."""

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .dora import widened
from .error_free import Float64, two_product, two_sum
from .formats import Array, FloatFormat, float_format, nonfinite_mask
from .merge_entries import Index, round_sum, sum_in_double_double
from .rounding import round_fraction

# At most this many products of A and B, and entries, are held in double-double at once.
_PRODUCTS_AT_ONCE = 1 << 15
_U2 = 2.0**-106
_NEGLIGIBLE, _TRUSTED = 2.0**-200, 2.0**-100
# What T and q1 have to be for the error of a quotient to be as it is said below; the growth of a sum of d.
_LARGEST_T, _SMALLEST_RESULT = 2.0**-60, 2.0**-900
_SUM_GROWTH = 2.0**-50
# Norms of which every square that matters is far from the ends of the range.
_SMALLEST_NORM, _LARGEST_NORM = 2.0**-250, 2.0**450


def is_ordinary(norm: Float64) -> NDArray[np.bool_]:
    """Return where neither the squares of a norm in float64 nor their root leave the range."""
    ordinary: NDArray[np.bool_] = (norm >= _SMALLEST_NORM) & (norm <= _LARGEST_NORM)
    return ordinary


class RowMerger:
    """Computes entries ``m[i] w[i, j] / ||w[i]||`` of a band of rows, w = W0 + scaling * B @ A exactly.

    W0 (m, c), B (m, r) and the magnitudes (m,) are those of the band, the latter two in float64; A is (r, c).

    **In double-double.** u = 2^-53. `merge_entries` gives each w as h + l with an error d, |l| <= u |h|. Let
    y be the row of the h + l: | ||w|| - ||y|| | <= sum d. A square is taken as p + x, with p + x' = h h
    exactly and x = x' + 2 h l, to an error of 7 u^2 p. In the pairwise sum of the p, with the residuals added
    to the x, |x| grows by u p a level, and is rounded twice: after L levels and panels that is 2 u^2 (L +
    4)^2 of the sum with the squares' own errors, of which twice is allowed. Entries below 2^-200 of a norm
    that is at most 2^100 ||y|| are left out; all together they weigh less than 2^-200 c. One Newton step from
    th = fl(sqrt(sum)), tl = (sum - th^2) / (2 th), gives the root to 10 u^2, so that

        | th + tl - ||w|| | <= T th,    T = 10 u^2 + 4 u^2 (L + 4)^2 + sum d / th

    The quotient m (h + l) / (th + tl) is q1 + q2, q1 = fl(fl(m h) / th) and q2 the residual over th, to 33
    u^2 |q1|. With T <= 2^-60, and |q1| >= 2^-900 and |m h| >= 2^-960, beside which an underflow is less
    than 2^-9 u^2,

        | q1 + q2 - q | <= |q1| (64 u^2 + 2 T) + 2 |m| d / th

    **Exactly.** What the ends of that interval do not round to one number, or what is out of the ranges
    above, is the root of the rational m^2 w^2 / ||w||^2: see `round_root`.
    """

    def __init__(
        self,
        W0: Array,
        A: Array,
        B: Float64,
        scaling: float,
        magnitude: Float64,
        norm: Float64,
        target: FloatFormat,
    ) -> None:
        """Take the tensors, and the norms as computed in float64, which need not be right."""
        self._W0, self._A, self._B, self._scaling = W0, A, B, scaling
        self._magnitude, self._norm, self._target = magnitude, norm, target
        self._squares: dict[int, Fraction] = {}
        self._done = ~is_ordinary(norm)
        self._norms = np.full((3, *norm.shape), np.nan)

    def square(self, row: int) -> Fraction:
        """Return the exact ``||w||^2`` of a row."""
        if row not in self._squares:
            self._squares[row] = exact_square(self._W0[row], self._A, self._B[row], self._scaling)
        return self._squares[row]

    def entries(self, rows: Index, columns: Index) -> Array:
        """Return the entries at the places given, each rounded once; zero is +0, an overflow infinite."""
        self._prepare(np.unique(rows[~self._done[rows]]))
        step = -(-_PRODUCTS_AT_ONCE // len(self._A))
        pieces = [
            self._entries(rows[start : start + step], columns[start : start + step])
            for start in range(0, len(rows), step)
        ]
        return np.concatenate([np.empty(0, self._target.dtype), *pieces])

    def _prepare(self, rows: Index) -> None:
        """Compute the norms of rows in double-double; those that are not ordinary stay NaN."""
        self._done[rows] = True
        step = -(-_PRODUCTS_AT_ONCE // (len(self._A) * self._width()))
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            with np.errstate(all="ignore"):
                self._norms[:, chunk] = self._norms_of(chunk)

    def _width(self) -> int:
        """Return how many columns of a row are taken at once."""
        return min(int(self._A.shape[1]), -(-_PRODUCTS_AT_ONCE // len(self._A)))

    def _merged(self, rows: Index, columns: Index) -> tuple[Float64, Float64, Float64]:
        """Return ``W0 + scaling * B @ A`` at the given places, as high, low and error."""
        needed, places = np.unique(columns, return_inverse=True)
        A, w = widened(self._A[:, needed]), widened(self._W0[rows, columns])
        return sum_in_double_double(w, rows, places, A, self._B, [(slice(None), self._scaling)])

    def _norms_of(self, rows: Index) -> tuple[Float64, Float64, Float64]:
        """Return the rows' norms as th, tl and the relative error T."""
        norm = self._norm[rows]
        columns, width = self._A.shape[1], self._width()
        high, low, error = (np.zeros(len(rows)) for _ in range(3))
        for start in range(0, columns, width):
            panel = np.arange(start, min(start + width, columns))
            i, j = np.repeat(rows, len(panel)), np.tile(panel, len(rows))
            h, lo, lost = (part.reshape(len(rows), len(panel)) for part in self._merged(i, j))
            h = np.where(np.abs(h) < _NEGLIGIBLE * norm[:, None], 0.0, h)
            square, rest = two_product(h, h)
            square, rest = _sum_rows(square, rest + 2 * h * lo)
            high, low = _add(high, low, square, rest)
            error += lost.sum(axis=1)
        high, low = two_sum(high, low)
        root = np.sqrt(high)
        square, rest = two_product(root, root)
        below = (((high - square) - rest) + low) / (2 * root)
        steps = (width - 1).bit_length() - (-columns // width)
        relative = (10 + 4 * (steps + 4.0) ** 2) * _U2 + error / root * (1 + columns * _SUM_GROWTH)
        # Where a row has cancelled, ``norm`` says nothing of what may be left out.
        return root, below, np.where(root >= _TRUSTED * norm, relative, np.nan)

    def _entries(self, rows: Index, columns: Index) -> Array:
        m = self._magnitude[rows]
        th, tl, relative = (part[rows] for part in self._norms)
        with np.errstate(all="ignore"):
            high, low, lost = self._merged(rows, columns)
            zero = ((high == 0) & (low == 0) & (lost == 0)) | (m == 0)
            q1, q2 = _quotient(high, low, m, th, tl)
            error = _quotient_error(q1, relative, m, lost, th)
            certain = (relative <= _LARGEST_T) & (np.abs(q1) >= _SMALLEST_RESULT)
            result, decided = _round_between(*two_sum(q1, q2), error, self._target)
        certain &= decided
        result[zero] = 0
        for n in np.flatnonzero(~(certain | zero)):
            result[n] = self._exact(int(rows[n]), int(columns[n]))
        return result

    def _exact(self, row: int, column: int) -> Any:
        w = exact_merged(self._W0[row, column], self._B[row], self._A[:, column], self._scaling)
        return exact_dora_entry(w, self.square(row), self._magnitude[row], self._target.dtype)


def exact_merged(w: Any, b: Iterable[Any], a: Iterable[Any], scaling: float) -> Fraction:
    """Return ``w + scaling * sum_k b[k] a[k]`` exactly."""
    update = sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(b, a, strict=True))
    return Fraction(float(w)) + Fraction(scaling) * update


def exact_square(w: Array, A: Array, b: Array, scaling: float) -> Fraction:
    """Return ``sum_j (w[j] + scaling * sum_k b[k] A[k, j])^2`` exactly; integers do the work."""
    width = -(-_PRODUCTS_AT_ONCE // len(A))
    total = Fraction(0)
    (own,), own_unit = _integers(np.array([scaling]))
    b_whole, b_unit = _integers(b)
    for start in range(0, len(w), width):
        a_whole, a_unit = _integers(A[:, start : start + width])
        w_whole, w_unit = _integers(w[start : start + width])
        unit = own_unit + b_unit + a_unit
        least = min(unit, w_unit)
        row = w_whole * (1 << (w_unit - least)) + (b_whole @ a_whole) * (own << (unit - least))
        total += Fraction(int((row * row).sum())) * Fraction(4) ** least
    return total


def exact_dora_entry(w: Fraction, square: Fraction, m: float, dtype: DTypeLike) -> Any:
    """Return ``m w / sqrt(square)`` rounded once to ``dtype``; zero is +0, an overflow an infinity."""
    m_exact = Fraction(float(m))
    return round_root(m_exact * m_exact * w * w / square, (m_exact < 0) != (w < 0), dtype)


def round_root(square: Fraction, negative: bool, dtype: DTypeLike) -> Any:
    """Return the root of a rational, with the sign given, rounded once to ``dtype``; zero gives +0.

    The root is cut to 63 bits or more, and a last bit says whether that was exact: numbers halfway between
    two of ``dtype`` are among those of so many bits, so what lies between those is rounded alike.
    """
    if square == 0:
        return float_format(dtype).dtype.type(0.0)
    shift = 64 - (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    scaled = square * Fraction(4) ** shift
    whole = math.isqrt(scaled.numerator // scaled.denominator)
    sticky = 2 * whole + (whole * whole != scaled)
    root = Fraction(sticky) / Fraction(2) ** (shift + 1)
    return round_fraction(-root if negative else root, dtype)


def _quotient(h: Float64, lo: Float64, m: Float64, th: Float64, tl: Float64) -> tuple[Float64, Float64]:
    """Return ``m (h + lo) / (th + tl)`` as a sum of two."""
    top, rest = two_product(h, m)
    rest = rest + m * lo
    q = top / th
    back, back_rest = two_product(q, th)
    return q, ((((top - back) - back_rest) + rest) - q * tl) / th


def _quotient_error(q: Float64, relative: Float64, m: Float64, lost: Float64, th: Float64) -> Float64:
    """Return ``|q| (64 u^2 + 2 T) + 2 |m| d / th``."""
    error: Float64 = np.abs(q) * (64 * _U2 + 2 * relative) + 2 * np.abs(m) * lost / th
    return error


def _round_between(
    high: Float64, low: Float64, error: Float64, target: FloatFormat
) -> tuple[Array, NDArray[np.bool_]]:
    """Round ``high + low``; return also where that is finite and all numbers within the error round alike.

    What is not finite on the way makes the result so.
    """
    # One step outwards covers the rounding of low -+ error.
    result = round_sum(high, np.nextafter(low - error, -np.inf), target)
    other = round_sum(high, np.nextafter(low + error, np.inf), target)
    return result, (result.view(target.bits) == other.view(target.bits)) & ~nonfinite_mask(result)


def _sum_rows(high: Float64, low: Float64) -> tuple[Float64, Float64]:
    """Return the sum of each row, pairwise, as high and low."""
    while tail := high.shape[1] // 2:
        half = high.shape[1] - tail
        head_high, head_low = _add(high[:, :tail], low[:, :tail], high[:, half:], low[:, half:])
        high = np.concatenate([head_high, high[:, tail:half]], axis=1)
        low = np.concatenate([head_low, low[:, tail:half]], axis=1)
    return high[:, 0], low[:, 0]


def _add(high: Float64, low: Float64, high2: Float64, low2: Float64) -> tuple[Float64, Float64]:
    total, rest = two_sum(high, high2)
    return total, (low + low2) + rest


def _integers(values: Array) -> tuple[NDArray[Any], int]:
    """Return an object array of ints k and an exponent e, with ``values == k * 2^e``."""
    ratios = [value.as_integer_ratio() for value in widened(values).ravel().tolist()]
    common = max(denominator for _, denominator in ratios)  # of powers of two
    whole = np.fromiter((n * (common // d) for n, d in ratios), object)
    return whole.reshape(values.shape), 1 - common.bit_length()
