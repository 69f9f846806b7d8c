"""The LoRA embedding, forward and backward."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, ShapeError
from .formats import Array
from .indices import Indices, check_indices, most_in_one
from .linear import adapter_tensors
from .linear_shapes import adapter_suffix
from .low_rank import LowRank, LowRankGradients
from .operands import Operand, add_up, as_rows, check_dtypes, product, scale


def embedding_forward(
    ids: NDArray[Any], W0: Array, adapters: Sequence[LowRank], *, embed_scale: float | None = None
) -> Array:
    """Return ``y = embed_scale * (W0[ids] + sum over adapters of scaling * (A^T)[ids] B^T)``, (..., d).

    An embedding is a linear layer without bias on one-hot rows, whose weight is stored (in, out); the update
    of W0 is ``scaling * (B A)^T``.

    Args:
        ids: (...), integers of any width from 0 to V - 1.
        W0: (V, d), frozen.
        adapters: any number; A is (r, V), the tensor ``lora_embedding_A``, B is (d, r), the tensor
            ``lora_embedding_B``. An embedding has no dropout, no bias of lora_B and no rows.
        embed_scale: multiplies W0's part and the adapters', as Gemma's embeddings do; a float64, taken as
            exact. None: there is none.

    All arrays but ids have one dtype, see `linear_forward`. An id that is a ``padding_idx`` contributes as
    any other.

    Raises:
        ShapeError, DTypeError, ConfigError: naming the tensor, what was expected and what came; an id out of
            range is named with its position.

    Source: LoRA, arXiv 2106.09685, equation 3; names, shapes and ``embed_scale`` as in PEFT's Embedding.
    """
    rows = check_embedding(ids, W0, adapters)
    check_dtypes(W0=W0, **adapter_tensors(adapters))
    y: Array = forward(rows, W0, adapters, embed_scale)
    return y


def embedding_backward(
    dy: Array,
    ids: NDArray[Any],
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    embed_scale: float | None = None,
    padding_idx: int | None = None,
) -> tuple[LowRankGradients, ...]:
    """Return each adapter's gradients of a scalar whose gradient with respect to y is ``dy``, (..., d).

    With h = (A^T)[ids] and dh = embed_scale * scaling * dy B, both (..., r), and sums over all positions p:

        dA[:, v] = sum of dh[p] where ids[p] = v,   dB = embed_scale * scaling * sum of dy[p]^T h[p]

    ids have no gradient and W0 is frozen, so there is nothing else; ``dbias`` is None.

    Args:
        padding_idx: the id whose column of dA stays zero, from 0 to V - 1; its positions count in dB all the
            same, as torch's embedding of A^T with a ``padding_idx`` has it.

    Other arguments, dtypes, errors and source as in `embedding_forward`.
    """
    rows = check_embedding(ids, W0, adapters, dy=dy, padding_idx=padding_idx)
    check_dtypes(W0=W0, **adapter_tensors(adapters), dy=dy)
    return tuple(
        LowRankGradients(dA, dB, None)
        for dA, dB in (update_backward(dy, rows, own, embed_scale, padding_idx) for own in adapters)
    )


def check_embedding(
    ids: NDArray[Any],
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    dy: Array | None = None,
    padding_idx: int | None = None,
) -> Indices:
    """Check shapes, ids and options of an embedding, and return the ids as array indices."""
    if W0.ndim != 2:
        raise ShapeError(f"W0: expected (V, d), got {W0.shape}; pass the weight as a matrix")
    vocabulary, d = W0.shape
    for number, adapter in enumerate(adapters):
        suffix = adapter_suffix(number, adapters)
        for name, option in (
            ("dropout", adapter.dropout),
            ("bias of lora_B", adapter.bias),
            ("rows", adapter.rows),
        ):
            if option is not None:
                raise ConfigError(f"{name}{suffix}: expected None, an embedding has none; leave it out")
        A, B = adapter.A, adapter.B
        if A.ndim != 2 or A.shape[1] != vocabulary or A.shape[0] < 1:
            raise ShapeError(
                f"A{suffix}: expected (r, {vocabulary}) to fit W0 {W0.shape}, got {A.shape}; "
                "is it transposed?"
            )
        if B.shape != (d, A.shape[0]):
            raise ShapeError(
                f"B{suffix}: expected {(d, A.shape[0])} to fit W0 {W0.shape} and A {A.shape}, got {B.shape}; "
                "is it transposed?"
            )
    if dy is not None and dy.shape != (*ids.shape, d):
        raise ShapeError(
            f"dy: expected {(*ids.shape, d)} to fit W0 {W0.shape} and ids {ids.shape}, got {dy.shape}; "
            "check its axes"
        )
    if padding_idx is not None and not 0 <= padding_idx < vocabulary:
        raise ConfigError(
            f"padding_idx: expected None or an id from 0 to {vocabulary - 1}, got {padding_idx}; "
            "count a negative one from the end of the vocabulary"
        )
    return check_indices("ids", ids, vocabulary, W0)


def forward(ids: Indices, W0: Operand, adapters: Sequence[LowRank], embed_scale: float | None) -> Operand:
    """Evaluate `embedding_forward` on operands of any kind; nothing is checked."""
    y = W0[ids]
    for own in adapters:
        y = y + scale(product(own.A.T[ids], own.B.T), own.scaling)
    return _scaled(y, embed_scale)


def update_backward(
    dy: Operand, ids: Indices, adapter: LowRank, embed_scale: float | None, padding_idx: int | None
) -> tuple[Operand, Operand]:
    """Return dA and dB of one adapter, on operands of any kind; nothing is checked."""
    flat, rows_dy = ids.ravel(), as_rows(dy)
    kept = np.flatnonzero(flat != padding_idx)  # all of them, where padding_idx is None
    vocabulary = adapter.A.shape[1]

    def scatter(values: Array) -> Array:
        columns = np.zeros((vocabulary, values.shape[1]), values.dtype)
        np.add.at(columns, flat[kept], values)
        return columns.T

    dh = _scaled(scale(product(rows_dy, adapter.B), adapter.scaling), embed_scale)
    dA = add_up(dh[kept], scatter, most_in_one(flat[kept]))
    dB = scale(product(rows_dy.T, adapter.A.T[flat]), adapter.scaling)
    return dA, _scaled(dB, embed_scale)


def _scaled(values: Operand, embed_scale: float | None) -> Operand:
    return values if embed_scale is None else scale(values, embed_scale)
