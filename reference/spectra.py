"""Singular values of an adapter's update, from its small factors, and what a spectrum says of its rank."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np

from .arguments import check_share
from .errors import ConfigError, NonFiniteError, ShapeError
from .formats import Array, float_format
from .precision import ROUND_UP
from .svd import Svd, backward_error, checked, float64_matrix, svd


def delta_svd(A: Array, B: Array, scaling: float = 1.0) -> Svd:
    """Return the decomposition of ``scaling * B @ A``, (out, in), which is never formed.

    With B = Q_B R_B and A^T = Q_A R_A, both of r columns, the small matrix ``R_B R_A^T`` has the singular
    values of ``B A``; its singular vectors, multiplied by Q_B and Q_A, are those of ``B A``.

    Args:
        A: (r, in), the tensor ``lora_A``.
        B: (out, r), the tensor ``lora_B``. A and B are float16, bfloat16, float32 or float64; the work is
            done in float64.
        scaling: see `lora_scaling`. Where it is negative the left singular vectors change their sign.

    The result has U (out, k), s (k,) and Vh (k, in), k = min(r, out, in): further singular values are zero.
    `delta_svd_error_bound` says how far it is off.

    Raises:
        DTypeError, ShapeError, NonFiniteError: naming the tensor, what was expected and what came.
    """
    A, B, scaling = _factors(A, B, scaling)
    left, right = np.linalg.qr(B), np.linalg.qr(A.T)
    with np.errstate(all="ignore"):  # what overflows is refused
        core = left.R @ right.R.T
        core_name = "the product of B and A"
        if not np.isfinite(core).all():
            raise NonFiniteError(f"{core_name}: expected finite numbers, got an overflow; scale them down")
        U, s, Vh = svd(core, core_name)
        s = abs(scaling) * s
    return checked(Svd(math.copysign(1.0, scaling) * (left.Q @ U), s, Vh @ right.Q.T), "delta")


def delta_singular_values(A: Array, B: Array, scaling: float = 1.0) -> Array:
    """Return the singular values of ``scaling * B @ A``, nonincreasing: the first min(r, out, in) of them.

    Arguments and errors as in `delta_svd`.

    >>> A, B = np.array([[3.0, 4.0, 0.0]]), np.array([[0.0], [1.0]])
    >>> delta_singular_values(A, B, scaling=2.0).round(12).tolist()
    [10.0]
    """
    return delta_svd(A, B, scaling).s


def delta_svd_error_bound(A: Array, B: Array, scaling: float = 1.0) -> float:
    """Return how far results of `delta_svd` may be off, as `svd_error_bound` does of a decomposition.

    It is ``3 (p(out, r) + p(r, in) + p(k, l)) u |scaling| ||B||_F ||A||_F``, (k, l) the shape of the small
    matrix: a backward error of each of the two QR factorizations and of the small matrix's decomposition,
    three times for the deviation of their factors from orthogonality and for the rounding of the product.

    Arguments and errors as in `delta_svd`.
    """
    A, B, scaling = _factors(A, B, scaling)
    (out_features, r), in_features = B.shape, A.shape[1]
    small = min(out_features, r), min(in_features, r)
    errors = backward_error((out_features, r)) + backward_error((r, in_features)) + backward_error(small)
    return 3 * errors * size_of_factors(A, B, scaling) * ROUND_UP


def size_of_factors(A: Array, B: Array, scaling: float) -> float:
    """Return ``|scaling| ||B||_F ||A||_F``, which no singular value of ``scaling * B @ A`` exceeds."""
    return abs(scaling) * math.hypot(*B.ravel().tolist()) * math.hypot(*A.ravel().tolist())


def effective_rank(singular_values: Array) -> float:
    """Return ``exp(-sum p log p)`` with ``p = s / sum(s)``: how many singular values matter, from 1 to n.

    It is n for n equal ones; 0 where all are zero. To a relative error of ``gamma_10 (2 + log n)``.

    Args:
        singular_values: (n,), nonincreasing.

    >>> round(effective_rank(np.array([5.0, 5.0, 0.0])), 12)
    2.0

    Raises:
        DTypeError, ShapeError, NonFiniteError, ConfigError: not a spectrum.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    s = _spectrum(singular_values)
    if s[0] == 0:
        return 0.0
    relative = [value / s[0] for value in s]
    total = math.fsum(relative)
    shares = [value / total for value in relative]
    return math.exp(-math.fsum(share * math.log(share) for share in shares if share))


def stable_rank(singular_values: Array) -> float:
    """Return ``sum(s^2) / s_1^2``, the squared Frobenius norm over the squared spectral norm; from 1 to n.

    It is at most the rank, and moves little when the matrix does; 0 where all singular values are zero. To a
    relative error of gamma_4.

    Arguments and errors as in `effective_rank`.

    >>> stable_rank(np.array([4.0, 2.0, 2.0]))
    1.5

    Source: Rudelson and Vershynin, "Sampling from large matrices", J. ACM 54 (2007).
    """
    s = _spectrum(singular_values)
    if s[0] == 0:
        return 0.0
    return math.fsum((value / s[0]) ** 2 for value in s)


def rank_for_energy(singular_values: Array, share: float = 0.99) -> int:
    """Return the smallest r whose first r singular values have that share of the energy, the sum of s^2.

    The best approximation of that rank leaves out at most ``1 - share`` of the squared Frobenius norm.
    Decided in exact arithmetic on the numbers given. 0 where all singular values are zero.

    Args:
        singular_values: (n,), nonincreasing.
        share: above 0 and at most 1, a float64 taken as exact. With 1 the result is how many are not zero.

    >>> s = np.array([4.0, 2.0, 2.0, 0.0])  # energies 16, 4, 4, 0
    >>> rank_for_energy(s, 0.5), rank_for_energy(s, 0.75), rank_for_energy(s)
    (1, 2, 3)

    Raises:
        DTypeError, ShapeError, NonFiniteError, ConfigError: not a spectrum, or the share is out of range.
    """
    s = _spectrum(singular_values)
    energies = [Fraction(value) ** 2 for value in s]
    missing = Fraction(check_share(share, "share")) * sum(energies)
    r = 0
    while missing > 0:
        missing -= energies[r]
        r += 1
    return r


def _factors(A: Array, B: Array, scaling: float) -> tuple[Array, Array, float]:
    """Return A (r, in), B (out, r) and the scaling, in float64."""
    A, B = float64_matrix(A, "A"), float64_matrix(B, "B")
    if A.shape[0] != B.shape[1]:
        raise ShapeError(
            f"B: expected (out, {A.shape[0]}) to fit A {A.shape}, got {B.shape}; is it transposed?"
        )
    scaling = float(scaling)
    if not math.isfinite(scaling):
        raise NonFiniteError(f"scaling: expected a finite number, got {scaling}; check lora_alpha")
    return A, B, scaling


def _spectrum(singular_values: Array) -> list[float]:
    """Return singular values as floats, with the checks that they are some."""
    values = np.asarray(singular_values)
    float_format(values.dtype, "singular_values")
    if values.ndim != 1 or values.size == 0:
        raise ShapeError(
            f"singular_values: expected a vector of at least one, got shape {values.shape}; pass them alone"
        )
    s: list[float] = values.astype(np.float64).tolist()
    if not all(map(math.isfinite, s)):
        raise NonFiniteError(
            "singular_values: expected finite numbers, got NaN or infinity; compute them anew"
        )
    if s[-1] < 0 or any(after > before for before, after in pairwise(s)):
        raise ConfigError(
            "singular_values: expected nonnegative numbers in nonincreasing order, got others; sort them"
        )
    return s
