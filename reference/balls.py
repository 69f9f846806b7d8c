"""Ball arithmetic: an intermediate result as a centre and a radius that holds every evaluation of it.

A layer with a nonlinearity is no sum of products of its inputs, so its bound is carried along, operation by
operation. An evaluation may use any order of summation within an operation, fused multiply-adds, or more
precision.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .formats import Array, float_format
from .magnitudes import Bound, Magnitude
from .precision import ROUND_UP, Precision, gamma

# The factor of `scaled`: rounded, and applied; or its root, to each of the operands of the product before;
# and the root or the factor computed in another way, as 1 / sqrt(n) for n ** -0.5.
_SCALE_ROUNDINGS = 5


@dataclass(frozen=True, eq=False)
class Ball:
    """``|computed - exact| <= radius`` for every evaluation in ``precision``.

    ``centre`` is computed in float64, and so is itself one of the evaluations: the exact value is at most
    ``size`` and a computed one at most ``reach``. ``unit`` is the absolute error of an underflow.
    """

    centre: Bound
    radius: Bound
    unit: float
    precision: Precision

    @staticmethod
    def of(values: Array, precision: Precision, unit: float) -> "Ball":
        """Return an input; where it need not be a number of the dtype it is rounded to it first."""
        given, form = float_format(values.dtype, "tensor"), precision.form
        contained = given.precision <= form.precision and given.max_exponent <= form.max_exponent
        centre = values.astype(np.float64)
        radius = np.zeros_like(centre) if contained else form.unit_roundoff * np.abs(centre) + unit
        return Ball(centre, radius, unit, precision)

    @property
    def size(self) -> Bound:
        """At least |exact value|."""
        return np.abs(self.centre) + self.radius

    @property
    def reach(self) -> Bound:
        """At least |computed value|."""
        return self.size + self.radius

    @property
    def shape(self) -> tuple[int, ...]:
        return self.centre.shape

    @property
    def magnitude(self) -> Magnitude:
        """The computed value as the input of an operation that `Magnitude` bounds."""
        return Magnitude(self.reach, np.full_like(self.centre, self.unit), self.unit, self.precision)

    @property
    def bound(self) -> Bound:
        """The radius, rounded up by more than float64 has lost in it."""
        bound: Bound = self.radius * ROUND_UP
        return bound

    def __matmul__(self, other: "Ball") -> "Ball":
        """The matrix product: an underflow in each product and, where those are flushed to zero, each sum."""
        count = self.shape[-1]
        spread = self.size @ other.radius + self.radius @ other.reach
        growth = self.precision.growth(count, int(self.precision.accumulates_wider), 1, 1.0)
        rounding = growth * (self.reach @ other.reach) + 2 * count * self.unit
        return replace(self, centre=self.centre @ other.centre, radius=spread + rounding)

    def __mul__(self, other: "Ball") -> "Ball":
        spread = self.size * other.radius + self.radius * other.reach
        rounding = self._rounding(1) * (self.reach * other.reach) + self.unit
        return replace(self, centre=self.centre * other.centre, radius=spread + rounding)

    def __add__(self, other: "Ball") -> "Ball":
        return self._sum(other, self.centre + other.centre)

    def __sub__(self, other: "Ball") -> "Ball":
        return self._sum(other, self.centre - other.centre)

    def scaled(self, factor: float) -> "Ball":
        """Return the product with an exact number, wherever that is applied."""
        rounding = self._rounding(_SCALE_ROUNDINGS) * self.reach
        radius = abs(factor) * (self.radius + rounding) + self.unit
        return replace(self, centre=self.centre * factor, radius=radius)

    def map(self, rearrange: Callable[[Array], Array]) -> "Ball":
        """Return the numbers moved, repeated, or filled in with zeros by ``rearrange``."""
        return replace(self, centre=rearrange(self.centre), radius=rearrange(self.radius))

    def add_up(self, gather: Callable[[Array], Array], most: int) -> "Ball":
        """Return the sums that ``gather`` makes of the numbers, each of at most ``most`` of them."""
        growth = self.precision.growth(most, int(self.precision.accumulates_wider), 0, 1.0)
        radius = gather(self.radius + growth * self.reach + self.unit)
        return replace(self, centre=gather(self.centre), radius=radius)

    def or_else(self, other: "Ball") -> "Ball":
        """Return the ball of one number that is evaluated in either of two ways."""
        return replace(self, radius=np.maximum(self.radius, other.radius))

    def _sum(self, other: "Ball", centre: Bound) -> "Ball":
        rounding = self._rounding(1) * (self.reach + other.reach) + self.unit
        return replace(self, centre=centre, radius=self.radius + other.radius + rounding)

    def _rounding(self, count: int) -> float:
        return gamma(count, self.precision.form.unit_roundoff)
