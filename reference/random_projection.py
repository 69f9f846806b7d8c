"""The dense random projection from d numbers to D: a Gaussian matrix whose columns have length one."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import DTypeLike

from .arguments import is_integer
from .errors import ConfigError, ShapeError
from .formats import Array
from .operands import Operand, check_dtypes, product
from .rounding import round_to

STREAM = 1804_08838
"""Opens every key of `numpy.random.SeedSequence` here, so that no other use of a seed gives these numbers."""


@dataclass(frozen=True, eq=False)
class DenseProjection:
    """P as a matrix.

    Attributes:
        matrix: (D, d).
    """

    matrix: Operand

    @property
    def shape(self) -> tuple[int, int]:
        """(D, d)."""
        rows, columns = self.matrix.shape
        return rows, columns

    def astype(self, dtype: DTypeLike) -> "DenseProjection":
        """Return the projection with each number rounded once to ``dtype``."""
        return replace(self, matrix=round_to(self.matrix, dtype))

    def forward(self, theta: Operand) -> Operand:
        """Return ``P theta``, (D,), of theta, (d,); arrays of one dtype, or magnitudes; unchecked."""
        return product(self.matrix, theta)

    def adjoint(self, gradient: Operand) -> Operand:
        """Return ``P^T gradient``, (d,), of a gradient, (D,); as `forward`."""
        return product(self.matrix.T, gradient)


def dense_projection(D: int, d: int, seed: int, *, dtype: DTypeLike = np.float32) -> DenseProjection:
    """Return P, (D, d): standard normal numbers, each column divided by its length.

    The numbers are those of ``np.random.default_rng((STREAM, seed)).standard_normal((D, d))``. They are drawn
    and divided in float64 and rounded once to ``dtype``.

    Args:
        D: numbers of the full space, at least 1.
        d: numbers of the subspace, from 1 to D.
        seed: at least 0.
        dtype: of the matrix, one of the four formats.

    Raises:
        ConfigError: D, d or the seed is out of range.
        DTypeError: ``dtype`` is none of the formats.

    Source: Li et al., arXiv 1804.08838, section 2: columns normalised to unit length, so that a step of
    length one in the subspace is one of about length one in the full space.
    """
    check_sizes(D, d, seed)
    drawn = np.random.default_rng((STREAM, seed)).standard_normal((D, d))
    drawn /= np.sqrt(np.sum(drawn * drawn, axis=0))
    return DenseProjection(round_to(drawn, dtype))


def check_sizes(D: int, d: int, seed: int) -> None:
    """Raises ConfigError where they are no sizes and no seed of a projection."""
    if not is_integer(D) or D < 1:
        raise ConfigError(f"D: expected an integer of at least 1, got {D!r}; count the parameters")
    if not is_integer(d) or not 1 <= d <= D:
        raise ConfigError(
            f"d: expected an integer from 1 to {D}, the number of parameters, got {d!r}; choose another"
        )
    if not is_integer(seed) or seed < 0:
        raise ConfigError(f"seed: expected an integer of at least 0, got {seed!r}; choose another")


def check_vector(vector: Array, length: int, name: str, **others: Array | None) -> None:
    """Check a vector's length, and that it has the dtype of the ``others``.

    Raises:
        ShapeError, DTypeError: naming the tensor, what was expected and what came.
    """
    if vector.shape != (length,):
        raise ShapeError(f"{name}: expected shape ({length},), got {vector.shape}; is it of another model?")
    check_dtypes(**others, **{name: vector})
