"""The few operations that every layer is made of, on numbers and on magnitudes alike.

A layer that is written with these alone can be evaluated three ways: in a floating-point dtype, in exact
arithmetic on object arrays of `fractions.Fraction`, and on `Magnitude`, which gives the size that its error
bound is a multiple of.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from .balls import Ball
from .errors import DTypeError
from .formats import FORMATS, Array
from .magnitudes import Magnitude, magnitude_of

Operand: TypeAlias = Any
"""An array, a `Magnitude` or a `Ball`; the functions here return what they were given."""

_DTYPES = (*(form.dtype for form in FORMATS), np.dtype(object))


def product(a: Operand, b: Operand) -> Operand:
    """Return the matrix product in the operands' dtype (NumPy would give float32 for bfloat16)."""
    if isinstance(a, Magnitude | Ball):
        return a @ b
    return np.matmul(a, b).astype(a.dtype)


def scale(values: Operand, factor: float) -> Operand:
    """Return ``factor * values``; ``factor`` is rounded to the dtype, and exact among Fractions."""
    if isinstance(values, Ball):
        return values.scaled(factor)
    if isinstance(values, Magnitude):
        return values * magnitude_of(np.array(factor), values.precision, values.unit)
    number: Any = Fraction(factor) if values.dtype == object else values.dtype.type(factor)
    return values * number


def restructure(values: Operand, rearrange: Callable[[Array], Array]) -> Operand:
    """Return ``rearrange(values)``, where ``rearrange`` moves, repeats or fills in zeros, and no more."""
    return values.map(rearrange) if isinstance(values, Magnitude | Ball) else rearrange(values)


def add_up(values: Operand, gather: Callable[[Array], Array], most: int) -> Operand:
    """Return ``gather(values)``, where ``gather`` sums numbers, at most ``most`` into each of its results."""
    return values.add_up(gather, most) if isinstance(values, Magnitude | Ball) else gather(values)


def stack(parts: Sequence[Operand]) -> Operand:
    """Return the parts, at least one and all of one shape, along a new first axis."""
    return Magnitude.stack(parts) if isinstance(parts[0], Magnitude) else np.stack(parts)


def masked(values: Operand, dropout: Operand | None) -> Operand:
    """Return ``values * dropout``, or ``values`` where there is no dropout."""
    return values if dropout is None else values * dropout


def place_rows(values: Operand, rows: slice | None, out_features: int) -> Operand:
    """Return (..., out_features) with ``values`` at ``rows`` of the last axis and zeros elsewhere."""
    if rows is None:
        return values
    before, after = rows.start, out_features - rows.stop

    def pad(array: Array) -> Array:
        zeros = [np.zeros((*array.shape[:-1], width), array.dtype) for width in (before, after)]
        return np.concatenate([zeros[0], array, zeros[1]], axis=-1)

    return restructure(values, pad)


def as_rows(values: Operand) -> Operand:
    """Return the same numbers with all leading axes made one: (N, features)."""
    return restructure(values, lambda a: a.reshape(math.prod(a.shape[:-1]), a.shape[-1]))


def total(values: Operand) -> Operand:
    """Return the sum over the first axis, in the dtype of the values."""
    return values.sum(axis=0)


def check_dtypes(**tensors: Array | None) -> None:
    """Check that all tensors have one dtype: a floating-point format, or object for exact arithmetic.

    Raises:
        DTypeError: naming the tensor, what was expected and what came.
    """
    given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    first, expected = next(iter(given.items()))
    if expected not in _DTYPES:
        known = ", ".join(map(str, _DTYPES))
        raise DTypeError(f"{first}: expected one of {known}, got {expected}; convert it")
    for name, dtype in given.items():
        if dtype != expected:
            raise DTypeError(f"{name}: expected {expected} as {first} has, got {dtype}; convert it")
