"""The intervals that hold the exact entries of a block, and their ends rounded, for all entries at once."""

from typing import Any

import numpy as np

from .error_free import Float64
from .float16_bits import narrow
from .formats import BFLOAT16, Array, FloatFormat
from .merge_product import ProductEvaluator, load

_HALF_BFLOAT16 = np.uint32(1 << 15)
_SIXTEEN = np.uint32(16)


class IntervalEvaluator:
    """Evaluates ``W0 + B @ A`` with an interval around each entry, rounds both ends; owns the scratch memory.

    For one A. Works in float32 or float64; the ends are float32 for a 16-bit target, and float64 for float32.
    """

    def __init__(self, A: Float64, dtype: np.dtype[Any], target: FloatFormat) -> None:
        """Take A, (r, columns), and the dtype to work in."""
        self._narrow = target.dtype.itemsize == 2
        self._product = ProductEvaluator(A, dtype, target, constants=0 if self._narrow else 1)
        shape, last = (self._product.rows, A.shape[1]), self._product.dtype
        self._scratch = np.empty(shape, last)
        self._e = np.empty(shape if self._narrow else (0, 0), last)
        self._other = np.empty(shape, target.dtype)

    @property
    def rows(self) -> int:
        """How many rows a block may have."""
        return self._product.rows

    def round_ends(
        self, W0: Array, B: Float64, relative: float, absolute: float, largest: float, out: Array
    ) -> Array:
        """Write the lower ends, v - e rounded, to ``out``; return the upper ends rounded, v + e.

        Where the two agree they are the correct rounding of every number between the ends. A tie may come out
        either way, but then the two differ. The next call overwrites what is returned.

        Args:
            W0: (rows, columns), of any dtype. B: (rows, r), times the scaling.
            relative, absolute: e = relative |v| + absolute. largest: at least every |v|.
            out: (rows, columns), of the target's dtype.
        """
        rows = len(W0)
        scratch, other = self._scratch[:rows], self._other[:rows]
        load(W0, scratch)
        if self._narrow:
            value = self._product.multiply(B)
            np.add(value, scratch, out=value)
            e = np.abs(value, out=self._e[:rows])
            np.multiply(e, np.float32(relative), out=e)
            np.add(e, np.float32(absolute), out=e)
            store(np.subtract(value, e, out=scratch), out)
            store(np.add(value, e, out=scratch), other)
        else:
            # So many bits lie between float64 and float32 that the e of the largest entry does for all. It is
            # taken away by the product itself, in a term more.
            most = relative * largest + absolute
            value = self._product.multiply(B, -most)
            store(np.add(value, scratch, out=value), out)
            store(np.add(value, 2 * most, out=scratch), other)
        return other


def store(values: Array, out: Array) -> None:
    """Round float32 or float64 numbers to ``out``, 16 bits with ties away from zero; spoils ``values``."""
    if out.dtype == BFLOAT16:
        bits = values.view(np.uint32)
        np.add(bits, _HALF_BFLOAT16, out=bits)
        np.right_shift(bits, _SIXTEEN, out=bits)
        np.copyto(out.view(np.uint16), bits, casting="unsafe")
    elif out.dtype == np.float16 and values.dtype == np.float32:
        narrow(values, out)
    else:
        np.copyto(out, values, casting="same_kind")
