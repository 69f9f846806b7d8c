"""Softmax over the last axis, under a mask, and its gradient."""

import numpy as np

from .errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from .formats import Array, float_format, nonfinite_mask
from .operands import Operand, add_up, check_dtypes


def softmax(scores: Array, mask: Array | None = None) -> Array:
    """Return ``exp(scores - max) / sum exp(scores - max)`` over the last axis, in the scores' dtype.

    Args:
        scores: (..., T), float16, bfloat16, float32 or float64.
        mask: boolean, broadcast to the scores' shape: True where a score counts. The others, which may be any
            number, have probability 0.

    Raises:
        ShapeError, DTypeError: the mask does not fit, or a dtype has no exponential.
        ConfigError: a row in which nothing counts.
        NonFiniteError: a score that counts is NaN or infinite.
    """
    if scores.dtype == object:
        raise DTypeError("scores: expected floating point, got object; the exponential is irrational")
    float_format(scores.dtype, "scores")
    if scores.ndim < 1 or scores.shape[-1] < 1:
        raise ShapeError(f"scores: expected (..., T) with T above 0, got {scores.shape}; give a key")
    counts = np.broadcast_to(True, scores.shape) if mask is None else broadcast_mask(mask, scores.shape)
    wrong = nonfinite_mask(scores) & counts
    if wrong.any():
        index = tuple(map(int, np.argwhere(wrong)[0]))
        raise NonFiniteError(
            f"scores: expected finite numbers, got {scores[index]} at {index}; take a wider dtype"
        )
    kept = np.where(counts, scores, scores.dtype.type(-np.inf))
    weights = np.exp(kept - kept.max(axis=-1, keepdims=True))
    probabilities: Array = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def softmax_backward(dprobabilities: Array, probabilities: Array) -> Array:
    """Return ``p * (dp - sum p dp)``, with the sum over the last axis: the gradient of the scores.

    Args: dprobabilities: (..., T), the gradient of what `softmax` returned. probabilities: (..., T), that.

    Any dtype, objects too: given the probabilities, the gradient is rational.

    Raises:
        ShapeError, DTypeError: naming the tensor, what was expected and what came.
    """
    if dprobabilities.shape != probabilities.shape or probabilities.ndim < 1:
        raise ShapeError(
            f"dprobabilities: expected {probabilities.shape} as the probabilities, got "
            f"{dprobabilities.shape}; check its axes"
        )
    check_dtypes(probabilities=probabilities, dprobabilities=dprobabilities)
    dscores: Array = backward(dprobabilities, probabilities, weighted(dprobabilities, probabilities))
    return dscores


def backward(dprobabilities: Operand, probabilities: Operand, mean: Operand) -> Operand:
    """Evaluate `softmax_backward` on operands of any kind, given the sums ``sum p dp``, (..., 1)."""
    return probabilities * (dprobabilities - mean)


def weighted(values: Operand, weights: Operand) -> Operand:
    """Return ``sum weights * values`` over the last axis, (..., 1)."""
    return add_up(weights * values, lambda a: a.sum(axis=-1, keepdims=True), values.shape[-1])


def broadcast_mask(mask: Array, shape: tuple[int, ...]) -> Array:
    """Return the mask in the scores' shape.

    Raises:
        ShapeError, DTypeError, ConfigError: it is not boolean, does not fit, or leaves a row with nothing.
    """
    if mask.dtype != np.bool_:
        raise DTypeError(f"mask: expected bool, got {mask.dtype}; True is where a key is attended to")
    try:
        counts = np.broadcast_to(mask, shape)
    except ValueError:
        raise ShapeError(
            f"mask: expected what broadcasts to {shape}, got {mask.shape}; check its axes"
        ) from None
    empty = ~counts.any(axis=-1)
    if empty.any():
        row = tuple(map(int, np.argwhere(empty)[0]))
        raise ConfigError(f"mask: expected a key for each query, got none in row {row}; attend to one")
    return counts
