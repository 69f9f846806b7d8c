"""Magnitudes of intermediate results, with what is needed to bound the error of computing them.

A layer of LoRA is a sum of products of its inputs. Evaluated on magnitudes instead of numbers it gives the
size that its rounding error is a multiple of, and, counted along the way, the number of roundings that say
which multiple.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType

import numpy as np
from numpy.typing import NDArray

from .formats import Array, FloatFormat, float_format
from .precision import ROUND_UP, Precision

Bound = NDArray[np.float64]
Index = (
    int | slice | EllipsisType | NDArray[np.bool_] | NDArray[np.intp] | tuple[int | slice | EllipsisType, ...]
)


@dataclass(frozen=True, eq=False)
class Magnitude:
    """What is known of an intermediate result before it is computed.

    ``size`` is at least |exact value|; ``lost`` bounds what underflows have done, ``unit`` is the absolute
    error of one. ``terms``, ``stores``, ``products`` and ``paths`` count the roundings on the longest path
    from an input, as `Precision.growth` takes them; ``paths`` is for one entry.
    """

    size: Bound
    lost: Bound
    unit: float
    precision: Precision
    terms: int = 0
    stores: int = 0
    products: int = 0
    paths: float = 1.0

    def __matmul__(self, other: "Magnitude") -> "Magnitude":
        """The matrix product: an underflow in each product and, where those are flushed to zero, each sum."""
        count = self.size.shape[-1]
        lost = self.lost @ (other.size + other.lost) + self.size @ other.lost
        return replace(
            self,
            size=self.size @ other.size,
            lost=lost + 2 * count * self.unit,
            terms=self.terms + other.terms + count,
            stores=self.stores + other.stores + self.precision.accumulates_wider,
            products=self.products + other.products + 1,
            paths=self.paths * other.paths * max(1, count),
        )

    def __mul__(self, other: "Magnitude") -> "Magnitude":
        lost = self.lost * (other.size + other.lost) + self.size * other.lost
        return replace(
            self,
            size=self.size * other.size,
            lost=lost + self.unit,
            terms=self.terms + other.terms,
            stores=self.stores + other.stores + 1,
            products=self.products + other.products,
            paths=self.paths * other.paths,
        )

    def __add__(self, other: "Magnitude") -> "Magnitude":
        return replace(
            self,
            size=self.size + other.size,
            lost=self.lost + other.lost + self.unit,
            terms=max(self.terms, other.terms),
            stores=max(self.stores, other.stores) + 1,
            products=max(self.products, other.products),
            paths=self.paths + other.paths,
        )

    def __getitem__(self, index: Index) -> "Magnitude":
        return replace(self, size=self.size[index], lost=self.lost[index])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size.shape

    @property
    def T(self) -> "Magnitude":  # noqa: N802
        return replace(self, size=self.size.T, lost=self.lost.T)

    @staticmethod
    def stack(parts: "Sequence[Magnitude]") -> "Magnitude":
        """Return the parts along a new first axis; the counts are the largest of theirs."""
        return replace(
            parts[0],
            size=np.stack([part.size for part in parts]),
            lost=np.stack([part.lost for part in parts]),
            terms=max(part.terms for part in parts),
            stores=max(part.stores for part in parts),
            products=max(part.products for part in parts),
            paths=max(part.paths for part in parts),
        )

    def map(self, rearrange: Callable[[Array], Array]) -> "Magnitude":
        """Return the numbers moved, repeated, or filled in with zeros by ``rearrange``."""
        return replace(self, size=rearrange(self.size), lost=rearrange(self.lost))

    def add_up(self, gather: Callable[[Array], Array], most: int) -> "Magnitude":
        """Return the sums that ``gather`` makes of the numbers, each of at most ``most`` of them."""
        return replace(
            self,
            size=gather(self.size),
            lost=gather(self.lost + self.unit),
            terms=self.terms + most,
            stores=self.stores + self.precision.accumulates_wider,
            paths=self.paths * max(1, most),
        )

    def sum(self, axis: int) -> "Magnitude":
        """Return the sum over an axis."""
        return self.add_up(lambda a: a.sum(axis=axis), self.size.shape[axis])

    def bound(self, slack: int) -> Bound:
        """Return a bound on ``|computed - exact|``.

        Args:
            slack: how many more roundings an evaluation in another order may have on its longest path.
        """
        paths = self.paths * max(1, self.size.size)
        growth = self.precision.growth(self.terms, self.stores + slack, self.products, paths)
        return (growth * self.size + (1 + growth) * self.lost) * ROUND_UP


def magnitude_of(values: Array, precision: Precision, unit: float) -> Magnitude:
    """Return the magnitude of an input, rounded first where it need not be a number of the dtype."""
    given, form = float_format(values.dtype, "tensor"), precision.form
    contained = given.precision <= form.precision and given.max_exponent <= form.max_exponent
    size = np.abs(values.astype(np.float64))
    return Magnitude(size, np.full_like(size, unit), unit, precision, stores=0 if contained else 1)


def underflow_unit(form: FloatFormat, *scalings: float) -> float:
    """Return the largest absolute error of an operation that underflows.

    Units of bfloat16 and float32 arithmetic may flush subnormal results to zero, so it is the smallest
    normal number, 10^-38 or less; of float16, which everyone computes with gradual underflow, the smallest
    subnormal, 6e-8. Another evaluation may multiply by the scaling earlier than the layer's definition, where
    an underflow weighs up to 1 / |scaling| as much, or later, up to |scaling|; both are allowed for.
    """
    unit = form.smallest_subnormal if form.max_exponent == 15 else form.smallest_normal
    weights = (max(abs(scaling), 1.0 / abs(scaling)) for scaling in scalings if scaling)
    return unit * (1.0 + max(weights, default=0.0))
