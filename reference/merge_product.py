"""``W0 + B @ A`` of a block of rows in floating point, cut for the cache and for one thread."""

from typing import Any

import numpy as np

from .error_free import Float64
from .float16_bits import widen
from .formats import BFLOAT16, Array, FloatFormat

# A product of at most this many multiplications is too small for OpenBLAS to start threads of its own for.
_SERIAL_PRODUCT = (1 << 18) - 1
# As many entries as a few threads can work on without waiting for one another's turn in the interpreter.
_BLOCK_ENTRIES = 1 << 17
_MOST_COLUMNS = 1 << 7
_LEAST_COLUMNS = 1 << 4
_SIXTEEN = np.uint32(16)


class ProductEvaluator:
    """Evaluates ``B @ A`` for one A in float32 or float64; owns the scratch memory.

    The values are float32 for a 16-bit target, and float64 for float32.

    A is held as slices of a few columns each, so that a product of one of them with the rows of a block is
    small enough for one thread; a stack of products is one call.
    """

    def __init__(self, A: Float64, dtype: np.dtype[Any], target: FloatFormat, constants: int = 0) -> None:
        """Take A, (r, columns), the dtype to work in, and how many terms more than r each sum has: B's
        entries for these are added as they are."""
        self._r, self._columns = A.shape
        terms = self._r + constants
        self.rows, width = block_shape(terms, self._columns)
        self._A = _slices(A, terms, width, dtype)
        self._B = np.empty((self.rows, terms), dtype)
        self.dtype = np.dtype(np.float32) if target.dtype.itemsize == 2 else dtype
        shape = (self.rows, len(self._A) * width)
        self._product = np.empty(shape, dtype)
        self._value = self._product if dtype == self.dtype else np.empty(shape, self.dtype)

    def multiply(self, B: Float64, constant: float | None = None) -> Array:
        """Return ``B @ A``, (rows, columns), and the constant, if the evaluator has one, added to each sum.

        The next call overwrites it; so may the caller.
        """
        rows = len(B)
        self._B[:rows, : self._r] = B
        if constant is not None:
            self._B[:rows, self._r] = constant
        product = self._product[:rows].reshape(rows, len(self._A), -1).swapaxes(0, 1)
        np.matmul(self._B[:rows], self._A, out=product)
        if self._value is not self._product:
            np.copyto(self._value[:rows], self._product[:rows], casting="same_kind")
        return self._value[:rows, : self._columns]


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
    if values.dtype.itemsize == 2:
        wide = out if out.dtype == np.float32 else np.empty(values.shape, np.float32)
        if values.dtype == BFLOAT16:
            np.left_shift(values.view(np.uint16), _SIXTEEN, out=wide.view(np.uint32), dtype=np.uint32)
        else:
            widen(values, wide)
        values = wide
    if values is not out:
        np.copyto(out, values, casting="same_kind")
