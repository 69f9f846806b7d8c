"""The LoRA products of a convolution as one autograd function that keeps neither masks nor masked inputs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from loracle.reference import ShapeError

from .dropout import SeededDropout
from .function_rules import check_dtype, check_frozen, compute_dtype, refuse_twice, scaled

_T = TypeVar("_T")
_CONVOLUTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class Geometry(NamedTuple):
    """How a convolution's windows lie on its input, a number for each spatial axis.

    Attributes:
        stride, dilation, groups: torch's.
        padding: zeros that the convolution itself adds at both ends of each axis.
        ends: what is added to the input before, as `torch.nn.functional.pad` takes it; None for nothing.
        mode: with what: that function's ``mode``.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]
    ends: tuple[int, ...] | None = None
    mode: str = "constant"

    @staticmethod
    def of(layer: nn.Module) -> "Geometry":
        """Return the geometry of an ``nn.Conv1d``, ``Conv2d`` or ``Conv3d``."""
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        axes = len(layer.kernel_size)
        # From the last axis to the first, before and after each.
        ends = tuple(layer._reversed_padding_repeated_twice)
        uneven = ends[::2] != ends[1::2]
        common = layer.stride, layer.dilation, layer.groups
        if layer.padding_mode == "zeros" and not uneven:
            return Geometry(*common, ends[::-2])
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return Geometry(*common, (0,) * axes, ends if any(ends) else None, mode)

    def one_by_one(self) -> "Geometry":
        """Return the geometry of a kernel of one number, as lora_B's."""
        axes = len(self.stride)
        return Geometry((1,) * axes, (1,) * axes, self.groups, (0,) * axes)

    def pad(self, x: Tensor) -> Tensor:
        """Return x with all that is added before the convolution."""
        return x if self.ends is None else nn.functional.pad(x, self.ends, mode=self.mode)


class ConvolutionTerm(NamedTuple):
    """An update, ``scaling * (conv(x * dropout, A) -> B) + scaling * lora_bias``.

    Attributes:
        A: (r, in / groups, *kernel), for each group's channels in turn; B: (out, r, 1, ...).
        scaling: ``lora_alpha / r`` or ``lora_alpha / sqrt(r)``.
        lora_bias: (out,), the bias of lora_B, or None.
        dropout: what the adapter's input is multiplied with, drawn from a seed or given in x's shape; None
            for one.
    """

    A: Tensor
    B: Tensor
    scaling: float
    lora_bias: Tensor | None = None
    dropout: SeededDropout | Tensor | None = None


class _Update(NamedTuple):
    """What is known of a term before any tensor is."""

    scaling: float
    dropout: SeededDropout | None

    @property
    def factor(self) -> float:
        """The scaling, with what a seeded mask of zeros and ones leaves out of it."""
        return self.scaling if self.dropout is None else self.scaling * self.dropout.factor


def lora_convolution(
    x: Tensor, W0: Tensor, bias: Tensor | None, terms: Sequence[ConvolutionTerm], geometry: Geometry
) -> Tensor:
    """Return ``y = conv(x, W0) + bias + sum of the terms``, differentiable in all but W0.

    Args:
        x: (N, in, *spatial), or without N.
        W0: (out, in / groups, *kernel), frozen.
        bias: (out,), or None.
        terms: at least one.
        geometry: A has the same as W0.

    With h = conv(x * dropout, A), (N, groups * r, *out_spatial), each group's r outputs after the other, and
    y and dy seen as (N, groups, out / groups, -1), the products of a term are added to y in place; kept for
    its gradients are x, h and the seed of its mask. dx is formed where x needs it, and summed up in place.

    Every operand is cast to `compute_dtype(x)`, and gradients have the dtype of their tensor, as in
    `loracle.torch_impl.lora_linear`. Differentiating twice is refused.

    Raises:
        ShapeError: x does not fit W0.
        DTypeError: x and W0 differ in dtype without autocast.
        TargetError: W0 requires a gradient, which it would not get.
        ConfigError: on the way back, with ``create_graph``.

    Source: LoRA, arXiv 2106.09685, for a weight seen as a matrix; the values and gradients are those of
        `loracle.reference.convolution_forward` and `convolution_backward`.
    """
    _check(x, W0, geometry)
    batched = x.dim() == W0.dim()
    dropouts = [term.dropout for term in terms]
    given = [dropout if isinstance(dropout, Tensor) else None for dropout in dropouts]
    if not batched:
        x = x[None]
        given = [None if own is None else own[None] for own in given]
    seeded = [dropout if isinstance(dropout, SeededDropout) else None for dropout in dropouts]
    updates = tuple(_Update(term.scaling, own) for term, own in zip(terms, seeded, strict=True))
    y: Tensor = _LoraConvolution.apply(  # type: ignore[no-untyped-call]
        updates,
        geometry,
        x.shape,
        compute_dtype(x),
        geometry.pad(x),
        W0,
        bias,
        *(None if own is None else geometry.pad(own) for own in given),
        *(term.A for term in terms),
        *(term.B for term in terms),
        *(term.lora_bias for term in terms),
    )
    return y if batched else y[0]


def _check(x: Tensor, W0: Tensor, geometry: Geometry) -> None:
    channels = W0.shape[1] * geometry.groups
    if x.dim() not in (W0.dim() - 1, W0.dim()) or x.shape[1 - W0.dim()] != channels:
        spatial = ", ".join("size" for _ in W0.shape[2:])
        raise ShapeError(
            f"x: expected shape (N, {channels}, {spatial}) or ({channels}, {spatial}) beside W0 of shape "
            f"{tuple(W0.shape)}, got {tuple(x.shape)}; check its axes"
        )
    check_dtype(x, W0)
    check_frozen(W0)


class _LoraConvolution(torch.autograd.Function):
    """See `lora_convolution`; x and given masks are padded, all operands batched."""

    @staticmethod
    def forward(
        ctx: Any,
        updates: tuple[_Update, ...],
        geometry: Geometry,
        shape: torch.Size,
        dtype: torch.dtype,
        x: Tensor,
        W0: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        need_x, _, _, *need = ctx.needs_input_grad[4:]
        _, need_A, need_B, _ = _parts(need)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        x, W0 = x.to(dtype), W0.to(dtype)
        cast: list[Any] = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        bias, *cast = cast
        given, As, Bs, lora_biases = _parts(cast)
        ctx.updates, ctx.geometry, ctx.shape, ctx.padded = updates, geometry, shape, x.shape
        y = _convolved(x, W0, bias, geometry)
        Hs = []
        for update, mask, A, B, lora_bias in zip(updates, given, As, Bs, lora_biases, strict=True):
            mask = _mask(x, update, mask, geometry, shape)
            dropped = x if mask is None else mask * x if update.dropout is None else mask.mul_(x)
            h = _convolved(dropped, _repeated(A, geometry), None, geometry)
            _add_raised(y, h, B, geometry, update.factor)
            if lora_bias is not None:
                y.add_(lora_bias.view(-1, *(1 for _ in y.shape[2:])), alpha=update.scaling)
            Hs.append(h)
        # What a gradient needs is kept only when that gradient is asked for.
        down = [need_x or own for own in need_A]
        ctx.save_for_backward(
            x if any(need_A) else None,
            W0 if need_x else None,
            *(mask if own else None for mask, own in zip(given, down, strict=True)),
            *(A if own else None for A, own in zip(As, down, strict=True)),
            *Bs,
            *(h if own else None for h, own in zip(Hs, need_B, strict=True)),
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice("the LoRA product")
        geometry: Geometry = ctx.geometry
        need_x, _, need_bias, *need = ctx.needs_input_grad[4:]
        _, need_A, need_B, need_lora_bias = _parts(need)
        bias_dtype, *dtypes = ctx.dtypes
        _, A_dtypes, B_dtypes, lora_bias_dtypes = _parts(dtypes)
        x, W0, *saved = ctx.saved_tensors
        given, As, Bs, Hs = _parts(saved)
        count = len(Bs)
        dA, dB, dlora_bias = ([None] * count for _ in range(3))  # type: list[Any], list[Any], list[Any]
        each = (0, *range(2, dy.dim()))
        one = geometry.one_by_one()
        # All operands have one dtype; an autocast that forward did not see must not change it.
        with torch.autocast(dy.device.type, enabled=False):
            dx = _gradients(dy, None, W0, geometry, ctx.padded, (True, False))[0] if need_x else None
            for i, update in enumerate(ctx.updates):
                down = need_x or need_A[i]
                width = geometry.groups * Bs[i].shape[1]
                narrow = *dy.shape[:1], width, *dy.shape[2:]
                dh, product = _gradients(dy, Hs[i], Bs[i], one, narrow, (down, need_B[i]))
                if need_B[i]:
                    dB[i] = scaled(product, update.factor, B_dtypes[i])
                if down:
                    mask = _mask(dy, update, given[i], geometry, ctx.shape)
                    dropped = x if mask is None or not need_A[i] else mask * x
                    own, product = _gradients(
                        dh, dropped, _repeated(As[i], geometry), geometry, ctx.padded, (need_x, need_A[i])
                    )
                    if need_A[i]:
                        product = product.view(geometry.groups, *As[i].shape).sum(0)
                        dA[i] = scaled(product, update.factor, A_dtypes[i])
                    if dx is not None and mask is None:
                        dx.add_(own, alpha=update.factor)
                    elif dx is not None:
                        dx.addcmul_(own, mask, value=update.factor)
                if need_lora_bias[i]:
                    dlora_bias[i] = scaled(dy.sum(each), update.scaling, lora_bias_dtypes[i])
            dbias = dy.sum(each).to(bias_dtype) if need_bias else None
        return None, None, None, None, dx, None, dbias, *[None] * count, *dA, *dB, *dlora_bias


def _parts(flat: Sequence[_T]) -> list[Sequence[_T]]:
    """Cut four values of each term, one after the other, into the terms' firsts, seconds and so on."""
    count = len(flat) // 4
    return [flat[start : start + count] for start in range(0, 4 * count, count)]


def _convolved(x: Tensor, W: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    convolution = _CONVOLUTIONS[W.dim() - 2]
    g = geometry
    y: Tensor = convolution(x, W, bias, g.stride, g.padding, g.dilation, g.groups)
    return y


def _repeated(A: Tensor, geometry: Geometry) -> Tensor:
    """Return A as the weight of a convolution in groups, each of which has it."""
    return A if geometry.groups == 1 else A.repeat(geometry.groups, *(1 for _ in A.shape[1:]))


def _add_raised(y: Tensor, h: Tensor, B: Tensor, geometry: Geometry, factor: float) -> None:
    """Add ``factor * (h -> B)`` to y, in place."""
    if not (y.is_contiguous() and h.is_contiguous()):
        y.add_(_convolved(h, B, None, geometry.one_by_one()), alpha=factor)
        return
    groups, r, N = geometry.groups, B.shape[1], len(y)
    width, places = B.shape[0] // groups, math.prod(y.shape[2:])
    matrices = B.reshape(1, groups, width, r).expand(N, -1, -1, -1).reshape(N * groups, width, r)
    y.view(N * groups, width, places).baddbmm_(matrices, h.view(N * groups, r, places), alpha=factor)


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    W: Tensor,
    geometry: Geometry,
    shape: Sequence[int],
    wanted: tuple[bool, bool],
) -> tuple[Any, Any]:
    """Return the gradients of a convolution's input, of the given shape, and weight, where wanted."""
    g = geometry
    if x is None or not wanted[1]:
        # The input's gradient needs its shape alone.
        x = dy.new_empty(1).expand(shape)
    zeros = (0,) * len(g.stride)
    dx, dW, _ = torch.ops.aten.convolution_backward(
        dy, x, W, None, g.stride, g.padding, g.dilation, False, zeros, g.groups, (*wanted, False)
    )
    return dx, dW


def _mask(
    like: Tensor, update: _Update, given: Tensor | None, geometry: Geometry, shape: torch.Size
) -> Tensor | None:
    """Return what the padded input is multiplied with: a copy of a number has its number's."""
    return given if update.dropout is None else geometry.pad(update.dropout.mask(like, shape))
