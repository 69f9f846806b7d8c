"""Where an adapter starts: its two matrices, and the frozen weight beside which they start."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from .errors import ConfigError, ShapeError
from .formats import Array, float_format
from .rounding import round_to


@dataclass(frozen=True, eq=False)
class Start:
    """A (r, in) and B (out, r) of a new adapter, and the frozen weight W0 to use from then on.

    W0 is the very object that was given where the start leaves the weight alone. Where it does not (PiSSA,
    OLoRA) it is a new array, the residual, and training, saving and merging must use that one.
    """

    A: Array
    B: Array
    W0: Array


def kaiming_start(
    W0: Array,
    r: int,
    rng: np.random.Generator,
    *,
    dtype: DTypeLike = np.float32,
    fan_in_fan_out: bool = False,
) -> Start:
    """Return A uniform in (-1 / sqrt(in), 1 / sqrt(in)) and B zero: no update yet; W0 is left alone.

    PEFT's ``init_lora_weights=True``, the default. Kaiming's uniform distribution with a = sqrt(5) has the
    bound gain * sqrt(3 / in) with gain = sqrt(2 / (1 + 5)), that is 1 / sqrt(in).

    Args:
        W0: (out, in), or (in, out) with ``fan_in_fan_out``; only its shape matters.
        r: rank, at least 1; it may exceed in and out.
        rng: the only source of randomness; the same state gives the same start.
        dtype: of A and B. Numbers are drawn in float64 and rounded once, so the ends of the interval are
            those of the rounded bound.

    Raises:
        ShapeError: W0 is not a matrix with rows and columns.
        DTypeError: W0 or ``dtype`` is not float16, bfloat16, float32 or float64.
        ConfigError: ``r`` is not a positive integer.

    Source: LoRA, arXiv 2106.09685, section 4.1 (B zero); loralib and PEFT for A; He et al., arXiv 1502.01852.
    """
    out_features, in_features = check_start(W0, r, dtype, fan_in_fan_out)
    A = _uniform(rng, (r, in_features), dtype)
    return Start(A, np.zeros((out_features, r), float_format(dtype).dtype), W0)


def kaiming_both_start(
    W0: Array,
    r: int,
    rng: np.random.Generator,
    *,
    dtype: DTypeLike = np.float32,
    fan_in_fan_out: bool = False,
) -> Start:
    """Return A uniform in +-1 / sqrt(in) and B uniform in +-1 / sqrt(r): the update is not zero.

    PEFT's ``init_lora_weights=False``, which leaves both as ``torch.nn.Linear`` makes them. W0 is left alone,
    so the layer's output changes before the first step: of use in tests. Arguments and errors as in
    `kaiming_start`; A is drawn first.
    """
    out_features, in_features = check_start(W0, r, dtype, fan_in_fan_out)
    A = _uniform(rng, (r, in_features), dtype)
    return Start(A, _uniform(rng, (out_features, r), dtype), W0)


def gaussian_start(
    W0: Array,
    r: int,
    rng: np.random.Generator,
    *,
    dtype: DTypeLike = np.float32,
    fan_in_fan_out: bool = False,
) -> Start:
    """Return A normal, of mean 0 and standard deviation 1 / r, and B zero: no update yet; W0 is left alone.

    PEFT's ``init_lora_weights="gaussian"``. Arguments and errors as in `kaiming_start`.

    Source: LoRA, arXiv 2106.09685, section 4.1; the deviation is PEFT's.
    """
    out_features, in_features = check_start(W0, r, dtype, fan_in_fan_out)
    A = round_to(rng.normal(0.0, 1.0 / r, (r, in_features)), dtype)
    return Start(A, np.zeros((out_features, r), float_format(dtype).dtype), W0)


def orthogonal_start(
    W0: Array,
    r: int,
    rng: np.random.Generator,
    *,
    dtype: DTypeLike = np.float32,
    fan_in_fan_out: bool = False,
) -> Start:
    """Return ``A = Q_1^T G / 10`` and ``B = H Q_2 / 10``: both dense, and no update yet; W0 is left alone.

    Q_1 and Q_2, (r / 2, r) each, are the rows 0, 2, ... and 1, 3, ... of the orthogonal factor of a square
    standard normal matrix; G (r / 2, in) and H (out, r / 2) are standard normal. All is computed in float64
    and rounded once. ``B A = H (Q_2 Q_1^T) G / 100`` is zero, for the rows of Q are orthogonal; rounding A
    and B to a dtype of unit roundoff u leaves at most (2 u + u^2) |B||A|, beside float64's own errors.

    PEFT's ``init_lora_weights="orthogonal"``. Arguments and errors as in `kaiming_start`; drawn in the order
    of Q, G, H.

    Raises:
        ConfigError: besides, ``r`` is odd.

    Source: PEFT, ``LoraLayer.orthogonal_init``, after https://datta0.github.io/posts/rethink-lora-init/.
    """
    out_features, in_features = check_start(W0, r, dtype, fan_in_fan_out)
    if r % 2:
        raise ConfigError(f"r: expected an even rank for an orthogonal start, got {r}; add or drop one")
    Q, _ = np.linalg.qr(rng.standard_normal((r, r)))
    G = rng.standard_normal((r // 2, in_features))
    H = rng.standard_normal((out_features, r // 2))
    return Start(round_to(Q[0::2].T @ G / 10.0, dtype), round_to(H @ Q[1::2] / 10.0, dtype), W0)


def embedding_start(
    W0: Array,
    r: int,
    rng: np.random.Generator,
    *,
    dtype: DTypeLike = np.float32,
    zero_A: bool = True,
) -> Start:
    """Return A (r, V) zero and B (d, r) standard normal, for an embedding W0 (V, d), which is left alone.

    In PEFT this is the start of an embedding whatever ``init_lora_weights`` says, but for False: then A is
    standard normal as well, and the update not zero. That is ``zero_A=False``; A is drawn first.

    Arguments and errors as in `kaiming_start`.

    Source: loralib and PEFT, ``reset_lora_parameters``.
    """
    size, width = check_start(W0, r, dtype)
    if zero_A:
        A = np.zeros((r, size), float_format(dtype).dtype)
    else:
        A = round_to(rng.standard_normal((r, size)), dtype)
    return Start(A, round_to(rng.standard_normal((width, r)), dtype), W0)


def check_start(W0: Array, r: int, dtype: DTypeLike, fan_in_fan_out: bool = False) -> tuple[int, int]:
    """Return the shape (out, in) of the weight.

    Raises:
        ShapeError, DTypeError, ConfigError: see `kaiming_start`.
    """
    if W0.ndim != 2 or 0 in W0.shape:
        raise ShapeError(f"W0: expected (out, in), neither of them 0, got {W0.shape}; pass the weight matrix")
    float_format(W0.dtype, "W0")
    float_format(dtype, "dtype of A and B")
    if isinstance(r, bool) or not hasattr(r, "__index__") or r < 1:
        raise ConfigError(f"r: expected an integer of at least 1, got {r!r}; set the adapter's rank")
    out_features, in_features = W0.T.shape if fan_in_fan_out else W0.shape
    return out_features, in_features


def _uniform(rng: np.random.Generator, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """Return what ``torch.nn.Linear`` draws for a weight of this shape: uniform in +-1 / sqrt(columns)."""
    bound = 1.0 / math.sqrt(shape[1])
    return round_to(rng.uniform(-bound, bound, shape), dtype)
