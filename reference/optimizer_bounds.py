"""How far from its exact value one step of AdamW, or a clipped gradient, may be, before it is computed.

As `bounds`, but a root and a quotient are no sums of products, so the errors are followed by hand. u is the
unit roundoff, g = gamma_6(u), eta the absolute error of an underflow. An evaluation may keep m as a sum of
two products or as torch does, ``m + (1 - b1) (g - m)`` (or from the other end); divide by a scalar or
multiply by its reciprocal; apply the learning rate to m, to the quotient or to the denominator; decay by a
product or by a difference; and fuse multiplications with additions. Its scalars, 1 - b^t above all, are
computed in float64. Not covered: overflow, scalars computed in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from .errors import ConfigError
from .formats import Array, float_format
from .magnitudes import Bound, underflow_unit
from .optimizer import CLIP_EPS, AdamWOptions, AdamWState, check_adamw
from .precision import ROUND_UP, Precision, gamma

_ROUNDINGS = 6
_FLOAT64_ROUNDOFF = 2.0**-53


@dataclass(frozen=True, eq=False)
class AdamWBound:
    """Bounds on ``|computed - exact|`` of a step's results, each of the parameter's shape."""

    parameter: Bound
    m: Bound
    v: Bound


def adamw_step_bound(
    parameter: Array, gradient: Array, state: AdamWState, options: AdamWOptions, dtype: DTypeLike
) -> AdamWBound:
    """Return bounds on ``|computed - exact|`` of `adamw_step` evaluated in ``dtype`` from the exact inputs.

    With M = b1 |m| + (1 - b1) |g|, V = b2 v + (1 - b2) g^2, D = sqrt(V) / sqrt(1 - b2^t) + eps and
    s = lr / (1 - b1^t), but for underflows:

        m: g (M + w (|m| + |g|)), w = 1 - b1, or 1 where that is 1/2 or more
        v: g V
        D: e_D = g_2 D + e_root / sqrt(1 - b2^t), where e_root is how far a root moves with V
        update: s (e_m / D + (M + e_m) e_D / (D (D - e_D)) + g_1 M / D)
        parameter: that, and (g + u) (1 + lr wd) |p| + u s M / D

    g_i = g + d + g d has in it d = 4 2^-53 / (1 - b_i^t), the error of that difference in float64, which
    cancellation makes a thousand times the roundoff of float64 for b2 = 0.999.

    The bound is infinite where the denominator may come out as zero: sqrt(V) and eps that both underflow.

    Args:
        parameter, gradient, state: as in `adamw_step`, the exact values, which are numbers of ``dtype``.
        dtype: float16, bfloat16, float32 or float64.

    Raises:
        ConfigError: a beta so near 1 that float64 cannot tell 1 - b^t; besides, as `adamw_step`.
        ShapeError, DTypeError, NonFiniteError: as `adamw_step`.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., chapters 2 and 3.
    """
    check_adamw(parameter, gradient, state)
    form = float_format(dtype)
    u, eta, growth = form.unit_roundoff, underflow_unit(form), gamma(_ROUNDINGS, form.unit_roundoff)
    p, g, m, v = (np.abs(a.astype(np.float64)) for a in (parameter, gradient, state.m, state.v))
    (beta1, beta2), t = options.betas, state.step + 1

    size_m = beta1 * m + (1 - beta1) * g
    swing = 1 - beta1 if beta1 > 0.5 else 1.0
    lost_m = eta * (4 + m + g)
    error_m = growth * (size_m + swing * (m + g)) + (1 + growth) * lost_m

    size_v = beta2 * v + (1 - beta2) * g * g
    lost_v = eta * (4 + g + v + g * g)
    error_v = growth * size_v + (1 + growth) * lost_v

    correction, uncertain = _bias_correction(beta2, t)
    root_correction = math.sqrt(correction)
    denominator = np.sqrt(size_v) / root_correction + options.eps
    relative = _combined(growth, uncertain + 2 * eta / root_correction)
    error_d = (1 + relative) * (_root_error(size_v, error_v) / root_correction + 3 * eta)
    error_d += relative * denominator

    correction, uncertain = _bias_correction(beta1, t)
    rate = options.lr / correction
    relative = _combined(growth, uncertain)
    least = denominator - error_d  # the smallest that the denominator may come out as
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = rate * size_m / denominator
        error_q = rate * (1 + relative) * (error_m / denominator)
        error_q += rate * (1 + relative) * (size_m + error_m) * (error_d / (denominator * least))
        error_q += relative * quotient + eta * (2 + rate + (1 + size_m + error_m) / least)
        decayed = (1 + options.lr * options.weight_decay) * p
        error_p = (growth + u) * decayed + u * quotient + (1 + u) * error_q + (1 + growth) * eta * (3 + p)
    error_p = np.where(least > 0, error_p, np.inf)
    return AdamWBound(error_p * ROUND_UP, error_m * ROUND_UP, error_v * ROUND_UP)


def clip_bound(
    gradients: Sequence[Array], max_norm: float, precision: Precision | DTypeLike
) -> tuple[tuple[Bound, ...], float]:
    """Return bounds on ``|computed - exact|`` of `clip_by_global_norm` evaluated in ``precision``.

    Of the clipped gradients, and of the norm, which is the root of a sum of n squares over k gradients, in
    any order, or of the squares of k norms that were rounded. All its terms are positive: its relative error
    is at most g, from `Precision.growth` for n terms and k + 6 further roundings; that of the factor is
    g norm / (norm + 1e-6 - g norm) and six roundings, but for underflows. Infinite where the norm's error may
    outweigh the norm and 1e-6.

    Args:
        gradients, max_norm: as in `clip_by_global_norm`, the exact values.
        precision: a dtype, or a `Precision` where squares are summed in another.

    Raises:
        ConfigError: so many terms in so few bits that there is no bound.
        DTypeError: a dtype is not float16, bfloat16, float32 or float64.
    """
    precision = Precision.of(precision)
    eta = underflow_unit(precision.form)
    sizes = [np.abs(gradient.astype(np.float64)) for gradient in gradients]
    count = sum(size.size for size in sizes)
    squares = math.fsum(float(np.square(size).sum()) for size in sizes)
    growth = precision.growth(count, len(sizes) + _ROUNDINGS, 0, count)
    norm = math.sqrt(squares)
    lost = np.array(2 * (count + len(sizes)) * eta)
    error_norm = growth * norm + (1 + growth) * (float(_root_error(np.array(squares), lost)) + eta)
    base = norm + CLIP_EPS
    least = base - error_norm - eta  # the smallest that the denominator may come out as
    if least <= 0:
        return tuple(np.full(size.shape, np.inf) for size in sizes), error_norm * ROUND_UP
    factor = min(1.0, max_norm / base)
    relative = _combined(gamma(_ROUNDINGS, precision.form.unit_roundoff), (error_norm + eta) / least)
    clipped = tuple(
        (relative * factor * size + eta * (2 + size * (1 + 1 / least))) * ROUND_UP for size in sizes
    )
    return clipped, error_norm * ROUND_UP


def _root_error(size: Bound, error: Bound) -> Bound:
    """Return how far sqrt(x) may be from sqrt(size) for any x >= 0 with ``|x - size| <= error``."""
    least = size - error
    roots = np.sqrt(size) + np.sqrt(np.maximum(least, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Bound = np.where(least > 0, error / roots, np.sqrt(error))
    return result


def _bias_correction(beta: float, t: int) -> tuple[float, float]:
    """Return ``c = 1 - beta^t`` and the relative error that its root or reciprocal, times a number, may have.

    As float64 gives them: a power off by 2 u at most, a difference, a root or quotient: 4 u / c.
    """
    correction = -math.expm1(t * math.log(beta)) if beta > 0 else 1.0
    uncertain = 4 * _FLOAT64_ROUNDOFF / correction
    if uncertain > 0.125:
        raise ConfigError(
            f"betas: expected 1 - beta^t of at least 2^-48, got beta {beta} and t {t}; lower it"
        )
    return correction, uncertain


def _combined(a: float, b: float) -> float:
    """Return ``(1 + a) (1 + b) - 1``, without losing float64's own roundoff beside the 1."""
    return a + b + a * b
