"""The definition of the merge, in rational arithmetic: what the fast merge is checked against and falls
back to."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .formats import Array, float_format
from .rounding import round_fraction


def exact_entry(
    w: Any, groups: Iterable[tuple[Iterable[Any], Iterable[Any], float]], dtype: DTypeLike
) -> Any:
    """Return ``w + sum_g scaling_g * sum_k b_g[k] a_g[k]`` rounded once to ``dtype``, as a scalar of it.

    Args:
        w: a number; groups: of numbers b_g, as many numbers a_g, and a scaling; all finite.

    An exact sum of zero gives +0, unless ``w`` is -0.0 (then the update is zero too, and ``w`` is kept). An
    underflow keeps the sign of the exact value; an overflow is an infinity, which the caller has to refuse.
    """
    total = Fraction(float(w))
    for b, a, scaling in groups:
        products = (Fraction(float(x)) * Fraction(float(y)) for x, y in zip(b, a, strict=True))
        total += Fraction(scaling) * sum(products, Fraction(0))
    if total == 0:
        return float_format(dtype).dtype.type(w if w == 0 else 0.0)
    return round_fraction(total, dtype)


def merge_exact(W0: Array, A: Array, B: Array, scaling: float, dtype: DTypeLike) -> Array:
    """Return ``W0 + scaling * B @ A`` entry by entry in rational arithmetic, rounded once to ``dtype``.

    The definition of `merge`, hundreds of thousands of times slower and without its checks: an oracle for
    tests.

    Args:
        W0: (out, in); A: (r, in); B: (out, r); finite numbers of any of the four dtypes.
        scaling: finite.
        dtype: float16, bfloat16, float32 or float64. An overflow is an infinity here.
    """
    out = np.empty(W0.shape, float_format(dtype).dtype)
    for i, j in np.ndindex(*W0.shape):
        out[i, j] = exact_entry(W0[i, j], [(B[i], A[:, j], scaling)], dtype)
    return out
