"""The LoRA product as one autograd function: two additions in place where plain autograd makes six passes."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loracle.reference import DTypeError, ShapeError, TargetError


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that the products of a layer with input ``x`` are computed in.

    Under ``torch.autocast`` for x's device it is autocast's dtype (float64 stays, as autocast leaves it
    alone); elsewhere it is x's own.
    """
    device = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def lora_linear(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    multiplier: Tensor | None = None,
) -> Tensor:
    """Return ``y = x W0^T + bias + scaling * ((x * multiplier) A^T) B^T``, differentiable in x, A and B.

    Args:
        x: (..., in), any leading dimensions, also empty ones.
        W0: (out, in), frozen.
        bias: (out,), frozen, or None.
        A: (r, in); B: (out, r).
        scaling: ``lora_alpha / r`` or ``lora_alpha / sqrt(r)``.
        multiplier: x's shape; what dropout multiplies the adapter's input with, 0 or ``1 / (1 - p)``; None
            for one.

    Every operand is cast to `compute_dtype(x)` and y has that dtype, as ``F.linear`` does under autocast.
    So float32 A and B beside a bfloat16 base are master copies: their products are bfloat16, their
    gradients arrive in float32. Gradients have the dtype of the tensor they belong to. Differentiating
    twice is refused.

    Raises:
        ShapeError: the shapes do not fit.
        DTypeError: x and W0 differ in dtype without autocast.
        TargetError: W0 or bias requires a gradient, which it would not get.

    Source: LoRA, arXiv 2106.09685, section 4.1; the gradients are those of
        `loracle.reference.linear_backward`.
    """
    _check_shapes(x, W0, bias, A, B, multiplier)
    dtype = compute_dtype(x)
    if dtype is x.dtype and not torch.is_autocast_enabled(x.device.type) and W0.dtype is not dtype:
        raise DTypeError(
            f"x: expected W0's {W0.dtype}, got {x.dtype}; cast one of them, or run under torch.autocast"
        )
    if W0.requires_grad or (bias is not None and bias.requires_grad):
        raise TargetError(
            "W0: expected frozen base parameters, got requires_grad=True; "
            "LoRA gives them no gradient: call requires_grad_(False) on the base layer"
        )
    # Flattened out here: a view made inside the function could not be modified in place afterwards.
    x_2d = x.reshape(-1, x.shape[-1])
    if multiplier is not None:
        multiplier = multiplier.reshape(x_2d.shape)
    y_2d = cast(
        Tensor,
        _LoraLinear.apply(x_2d, W0, bias, A, B, scaling, multiplier, dtype),  # type: ignore[no-untyped-call]
    )
    return y_2d.view(*x.shape[:-1], W0.shape[0])


def _check_shapes(
    x: Tensor, W0: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, multiplier: Tensor | None
) -> None:
    out_features, in_features = W0.shape
    r = A.shape[0]
    expected: list[tuple[str, tuple[int, ...], Tensor | None]] = [
        ("x", (*x.shape[:-1], in_features), x),
        ("bias", (out_features,), bias),
        ("lora_A", (r, in_features), A),
        ("lora_B", (out_features, r), B),
        ("multiplier", tuple(x.shape), multiplier),
    ]
    for name, shape, tensor in expected:
        if tensor is not None and (tensor.dim() == 0 or tuple(tensor.shape) != shape):
            raise ShapeError(
                f"{name}: expected shape {shape} beside W0 of shape {tuple(W0.shape)}, "
                f"got {tuple(tensor.shape)}; give tensors of one layer"
            )


class _LoraLinear(torch.autograd.Function):
    """See `lora_linear`; x is (N, in) here, y (N, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W0: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        multiplier: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.A_dtype, ctx.B_dtype, ctx.scaling = A.dtype, B.dtype, scaling
        x, W0, A, B = x.to(dtype), W0.to(dtype), A.to(dtype), B.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        multiplier = None if multiplier is None else multiplier.to(dtype)
        y = nn.functional.linear(x, W0, bias)  # (N, out)
        xA = nn.functional.linear(x if multiplier is None else x * multiplier, A)  # (N, r)
        y.addmm_(xA, B.t(), alpha=scaling)
        # What a gradient needs is kept only when that gradient is asked for.
        need_x, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        ctx.save_for_backward(
            W0 if need_x else None,
            x if need_A else None,
            A if need_x else None,
            B if need_x or need_A else None,
            xA if need_B else None,
            multiplier if need_x or need_A else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        W0, x, A, B, xA, multiplier = ctx.saved_tensors
        need_x, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        scaling = ctx.scaling
        dx = dA = dB = None
        # All operands have one dtype; an autocast that forward did not see must not change it.
        with torch.autocast(dy.device.type, enabled=False):
            if need_x or need_A:
                # B^T made contiguous (r, out): reading B's rows of r numbers takes twice the time.
                dyB = nn.functional.linear(dy, B.t().contiguous())  # (N, r)
            if need_x:
                dx = dy @ W0
                if multiplier is None:
                    dx.addmm_(dyB, A, alpha=scaling)
                else:
                    dx.addcmul_(dyB @ A, multiplier, value=scaling)
            if need_A:
                dA = _scaled(dyB.t() @ (x if multiplier is None else x * multiplier), scaling, ctx.A_dtype)
            if need_B:
                # Computed as (r, out) and transposed: up to four times faster than dy^T xA.
                dB = _scaled((xA.t() @ dy).t(), scaling, ctx.B_dtype)
        return dx, None, None, dA, dB, None, None, None


def _scaled(product: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return ``scaling * product`` in ``dtype``, multiplied in the wider dtype; ``product`` may be reused."""
    return product.to(torch.promote_types(product.dtype, dtype)).mul_(scaling).to(dtype)
