"""The linear layer in rational arithmetic, for tests: the exact values to compare computed ones with."""

from fractions import Fraction
from typing import Any

import numpy as np
from strategies import ARRAYS, LoraProblem

from loracle.reference import LinearGradients, linear_backward, linear_forward

GRADIENTS = ("dx", "dA", "dB", "dbias")


def rational(array: Any) -> Any:
    """Return an object array of Fractions equal to the floating-point numbers given."""
    array = np.asarray(array)
    return np.array([Fraction(float(v)) for v in array.ravel()], dtype=object).reshape(array.shape)


def rational_problem(problem: LoraProblem) -> LoraProblem:
    return LoraProblem(*(rational(getattr(problem, name)) for name in ARRAYS), problem.scaling)


def forward(p: LoraProblem, *, bias: bool = True, dropout: bool = True) -> Any:
    return linear_forward(
        p.x, p.W0, p.A, p.B, p.scaling, bias=p.bias if bias else None, dropout=p.dropout if dropout else None
    )


def backward(p: LoraProblem, *, dropout: bool = True) -> LinearGradients:
    return linear_backward(p.dy, p.x, p.W0, p.A, p.B, p.scaling, dropout=p.dropout if dropout else None)


def error(computed: Any, exact: Any) -> Any:
    """Return ``|computed - exact|`` as float64, rounded up; the difference itself is exact."""
    difference = np.abs(rational(computed) - exact)
    rounded = np.array([float(d) for d in difference.ravel()]).reshape(difference.shape)
    return rounded * (1 + 2.0**-50)
