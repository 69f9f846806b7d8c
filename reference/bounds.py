"""How far from its exact value a computation in floating point may be, before it is made.

Componentwise a-priori bounds in the standard model: an operation gives fl(a op b) = (a op b)(1 + d), |d| <=
u, plus an absolute error where it underflows. Along a path of n roundings the factors 1 + d multiply to 1 +
t with |t| <= gamma_n = n u / (1 - n u) (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed.,
lemma 3.1). Each bound counts the roundings on the longest path and multiplies by the same formula in
magnitudes.

The counts hold for any order of summation, with or without fused multiply-adds, for (x A^T) B^T and x (B
A)^T, for the scaling applied to any factor or product, and for adding the adapter's product to the base's
at the end or term by
term: for BLAS, torch, PEFT's order of the factors, ``addmm`` and onnxruntime alike. Not covered: overflow,
products in fewer bits than asked for (TF32), subnormal inputs flushed to zero.
"""

import math

import numpy as np
from numpy.typing import DTypeLike

from .errors import ConfigError
from .formats import Array, FloatFormat, float_format
from .linear import LinearGradients
from .linear_shapes import check_linear_shapes
from .magnitudes import Bound, Magnitude, underflow_unit

# The bounds are evaluated in float64, in sums of fewer than 2^21 terms: to a relative error below 2^-30.
_ROUND_UP = 1.0 + 2.0**-30


def unit_roundoff(dtype: DTypeLike) -> float:
    """Return u, the largest relative error of rounding to ``dtype``: 2^-24 for float32, 2^-8 for bfloat16."""
    return float_format(dtype).unit_roundoff


def gamma(n: int, u: float) -> float:
    """Return ``n u / (1 - n u)``, a bound on the relative error of n roundings in a row; rounded up.

    Raises:
        ConfigError: ``n * u`` is 1 or more, where there is no such bound.
    """
    if n * u >= 1:
        raise ConfigError(
            f"gamma: expected n * u below 1, got n {n} and u {u}; name a more precise accumulator"
        )
    return n * u / (1 - n * u) * _ROUND_UP


def linear_forward_bound(
    x: Array,
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    dtype: DTypeLike,
    *,
    bias: Array | None = None,
    dropout: Array | None = None,
    accumulator: DTypeLike | None = None,
) -> Bound:
    """Return a bound, (..., out), on ``|computed - exact|`` of `linear_forward` evaluated in ``dtype``.

    Args: x, W0, A, B, scaling, bias, dropout: as in `linear_forward`, the exact values, in any float
        dtypes. Those
            that need not be numbers of ``dtype`` (a float32 adapter under bfloat16 autocast, most scalings,
            1 / (1 - p) in float64) count as rounded to it first.
        dtype: in which intermediate results are stored.
        accumulator: in which the terms of a product are summed before they are rounded to ``dtype``.
            ``dtype`` itself by default; kernels for float16 and bfloat16 use float32, and need not be given
            up at in + r = 256, where sums in bfloat16 have no bound.

    The bound is g (|x||W0|^T + |bias| + |scaling| |x dropout||A|^T|B|^T) plus what underflows can do, with
    1 + g = (1 + gamma_n(u_accumulator)) (1 + gamma_c(u)), n = in + r + 2 and c at most 13.

    Raises:
        ShapeError: a tensor does not fit.
        DTypeError: a dtype is not float16, bfloat16, float32 or float64.
        ConfigError: so many terms in so few bits that there is no bound.
    """
    check_linear_shapes(x, W0, A, B, bias=bias, dropout=dropout)
    form, wide = _forms(dtype, accumulator)
    base = Magnitude.of(x, underflow_unit(form)) @ Magnitude.of(W0, underflow_unit(form)).T
    if bias is not None:
        base = base + Magnitude.of(bias, underflow_unit(form))
    unit = _adapter_unit(form, scaling)
    dropped = _dropped(x, dropout, unit)
    delta = dropped @ Magnitude.of(A, unit).T @ Magnitude.of(B, unit).T
    growth = _growth(W0.shape[1] + A.shape[0] + 2, form, wide, scaling, x, W0, A, B, bias, dropout)
    return _bound(base + delta * Magnitude.of(np.array(scaling), unit), growth)


def linear_backward_bound(
    dy: Array,
    x: Array,
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    dtype: DTypeLike,
    *,
    dropout: Array | None = None,
    accumulator: DTypeLike | None = None,
) -> LinearGradients:
    """Return bounds on ``|computed - exact|`` of each gradient of `linear_backward` evaluated in ``dtype``.

    Arguments, form of the bound and errors as in `linear_forward_bound`, with the number of terms on the
    longest path out + r + 1 for dx, out + N for dA, in + N for dB and N for dbias, N the number of rows of
    x.
    """
    check_linear_shapes(x, W0, A, B, dropout=dropout, dy=dy)
    form, wide = _forms(dtype, accumulator)
    plain, unit = underflow_unit(form), _adapter_unit(form, scaling)
    factor = Magnitude.of(np.array(scaling), unit)
    dropped = _dropped(x, dropout, unit)
    h = dropped @ Magnitude.of(A, unit).T
    dh = (Magnitude.of(dy, unit) @ Magnitude.of(B, unit)) * factor
    dx = dh @ Magnitude.of(A, unit)
    if dropout is not None:
        dx = dx * Magnitude.of(dropout, unit)
    dx = Magnitude.of(dy, plain) @ Magnitude.of(W0, plain) + dx
    dA = dh.rows().T @ dropped.rows()
    dB = (Magnitude.of(dy, unit).rows().T @ h.rows()) * factor
    dbias = Magnitude.of(dy, plain).rows().sum()
    (out_features, in_features), r, rows = W0.shape, A.shape[0], dy.size // max(1, dy.shape[-1])
    terms = {"dx": out_features + r + 1, "dA": out_features + rows, "dB": in_features + rows, "dbias": rows}
    growth = {name: _growth(n, form, wide, scaling, dy, x, W0, A, B, dropout) for name, n in terms.items()}
    return LinearGradients(
        dx=_bound(dx, growth["dx"]),
        dA=_bound(dA, growth["dA"]),
        dB=_bound(dB, growth["dB"]),
        dbias=_bound(dbias, growth["dbias"]),
    )


def merged_forward_bound(
    x: Array,
    W: Array,
    dtype: DTypeLike,
    *,
    bias: Array | None = None,
    accumulator: DTypeLike | None = None,
) -> Bound:
    """Return a bound, (..., out), on ``|computed - exact|`` of ``y = x W^T + bias`` evaluated in ``dtype``.

    W is the merged weight as it is stored; its own rounding is no part of this bound. Arguments, form and
    errors as in `linear_forward_bound`, with n = in + 1.
    """
    nothing = np.zeros((1, W.shape[-1]), W.dtype)
    check_linear_shapes(x, W, nothing, np.zeros((W.shape[0], 1), W.dtype), bias=bias)
    form, wide = _forms(dtype, accumulator)
    y = Magnitude.of(x, underflow_unit(form)) @ Magnitude.of(W, underflow_unit(form)).T
    if bias is not None:
        y = y + Magnitude.of(bias, underflow_unit(form))
    return _bound(y, _growth(W.shape[1] + 1, form, wide, 1.0, x, W, bias))


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


def _forms(dtype: DTypeLike, accumulator: DTypeLike | None) -> tuple[FloatFormat, FloatFormat]:
    form = float_format(dtype)
    wide = form if accumulator is None else float_format(accumulator, "accumulator")
    if wide.precision < form.precision:
        raise ConfigError(f"accumulator: expected at least the precision of {form.dtype}, got {wide.dtype}")
    return form, wide


def _adapter_unit(form: FloatFormat, scaling: float) -> float:
    # `Magnitude` multiplies by the scaling last. Where it is below 1 and comes earlier, an underflow after
    # it weighs 1 / |scaling| as much.
    return underflow_unit(form) * (1.0 if scaling == 0 else 1.0 + 1.0 / abs(scaling))


def _dropped(x: Array, dropout: Array | None, unit: float) -> Magnitude:
    given = Magnitude.of(x, unit)
    return given if dropout is None else given * Magnitude.of(dropout, unit)


def _growth(
    terms: int, form: FloatFormat, wide: FloatFormat, scaling: float, *tensors: Array | None
) -> float:
    """Return g: ``terms`` roundings in the accumulator, and those to the working dtype.

    The latter are one for each tensor that has to be rounded to it, two for the scaling and the product
    with it, one for the product with dropout, and with a wider accumulator four for the products' results
    and their sum.
    """
    stored = 2 + sum(tensor is not None and not _contains(form, tensor) for tensor in tensors)
    stored += 1 + (4 if wide.precision > form.precision else 0)
    return (1 + gamma(terms, wide.unit_roundoff)) * (1 + gamma(stored, form.unit_roundoff)) - 1


def _contains(form: FloatFormat, tensor: Array) -> bool:
    """Return whether every number of the tensor's dtype is one of ``form``."""
    given = float_format(tensor.dtype, "tensor")
    return given.precision <= form.precision and given.max_exponent <= form.max_exponent


def _bound(magnitude: Magnitude, growth: float) -> Bound:
    return (growth * magnitude.size + (1 + growth) * magnitude.lost) * _ROUND_UP
