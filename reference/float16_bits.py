"""float16 to float32 and back by operations on their bits: on whole arrays these are several times faster
than NumPy's conversions, which go number by number.

A float16 has a sign, 5 bits of exponent with a bias of 15 and 10 bits of fraction, a float32 1, 8 (127) and
23: moved up by 13 bits, with 112 added to the exponent, a normal number is the same number. Subnormal
numbers, zeros, infinities and NaN, few in most weights, are converted one by one.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import Array

Index = NDArray[np.intp]

_SHIFT = 13
_SIGN, _EXPONENT = np.uint16(0x8000), np.uint16(0x7C00)
_LOWEST = np.uint16(0x0400)
_BIAS = np.uint32(112 << 23)
# Of a number moved up, sign-extended: the sign, and all below the bits that its copies fill.
_NOT_COPIES = np.uint32(0x8FFFFFFF)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_HALF = np.uint32(1 << (_SHIFT - 1))
# float32's bits of 2^-14, the smallest normal number, and from there to 65520, where an overflow begins.
_NORMAL = np.uint32(113 << 23)
_NORMALS = np.uint32((30 << 23) - (1 << (_SHIFT - 1)))


def widen(values: Array, out: NDArray[np.float32]) -> Index:
    """Write float16 numbers to a float32 array of the same shape, each exactly, NaN as some NaN.

    Returns the flat indices of those that are not normal numbers: zeros, subnormals, infinities and NaN.
    """
    bits, wide = values.view(np.uint16), out.view(np.uint32)
    np.left_shift(values.view(np.int16), np.int32(_SHIFT), out=out.view(np.int32), dtype=np.int32)
    np.bitwise_and(wide, _NOT_COPIES, out=wide)
    np.add(wide, _BIAS, out=wide)
    # Exponents of all zeros and of all ones become the two smallest.
    field = np.bitwise_and(bits, _EXPONENT)
    np.add(field, _LOWEST, out=field)
    np.bitwise_and(field, _EXPONENT, out=field)
    others = np.flatnonzero(field <= _LOWEST)
    if len(others):
        place = np.unravel_index(others, values.shape)
        with np.errstate(invalid="ignore"):  # a signalling NaN
            out[place] = values[place].astype(np.float32)
    return others


def narrow(values: NDArray[np.float32], out: NDArray[Any]) -> None:
    """Round float32 numbers to float16, to nearest, normal results with ties away from zero; spoils
    ``values``, whose entries must be contiguous along the last axis.

    An overflow is an infinity.
    """
    wide, bits = values.view(np.uint32), out.view(np.uint16)
    np.right_shift(wide, np.uint32(16), out=bits, dtype=np.uint32, casting="unsafe")
    np.bitwise_and(bits, _SIGN, out=bits)
    np.bitwise_and(wide, _MAGNITUDE, out=wide)
    np.subtract(wide, _NORMAL, out=wide)  # what is smaller becomes larger than all others
    others = np.flatnonzero(wide >= _NORMALS)
    place = np.unravel_index(others, values.shape)
    magnitudes = (wide[place] + _NORMAL).view(np.float32)
    np.add(wide, np.uint32(1 << 23) + _HALF, out=wide)
    np.right_shift(wide, np.uint32(_SHIFT), out=wide)
    if len(others):
        wide[place] = 0
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            bits[place] |= magnitudes.astype(np.float16).view(np.uint16)
    np.bitwise_or(bits, wide.astype(np.uint16), out=bits)
