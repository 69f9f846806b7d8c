"""How far from its exact value a computation in floating point may be, before it is made.

Componentwise a-priori bounds in the standard model: an operation gives fl(a op b) = (a op b)(1 + d), |d| <=
u, plus an absolute error where it underflows. Along a path of n roundings the factors 1 + d multiply to 1 +
t with |t| <= gamma_n = n u / (1 - n u) (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed.,
lemma 3.1). Every layer but attention is a sum of products of its inputs, so a bound is the layer itself,
evaluated on magnitudes, times the growth along its longest path: see `Magnitude` and `Precision.growth`.

The counts hold for any order of summation, with or without fused multiply-adds, for (x A^T) B^T and x (B
A)^T, for the scaling applied to any factor or product, and for adding the adapter's product to the base's
at the end or term by term: for BLAS, torch, PEFT's order of the factors, ``addmm`` and onnxruntime alike. Not
covered: overflow, products in fewer bits than `Precision` says, subnormal inputs flushed to zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike

from . import linear
from .formats import Array, float_format
from .linear import LinearGradients
from .linear_shapes import check_linear_shapes
from .low_rank import LayerGradients, LowRank, LowRankGradients
from .magnitudes import Bound, Magnitude, magnitude_of, underflow_unit
from .operands import Operand
from .precision import Precision


def unit_roundoff(dtype: DTypeLike) -> float:
    """Return u, the largest relative error of rounding to ``dtype``: 2^-24 for float32, 2^-8 for bfloat16."""
    return float_format(dtype).unit_roundoff


def linear_forward_bound(
    x: Array,
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    precision: Precision | DTypeLike,
    *,
    bias: Array | None = None,
    dropout: Array | None = None,
) -> Bound:
    """Return a bound, (..., out), on ``|computed - exact|`` of `linear_forward` evaluated in ``precision``.

    Args:
        x, W0, A, B, scaling, bias, dropout: as in `linear_forward`, the exact values, in any float dtypes.
            Those that need not be numbers of the dtype (a float32 adapter under bfloat16 autocast, most
            scalings, 1 / (1 - p) in float64) count as rounded to it first.
        precision: a dtype, or a `Precision` where products are summed in another or in fewer bits.

    The bound is g (|x||W0|^T + |bias| + |scaling| |x dropout||A|^T|B|^T) plus what underflows can do, with g
    from `Precision.growth` for in + r terms and at most 16 further roundings.

    Raises:
        ShapeError: a tensor does not fit.
        DTypeError: a dtype is not float16, bfloat16, float32 or float64.
        ConfigError: so many terms in so few bits that there is no bound.
    """
    adapters = [LowRank(A, B, scaling, dropout=dropout)]
    return adapted_linear_forward_bound(x, W0, adapters, precision, bias=bias)


def linear_backward_bound(
    dy: Array,
    x: Array,
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    precision: Precision | DTypeLike,
    *,
    dropout: Array | None = None,
) -> LinearGradients:
    """Return bounds on ``|computed - exact|`` of each gradient of `linear_backward` in ``precision``.

    Arguments, form of the bound and errors as in `linear_forward_bound`, with the number of terms on the
    longest path out + r for dx, out + N for dA, in + N for dB and N for dbias, N the number of rows of x.
    """
    adapters = [LowRank(A, B, scaling, dropout=dropout)]
    bounds = adapted_linear_backward_bound(dy, x, W0, adapters, precision)
    own = bounds.adapters[0]
    return LinearGradients(dx=bounds.dx, dA=own.dA, dB=own.dB, dbias=bounds.dbias)


def adapted_linear_forward_bound(
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    bias: Array | None = None,
    fan_in_fan_out: bool = False,
) -> Bound:
    """Return a bound on ``|computed - exact|`` of `adapted_linear_forward`; see `linear_forward_bound`."""
    W0 = W0.T if fan_in_fan_out else W0
    check_linear_shapes(x, W0, adapters, bias=bias)
    size = sizing(precision, adapters)
    y: Magnitude = linear.forward(size(x), size(W0), sized(adapters, size), size(bias))
    return y.bound(slack(adapters))


def adapted_linear_backward_bound(
    dy: Array,
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    fan_in_fan_out: bool = False,
) -> LayerGradients:
    """Return bounds on ``|computed - exact|`` of `adapted_linear_backward`; see `linear_backward_bound`."""
    W0 = W0.T if fan_in_fan_out else W0
    check_linear_shapes(x, W0, adapters, dy=dy)
    size = sizing(precision, adapters)
    terms = linear.backward(size(dy), size(x), size(W0), sized(adapters, size))
    return gradient_bounds(terms.dx, terms.dbias, terms.adapters, slack(adapters))


def merged_forward_bound(
    x: Array, W: Array, precision: Precision | DTypeLike, *, bias: Array | None = None
) -> Bound:
    """Return a bound, (..., out), on ``|computed - exact|`` of ``y = x W^T + bias`` in ``precision``.

    W is the merged weight as it is stored; its own rounding is no part of this bound. Arguments, form and
    errors as in `linear_forward_bound`, with n = in.
    """
    return adapted_linear_forward_bound(x, W, (), precision, bias=bias)


def merge_bound(
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    dtype: DTypeLike | None = None,
) -> Bound:
    """Return a bound, (out, in), on ``|computed - exact|`` of a merge that rounds after every operation.

    For the merges of others, as PEFT's or loralib's; `merge` itself is off by half a unit in the last place
    at most. Evaluated in ``precision`` and rounded to ``dtype``, W0's by default, at the end.

    The update may be computed in any order, and be added to W0 in the sums of the product itself, as
    ``addmm`` does. W0 takes part in one stored sum for each adapter, so with a wide accumulator the bound is
    a few units in the last place where the update is small, whatever r is:

        g0 |W0| + g sum |scaling| |B||A|,

    g0 from `Precision.growth` for those sums and one rounding more, g for the update's own too, both with r
    terms in the accumulator; plus underflows and the rounding to ``dtype``.
    """
    check_linear_shapes(np.zeros((0, W0.shape[-1])), W0, adapters)
    size = sizing(precision, adapters)
    frozen, update = size(W0), None
    for adapter in sized(adapters, size):
        own = linear.weight_update(adapter, W0.shape[0])
        update = own if update is None else update + own
    magnitude, bound = frozen.size, frozen.bound(1)
    if update is not None:
        sums = replace(frozen, terms=update.terms, stores=frozen.stores + len(adapters))
        bound = sums.bound(1) + update.bound(1 + slack(adapters))
        magnitude = magnitude + update.size
    stored = float_format(W0.dtype if dtype is None else dtype)
    total: Bound = bound + stored.unit_roundoff * (magnitude + bound) + stored.smallest_normal
    return total


def merged_against_unmerged_bound(
    x: Array,
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    bias: Array | None = None,
    dtype: DTypeLike | None = None,
) -> Bound:
    """Return a bound, (..., out), on ``|merged - unmerged|``, of two layers in the same ``precision``.

    The merged one holds the correctly rounded merge in ``dtype``, W0's by default. The bound is that of the
    unmerged forward, plus that of the merged one, plus |x| times the rounding of the merged weight. Without
    dropout.
    """
    undropped = [replace(adapter, dropout=None) for adapter in adapters]
    unmerged = adapted_linear_forward_bound(x, W0, undropped, precision, bias=bias)
    exact = sizing(np.float64, adapters)
    weight = exact(W0)
    for adapter in sized(undropped, exact):
        weight = weight + linear.weight_update(adapter, W0.shape[0])
    stored = float_format(W0.dtype if dtype is None else dtype)
    rounding: Bound = stored.unit_roundoff * weight.size + stored.smallest_subnormal
    merged = merged_forward_bound(
        x, weight.size + rounding, precision, bias=_merged_bias(bias, undropped, W0)
    )
    return unmerged + merged + np.abs(x.astype(np.float64)) @ rounding.T * (1 + 2.0**-20)


def product_noise(k: int, u: float, energy: Array | float) -> Bound:
    """Return ``sqrt(k) u energy``: the root mean square error of a dot product of k terms.

    Args:
        k: number of terms.
        u: unit roundoff of the arithmetic, see `unit_roundoff`.
        energy: ``||x * w||_2`` of the elementwise product, per output.

    The model: rounding errors are independent, of mean zero and at most u, and so are the signs of the
    terms. Then a partial sum has a mean square of the energy it contains, each term is in at most k - 1 of
    them in any order of summation, and together with the k products the mean square of the error is at most
    k u^2 energy^2. A figure for sampling, not a bound: sums that grow steadily have larger errors.

    Source: Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.
    41 (2019), and "Sharper probabilistic backward error analysis", ibid. 42 (2020), for data of mean zero.
    """
    noise: Bound = math.sqrt(k) * u * np.asarray(energy, np.float64)
    return noise


def sizing(
    precision: Precision | DTypeLike, adapters: Sequence[LowRank]
) -> Callable[[Array | None], Operand]:
    """Return a function that takes an input tensor, or None, to its `Magnitude`."""
    precision = Precision.of(precision)
    unit = underflow_unit(precision.form, *(adapter.scaling for adapter in adapters))
    return lambda values: None if values is None else magnitude_of(values, precision, unit)


def sized(adapters: Sequence[LowRank], size: Callable[[Array | None], Operand]) -> list[LowRank]:
    """Return the adapters with every tensor replaced by its `Magnitude`."""
    return [
        replace(own, A=size(own.A), B=size(own.B), bias=size(own.bias), dropout=size(own.dropout))
        for own in adapters
    ]


def slack(adapters: Sequence[LowRank]) -> int:
    """Return how many roundings more than the definition's an evaluation in another order may have.

    The scaling rounded and applied elsewhere, the bias added at another point, and the adapters in another
    order.
    """
    return 3 + len(adapters)


def gradient_bounds(
    dx: Magnitude, dbias: Magnitude, adapters: Sequence[linear.AdapterTerms], more: int
) -> LayerGradients:
    """Return the bounds of a layer's gradients."""
    own = (
        LowRankGradients(a.dA.bound(more), a.dB.bound(more), None if a.dbias is None else a.dbias.bound(more))
        for a in adapters
    )
    return LayerGradients(dx.bound(more), dbias.bound(more), tuple(own))


def _merged_bias(bias: Array | None, adapters: Sequence[LowRank], W0: Array) -> Array | None:
    """Return the size of the bias that a merged layer has: its own and, scaled, those of lora_B."""
    if bias is None and all(adapter.bias is None for adapter in adapters):
        return None
    size = np.zeros(W0.shape[0]) if bias is None else np.abs(bias.astype(np.float64))
    for adapter in adapters:
        if adapter.bias is not None:
            rows = adapter.rows or slice(None)
            size[rows] += abs(adapter.scaling) * np.abs(adapter.bias.astype(np.float64))
    return size
