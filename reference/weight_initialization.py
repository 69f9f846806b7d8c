"""Starts that take the adapter out of the weight and leave a residual; every start by PEFT's name for it."""

import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import ConfigError, NonFiniteError
from .formats import Array, first_nonfinite
from .initialization import (
    Start,
    check_start,
    gaussian_start,
    kaiming_both_start,
    kaiming_start,
    orthogonal_start,
)
from .merge import merge
from .rounding import round_to
from .svd import svd

_NAMES = "True, False, 'gaussian', 'orthogonal', 'pissa', 'olora'"


def pissa_start(
    W0: Array, r: int, scaling: float, *, dtype: DTypeLike = np.float32, fan_in_fan_out: bool = False
) -> Start:
    """Return the r largest singular triplets of W0 as the adapter, and W0 without them.

    With ``W0 = U diag(S) V^T`` in float64, and A and B rounded once:

        A = sqrt(S_r / scaling) V_r^T,   B = U_r sqrt(S_r / scaling),   W0 becomes W0 - scaling * B A

    The residual is that of A and B as they are stored, each entry the exact real number rounded once to W0's
    dtype (`merge` with ``-scaling``). So the layer is what it was: ``merge(start.W0, start.A, start.B,
    scaling)`` differs from the W0 given by at most twice what rounding moved the residual's entry, that is
    by one unit in the last place of that entry, whatever the rounding of A and B; where it moved by less
    than half the distance to W0's neighbours, W0's entry comes back.

    Args:
        W0: (out, in), or (in, out) with ``fan_in_fan_out``; the residual has the same layout.
        r: at most min(in, out).
        scaling: see `lora_scaling`; above 0.
        dtype: of A and B.

    PEFT's ``init_lora_weights="pissa"``, which works in float32 throughout. The signs of singular vectors
    are free, and cancel in ``B A``.

    Raises:
        ShapeError, DTypeError, ConfigError: as in `kaiming_start`; ``r`` too large; ``scaling`` not above 0.
        NonFiniteError: NaN or infinity in W0; a singular value, A, B or the residual too large for its dtype.

    Source: PiSSA, arXiv 2404.02948, equations 2 to 4.
    """
    weight = _check_weight(W0, r, dtype, fan_in_fan_out)
    if not 0 < scaling < math.inf:
        raise ConfigError(
            f"scaling: expected a finite number above 0 to divide singular values by, got {scaling}; "
            "check lora_alpha"
        )
    U, S, Vt = svd(_wide(weight), "W0")
    root = np.sqrt(S[:r] / scaling)
    A = round_to(root[:, np.newaxis] * Vt[:r], dtype)
    B = round_to(U[:, :r] * root, dtype)
    return _without(weight, A, B, scaling, fan_in_fan_out)


def olora_start(
    W0: Array, r: int, scaling: float, *, dtype: DTypeLike = np.float32, fan_in_fan_out: bool = False
) -> Start:
    """Return the first r columns and rows of W0's QR factors as the adapter, and W0 without their product.

    With ``W0 = Q R`` in float64, and A and B rounded once:

        A = R[:r],   B = Q[:, :r],   W0 becomes W0 - scaling * B A

    With scaling 1 the first r columns of the residual are zero but for rounding. The residual, arguments and
    errors are as in `pissa_start`, but that any finite scaling will do.

    PEFT's ``init_lora_weights="olora"``. The signs of Q's columns are free, and cancel in ``B A``.

    Source: OLoRA, arXiv 2406.01775, algorithm 1.
    """
    weight = _check_weight(W0, r, dtype, fan_in_fan_out)
    Q, R = np.linalg.qr(_wide(weight))
    return _without(weight, round_to(R[:r], dtype), round_to(Q[:, :r], dtype), scaling, fan_in_fan_out)


def adapter_start(
    init_lora_weights: bool | str,
    W0: Array,
    r: int,
    scaling: float,
    rng: np.random.Generator,
    *,
    dtype: DTypeLike = np.float32,
    fan_in_fan_out: bool = False,
) -> Start:
    """Return the start that PEFT's ``init_lora_weights`` names.

    True: `kaiming_start`; False: `kaiming_both_start`; "gaussian": `gaussian_start`; "orthogonal":
    `orthogonal_start`; "pissa": `pissa_start`; "olora": `olora_start`. The last two draw nothing from ``rng``
    and replace W0; the others leave W0 alone and take no notice of ``scaling``.

    Raises:
        ConfigError: another value. "pissa_niter_[n]" approximates "pissa" by a randomised decomposition whose
            result is a matter of the library's random numbers; the others need data or a quantised weight.

    Other arguments and errors as in `kaiming_start` and `pissa_start`.
    """
    random_starts = {"gaussian": gaussian_start, "orthogonal": orthogonal_start}
    weight_starts = {"pissa": pissa_start, "olora": olora_start}
    if isinstance(init_lora_weights, bool):
        draw = kaiming_start if init_lora_weights else kaiming_both_start
        return draw(W0, r, rng, dtype=dtype, fan_in_fan_out=fan_in_fan_out)
    if init_lora_weights in random_starts:
        draw = random_starts[init_lora_weights]
        return draw(W0, r, rng, dtype=dtype, fan_in_fan_out=fan_in_fan_out)
    if init_lora_weights in weight_starts:
        take = weight_starts[init_lora_weights]
        return take(W0, r, scaling, dtype=dtype, fan_in_fan_out=fan_in_fan_out)
    remedy = "name one of them"
    if str(init_lora_weights).startswith("pissa_niter_"):
        remedy = "'pissa' is what it approximates"
    raise ConfigError(f"init_lora_weights: expected one of {_NAMES}, got {init_lora_weights!r}; {remedy}")


def _check_weight(W0: Array, r: int, dtype: DTypeLike, fan_in_fan_out: bool) -> Array:
    """Return W0 as (out, in), checked."""
    shape = check_start(W0, r, dtype, fan_in_fan_out)
    if r > min(shape):
        raise ConfigError(f"r: expected at most {min(shape)}, the full rank of W0 {shape}, got {r}; lower it")
    weight = W0.T if fan_in_fan_out else W0
    position = first_nonfinite(weight)
    if position is not None:
        raise NonFiniteError(
            f"W0: expected finite numbers, got {float(weight[position])} at {list(position)} of (out, in); "
            "fetch it again"
        )
    return weight


def _wide(weight: Array) -> NDArray[np.float64]:
    return weight.astype(np.float64)


def _without(weight: Array, A: Array, B: Array, scaling: float, fan_in_fan_out: bool) -> Start:
    """Return the start whose weight is ``weight - scaling * B A``, rounded once, in W0's own layout."""
    residual = merge(weight, A, B, -scaling)
    return Start(A, B, residual.T if fan_in_fan_out else residual)
