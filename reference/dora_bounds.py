"""How far from its exact value a DoRA layer computed in floating point may be, before it is computed.

Given its factors g = magnitude / norm the layer is a sum of products of its inputs, so its bound is the layer
evaluated on magnitudes, as in `bounds`. Only the norm needs an argument of its own.

**The norm.** Let w be a row of W0 + scaling B A, n = ||w|| its exact norm, and w~ the row as computed, with
|w~ - w| <= e componentwise: the bound of a sum of products again, a multiple of |W0| + |scaling| |B||A|. It
is absolute, so that cancellation between W0 and the update is in it. Then

    | ||w~|| - n | <= ||w~ - w|| <= ||e||                                      (the triangle inequality)

Let u be the unit roundoff of the dtype, u' that of the format in which the squares are added up, which is
float32 or wider. A computed sum of squares, in any order, is s = ||w~||^2 (1 + a) + t, where |a| <=
gamma_in(u') and 0 <= t <= 2 in eta (1 + |a|), eta being the smallest normal number, for squares and sums that
underflow. Since | sqrt(p + t) - sqrt(p) | <= sqrt(|t|) and | sqrt(1 + a) - 1 | <= |a|, its root is ||w~|| (1
+ a') + t', |a'| <= gamma_in(u'), |t'| <= sqrt(2 in eta (1 + |a|)). The root is rounded once in the wide
format and once to the dtype. In all, with 6 more roundings in the wide format allowed for (a norm that
divides by its largest entry first) and 2 in the dtype, and 1 + c = (1 + gamma_{in+6}(u')) (1 + gamma_2(u)),

    |norm~ - n| <= E = ||e|| + c (n + ||e||) + (1 + c) sqrt(2 in eta) + (an underflow of the result)

where n may be replaced by the norm of |W0| + |scaling| |B||A|.

**The factor.** | 1 / norm~ - 1 / n | <= (1 / n) E / (n - E), which is as a relative error of E / (n - E) in
the reciprocal; the roundings of the magnitude and of the division are counted as any others. The relative
error of g does not pass to g - 1; there it is an absolute one.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import DTypeLike

from . import dora
from .bounds import sized, sizing, slack
from .dora import DoraGradients, check_dora, row_norms, wide_norm, widened
from .errors import ConfigError
from .formats import Array, float_format
from .linear import weight_update
from .low_rank import LowRank
from .magnitudes import Bound, Magnitude, magnitude_of, underflow_unit
from .operands import Operand, as_rows, total
from .precision import ROUND_UP, Precision, gamma

# What an evaluation in another order may round more often than the definition, beyond `slack`: a bias that is
# subtracted from the base layer's output again, two sums or factors taken apart.
_MORE = 2
_FLOAT64 = Precision(np.float64)
# For the roundings of g - 1 here, which are not small beside the result.
_OWN_ROUNDING = 2.0**-50


def dora_norm_bound(
    W0: Array, adapter: LowRank, precision: Precision | DTypeLike, *, fan_in_fan_out: bool = False
) -> Bound:
    """Return a bound, (out,), on ``|computed - exact|`` of `dora_norm` evaluated in ``precision``.

    Args: W0, adapter: as in `dora_norm`, in any float dtypes. precision: a dtype or a `Precision`; the
    squares
        are added up in float32 or wider. A ``failure`` plays no part: this bound always holds.

    Raises:
        ShapeError, DTypeError, ConfigError: as in `linear_forward_bound`.
    """
    W0 = W0.T if fan_in_fan_out else W0
    check_dora(W0, W0, replace(adapter, dropout=None))
    return _norm_error(W0, adapter, Precision.of(precision))


def dora_forward_bound(
    x: Array,
    W0: Array,
    adapter: LowRank,
    magnitude: Array,
    precision: Precision | DTypeLike,
    *,
    bias: Array | None = None,
    fan_in_fan_out: bool = False,
) -> Bound:
    """Return a bound, (..., out), on ``|computed - exact|`` of `dora_forward` evaluated in ``precision``.

    The norm may be evaluated in ``precision`` or in any wider format. Beside the definition the bound covers
    ``g * (x (W0 + scaling B A)^T) + bias`` without dropout, and PEFT, which subtracts the bias from the base
    layer's output to get x W0^T.

    Args: the layer's as in `dora_forward`, the exact values, in any float dtypes; precision as in
        `linear_forward_bound`.

    Raises:
        ShapeError, DTypeError: a tensor does not fit.
        ConfigError: there is no bound, because there are so many terms in so few bits, or because the error
            of a norm may be more than half of it.
    """
    W0 = W0.T if fan_in_fan_out else W0
    check_dora(x, W0, adapter, bias=bias, magnitude=magnitude)
    sizes = _sizes(W0, adapter, magnitude, precision)
    offset = sizes.of(bias)
    y: Magnitude = dora.forward(sizes.of(x), sizes.of(W0), sizes.adapter, sizes.g, sizes.less, offset)
    if bias is not None:
        y = y + (offset + offset) * sizes.less
    return y.bound(slack([adapter]) + _MORE)


def dora_backward_bound(
    dy: Array,
    x: Array,
    W0: Array,
    adapter: LowRank,
    magnitude: Array,
    precision: Precision | DTypeLike,
    *,
    bias: Array | None = None,
    fan_in_fan_out: bool = False,
) -> DoraGradients:
    """Return bounds on ``|computed - exact|`` of each gradient of `dora_backward` in ``precision``.

    Arguments, coverage and errors as in `dora_forward_bound`. bias: (out,), the layer's, for implementations
    that subtract it from the base layer's output; it then enters the error of dmagnitude, and no other.
    """
    W0 = W0.T if fan_in_fan_out else W0
    check_dora(x, W0, adapter, bias=bias, dy=dy, magnitude=magnitude)
    sizes = _sizes(W0, adapter, magnitude, precision)
    dy_size = sizes.of(dy)
    terms = dora.backward(dy_size, sizes.of(x), sizes.of(W0), sizes.adapter, sizes.g, sizes.less)
    dg = terms.dg
    if bias is not None:
        offset = sizes.of(bias)
        dg = dg + total(as_rows(dy_size * (offset + offset)))
    more = slack([adapter]) + _MORE
    dx, dA, dB, dbias = (term.bound(more) for term in (terms.dx, terms.dA, terms.dB, terms.dbias))
    return DoraGradients(dx, dA, dB, dbias, (dg * sizes.reciprocal).bound(more))


def dora_merge_bound(
    W0: Array,
    adapter: LowRank,
    magnitude: Array,
    precision: Precision | DTypeLike,
    *,
    dtype: DTypeLike | None = None,
) -> Bound:
    """Return a bound, (out, in), on ``|computed - exact|`` of a merge that rounds after every operation.

    The merge is ``magnitude / ||w|| * w``, ``w = W0 + scaling B A``, each row's factor computed by itself, as
    PEFT does; `merge_dora` is off by half a unit in the last place at most. Evaluated in ``precision`` and
    rounded to ``dtype``, W0's by default, at the end. Errors as in `dora_forward_bound`.
    """
    check_dora(W0, W0, replace(adapter, dropout=None), magnitude=magnitude)
    sizes = _sizes(W0, adapter, magnitude, precision)
    weight = sizes.of(W0) + weight_update(sizes.adapter, W0.shape[0])
    merged = sizes.g.map(lambda values: values[:, None]) * weight
    bound: Bound = merged.bound(slack([adapter]) + _MORE)
    stored = float_format(W0.dtype if dtype is None else dtype)
    bound += stored.unit_roundoff * (merged.size + bound) + stored.smallest_normal
    return bound


@dataclass(frozen=True, eq=False)
class _Sizes:
    """The magnitudes of a layer's factors: 1 / norm, g = magnitude / norm, and g - 1."""

    precision: Precision
    unit: float
    adapter: LowRank
    reciprocal: Magnitude
    g: Magnitude
    less: Magnitude

    def of(self, values: Array | None) -> Operand:
        return None if values is None else magnitude_of(values, self.precision, self.unit)


def _sizes(W0: Array, adapter: LowRank, magnitude: Array, precision: Precision | DTypeLike) -> _Sizes:
    precision = Precision.of(precision)
    error = _norm_error(W0, adapter, precision)
    norm, doubt = wide_norm(W0, adapter), _norm_error(W0, adapter, _FLOAT64)
    least, most = norm - doubt, norm + doubt
    for row in np.flatnonzero(~(error <= least / 2)):
        raise ConfigError(
            f"precision: expected one that bounds the error of each norm by half of it, got {error[row]:.3g} "
            f"for row {row} of norm {norm[row]:.3g}; name a more precise dtype"
        )
    lengths = widened(magnitude)
    factors = [*(lengths / norm).tolist(), *(adapter.scaling * lengths / norm).tolist()]
    unit = underflow_unit(precision.form, adapter.scaling, *factors)
    reciprocal = Magnitude(1 / least, error / (least - error) / least * ROUND_UP, unit, precision)
    g = magnitude_of(magnitude, precision, unit) * reciprocal
    away = np.maximum(np.abs(lengths / least - 1), np.abs(lengths / most - 1)) + _OWN_ROUNDING * g.size
    less = replace(g, size=away, lost=g.bound(0), stores=1)
    own = sized([adapter], lambda values: None if values is None else magnitude_of(values, precision, unit))
    return _Sizes(precision, unit, own[0], reciprocal, g, less)


def _norm_error(W0: Array, adapter: LowRank, precision: Precision) -> Bound:
    """Return E of the module's docstring for each row, W0 as (out, in)."""
    precision = replace(precision, failure=None)
    size = sizing(precision, [adapter])
    own = sized([adapter], size)[0]
    weight = size(W0) + weight_update(own, *W0.shape[:1])
    entries, sizes = row_norms(weight.bound(slack([adapter]))), row_norms(weight.size)
    wide = max(precision.wide, float_format(np.float32), key=lambda form: form.precision)
    in_features = W0.shape[1]
    summed, stored = gamma(in_features + 6, wide.unit_roundoff), gamma(2, precision.form.unit_roundoff)
    relative = summed + stored + summed * stored
    underflow = (1 + relative) * math.sqrt(2 * in_features * wide.smallest_normal) + weight.unit
    error: Bound = (entries + relative * (sizes + entries) + underflow) * ROUND_UP
    return error
