"""The intervals that hold the exact entries of a block, evaluated for all of its entries at once."""

from typing import Any

import numpy as np

from .formats import Array, FloatFormat

# A product of at most this many multiplications is too small for OpenBLAS to start threads of its own for.
_SERIAL_PRODUCT = 1 << 18


class IntervalEvaluator:
    """Evaluates ``W0 + B @ A`` with an interval around each entry; owns the scratch memory for it.

    Works in float32 or float64. The ends are float32 for a 16-bit target, and float64 for float32.
    """

    def __init__(self, dtype: np.dtype[Any], target: FloatFormat) -> None:
        self._dtype = dtype
        self._narrow = target.dtype.itemsize == 2
        self._allocate((0, 0))

    def ends(
        self, W0: Array, B: Array, A: Array, relative: float, absolute: float, largest: float
    ) -> tuple[Array, Array]:
        """Return the lower and the upper ends, v - e and v + e; the next call overwrites both.

        Args:
            W0: (rows, columns), of any dtype. B: (rows, r), times the scaling, and A: (r, columns), both of
            the
                dtype worked in.
            relative, absolute: e = relative |v| + absolute. largest: at least every |v|.
        """
        if self._value.shape != W0.shape:
            self._allocate(W0.shape)
        np.copyto(self._scratch, W0, casting="same_kind")
        multiply(B, A, self._value)
        np.add(self._value, self._scratch, out=self._value)
        if not self._narrow:
            # So many bits lie between float64 and float32 that the e of the largest entry does for all.
            e = relative * largest + absolute
            np.subtract(self._value, e, out=self._scratch)
            return self._scratch, np.add(self._value, e, out=self._value)
        np.copyto(self._value32, self._value, casting="same_kind")
        np.multiply(np.abs(self._value32, out=self._e), np.float32(relative), out=self._e)
        np.add(self._e, np.float32(absolute), out=self._e)
        np.subtract(self._value32, self._e, out=self._low32)
        return self._low32, np.add(self._value32, self._e, out=self._value32)

    def _allocate(self, shape: tuple[int, ...]) -> None:
        self._value, self._scratch = np.empty(shape, self._dtype), np.empty(shape, self._dtype)
        if self._narrow:
            wide = self._dtype.itemsize == 8
            self._value32 = np.empty(shape, np.float32) if wide else self._value
            self._low32 = np.empty(shape, np.float32) if wide else self._scratch
            self._e = np.empty(shape, np.float32)


def multiply(B: Array, A: Array, out: Array) -> None:
    """Write ``B @ A`` into ``out``, as a stack of products that OpenBLAS computes in the calling thread."""
    (m, r), c = B.shape, A.shape[1]
    group = max(1, min(m, _SERIAL_PRODUCT // max(1, r * c)))
    whole = m // group * group
    np.matmul(B[:whole].reshape(-1, group, r), A, out=out[:whole].reshape(-1, group, c))
    if whole < m:
        np.matmul(B[whole:], A, out=out[whole:])
