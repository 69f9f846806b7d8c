"""The intervals that hold the exact entries of a block, and their ends rounded, for all entries at once."""

from typing import Any

import numpy as np

from .error_free import Float64
from .formats import BFLOAT16, Array, FloatFormat

# A product of at most this many multiplications is too small for OpenBLAS to start threads of its own for.
_SERIAL_PRODUCT = (1 << 18) - 1
# As many entries as a few threads can work on without waiting for one another's turn in the interpreter.
_BLOCK_ENTRIES = 1 << 17
_MOST_COLUMNS = 1 << 7
_LEAST_COLUMNS = 1 << 4
_HALF_BFLOAT16 = np.uint32(1 << 15)
_SIXTEEN = np.uint32(16)


class IntervalEvaluator:
    """Evaluates ``W0 + B @ A`` with an interval around each entry, rounds both ends; owns the scratch memory.

    For one A. Works in float32 or float64; the ends are float32 for a 16-bit target, and float64 for float32.

    A is held as slices of a few columns each, so that a product of one of them with the rows of a block is
    small enough for one thread; a stack of products is one call.
    """

    def __init__(self, A: Float64, dtype: np.dtype[Any], target: FloatFormat) -> None:
        """Take A, (r, columns), and the dtype to work in."""
        self._narrow = target.dtype.itemsize == 2
        self._r, self._columns = A.shape
        terms = self._r if self._narrow else self._r + 1
        self._rows, width = block_shape(terms, self._columns)
        self._A = _slices(A, terms, width, dtype)
        self._B = np.empty((self._rows, terms), dtype)
        last = np.dtype(np.float32) if self._narrow else dtype
        shape = (self._rows, len(self._A) * width)
        self._product = np.empty(shape, dtype)
        self._value = self._product if dtype == last else np.empty(shape, last)
        self._scratch = np.empty((self._rows, self._columns), last)
        self._e = np.empty(self._scratch.shape if self._narrow else (0, 0), last)
        self._other = np.empty(self._scratch.shape, target.dtype)

    @property
    def rows(self) -> int:
        """How many rows a block may have."""
        return self._rows

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
        value, scratch, other = self._value[:rows, : self._columns], self._scratch[:rows], self._other[:rows]
        load(W0, scratch)
        if self._narrow:
            self._multiply(B)
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
            self._B[:rows, self._r] = -most
            self._multiply(B)
            store(np.add(value, scratch, out=value), out)
            store(np.add(value, 2 * most, out=scratch), other)
        return other

    def _multiply(self, B: Float64) -> None:
        """Write ``B @ A`` to the value."""
        rows = len(B)
        self._B[:rows, : self._r] = B
        product = self._product[:rows].reshape(rows, len(self._A), -1).swapaxes(0, 1)
        np.matmul(self._B[:rows], self._A, out=product)
        if self._value is not self._product:
            np.copyto(self._value[:rows], self._product[:rows], casting="same_kind")


def block_shape(terms: int, columns: int) -> tuple[int, int]:
    """Return how many rows a block has, and how many columns, a power of two, a slice of A.

    Rows times ``terms`` times a slice's columns are the multiplications of one product: few enough for one
    thread, where ``terms`` allows for it.
    """
    rows = max(1, min(_BLOCK_ENTRIES // max(1, columns), _SERIAL_PRODUCT // (terms * _LEAST_COLUMNS)))
    most = max(1, min(_MOST_COLUMNS, columns, _SERIAL_PRODUCT // (terms * rows)))
    return rows, 1 << (most.bit_length() - 1)


def _slices(A: Float64, terms: int, width: int, dtype: np.dtype[Any]) -> Array:
    """Return A as (slices, terms, width) with zeros beyond its columns, and ones where it has no rows."""
    r, columns = A.shape
    slices = np.zeros((-(-columns // width), terms, width), dtype)
    slices[:, r:] = 1
    for number, own in enumerate(slices):
        part = A[:, number * width : (number + 1) * width]
        own[:r, : part.shape[1]] = part
    return slices


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
    """Round float32 or float64 numbers to ``out``, bfloat16 with ties away from zero; spoils ``values``."""
    if out.dtype == BFLOAT16:
        bits = values.view(np.uint32)
        np.add(bits, _HALF_BFLOAT16, out=bits)
        np.right_shift(bits, _SIXTEEN, out=bits)
        np.copyto(out.view(np.uint16), bits, casting="unsafe")
    else:
        np.copyto(out, values, casting="same_kind")
