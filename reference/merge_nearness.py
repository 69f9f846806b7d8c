"""Which of somebody's merged entries are proven right without merging: so near to the value evaluated that
no other number can be the exact entry's rounding.

Let v be the value that `merge_proof` evaluates, |v - q| <= e, 2^k <= |v| < 2^(k+1), p the target's precision
and h = 2^(k-p), half the spacing of its numbers around v. A number g of the target with

    |v - g| + e < h    and    2 e < h

is q rounded: |q - g| < h, so g is nearest to q where q is in v's binade, or in the next, where g must be the
power of two between them. Below 2^k the spacing is half as large: then g is 2^k and |q - 2^k| <= e < h / 2.
Zero is not proven: |v - 0| is 2^k or more. Where the target's numbers around v are subnormal they lie further
apart than h says, and so near a number is the right one all the more; for subnormal numbers of float16, which
weights do have, h is what it is there, but for zero, whose sign nothing is known about.

|v - g| and h are computed to within a few units in the last place, for which e has room.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .error_free import Float64
from .float16_bits import widen
from .formats import Array, FloatFormat
from .merge_entries import Index
from .merge_product import ProductEvaluator, load
from .merge_proof import EvaluationError

_NOTHING: Index = np.empty(0, np.intp)
_ROOM = 1 + 2.0**-10


class NearnessEvaluator:
    """Evaluates ``W0 + B @ A`` and compares; owns the scratch memory. For one A, in float32 or float64."""

    def __init__(self, A: Float64, dtype: np.dtype[Any], target: FloatFormat) -> None:
        """Take A, (r, columns), the dtype to work in, and the format of what is compared: not float64."""
        self._product = ProductEvaluator(A, dtype, target)
        last = self._product.dtype
        self._scratch = np.empty((self._product.rows, A.shape[1]), last)
        self._bits = np.dtype(f"u{last.itemsize}")
        exponent = 0x7F800000 if last.itemsize == 4 else 0x7FF0000000000000
        self._exponent = self._bits.type(exponent)
        self._half_spacing = target.unit_roundoff
        self._half_subnormal = target.smallest_subnormal / 2

    @property
    def rows(self) -> int:
        """How many rows a block may have."""
        return self._product.rows

    def unproven(self, W0: Array, B: Float64, error: EvaluationError, merged: Array) -> Index:
        """Return the flat indices of the entries of ``merged`` that are not proven right.

        Args:
            W0, merged: (rows, columns), of any dtype, and of the target's.
            B: (rows, r), times the scaling.
            error: see `merge_proof`; one ``absolute`` for each column, (columns,), or (1,).
        """
        last, rows = self._scratch.dtype.type, len(W0)
        absolute = error.absolute * _ROOM
        relative = error.relative * _ROOM
        # e <= 2 relative 2^k + absolute. As relative is 2^-p / 8 at most, 2 e < h where 4 absolute < h.
        factor = self._half_spacing * (1 - 2.0**-20) - 2 * relative
        scratch, value = self._scratch[:rows], self._product.multiply(B)
        load(W0, scratch)
        np.add(value, scratch, out=value)
        unusual = self._load(merged, scratch)
        np.subtract(value, scratch, out=scratch)
        np.abs(scratch, out=scratch)
        near = self._near_subnormals(unusual, merged, value, scratch, relative, absolute)
        bits = value.view(self._bits)
        np.bitwise_and(bits, self._exponent, out=bits)  # 2^k
        small = np.less_equal(value, (4 / self._half_spacing * absolute).astype(last))
        np.multiply(value, last(factor), out=value)
        np.subtract(value, absolute.astype(last), out=value)
        proven = np.less(scratch, value)
        np.greater(proven, small, out=proven)
        if len(unusual):
            proven[np.unravel_index(unusual, proven.shape)] = near
        return np.flatnonzero(~proven) if not proven.all() else _NOTHING

    def _load(self, merged: Array, out: Array) -> Index:
        """Write ``merged`` in float32 or float64; return where it is float16 and no normal number."""
        if merged.dtype == np.float16 and out.dtype == np.float32:
            return widen(merged, out)
        load(merged, out)
        return _NOTHING

    def _near_subnormals(
        self, places: Index, merged: Array, value: Array, distance: Array, relative: float, absolute: Float64
    ) -> NDArray[np.bool_]:
        """Return which of the subnormal numbers there are proven: not zeros, infinities and NaN."""
        place = np.unravel_index(places, merged.shape)
        e = (
            relative * np.abs(value[place].astype(np.float64))
            + np.broadcast_to(absolute, merged.shape)[place]
        )
        near = distance[place] + e < self._half_subnormal * (1 - 2.0**-20)
        proven: NDArray[np.bool_] = near & (merged[place] != 0)
        return proven
