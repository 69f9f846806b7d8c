"""How far from its exact value a LoRA embedding in floating point may be; see `bounds`."""

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import DTypeLike, NDArray

from . import embedding
from .bounds import sized, slack
from .formats import Array
from .low_rank import LowRank, LowRankGradients
from .magnitudes import Bound, Magnitude, magnitude_of, underflow_unit
from .operands import Operand
from .precision import Precision


def embedding_forward_bound(
    ids: NDArray[Any],
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    embed_scale: float | None = None,
) -> Bound:
    """Return a bound, (..., d), on ``|computed - exact|`` of `embedding_forward` evaluated in ``precision``.

    Arguments as in `embedding_forward`, the exact values, in any float dtypes; ``precision``, form and errors
    as in `linear_forward_bound`, with r terms: picking a row rounds nothing.
    """
    rows = embedding.check_embedding(ids, W0, adapters)
    size = _sizing(precision, adapters, embed_scale)
    y: Magnitude = embedding.forward(rows, size(W0), sized(adapters, size), embed_scale)
    return y.bound(slack(adapters))


def embedding_backward_bound(
    dy: Array,
    ids: NDArray[Any],
    W0: Array,
    adapters: Sequence[LowRank],
    precision: Precision | DTypeLike,
    *,
    embed_scale: float | None = None,
    padding_idx: int | None = None,
) -> tuple[LowRankGradients, ...]:
    """Return bounds on ``|computed - exact|`` of `embedding_backward`, for each adapter's dA and dB.

    As in `embedding_forward_bound`, with d terms and the positions of the most frequent id on the longest
    path of dA, and all positions on that of dB. Zero where dA is zero because no id, or only ``padding_idx``,
    contributes, but for what underflows can do.
    """
    rows = embedding.check_embedding(ids, W0, adapters, dy=dy, padding_idx=padding_idx)
    size = _sizing(precision, adapters, embed_scale)
    bounds = []
    for own in sized(adapters, size):
        dA, dB = embedding.update_backward(size(dy), rows, own, embed_scale, padding_idx)
        bounds.append(LowRankGradients(dA.bound(slack(adapters)), dB.bound(slack(adapters)), None))
    return tuple(bounds)


def _sizing(
    precision: Precision | DTypeLike, adapters: Sequence[LowRank], embed_scale: float | None
) -> Callable[[Array | None], Operand]:
    """Return a function that takes an input tensor, or None, to its `Magnitude`."""
    precision = Precision.of(precision)
    # Either factor, or both, may be applied before or after an operation that underflows.
    scalings = [adapter.scaling for adapter in adapters]
    outer = 1.0 if embed_scale is None else embed_scale
    unit = underflow_unit(precision.form, outer, *scalings, *(outer * scaling for scaling in scalings))
    return lambda values: None if values is None else magnitude_of(values, precision, unit)
