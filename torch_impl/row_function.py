"""An embedding and an output layer some of whose weight's rows train, each as one autograd function."""

from typing import Any

import torch
from torch import Tensor, nn

from .function import Member, check_products
from .function_rules import check_shape, compute_dtype, refuse_twice

_linear = nn.functional.linear


def embedding_with_rows(
    ids: Tensor,
    W0: Tensor,
    rows: Tensor,
    places: Tensor,
    embed_scale: Tensor | float | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Return ``embed_scale * W[ids]``, (..., d), where W is W0 with ``rows`` in some of its rows' place.

    Differentiable in rows: the gradient of a row is the sum of ``embed_scale * dy`` over its id's positions.
    W is not formed. Kept for the gradient: each id's place.

    Args:
        ids: (...), integers from 0 to V - 1.
        W0: (V, d), frozen; its dtype is y's, also under autocast.
        rows: (n, d), rounded to W0's dtype when they are looked up; their gradient is added up in no less
            than float32.
        places: (V,), int64: which row stands in the place of each of W0's; n where none does.
        embed_scale: as in `loracle.torch_impl.embedding_function.lora_embedding`.
        padding_idx: the id whose row gets no gradient, as torch's embedding has it.

    Raises:
        ShapeError: rows do not fit W0.
        ConfigError: on the way back, with ``create_graph``.
    """
    check_shape("rows", rows, (rows.shape[0], W0.shape[1]), W0)
    check_shape("places", places, (W0.shape[0],), W0)
    y: Tensor = _EmbeddingWithRows.apply(  # type: ignore[no-untyped-call]
        ids.reshape(-1), W0, rows, places, embed_scale, padding_idx
    )
    return y.view(*ids.shape, y.shape[1])


def linear_with_rows(x: Tensor, W0: Tensor, bias: Tensor | None, rows: Tensor, tokens: Tensor) -> Tensor:
    """Return ``y = x W^T + bias``, (..., V), where W is W0 with ``rows`` in the place of the tokens' rows.

    Differentiable in x and rows. With dt the columns of dy at the tokens, (N, n),

        dx = dy W0 + dt (rows - W0[tokens]),   drows = dt^T x

    W is not formed, and nothing of y's size is copied. Kept for the gradients: x and rows.

    Args:
        x: (..., in).
        W0: (V, in), frozen. bias: (V,), or None.
        rows: (n, in), rounded to W0's dtype first, as if they stood there.
        tokens: (n,), int64, each from 0 to V - 1 and once.

    Dtypes and errors as for `loracle.torch_impl.lora_linear`.
    """
    check_products(x, (Member(W0, bias),), ())
    check_shape("rows", rows, (tokens.shape[0], W0.shape[1]), W0)
    y: Tensor = _LinearWithRows.apply(  # type: ignore[no-untyped-call]
        compute_dtype(x), x.reshape(-1, x.shape[-1]), W0, bias, rows, tokens
    )
    return y.view(*x.shape[:-1], y.shape[1])


class _EmbeddingWithRows(torch.autograd.Function):
    """See `embedding_with_rows`; ids are (N,) here and y (N, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        W0: Tensor,
        rows: Tensor,
        places: Tensor,
        embed_scale: Tensor | float | None,
        padding_idx: int | None,
    ) -> Tensor:
        n = rows.shape[0]
        at = places[ids]
        picked = rows.to(W0.dtype)[at.clamp(max=n - 1)]
        y = torch.where((at < n)[:, None], picked, nn.functional.embedding(ids, W0))
        if embed_scale is not None:
            y.mul_(embed_scale)
        if padding_idx is not None:
            at = at.masked_fill(ids == padding_idx, n)
        ctx.save_for_backward(at, embed_scale if isinstance(embed_scale, Tensor) else None)
        ctx.embed_scale = None if isinstance(embed_scale, Tensor) else embed_scale
        ctx.n, ctx.dtype = n, rows.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice("trained rows")
        at, scale = ctx.saved_tensors
        scale = ctx.embed_scale if scale is None else scale
        # The last row, which stands for all that do not train, is left out of the sum.
        summed: Tensor = torch.ops.aten.embedding_dense_backward(
            dy.to(torch.promote_types(ctx.dtype, torch.float32)), at, ctx.n + 1, ctx.n, False
        )
        drows = summed[: ctx.n]
        drows = drows if scale is None else drows * scale
        return None, None, drows.to(ctx.dtype), None, None, None


class _LinearWithRows(torch.autograd.Function):
    """See `linear_with_rows`; x is (N, in) here and y (N, V)."""

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        x: Tensor,
        W0: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        need_x, _, _, need_rows = ctx.needs_input_grad[1:5]
        ctx.row_dtype = rows.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        x, W0, rows = x.to(dtype), W0.to(dtype), rows.to(W0.dtype).to(dtype)
        bias = None if bias is None else bias.to(dtype)
        y = _linear(x, W0, bias)
        y.index_copy_(1, tokens, _linear(x, rows, None if bias is None else bias[tokens]))
        # What a gradient needs is kept only when that gradient is asked for.
        ctx.save_for_backward(
            x if need_rows else None, W0 if need_x else None, rows if need_x else None, tokens
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice("trained rows")
        need_x, _, need_bias, need_rows = ctx.needs_input_grad[1:5]
        x, W0, rows, tokens = ctx.saved_tensors
        dx = drows = None
        # All operands have one dtype; an autocast that forward did not see must not change it.
        with torch.autocast(dy.device.type, enabled=False):
            dt = dy.index_select(1, tokens)
            if need_x:
                wide = torch.promote_types(dy.dtype, torch.float32)
                difference = (rows.to(wide) - W0[tokens].to(wide)).to(dy.dtype)
                dx = (dy @ W0).addmm_(dt, difference)
            if need_rows:
                drows = (dt.t() @ x).to(ctx.row_dtype)
            dbias = dy.sum(0).to(ctx.bias_dtype) if need_bias else None
        return None, dx, None, dbias, drows, None
