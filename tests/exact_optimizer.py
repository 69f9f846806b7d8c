"""AdamW and clipping in rational arithmetic, for tests; roots are right to 400 bits."""

from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
from exact_linear import rational

_BITS = 400


def root(q: Fraction) -> Fraction:
    """Return sqrt(q) to a relative error below 2^-399, and exactly where it is a number of few bits."""
    shift = max(0, 2 * _BITS + q.denominator.bit_length() - q.numerator.bit_length())
    shift += shift % 2
    whole = (q.numerator << shift) // q.denominator
    return Fraction(isqrt(whole), 1 << shift // 2)


def exact_step(parameter: Any, gradient: Any, state: Any, options: Any) -> tuple[Any, Any, Any]:
    """Return the parameter, m and v after one step, as object arrays: the definition, entry by entry."""
    beta1, beta2 = map(Fraction, options.betas)
    lr, eps, decay = Fraction(options.lr), Fraction(options.eps), Fraction(options.weight_decay)
    t = state.step + 1
    p, g = rational(parameter), rational(gradient)
    m = beta1 * rational(state.m) + (1 - beta1) * g
    v = beta2 * rational(state.v) + (1 - beta2) * g * g
    correction1, correction2 = 1 - beta1**t, root(1 - beta2**t)
    moved = np.empty(p.shape, object)
    for index in np.ndindex(p.shape):
        quotient = (m[index] / correction1) / (root(v[index]) / correction2 + eps)
        moved[index] = p[index] - lr * decay * p[index] - lr * quotient
    return moved, m, v


def exact_clip(gradients: Any, max_norm: float) -> tuple[list[Any], Fraction]:
    """Return the clipped gradients as object arrays, and the norm."""
    exact = [rational(gradient) for gradient in gradients]
    norm = root(sum((value**2 for gradient in exact for value in gradient.ravel()), Fraction(0)))
    factor = min(Fraction(1), Fraction(max_norm) / (norm + Fraction(1e-6)))
    return [gradient * factor for gradient in exact], norm
