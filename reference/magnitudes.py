"""Magnitudes of intermediate results, with the absolute error that underflows may have left in them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .formats import Array, FloatFormat

Bound = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Magnitude:
    """``size`` is at least |exact value|, computed from magnitudes alone; ``lost`` bounds what underflow did.

    ``unit`` is the absolute error of one operation that underflows; what it is needs the format and, for
    the path of the adapter, the scaling: see `underflow_unit`.
    """

    size: Bound
    lost: Bound
    unit: float

    @staticmethod
    def of(values: Array, unit: float) -> "Magnitude":
        """Start from an array; its own rounding to the working dtype may underflow, too."""
        size = np.abs(values.astype(np.float64))
        return Magnitude(size, np.full_like(size, unit), unit)

    def __matmul__(self, other: "Magnitude") -> "Magnitude":
        """The matrix product: an underflow in each product and, where those are flushed to zero, each sum."""
        lost = self.lost @ (other.size + other.lost) + self.size @ other.lost
        return Magnitude(self.size @ other.size, lost + 2 * self.size.shape[-1] * self.unit, self.unit)

    def __mul__(self, other: "Magnitude") -> "Magnitude":
        lost = self.lost * (other.size + other.lost) + self.size * other.lost
        return Magnitude(self.size * other.size, lost + self.unit, self.unit)

    def __add__(self, other: "Magnitude") -> "Magnitude":
        return Magnitude(self.size + other.size, self.lost + other.lost + self.unit, self.unit)

    @property
    def T(self) -> "Magnitude":  # noqa: N802
        return Magnitude(self.size.T, self.lost.T, self.unit)

    def rows(self) -> "Magnitude":
        """Return the same numbers with all leading axes made one."""
        shape = (-1, self.size.shape[-1])
        return Magnitude(self.size.reshape(shape), self.lost.reshape(shape), self.unit)

    def sum(self) -> "Magnitude":
        """Return the sum over the first axis."""
        return Magnitude(
            self.size.sum(axis=0), self.lost.sum(axis=0) + self.size.shape[0] * self.unit, self.unit
        )


def underflow_unit(form: FloatFormat) -> float:
    """Return the largest absolute error of an operation that underflows.

    Units of bfloat16 and float32 arithmetic may flush subnormal results to zero, so it is the smallest
    normal number, 10^-38 or less; of float16, which everyone computes with gradual underflow, the smallest
    subnormal, 6e-8.
    """
    return form.smallest_subnormal if form.max_exponent == 15 else form.smallest_normal
