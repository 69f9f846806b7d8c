"""Rounding to nearest, ties to even, exactly once.

Rounding twice is not rounding once: 1 + 2^-8 + 2^-30 lies above the midpoint of two neighbouring bfloat16
numbers, but float32 cannot hold it, so a conversion that passes through float32 lands on the midpoint and
then on the wrong side.
That is what ml_dtypes does with float64. Passing through a wider format is harmless when the first step
rounds *to odd*: truncate, and set the last bit if anything was lost. The bit keeps the result off every
midpoint of a format that has at least two bits less (Boldo and Melquiond, "Emulation of a FMA and correctly
rounded sums", IEEE Trans. Comput. 57, 2008).
"""

import math
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .error_free import Float64, two_sum
from .formats import BFLOAT16, Array, float_format


def round_fraction(q: Fraction, dtype: DTypeLike) -> Any:
    """Round the rational ``q`` once to ``dtype`` and return the scalar.

    Subnormals are honoured, an underflow to zero keeps the sign of ``q``, a magnitude of at least the
    largest finite number plus half its spacing becomes an infinity; ``q == 0`` gives +0.

    Raises:
        DTypeError: ``dtype`` is not float16, bfloat16, float32 or float64.
    """
    form = float_format(dtype)
    if q == 0:
        return form.dtype.type(0.0)
    magnitude = abs(q)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    # Now 2^exponent <= |q| < 2^(exponent + 1); below the normal numbers the spacing stops shrinking.
    spacing = max(exponent, form.min_exponent) - form.precision + 1
    multiple = round(magnitude / Fraction(2) ** spacing)  # Python rounds a Fraction half to even
    overflow = multiple.bit_length() + spacing > form.max_exponent + 1
    rounded = math.inf if overflow else math.ldexp(multiple, spacing)
    return form.dtype.type(-rounded if q < 0 else rounded)


def round_float64(values: NDArray[np.float64], dtype: DTypeLike) -> Array:
    """Round a float64 array once to ``dtype``; a new array of the same shape, infinities where it overflows.

    Signs of zeros and of underflows are kept; NaN stays NaN.

    Raises:
        DTypeError: ``values`` is not float64, or ``dtype`` is not float16, bfloat16, float32 or float64.
    """
    target = float_format(dtype).dtype
    if values.dtype != np.float64:
        float_format(values.dtype, "values")
        values = values.astype(np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if target == BFLOAT16:
            return _float32_to_odd(values).astype(BFLOAT16)
        return values.astype(target)


def round_to(values: Array, dtype: DTypeLike) -> Array:
    """Round an array of any of the four dtypes once to ``dtype``; always a new array.

    A widening, or the same dtype, is exact and keeps every bit of -0.0.

    Raises:
        DTypeError: either dtype is not float16, bfloat16, float32 or float64.
    """
    target = float_format(dtype).dtype
    if float_format(values.dtype, "values").dtype == np.float64:
        return round_float64(values, target)
    if values.dtype.itemsize == 2 and values.size >= 1 << 16 and values.dtype != target:
        return _of_every(values.dtype, target).take(values.view(np.uint16))
    return _by_float32(values, target)


def _by_float32(values: Array, target: np.dtype[Any]) -> Array:
    """The three narrower formats all fit into float32, so this rounds once."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(np.float32, copy=False).astype(target)


@cache
def _of_every(source: np.dtype[Any], target: np.dtype[Any]) -> Array:
    """What each number of a 16-bit format is rounded to, in the order of their bits."""
    table = _by_float32(np.arange(1 << 16, dtype=np.uint16).view(source), target)
    table.flags.writeable = False
    return table


def round_sum_to_odd(high: Float64, low: Float64) -> Float64:
    """Return the exact sum ``high + low`` rounded to odd in float64: inexact sums become the neighbour with
    an odd last bit.

    Rounding the result to a format of at most 51 bits is then the same as rounding the exact sum.
    """
    total, rest = two_sum(high, low)
    bits = total.view(np.int64)
    # An even result of an inexact sum moves one step towards the exact value; the magnitude grows when
    # signs agree.
    step = np.where(np.signbit(total) == np.signbit(rest), 1, -1)
    fix = (rest != 0) & (bits & 1 == 0)
    odd: Float64 = np.where(fix, bits + step, bits).view(np.float64)
    return odd


def _float32_to_odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round to odd in float32; NaN and infinities pass, an overflow becomes the largest finite number,
    which is odd."""
    nearest = values.astype(np.float32)
    bits = nearest.view(np.int32)
    away = np.abs(nearest) > np.abs(values)
    inexact = nearest != values  # a NaN too, and setting its last bit leaves it one
    # Truncation is one step towards zero where rounding went away from it; then the last bit is set.
    return np.where(inexact, (bits - away) | 1, bits).view(np.float32)
