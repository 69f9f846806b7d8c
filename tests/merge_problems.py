"""Merges of a few entries with their exact values, for the tests of the interval and of the proof."""

from fractions import Fraction
from typing import Any

import numpy as np

from loracle.reference.factors import norm_bound
from loracle.reference.merge_proof import EvaluationError, evaluation_error


def problem(
    seed: int, work: Any, target: Any, spread: int, rows: int = 4, columns: int = 5, r: int = 3
) -> tuple[Any, Any, Any, Any, EvaluationError]:
    """Inputs of the dtypes given, the exact entries, and an error that is meant to hold for the
    evaluation.
    """
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> Any:
        return np.ldexp(rng.uniform(-1, 1, shape), rng.integers(-spread, spread + 1, shape))

    w, B, A = numbers(rows, columns).astype(target), numbers(rows, r), numbers(r, columns)
    scaling = 1 / 3
    exact = [
        [Fraction(float(w[i, j])) + Fraction(scaling) * dot(B[i], A[:, j]) for j in range(columns)]
        for i in range(rows)
    ]
    scaled = B * scaling
    norms, norm = norm_bound(scaled, axis=1), float(norm_bound(A, axis=0).max())
    error = evaluation_error(work, r, norms, norm, through_float32=target.itemsize == 2)
    return w, scaled, A, exact, error


def dot(b: Any, a: Any) -> Fraction:
    """Return the exact product of two vectors."""
    return sum((Fraction(x) * Fraction(y) for x, y in zip(b, a, strict=True)), Fraction(0))
