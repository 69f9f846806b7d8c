"""Linear algebra on object arrays of Fractions, for tests: norms, projectors and singular values, exactly."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from exact_linear import rational

__all__ = [
    "frobenius",
    "inverse",
    "projector",
    "rational",
    "reflector",
    "singular_values_above",
    "with_singular_values",
]


def frobenius(matrix: Any) -> float:
    """Return the Frobenius norm, to a relative error of 2^-51."""
    return math.sqrt(sum((v * v for v in matrix.ravel()), Fraction(0)))


def inverse(matrix: Any) -> Any:
    """Return the inverse, by Gauss-Jordan elimination; ZeroDivisionError where there is none."""
    n = len(matrix)
    rows = np.concatenate([matrix, rational(np.eye(n))], axis=1)
    for k in range(n):
        pivot = next((i for i in range(k, n) if rows[i, k]), k)
        rows[[k, pivot]] = rows[[pivot, k]]
        rows[k] = rows[k] / rows[k, k]
        for i in range(n):
            if i != k:
                rows[i] = rows[i] - rows[i, k] * rows[k]
    return rows[:, n:]


def projector(A: Any) -> Any:
    """Return the orthogonal projector (n, n) on the space of the rows of A (r, n), which are independent."""
    return A.T @ inverse(A @ A.T) @ A


def reflector(vector: Any) -> Any:
    """Return ``I - 2 v v^T / v^T v``, an orthogonal matrix of Fractions."""
    return rational(np.eye(len(vector))) - np.outer(vector, vector) * Fraction(2) / (vector @ vector)


def with_singular_values(rng: np.random.Generator, values: list[int], m: int, n: int) -> tuple[Any, Any, Any]:
    """Return U (m, k), M (m, n), Vh (k, n) with ``M = U diag(values) Vh``, U and Vh orthonormal."""
    U, V = (reflector(np.array([Fraction(int(v)) for v in rng.integers(1, 9, size)])) for size in (m, n))
    U, Vh = U[:, : len(values)], V[: len(values)]
    return U, U @ (np.array([Fraction(v) for v in values])[:, None] * Vh), Vh


def singular_values_above(matrix: Any, threshold: float | Fraction) -> int:
    """Return how many singular values of M are above a threshold: the positive pivots of M^T M - t^2 I.

    By Sylvester's law of inertia; exact. ZeroDivisionError in the rare case that a pivot is zero and its
    column is not. A negative threshold is below all min(m, n) of them.
    """
    if threshold < 0:
        return min(matrix.shape)
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    n = matrix.shape[1]
    rows = matrix.T @ matrix - rational(np.eye(n)) * Fraction(threshold) ** 2
    positive = 0
    for k in range(n):
        positive += rows[k, k] > 0
        for i in range(k + 1, n):
            if rows[i, k]:
                rows[i] = rows[i] - rows[i, k] / rows[k, k] * rows[k]
    return positive
