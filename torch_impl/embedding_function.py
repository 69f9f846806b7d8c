"""An embedding with low-rank updates as one autograd function: rows picked, added to in place, and scaled."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loracle.reference import DTypeError

from .function_rules import check_frozen, check_shape, refuse_twice

_linear = nn.functional.linear


class EmbeddingTerm(NamedTuple):
    """An update, ``scaling * (A^T)[ids] B^T``. A: (r, V); B: (d, r)."""

    A: Tensor
    B: Tensor
    scaling: float


def lora_embedding(
    ids: Tensor,
    W0: Tensor,
    terms: Sequence[EmbeddingTerm],
    embed_scale: Tensor | float | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Return ``y = embed_scale * (W0[ids] + sum over terms of scaling * (A^T)[ids] B^T)``, (..., d).

    Differentiable in A and B. With h = (A^T)[ids], (N, r),

        dh = embed_scale * scaling * dy B,   dA[:, v] = sum of dh[p] where ids[p] = v,
        dB = embed_scale * scaling * dy^T h

    Kept for them: ids, h and B. No row of V is formed, but for the dense dA.

    Args:
        ids: (...), int32 or int64, from 0 to V - 1; torch's kernels refuse others.
        W0: (V, d), frozen. An embedding is not among what autocast casts: W0's dtype is y's, and that of all
            products, also under ``torch.autocast``.
        terms: at least one. A and B are cast to W0's dtype; their gradients arrive in their own, and dA is
            added up in no less than float32.
        embed_scale: multiplies the base's rows and the updates, as Gemma's embeddings do; a tensor of one
            element is applied to the rows in its own dtype, as in ``rows * embed_scale``.
        padding_idx: the id whose column of dA stays zero; it is looked up as any other.

    Raises:
        ShapeError, DTypeError: ids are no integers, or A or B do not fit.
        TargetError: W0 requires a gradient, which it would not get.
        ConfigError: on the way back, with ``create_graph``.

    Source: LoRA, arXiv 2106.09685, equation 3; `loracle.reference.embedding_backward`.
    """
    _check(ids, W0, terms)
    y: Tensor = _LoraEmbedding.apply(  # type: ignore[no-untyped-call]
        tuple(term.scaling for term in terms),
        padding_idx,
        ids.reshape(-1),
        W0,
        embed_scale,
        *(term.A for term in terms),
        *(term.B for term in terms),
    )
    return y.view(*ids.shape, y.shape[1])


def _check(ids: Tensor, W0: Tensor, terms: Sequence[EmbeddingTerm]) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise DTypeError(f"ids: expected torch.int64 or torch.int32, got {ids.dtype}; convert them")
    vocabulary, d = W0.shape
    for A, B, _ in terms:
        r = A.shape[0] if A.dim() else 0
        for name, tensor, shape in (("lora_A", A, (r, vocabulary)), ("lora_B", B, (d, r))):
            check_shape(name, tensor, shape, W0)
    check_frozen(W0)


class _LoraEmbedding(torch.autograd.Function):
    """See `lora_embedding`; ids are (N,) here and y (N, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        scalings: tuple[float, ...],
        padding_idx: int | None,
        ids: Tensor,
        W0: Tensor,
        embed_scale: Tensor | float | None,
        *factors: Tensor,
    ) -> Tensor:
        n = len(scalings)
        As, Bs, need = factors[:n], factors[n:], ctx.needs_input_grad[5:]
        y = nn.functional.embedding(ids, W0)
        hs = []
        for A, B, scaling in zip(As, Bs, scalings, strict=True):
            h = A.index_select(1, ids).t().to(W0.dtype)
            y.addmm_(h, B.to(W0.dtype).t(), alpha=scaling)
            hs.append(h)
        if embed_scale is not None:
            y.mul_(embed_scale)
        is_tensor = isinstance(embed_scale, Tensor)
        # What a gradient needs is kept only when that gradient is asked for.
        ctx.save_for_backward(
            ids if any(need[:n]) else None,
            embed_scale if is_tensor else None,
            *(h if needed else None for h, needed in zip(hs, need[n:], strict=True)),
            *(B if needed else None for B, needed in zip(Bs, need[:n], strict=True)),
        )
        ctx.scalings, ctx.padding_idx, ctx.vocabulary = scalings, padding_idx, W0.shape[0]
        ctx.embed_scale = None if is_tensor else embed_scale
        ctx.dtypes = [factor.dtype for factor in factors]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice("the LoRA embedding")
        n = len(ctx.scalings)
        ids, scale, *saved = ctx.saved_tensors
        scale = ctx.embed_scale if scale is None else scale
        dAs, dBs = [], []
        with torch.autocast(dy.device.type, enabled=False):
            for at, scaling in enumerate(ctx.scalings):
                h, B = saved[at], saved[n + at]
                dA = dB = None
                if B is not None:
                    # Widened before the sums over an id's positions, some of which are long.
                    wide = torch.promote_types(ctx.dtypes[at], torch.float32)
                    dh = _linear(dy, B.to(dy.dtype).t().contiguous()).to(wide)
                    dh = _scaled(dh, scaling, scale)
                    dA = _columns(dh, ids, ctx.vocabulary, ctx.padding_idx).to(ctx.dtypes[at])
                if h is not None:
                    # Computed as (r, d) and transposed, as in `lora_products`.
                    wide = torch.promote_types(dy.dtype, ctx.dtypes[n + at])
                    dB = _scaled((h.t() @ dy).t().to(wide), scaling, scale).to(ctx.dtypes[n + at])
                dAs.append(dA)
                dBs.append(dB)
        return None, None, None, None, None, *dAs, *dBs


def _scaled(values: Tensor, scaling: float, embed_scale: Tensor | float | None) -> Tensor:
    """Multiply in place with both numbers."""
    values.mul_(scaling)
    return values if embed_scale is None else values.mul_(embed_scale)


def _columns(dh: Tensor, ids: Tensor, vocabulary: int, padding_idx: int | None) -> Tensor:
    """Return (r, V), in whose column v the rows of dh (N, r) at the positions of v are added up."""
    at = -1 if padding_idx is None else padding_idx
    summed: Tensor = torch.ops.aten.embedding_dense_backward(dh, ids, vocabulary, at, False)
    return summed.t().contiguous()
