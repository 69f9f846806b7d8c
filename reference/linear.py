"""The LoRA linear layer, forward and backward: what every implementation of it is compared with."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .errors import DTypeError
from .formats import FORMATS, Array
from .linear_shapes import check_linear_shapes

_DTYPES = (*(form.dtype for form in FORMATS), np.dtype(object))


@dataclass(frozen=True, eq=False)
class LinearGradients:
    """Gradients of the layer: dx (..., in), dA (r, in), dB (out, r), dbias (out,). W0 is frozen."""

    dx: Array
    dA: Array  # noqa: N815
    dB: Array  # noqa: N815
    dbias: Array


def linear_forward(
    x: Array,
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    *,
    bias: Array | None = None,
    dropout: Array | None = None,
) -> Array:
    """Return ``y = x W0^T + bias + scaling * ((x * dropout) A^T) B^T``, of shape (..., out).

    Args: x: (..., in). W0: (out, in), frozen. A: (r, in), the tensor ``lora_A``. B: (out, r), the tensor
        ``lora_B``. scaling: see `lora_scaling`. bias: (out,), or None. dropout: of x's shape, what to
        multiply the adapter's input by: 0 where dropped, 1 / (1 - p) where kept.
            The base product always sees x itself.

    All arrays have one dtype and the work is done in it: float16, bfloat16, float32, float64; or object,
    for exact arithmetic with `fractions.Fraction` or int elements, where ``scaling`` is taken as an exact
    rational. In floating point this is one evaluation among many: `linear_forward_bound` says how far any
    may be off.

    Raises:
        ShapeError, DTypeError: naming the tensor, what was expected and what came.

    Source: LoRA, arXiv 2106.09685, equation 3, with dropout on the adapter's input as in the authors'
    loralib.
    """
    check_linear_shapes(x, W0, A, B, bias=bias, dropout=dropout)
    _check_dtypes(x=x, W0=W0, A=A, B=B, bias=bias, dropout=dropout)
    y = _product(x, W0.T)
    if bias is not None:
        y = y + bias
    return y + _scale(_product(_product(_dropped(x, dropout), A.T), B.T), scaling)


def linear_backward(
    dy: Array,
    x: Array,
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    *,
    dropout: Array | None = None,
) -> LinearGradients:
    """Return the gradients of a scalar whose gradient with respect to y is ``dy``, (..., out).

    With h = (x * dropout) A^T and dh = scaling * dy B, both (..., r), and sums over all leading axes:

        dx = dy W0 + (dh A) * dropout,   dA = dh^T (x * dropout),   dB = scaling * dy^T h,   dbias = sum dy

    Arguments, dtypes and errors as in `linear_forward`.
    """
    check_linear_shapes(x, W0, A, B, dropout=dropout, dy=dy)
    _check_dtypes(x=x, W0=W0, A=A, B=B, dropout=dropout, dy=dy)
    dropped = _dropped(x, dropout)
    h = _product(dropped, A.T)
    dh = _scale(_product(dy, B), scaling)
    rows_dy, rows_dh, rows_h, rows_x = (a.reshape(-1, a.shape[-1]) for a in (dy, dh, h, dropped))
    return LinearGradients(
        dx=_product(dy, W0) + _dropped(_product(dh, A), dropout),
        dA=_product(rows_dh.T, rows_x),
        dB=_scale(_product(rows_dy.T, rows_h), scaling),
        dbias=rows_dy.sum(axis=0),
    )


def _product(a: Array, b: Array) -> Array:
    """Return the matrix product in the operands' dtype (NumPy would give float32 for bfloat16)."""
    product: Array = np.matmul(a, b).astype(a.dtype, copy=False)
    return product


def _scale(values: Array, scaling: float) -> Array:
    factor: Any = Fraction(scaling) if values.dtype == object else values.dtype.type(scaling)
    scaled: Array = values * factor
    return scaled


def _dropped(values: Array, dropout: Array | None) -> Array:
    return values if dropout is None else values * dropout


def _check_dtypes(**tensors: Array | None) -> None:
    given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    expected = next(iter(given.values()))
    if expected not in _DTYPES:
        known = ", ".join(map(str, _DTYPES))
        raise DTypeError(f"{next(iter(given))}: expected one of {known}, got {expected}; convert it")
    for name, dtype in given.items():
        if dtype != expected:
            raise DTypeError(
                f"{name}: expected {expected} as {next(iter(given))} has, got {dtype}; convert it"
            )
