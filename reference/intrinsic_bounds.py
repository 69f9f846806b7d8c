"""How far from its exact value a point of a random subspace, or a gradient in it, may be; see `bounds`.

The counts hold for any order of summation in P, in the sums of a Walsh-Hadamard transform, and in those over
blocks and layers: fast transforms of any radix, and products with the matrix of signs, are covered.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike

from .formats import Array
from .intrinsic import Projection, Subspace
from .magnitudes import Bound, Magnitude, magnitude_of, underflow_unit
from .precision import Precision
from .random_projection import DenseProjection

_SLACK = 2
"""The lambdas may multiply after the sums or before, and theta_0 may be added at another point."""


def subspace_parameters_bound(subspace: Subspace, theta_d: Array, precision: Precision | DTypeLike) -> Bound:
    """Return a bound, (D,), on ``|computed - exact|`` of `subspace_parameters` evaluated in ``precision``.

    Args:
        subspace, theta_d: as there, the exact values, in any float dtypes.
        precision: a dtype, or a `Precision`; form of the bound and errors as in `linear_forward_bound`.
    """
    own = _Sizes(precision)
    point: Magnitude = own.subspace(subspace).point(own.size(theta_d))
    return point.bound(_SLACK)


def subspace_gradient_bound(
    subspace: Subspace, theta_d: Array, gradient: Array, precision: Precision | DTypeLike
) -> Bound:
    """Return a bound, (d,), on ``|computed - exact|`` of `subspace_gradient` in ``precision``; as above."""
    own = _Sizes(precision)
    projected, scales = own.subspace(subspace).pulled_back(own.size(theta_d), own.size(gradient))
    parts = [part.bound(_SLACK) for part in (projected, scales) if part is not None]
    return np.concatenate(parts)


class _Sizes:
    def __init__(self, precision: Precision | DTypeLike) -> None:
        self._precision = Precision.of(precision)
        self._unit = underflow_unit(self._precision.form)

    def size(self, values: Array) -> Magnitude:
        return magnitude_of(values, self._precision, self._unit)

    def subspace(self, subspace: Subspace) -> Subspace:
        own = subspace.projection
        sized: Projection
        if isinstance(own, DenseProjection):
            sized = replace(own, matrix=self.size(own.matrix))
        else:
            sized = replace(own, gaussians=self.size(own.gaussians))
        return replace(subspace, theta_0=self.size(subspace.theta_0), projection=sized)
