"""The intervals that hold the exact entries of a block, and their ends rounded, for all entries at once."""

from typing import Any

import numpy as np

from .formats import BFLOAT16, Array, FloatFormat

# A product of at most this many multiplications is too small for OpenBLAS to start threads of its own for.
_SERIAL_PRODUCT = 1 << 18
_HALF_BFLOAT16 = np.uint32(1 << 15)
_SIXTEEN = np.uint32(16)


class IntervalEvaluator:
    """Evaluates ``W0 + B @ A`` with an interval around each entry, rounds both ends; owns the scratch memory.

    Works in float32 or float64. The ends are float32 for a 16-bit target, and float64 for float32.
    """

    def __init__(self, dtype: np.dtype[Any], target: FloatFormat) -> None:
        self._dtype, self._target = dtype, target
        self._last = np.dtype(np.float32) if target.dtype.itemsize == 2 else dtype
        self._allocate((0, 0))

    def round_ends(
        self, W0: Array, B: Array, A: Array, relative: float, absolute: float, largest: float, out: Array
    ) -> Array:
        """Write the lower ends, v - e rounded, to ``out``; return the upper ends rounded, v + e.

        Where the two agree they are the correct rounding of every number between the ends. A tie may come out
        either way, but then the two differ. The next call overwrites what is returned.

        Args:
            W0: (rows, columns), of any dtype. B: (rows, r), times the scaling, and A: (r, columns), both of
            the
                dtype worked in.
            relative, absolute: e = relative |v| + absolute. largest: at least every |v|.
            out: (rows, columns), of the target's dtype.
        """
        if self._product.shape != W0.shape:
            self._allocate(W0.shape)
        multiply(B, A, self._product)
        if self._product.dtype != self._last:
            np.copyto(self._value, self._product, casting="same_kind")
        load(W0, self._scratch)
        np.add(self._value, self._scratch, out=self._value)
        e: Array | float
        if self._last.itemsize == 4:
            np.multiply(np.abs(self._value, out=self._e), np.float32(relative), out=self._e)
            e = np.add(self._e, np.float32(absolute), out=self._e)
        else:
            # So many bits lie between float64 and float32 that the e of the largest entry does for all.
            e = relative * largest + absolute
        store(np.subtract(self._value, e, out=self._scratch), out)
        store(np.add(self._value, e, out=self._scratch), self._other)
        return self._other

    def _allocate(self, shape: tuple[int, ...]) -> None:
        self._product = np.empty(shape, self._dtype)
        self._value = self._product if self._dtype == self._last else np.empty(shape, self._last)
        self._scratch = np.empty(shape, self._last)
        self._e = np.empty(shape if self._last.itemsize == 4 else (0, 0), np.float32)
        self._other = np.empty(shape, self._target.dtype)


def load(values: Array, out: Array) -> None:
    """Write numbers of any of the four dtypes to a float32 or float64 array, float64 rounded to float32.

    bfloat16 is the upper half of float32. Moving its bits, unlike ml_dtypes' conversion, leaves Python's
    other threads running.
    """
    if values.dtype == BFLOAT16:
        wide = out if out.dtype == np.float32 else np.empty(values.shape, np.float32)
        np.left_shift(values.view(np.uint16), _SIXTEEN, out=wide.view(np.uint32), dtype=np.uint32)
        values = wide
    if values is not out:
        np.copyto(out, values, casting="same_kind")


def store(values: Array, out: Array) -> None:
    """Round float32 or float64 numbers to ``out``'s dtype, bfloat16 with ties away from zero; spoils
    ``values``.
    """
    if out.dtype == BFLOAT16:
        bits = values.view(np.uint32)
        np.add(bits, _HALF_BFLOAT16, out=bits)
        np.right_shift(bits, _SIXTEEN, out=out.view(np.uint16), casting="unsafe", dtype=np.uint32)
    else:
        np.copyto(out, values, casting="same_kind")


def multiply(B: Array, A: Array, out: Array) -> None:
    """Write ``B @ A`` into ``out``, as a stack of products that OpenBLAS computes in the calling thread."""
    (m, r), c = B.shape, A.shape[1]
    group = max(1, min(m, _SERIAL_PRODUCT // max(1, r * c)))
    whole = m // group * group
    np.matmul(B[:whole].reshape(-1, group, r), A, out=out[:whole].reshape(-1, group, c))
    if whole < m:
        np.matmul(B[whole:], A, out=out[whole:])
