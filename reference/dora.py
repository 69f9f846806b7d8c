"""The DoRA linear layer, forward and backward: each row of the adapted weight is given a length of its
own.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from .formats import Array
from .linear import update, update_backward, weight_update
from .linear_shapes import check_linear_shapes
from .low_rank import LowRank
from .operands import Operand, as_rows, check_dtypes, masked, product, total
from .rounding import round_float64


@dataclass(frozen=True, eq=False)
class DoraGradients:
    """Gradients of the layer: dx (..., in), dA (r, in), dB (out, r), dbias and dmagnitude (out,)."""

    dx: Array
    dA: Array  # noqa: N815
    dB: Array  # noqa: N815
    dbias: Array
    dmagnitude: Array


def dora_norm(W0: Array, adapter: LowRank, *, fan_in_fan_out: bool = False) -> Array:
    """Return ``||W0 + scaling * B A||_2`` of each row, (out,): the lengths that DoRA divides by.

    Args:
        W0: (out, in), or (in, out) with ``fan_in_fan_out``. A convolution's weight is taken as the matrix
            ``W0.reshape(out, -1)``, with A ``(r, -1)`` and B ``(out, r)`` reshaped likewise; an embedding's
            (V, d) as ``W0.T``, with A (r, V) and B (d, r), so that its lengths are those of the d columns.
        adapter: its A, B and scaling; without rows and without a bias of lora_B.

    All arrays have one dtype. In floating point everything is evaluated in float64, without overflow or
    underflow on the way from the weight to its length, and rounded once to that dtype. Among objects
    (fractions or ints) the norm is exact, and has to be rational.

    Raises:
        ShapeError, DTypeError, ConfigError: naming the tensor, what was expected and what came; a DTypeError
            also where the dtype is object and a norm irrational.
        NonFiniteError: a norm of zero, or none that is finite, with its row.

    Source: DoRA, arXiv 2402.09353, equation 5, with PEFT's axes.
    """
    W0 = W0.T if fan_in_fan_out else W0
    check_dora(W0, W0, replace(adapter, dropout=None))
    check_dtypes(W0=W0, A=adapter.A, B=adapter.B)
    return _checked_norm(_exact_norm(W0, adapter) if W0.dtype == object else _rounded_norm(W0, adapter))


def dora_magnitude_start(W0: Array, adapter: LowRank, *, fan_in_fan_out: bool = False) -> Array:
    """Return the magnitude, (out,), that a new DoRA layer starts with: `dora_norm`.

    With it the layer is the LoRA layer; with B of zeros, as new adapters have, it is the frozen one. The
    paper initialises with ``||W0||``, PEFT with the adapter included, as here; for B of zeros that is the
    same.
    """
    return dora_norm(W0, adapter, fan_in_fan_out=fan_in_fan_out)


def dora_forward(
    x: Array,
    W0: Array,
    adapter: LowRank,
    magnitude: Array,
    *,
    bias: Array | None = None,
    norm: Array | None = None,
    fan_in_fan_out: bool = False,
) -> Array:
    """Return the layer's output, (..., out). With g = magnitude / norm and xd = x * dropout,

        y = x W0^T + bias + (g - 1) * (xd W0^T) + g * scaling * (xd A^T) B^T

    which without dropout is ``g * (x (W0 + scaling B A)^T) + bias``.

    Args:
        x: (..., in). W0: (out, in), frozen, or (in, out) with ``fan_in_fan_out``.
        adapter: A (r, in), B (out, r), scaling, dropout of x's shape; neither rows nor a bias of lora_B.
        magnitude: (out,), PEFT's ``lora_magnitude_vector``.
        bias: (out,); not rescaled.
        norm: (out,), above zero, to use in place of `dora_norm`; for exact arithmetic where that is
        irrational.

    Dtypes as in `linear_forward`. In floating point this is one evaluation among many: `dora_forward_bound`
    says how far any may be off.

    Raises:
        ShapeError, DTypeError, ConfigError: naming the tensor, what was expected and what came.
        NonFiniteError: as in `dora_norm`.

    Source: DoRA, arXiv 2402.09353, equation 5; dropout as in PEFT 0.21, ``DoraLinearLayer.forward``.
    """
    W0 = W0.T if fan_in_fan_out else W0
    norm = _check_arguments(x, W0, adapter, magnitude, norm, bias=bias)
    y: Array = forward(x, W0, adapter, *_factors(magnitude, norm), bias)
    return y


def dora_backward(
    dy: Array,
    x: Array,
    W0: Array,
    adapter: LowRank,
    magnitude: Array,
    *,
    norm: Array | None = None,
    fan_in_fan_out: bool = False,
) -> DoraGradients:
    """Return the gradients of a scalar whose gradient with respect to y is ``dy``, (..., out).

    The norm is a constant here: no gradient goes through it. With h = xd A^T, dg = dy * g and sums over all
    leading axes:

        dx = dy W0 + ((dy * (g - 1)) W0 + scaling * dg B A) * dropout
        dA = scaling * (dg B)^T xd,   dB = scaling * dg^T h,   dbias = sum dy
        dmagnitude = sum dy * (xd W0^T + scaling * h B^T) / norm

    Arguments, dtypes and errors as in `dora_forward`.

    Source: DoRA, arXiv 2402.09353, section 4.3.
    """
    W0 = W0.T if fan_in_fan_out else W0
    norm = _check_arguments(x, W0, adapter, magnitude, norm, dy=dy)
    terms = backward(dy, x, W0, adapter, *_factors(magnitude, norm))
    return DoraGradients(terms.dx, terms.dA, terms.dB, terms.dbias, _quotient(terms.dg, norm))


class DoraTerms(NamedTuple):
    """Gradients of the layer, as arrays or as magnitudes; dg is that of magnitude / norm."""

    dx: Operand
    dA: Operand  # noqa: N815
    dB: Operand  # noqa: N815
    dbias: Operand
    dg: Operand


def forward(x: Operand, W0: Operand, adapter: LowRank, g: Operand, less: Operand, bias: Operand) -> Operand:
    """Evaluate `dora_forward` on operands of any kind, W0 as (out, in), with ``less`` for g - 1."""
    y = product(x, W0.T)
    if bias is not None:
        y = y + bias
    y = y + product(masked(x, adapter.dropout), W0.T) * less
    return y + update(x, adapter, *W0.shape[:1]) * g


def backward(dy: Operand, x: Operand, W0: Operand, adapter: LowRank, g: Operand, less: Operand) -> DoraTerms:
    """Evaluate `dora_backward` on operands of any kind, W0 as (out, in), with ``less`` for g - 1."""
    own = update_backward(dy * g, x, adapter)
    rescaled = product(masked(x, adapter.dropout), W0.T) + update(x, adapter, *W0.shape[:1])
    return DoraTerms(
        dx=product(dy, W0) + masked(product(dy * less, W0), adapter.dropout) + own.dx,
        dA=own.dA,
        dB=own.dB,
        dbias=total(as_rows(dy)),
        dg=total(as_rows(dy * rescaled)),
    )


def check_dora(
    x: Array,
    W0: Array,
    adapter: LowRank,
    *,
    bias: Array | None = None,
    dy: Array | None = None,
    **lengths: Array | None,
) -> None:
    """Check the shapes of a DoRA layer's tensors, W0 as (out, in); ``lengths`` are vectors (out,).

    Raises:
        ShapeError, ConfigError: naming the tensor, what was expected and what came.
    """
    if adapter.rows is not None:
        raise ConfigError(
            f"rows: expected None for DoRA, got {adapter.rows}; make each slice a layer of its own"
        )
    if adapter.bias is not None:
        raise ConfigError("bias of lora_B: expected None for DoRA, got a tensor; add it to the layer's bias")
    check_linear_shapes(x, W0, [adapter], bias=bias, dy=dy)
    for name, vector in lengths.items():
        if vector is not None and vector.shape != W0.shape[:1]:
            raise ShapeError(
                f"{name}: expected {W0.shape[:1]} to fit W0 {W0.shape}, got {vector.shape}; check its axes"
            )


def row_norms(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``||row||_2`` in float64; a power of two is divided out first, lest a square leave the range."""
    _, exponents = np.frexp(np.abs(matrix).max(axis=1, initial=0.0))
    scaled = np.ldexp(matrix, -exponents[:, None])
    norms: NDArray[np.float64] = np.ldexp(np.sqrt((scaled * scaled).sum(axis=1)), exponents)
    return norms


def wide_norm(W0: Array, adapter: LowRank) -> NDArray[np.float64]:
    """Return `dora_norm` in float64, not rounded to the dtype and not checked; W0 as (out, in)."""
    wide = LowRank(widened(adapter.A), widened(adapter.B), adapter.scaling)
    return row_norms(widened(W0) + weight_update(wide, *W0.shape[:1]))


def widened(values: Array) -> NDArray[np.float64]:
    """Return the numbers in float64, which holds those of every float dtype."""
    wide: NDArray[np.float64] = np.asarray(values, np.float64)
    return wide


def _check_arguments(
    x: Array,
    W0: Array,
    adapter: LowRank,
    magnitude: Array,
    norm: Array | None,
    *,
    bias: Array | None = None,
    dy: Array | None = None,
) -> Array:
    """Check shapes and dtypes; return the norm that was given, or the layer's own."""
    check_dora(x, W0, adapter, bias=bias, dy=dy, magnitude=magnitude, norm=norm)
    own = {"A": adapter.A, "B": adapter.B, "dropout": adapter.dropout}
    check_dtypes(x=x, W0=W0, **own, magnitude=magnitude, norm=norm, bias=bias, dy=dy)
    return dora_norm(W0, adapter) if norm is None else _checked_norm(norm)


def _factors(magnitude: Array, norm: Array) -> tuple[Array, Array]:
    """Return g = magnitude / norm, and g - 1."""
    g = _quotient(magnitude, norm)
    one: Any = g.dtype.type(1)  # among objects the int
    return g, g - one


def _quotient(values: Array, norm: Array) -> Array:
    """Return ``values / norm``, in fractions where the values are objects: ints would give floats."""
    if norm.dtype == object:
        norm = np.fromiter(map(Fraction, norm), object)
    quotient: Array = values / norm
    return quotient


def _rounded_norm(W0: Array, adapter: LowRank) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return round_float64(wide_norm(W0, adapter), W0.dtype)


def _exact_norm(W0: Array, adapter: LowRank) -> Array:
    weight = W0 + weight_update(adapter, *W0.shape[:1])
    squares = [Fraction(square) for square in (weight * weight).sum(axis=1)]
    return np.fromiter((_exact_root(square, row) for row, square in enumerate(squares)), object)


def _exact_root(square: Fraction, row: int) -> Fraction:
    root = Fraction(math.isqrt(square.numerator), math.isqrt(square.denominator))
    if root * root != square:
        raise DTypeError(
            f"norm: expected a rational one, as exact arithmetic needs, got the root of {square} for row "
            f"{row} of W0 + scaling * B A; pass a rational norm"
        )
    return root


def _checked_norm(norm: Array) -> Array:
    for row, length in enumerate(norm):
        if not 0 < length < math.inf:
            raise NonFiniteError(
                f"norm: expected finite numbers above 0, got {length} for row {row} of W0 + scaling * B A; "
                "such a row has no direction for DoRA to keep"
            )
    return norm
