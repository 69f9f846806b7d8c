"""The four binary floating-point formats that weights come in, and what each can represent."""

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import DTypeError

Array = NDArray[Any]
"""An array whose dtype is checked when the program runs: the type system has no bfloat16."""

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class FloatFormat:
    """A binary format with gradual underflow.

    ``precision`` counts the significant bits, the hidden one included; normal numbers are m 2^e with
    1 <= m < 2 and e from ``min_exponent`` to ``max_exponent``.
    """

    dtype: np.dtype[Any]
    precision: int
    min_exponent: int
    max_exponent: int

    @property
    def unit_roundoff(self) -> float:
        """u, the largest relative error of one rounding without underflow: 2^-precision."""
        return math.ldexp(1.0, -self.precision)

    @property
    def smallest_subnormal(self) -> float:
        """The spacing of the subnormal numbers, twice the largest absolute error of an underflow."""
        return math.ldexp(1.0, self.min_exponent - self.precision + 1)

    @property
    def smallest_normal(self) -> float:
        return math.ldexp(1.0, self.min_exponent)

    @property
    def largest(self) -> float:
        return math.ldexp(2.0 - math.ldexp(1.0, 1 - self.precision), self.max_exponent)

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integer of the same width; non-negative floats are ordered as these integers are."""
        return np.dtype(f"u{self.dtype.itemsize}")

    @property
    def infinity_bits(self) -> int:
        """The bit pattern of +infinity, the exponent field all ones; NaNs lie above it."""
        return ((1 << (8 * self.dtype.itemsize - self.precision)) - 1) << (self.precision - 1)

    @property
    def magnitude_mask(self) -> int:
        """All bits but the sign."""
        return (1 << (8 * self.dtype.itemsize - 1)) - 1


FORMATS: tuple[FloatFormat, ...] = (
    FloatFormat(np.dtype(np.float16), 11, -14, 15),
    FloatFormat(BFLOAT16, 8, -126, 127),
    FloatFormat(np.dtype(np.float32), 24, -126, 127),
    FloatFormat(np.dtype(np.float64), 53, -1022, 1023),
)
_BY_DTYPE = {form.dtype: form for form in FORMATS}


def float_format(dtype: DTypeLike, name: str = "dtype") -> FloatFormat:
    """Return the format of ``dtype``.

    Raises:
        DTypeError: not float16, bfloat16, float32 or float64 in native byte order; ``name`` opens the
        message.
    """
    form = _BY_DTYPE.get(np.dtype(dtype))
    if form is None:
        known = ", ".join(str(known.dtype) for known in FORMATS)
        raise DTypeError(
            f"{name}: expected one of {known} in native byte order, got {np.dtype(dtype)!r}; convert it"
        )
    return form


def nonfinite_mask(values: Array) -> NDArray[np.bool_]:
    """Return where ``values`` (any of the four dtypes) is NaN or infinite, by its bits: no arithmetic."""
    form = float_format(values.dtype)
    mask: NDArray[np.bool_] = _magnitude_bits(values, form) >= form.bits.type(form.infinity_bits)
    return mask


def largest_magnitude(values: Array) -> float:
    """Return ``max |values|`` exactly, 0 for an empty array; infinite or NaN if and only if an element is."""
    form = float_format(values.dtype)
    if values.dtype.itemsize > 2:
        # Faster than by bits; a NaN goes through both.
        return abs(float(np.maximum(values.max(initial=0), -values.min(initial=0))))
    return float(_magnitude_bits(values, form).max(initial=0).astype(form.bits).view(form.dtype))


def first_nonfinite(matrix: Array) -> tuple[int, int] | None:
    """Return the row and column of the first NaN or infinity in row-major order, or None."""
    if math.isfinite(largest_magnitude(matrix)):
        return None
    i, j = np.argwhere(nonfinite_mask(matrix))[0]
    return int(i), int(j)


def _magnitude_bits(values: Array, form: FloatFormat) -> NDArray[Any]:
    bits: NDArray[Any] = np.bitwise_and(values.view(form.bits), form.bits.type(form.magnitude_mask))
    return bits
