"""A model's parameters as a point of a random subspace: what an intrinsic dimension is measured in."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import ConfigError, ShapeError
from .fastfood import Fastfood
from .formats import Array
from .operands import Operand, add_up, restructure, stack
from .random_projection import DenseProjection, check_vector
from .rounding import round_to

Projection = DenseProjection | Fastfood


@dataclass(frozen=True, eq=False)
class Subspace:
    """The points ``theta_D = theta_0 + P theta_d``; or, with layers, layer by layer

        theta_D^i = theta_0^i + lambda_i (P theta_{d-m})^i

    where the m numbers lambda are the last of the d ("structure-aware", SAID).

    Attributes:
        theta_0: (D,), where training starts.
        projection: P, (D, d), or (D, d - m) with layers.
        layers: (D,), integers 0 ... m - 1: the layer that each parameter belongs to; None for one P alone.

    Source: Li et al., arXiv 1804.08838, equation 2; Aghajanyan et al., arXiv 2012.13255, section 3.
    """

    theta_0: Operand
    projection: Projection
    layers: NDArray[Any] | None = None

    @property
    def count(self) -> int:
        """m, the number of lambdas."""
        return 0 if self.layers is None else int(self.layers.max()) + 1

    @property
    def dimension(self) -> int:
        """d."""
        return self.projection.shape[1] + self.count

    def start(self, dtype: DTypeLike) -> Array:
        """Return the theta_d of theta_0 itself: zeros, and each lambda one."""
        zeros, ones = np.zeros(self.projection.shape[1], dtype), np.ones(self.count, dtype)
        return np.concatenate([zeros, ones])

    def astype(self, dtype: DTypeLike) -> "Subspace":
        """Return the subspace with every number rounded once to ``dtype``."""
        return replace(self, theta_0=round_to(self.theta_0, dtype), projection=self.projection.astype(dtype))

    def point(self, theta_d: Operand) -> Operand:
        """Return theta_D on operands of any kind; see `subspace_parameters`."""
        update = self.projection.forward(theta_d[: self.projection.shape[1]])
        if self.layers is None:
            return self.theta_0 + update
        return self.theta_0 + self._scales(theta_d) * update

    def pulled_back(self, theta_d: Operand, gradient: Operand) -> tuple[Operand, Operand | None]:
        """Return the gradients of the projected part and of the lambdas, (m,), None where there are none."""
        if self.layers is None:
            return self.projection.adjoint(gradient), None
        inner = self.projection.shape[1]
        products = gradient * self.projection.forward(theta_d[:inner])
        sums = [_sum(products, self.layers == number) for number in range(self.count)]
        return self.projection.adjoint(self._scales(theta_d) * gradient), stack(sums)

    def _scales(self, theta_d: Operand) -> Operand:
        """Return each parameter's lambda, (D,)."""
        scales = theta_d[self.projection.shape[1] :]
        return restructure(scales, lambda a: a[self.layers])


def _sum(values: Operand, where: NDArray[np.bool_]) -> Operand:
    """Return the sum of some of the numbers."""
    return add_up(restructure(values, lambda a: a[where]), lambda a: a.sum(axis=0), int(where.sum()))


def subspace_parameters(subspace: Subspace, theta_d: Array) -> Array:
    """Return theta_D, (D,), of theta_d, (d,).

    All arrays have one dtype and the work is done in it: one of the four formats, or object for exact
    arithmetic. In floating point this is one evaluation among many: `subspace_parameters_bound` says how far
    any may be off.

    Raises:
        ShapeError, DTypeError, ConfigError: naming the tensor, what was expected and what came.
    """
    _check(subspace)
    check_vector(theta_d, subspace.dimension, "theta_d", **_tensors(subspace))
    point: Array = subspace.point(theta_d)
    return point


def subspace_gradient(subspace: Subspace, theta_d: Array, gradient: Array) -> Array:
    """Return the gradient, (d,), of a scalar whose gradient with respect to theta_D is ``gradient``, (D,).

        d theta_{d-m} = P^T (lambda_i gradient^i),   d lambda_i = <gradient^i, (P theta_{d-m})^i>

    and without layers ``P^T gradient``. Dtypes and errors as in `subspace_parameters`.
    """
    _check(subspace)
    check_vector(theta_d, subspace.dimension, "theta_d", **_tensors(subspace))
    check_vector(gradient, subspace.projection.shape[0], "gradient", **_tensors(subspace))
    projected, scales = subspace.pulled_back(theta_d, gradient)
    return np.asarray(projected) if scales is None else np.concatenate([projected, scales])


def _tensors(subspace: Subspace) -> dict[str, Array | None]:
    """Return the tensors under the names that errors call them."""
    own = subspace.projection
    numbers = own.matrix if isinstance(own, DenseProjection) else own.gaussians
    return {"theta_0": subspace.theta_0, "P": numbers}


def _check(subspace: Subspace) -> None:
    rows = subspace.projection.shape[0]
    if subspace.theta_0.shape != (rows,):
        raise ShapeError(
            f"theta_0: expected shape ({rows},) to fit P, got {subspace.theta_0.shape}; project to its length"
        )
    layers = subspace.layers
    if layers is None:
        return
    if layers.shape != (rows,):
        raise ShapeError(f"layers: expected shape ({rows},) to fit P, got {layers.shape}; name each layer")
    if layers.dtype.kind not in "iu" or set(np.unique(layers).tolist()) != set(range(subspace.count)):
        raise ConfigError("layers: expected integers 0, 1, ... without a gap, got others; number the layers")
