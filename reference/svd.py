"""The singular value decomposition in float64, and how far a computed one may be from an exact one."""

import math
from typing import NamedTuple

import numpy as np

from .errors import NonFiniteError, ShapeError
from .formats import Array, first_nonfinite, float_format
from .precision import ROUND_UP

F64 = float_format(np.float64)
# Of how many roundings the backward error is that LAPACK allows itself, per row or column: 35 ulps are 70.
_ALLOWED = 100


class Svd(NamedTuple):
    """``M = U diag(s) Vh`` in float64: U (m, k), s (k,) nonincreasing, Vh (k, n), k at most min(m, n)."""

    U: Array
    s: Array
    Vh: Array


def svd(matrix: Array, name: str) -> Svd:
    """Return the decomposition of a matrix as `float64_matrix` gives it; ``name`` opens an error's message.

    Raises:
        NonFiniteError: a singular value is too large for float64.
    """
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    return checked(Svd(U, s, Vh), name)


def checked(decomposition: Svd, name: str) -> Svd:
    """Return the decomposition, with finite singular values.

    Raises:
        NonFiniteError: a singular value is too large for float64.
    """
    if not np.isfinite(decomposition.s).all():
        raise NonFiniteError(
            f"{name}: expected singular values of at most {F64.largest:.5g}, got an overflow; scale it down"
        )
    return decomposition


def backward_error(shape: tuple[int, int]) -> float:
    """Return p(m, n) u, p(m, n) = 100 max(m, n) sqrt(m n), u = 2^-53: of an SVD or a QR factorization.

    It bounds ``||M - U diag(s) Vh||_F / ||M||_2``, and p / sqrt(m n) bounds ``||U^T U - I||_2``, as it does
    of Vh and of the factors of M = Q R. LAPACK's own tests refuse a build of it where, in the 1-norm, the
    first is above 35 max(m, n) 2u, the second above 35 m 2u, those of QR above 30 m u; the Frobenius norm is
    at most sqrt(n) times the 1-norm, and the 1-norm at most sqrt(m) times the 2-norm. What can be proven of
    Householder transformations has the form c m n u, too. Not covered: underflow.

    Source: LAPACK, TESTING/svd.in, EIG/ddrvbd.f, dtest.in, LIN/dqrt01.f; Higham, "Accuracy and Stability of
    Numerical Algorithms", 2nd ed., theorem 19.4.
    """
    m, n = shape
    return _ALLOWED * max(m, n) * math.sqrt(m * n) * F64.unit_roundoff * ROUND_UP


def svd_error_bound(shape: tuple[int, int], largest: float) -> float:
    """Return ``3 p(m, n) u sigma_1``: how far results of a float64 SVD of a matrix (m, n) may be off.

    Args:
        shape: of the matrix.
        largest: its largest singular value.

    With p(m, n) as in `backward_error` this bounds
        - the difference of each singular value, and the 2-norm of the differences of all of them;
        - for factors B, A of `low_rank_approximation`, the difference of ``||M - B A||`` from the error
          that is reported, and from the least possible, in the spectral and in the Frobenius norm;
        - ``||E||_F`` such that the singular vectors are, but for their own roundings, exactly those of M + E.

    One p(m, n) u is for the residual of the decomposition; one for the deviation of U and V from
    orthogonality, which moves a singular value by at most its 100 max(m, n) u-th part; one for the rest: the
    roundings of the square roots, of the factors and of the norms, 8 min(m, n) u sigma_1 in all.
    """
    return 3 * backward_error(shape) * largest * ROUND_UP


def float64_matrix(matrix: Array, name: str) -> Array:
    """Return a matrix of finite numbers in float64, which holds all of the four dtypes exactly.

    Raises:
        DTypeError, ShapeError, NonFiniteError: ``name`` opens the message.
    """
    matrix = np.asarray(matrix)
    float_format(matrix.dtype, name)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ShapeError(
            f"{name}: expected a matrix of at least one row and column, got shape {matrix.shape}; "
            "give it two axes"
        )
    position = first_nonfinite(matrix)
    if position is not None:
        value = float(matrix[position])
        raise NonFiniteError(
            f"{name}: expected finite numbers, got {value} at {list(position)}; fetch it again"
        )
    return matrix.astype(np.float64)
