"""Rotary position embedding: the tables of cosines and sines, and the rotation of heads by them."""

import math

import numpy as np

from .errors import ConfigError, NonFiniteError, ShapeError
from .formats import Array
from .operands import Operand, check_dtypes, restructure


def rotary_tables(positions: Array, head_dim: int, theta: float = 10000.0) -> tuple[Array, Array]:
    """Return cos and sin, (T, D) each and float64, of the angles ``position * theta^(-2 i / D)``.

    Args:
        positions: (T,), of the tokens; integers, or numbers where positions are interpolated.
        head_dim: D, even. Column i and column i + D / 2 have the angle of i, for i below D / 2.
        theta: the base of the wavelengths.

    This is what the tables mean; implementations that make them in float32 are off by a rounding of the
    angle, which grows with the position.

    Raises:
        ShapeError, ConfigError, NonFiniteError: what does not fit is named.

    Source: RoFormer, arXiv 2104.09864, section 3.2.2, with the columns in the order of transformers' Llama.
    """
    positions = np.asarray(positions)
    if positions.ndim != 1:
        raise ShapeError(f"positions: expected (T,), got {positions.shape}; give one a token")
    if not np.isfinite(positions).all():
        raise NonFiniteError(f"positions: expected finite numbers, got {positions}; count the tokens from 0")
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(f"head_dim: expected an even number above 0, got {head_dim}; pairs are rotated")
    if not (math.isfinite(theta) and theta > 0):
        raise ConfigError(f"theta: expected a finite number above 0, got {theta}; Llama's is 10000")
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.tile(positions[:, None] * frequencies, 2)
    return np.cos(angles), np.sin(angles)


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Return ``x * cos + rotate_half(x) * sin``, where ``rotate_half`` takes halves [a, b] to [-b, a].

    Args: x: (..., T, D), D even. cos, sin: (T, D), see `rotary_tables`; any numbers, of x's dtype.

    Raises:
        ShapeError, DTypeError: naming the tensor, what was expected and what came.

    Source: ``apply_rotary_pos_emb`` of transformers' Llama.
    """
    check_rotary(cos, sin, x.shape)
    check_dtypes(x=x, cos=cos, sin=sin)
    rotated: Array = rotate(x, cos, signed(sin))
    return rotated


def apply_rotary_backward(dy: Array, cos: Array, sin: Array) -> Array:
    """Return the gradient of x for ``dy``, (..., T, D), the gradient of what `apply_rotary` returns.

    That is ``dy * cos`` plus the transpose of ``rotate_half`` applied to ``dy * sin``.

    Arguments and errors as in `apply_rotary`.
    """
    check_rotary(cos, sin, dy.shape, "dy")
    check_dtypes(dy=dy, cos=cos, sin=sin)
    dx: Array = rotate_backward(dy, cos, signed(sin))
    return dx


def check_rotary(cos: Array, sin: Array, shape: tuple[int, ...], name: str = "x") -> None:
    """Check cos and sin (T, D) against the shape (..., T, D) of what they rotate.

    Raises:
        ShapeError: naming the tensor, what was expected and what came.
    """
    if len(shape) < 2 or shape[-1] % 2:
        raise ShapeError(f"{name}: expected (..., T, D) with D even, got {shape}; pairs are rotated")
    for table, values in (("cos", cos), ("sin", sin)):
        if values.shape != shape[-2:]:
            raise ShapeError(
                f"{table}: expected {shape[-2:]} to fit {name} {shape}, got {values.shape}; "
                "give a row a token"
            )


def signed(sin: Array) -> Array:
    """Return sin, (T, D), with its first half negated: the sign of ``rotate_half`` moved to the table."""
    half = sin.shape[1] // 2
    return np.concatenate([-sin[:, :half], sin[:, half:]], axis=1)


def rotate(x: Operand, cos: Operand, signed_sin: Operand) -> Operand:
    """Evaluate `apply_rotary` on operands of any kind; nothing is checked."""
    return x * cos + restructure(x, _swapped) * signed_sin


def rotate_backward(dy: Operand, cos: Operand, signed_sin: Operand) -> Operand:
    """Evaluate `apply_rotary_backward` on operands of any kind; nothing is checked."""
    return dy * cos + restructure(dy * signed_sin, _swapped)


def _swapped(values: Array) -> Array:
    half = values.shape[-1] // 2
    return np.concatenate([values[..., half:], values[..., :half]], axis=-1)
