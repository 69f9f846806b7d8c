"""The DoRA linear layer as one autograd function: each output is rescaled to a magnitude of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from loracle.reference import NonFiniteError

from .dropout import SeededDropout
from .function import Member, Term, check_products
from .function_rules import check_shape, compute_dtype, refuse_twice, scaled

_linear = nn.functional.linear

# Of W0 + scaling * B A so many entries are there at once: 16 MiB in float32.
_BLOCK_ENTRIES = 1 << 22


def dora_norm(W0: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return ``||W0 + scaling * B A||_2`` of each row, (out,), in float32 or wider; without a gradient.

    Computed from the tensors as they are stored, also under autocast, a block of rows at a time.

    Args:
        W0: (out, in). A: (r, in). B: (out, r).

    Source: DoRA, arXiv 2402.09353, equation 5; `loracle.reference.dora_norm`.
    """
    wide = torch.promote_types(torch.promote_types(W0.dtype, A.dtype), torch.float32)
    with torch.no_grad(), torch.autocast(W0.device.type, enabled=False):
        A, B = A.to(wide), B.to(wide)
        rows = max(1, _BLOCK_ENTRIES // W0.shape[1])
        norms = [
            torch.linalg.vector_norm(torch.addmm(own.to(wide), own_B, A, alpha=scaling), dim=1)
            for own, own_B in zip(torch.split(W0, rows), torch.split(B, rows), strict=True)
        ]
        return norms[0] if len(norms) == 1 else torch.cat(norms)


def check_norm(norm: Tensor) -> None:
    """Check a layer's norms, (out,), before it starts with them.

    Raises:
        NonFiniteError: one is zero, or none that is finite; its row is named.
    """
    wrong = ~(norm > 0) | ~norm.isfinite()
    if bool(wrong.any()):
        row = int(wrong.to(torch.int8).argmax())
        raise NonFiniteError(
            f"norm: expected finite numbers above 0, got {float(norm[row])} for row {row} of W0 + scaling * "
            "B A; such a row has no direction for DoRA to keep"
        )


def dora_linear(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    magnitude: Tensor,
    dropout: SeededDropout | Tensor | None = None,
) -> Tensor:
    """Return the DoRA layer's output, (..., out), differentiable in all but W0.

    With n = `dora_norm`, taken as a constant, g = magnitude / n and xd = x * dropout,

        y = x W0^T + bias + (g - 1) * (xd W0^T) + g * scaling * (xd A^T) B^T

    which without dropout is computed as ``g * z + bias`` with ``z = x W0^T + scaling * (x A^T) B^T``. Kept
    for the gradients: x, once; x A^T; and z, or with dropout xd W0^T plus the update, for

        dmagnitude = sum dy * z / n

    With dropout there are two products with W0 in each direction instead of one: W0 sees x and xd.

    Args:
        magnitude: (out,), PEFT's ``lora_magnitude_vector``; its quotient with the norm is formed in float32
            or wider.
        dropout: what the adapter's input is multiplied with, drawn from a seed or given in x's shape.

    Other arguments, dtypes and errors as for `loracle.torch_impl.lora_linear`. A row of norm zero gives
    infinity or NaN.

    Source: DoRA, arXiv 2402.09353, equation 5 and section 4.3; `loracle.reference.dora_forward`.
    """
    check_products(x, (Member(W0, bias),), (Term(0, A, B, scaling, dropout=dropout),))
    check_shape("lora_magnitude_vector", magnitude, (W0.shape[0],), W0)
    norm = dora_norm(W0, A, B, scaling)
    y: Tensor = _DoraLinear.apply(  # type: ignore[no-untyped-call]
        scaling,
        dropout if isinstance(dropout, SeededDropout) else None,
        compute_dtype(x),
        # Flattened out here: a view made inside the function could not be modified in place afterwards.
        x.reshape(-1, x.shape[-1]),
        W0,
        bias,
        A,
        B,
        magnitude,
        norm,
        dropout.reshape(-1, x.shape[-1]) if isinstance(dropout, Tensor) else None,
    )
    return y.view(*x.shape[:-1], y.shape[1])


class _DoraLinear(torch.autograd.Function):
    """See `dora_linear`; x is (N, in) here and y (N, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        scaling: float,
        seeded: SeededDropout | None,
        dtype: torch.dtype,
        x: Tensor,
        W0: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        given: Tensor | None,
    ) -> Tensor:
        need_x, _, _, need_A, need_B, need_magnitude = ctx.needs_input_grad[3:9]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, A, B, magnitude)]
        g = magnitude.to(norm.dtype) / norm
        # The outputs' factors go to B where they can: it is the smaller matrix.
        gB = (B.to(norm.dtype) * g[:, None]).to(dtype)
        x, W0, A, B = (tensor.to(dtype) for tensor in (x, W0, A, B))
        bias, given = (None if tensor is None else tensor.to(dtype) for tensor in (bias, given))
        factor = 1.0 if seeded is None else seeded.factor
        if seeded is None and given is None:
            H = _linear(x, A)
            z = _linear(x, W0).addmm_(H, B.t(), alpha=scaling)
            y = z * g.to(dtype) if bias is None else torch.addcmul(bias, z, g.to(dtype))
        else:
            dropped = _mask(x, x.shape, seeded, given) * x
            H = _linear(dropped, A)
            z = _linear(dropped, W0)
            y = _linear(x, W0, bias)
            y.addmm_(H, gB.t(), alpha=scaling * factor)
            y.addcmul_(z, (g - 1).to(dtype), value=factor)
            if need_magnitude:
                z.addmm_(H, B.t(), alpha=scaling)
        # What a gradient needs is kept only when that gradient is asked for.
        down = need_x or need_A
        ctx.save_for_backward(
            x if need_A else None,
            W0 if need_x else None,
            A if need_x else None,
            gB if down else None,
            H if need_B else None,
            z if need_magnitude else None,
            g if need_x or need_B else None,
            norm if need_magnitude else None,
            given if down else None,
        )
        ctx.scaling, ctx.seeded, ctx.factor, ctx.shape = scaling, seeded, factor, x.shape
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_twice("the DoRA layer")
        if dy is None:
            return (None,) * 11
        need_x, _, need_bias, need_A, need_B, need_magnitude = ctx.needs_input_grad[3:9]
        bias_dtype, A_dtype, B_dtype, magnitude_dtype = ctx.dtypes
        x, W0, A, gB, H, z, g, norm, given = ctx.saved_tensors
        scaling, factor = ctx.scaling, ctx.factor
        dx = dA = dB = dmagnitude = None
        # All operands have one dtype; an autocast that forward did not see must not change it.
        with torch.autocast(dy.device.type, enabled=False):
            if need_x or need_A:
                dropped = ctx.seeded is not None or given is not None
                mask = _mask(dy, ctx.shape, ctx.seeded, given) if dropped else None
                # Made contiguous: reading B's rows of r numbers takes twice the time.
                up = _linear(dy, gB.t().contiguous())  # (N, r)
                if need_x and mask is None:
                    dx = (dy * g.to(dy.dtype)) @ W0
                    dx.addmm_(up, A, alpha=scaling)
                elif need_x:
                    inner = (dy * (g - 1).to(dy.dtype)) @ W0
                    inner.addmm_(up, A, alpha=scaling)
                    dx = (dy @ W0).addcmul_(inner, mask, value=factor)
                if need_A:
                    dA = scaled(up.t() @ (x if mask is None else x * mask), scaling * factor, A_dtype)
            if need_B:
                # Computed as (r, out) and transposed: up to four times faster than dy^T H.
                product = (H.t() @ dy).t().to(g.dtype)
                dB = product.mul_(g[:, None]).mul_(scaling * factor).to(B_dtype)
            if need_magnitude:
                total = (dy * z).sum(0, dtype=norm.dtype)
                dmagnitude = total.mul_(factor).div_(norm).to(magnitude_dtype)
            dbias = dy.sum(0).to(bias_dtype) if need_bias else None
        return None, None, None, dx, None, dbias, dA, dB, dmagnitude, None, None


def _mask(like: Tensor, shape: torch.Size, seeded: SeededDropout | None, given: Tensor | None) -> Tensor:
    if seeded is not None:
        return seeded.mask(like, shape)
    assert given is not None
    return given
