"""The numerical rank of a matrix, and its best approximation of a given rank, by singular values."""

import math
from dataclasses import dataclass

import numpy as np

from .arguments import check_count, is_real
from .errors import ConfigError
from .formats import Array, FloatFormat, float_format
from .svd import Svd, float64_matrix, svd


@dataclass(frozen=True, eq=False)
class LowRankApproximation:
    """The best approximation ``B A`` of a matrix M, with what it leaves out; float64.

    B (m, r) is ``U_r diag(sqrt(s_r))`` and A (r, n) is ``diag(sqrt(s_r)) V_r^T``: each factor takes the
    square root of the singular values, so that column k of B and row k of A have the same norm.

    ``singular_values`` are all min(m, n) of M, nonincreasing.
    """

    B: Array
    A: Array
    singular_values: Array

    @property
    def r(self) -> int:
        """How many singular values are kept."""
        return int(self.A.shape[0])

    @property
    def frobenius_error(self) -> float:
        """``||M - B A||_F``, the root of the sum of the squares of the singular values left out."""
        return math.hypot(*self.singular_values[self.r :].tolist())

    @property
    def spectral_error(self) -> float:
        """``||M - B A||_2``, the first singular value left out; 0 where none is."""
        return float(self.singular_values[self.r :].max(initial=0.0))

    @property
    def relative_error(self) -> float:
        """``||M - B A||_F / ||M||_F``, from 0 to 1; 0 for a matrix of zeros."""
        # Relative to the largest, as the norm itself may be too large for float64.
        largest = float(self.singular_values[0])
        if largest == 0:
            return 0.0
        relative = self.singular_values / largest
        return math.hypot(*relative[self.r :].tolist()) / math.hypot(*relative.tolist())


def low_rank_approximation(matrix: Array, r: int) -> LowRankApproximation:
    """Return the matrix of rank at most r that is nearest to M (m, n), as factors B (m, r) and A (r, n).

    No other of rank r is nearer, in the Frobenius norm and in the spectral norm; where the r-th singular
    value equals the next there are others as near. `svd_error_bound` says how far the result is off.

    Args:
        matrix: float16, bfloat16, float32 or float64; the work is done in float64.
        r: from 1 to min(m, n).

    >>> M = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 8.0], [0.0, 1.0, 0.0]])
    >>> nearest = low_rank_approximation(M, 1)
    >>> round(nearest.spectral_error, 12), round(nearest.frobenius_error**2, 12)
    (2.0, 5.0)

    Raises:
        DTypeError, ShapeError, NonFiniteError: the matrix is not one of finite floats.
        ConfigError: r is out of range.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1
    (1936); Mirsky, "Symmetric gauge functions and unitarily invariant norms", Quart. J. Math. 11 (1960).
    """
    given = float64_matrix(matrix, "matrix")
    r = check_count(r, min(given.shape), "r", f"the smaller side of {given.shape}")
    return truncated(svd(given, "matrix"), r)


def truncated(decomposition: Svd, r: int) -> LowRankApproximation:
    """Return the approximation that keeps the first r singular values."""
    U, s, Vh = decomposition
    root = np.sqrt(s[:r])
    return LowRankApproximation(U[:, :r] * root, root[:, None] * Vh[:r], s)


def numerical_rank(matrix: Array, *, tol: float | None = None) -> int:
    """Return how many singular values are above ``tol``.

    Args:
        matrix: (m, n), float16, bfloat16, float32 or float64; the singular values are computed in float64.
        tol: an absolute threshold. By default ``max(m, n) 2u sigma_1``, with u the unit roundoff of the
            matrix's dtype, as `numpy.linalg.matrix_rank` has it: what rounding a matrix of that rank to its
            dtype is not likely to exceed.

    >>> thirds = np.array([[1.0, 2.0], [1 / 3, 2 / 3]])
    >>> numerical_rank(thirds), numerical_rank(thirds + [[0, 0], [0, 1e-9]])
    (1, 2)

    Raises:
        DTypeError, ShapeError, NonFiniteError: the matrix is not one of finite floats.
        ConfigError: ``tol`` is not a finite number of at least 0; or there is none and the default would be
            sigma_1 or more, as it is for bfloat16 from 128 rows or columns on.
    """
    form = float_format(np.asarray(matrix).dtype, "matrix")
    given = float64_matrix(matrix, "matrix")
    s = svd(given, "matrix").s
    if tol is None:
        tol = relative_threshold((given.shape[0], given.shape[1]), form) * float(s[0])
    elif not is_real(tol) or not 0 <= tol < math.inf:
        raise ConfigError(f"tol: expected a finite number of at least 0, got {tol!r}; choose another")
    return count_above(s, float(tol))


def relative_threshold(shape: tuple[int, int], form: FloatFormat) -> float:
    """Return ``max(m, n) 2u``, the share of sigma_1 up to which a singular value counts as zero.

    Raises:
        ConfigError: it is 1 or more, where every matrix would have rank 0.
    """
    relative = max(shape) * 2 * form.unit_roundoff
    if relative >= 1:
        raise ConfigError(
            f"tol: expected a threshold, as the default, {relative:g} sigma_1 for {shape} in {form.dtype}, "
            "is above every singular value; pass tol"
        )
    return relative


def count_above(singular_values: Array, threshold: float) -> int:
    """Return how many singular values are above the threshold."""
    return int((singular_values > threshold).sum())
