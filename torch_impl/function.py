"""The LoRA products of layers that share one input, as one autograd function with in-place additions."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .dropout import SeededDropout
from .function_rules import check_dtype, check_frozen, check_shape, compute_dtype, refuse_twice, scaled

_T = TypeVar("_T")
_linear = nn.functional.linear


class Member(NamedTuple):
    """A frozen linear layer: W0 (out, in), which may be a transposed view, and its bias (out,) or None."""

    W0: Tensor
    bias: Tensor | None


class Term(NamedTuple):
    """An update of one member, ``scaling * ((x * dropout) A^T) B^T + scaling * lora_bias``.

    Attributes:
        member: which of the layers it belongs to.
        A: (r, in); B: (width, r).
        scaling: ``lora_alpha / r`` or ``lora_alpha / sqrt(r)``.
        lora_bias: (width,), the bias of lora_B, or None.
        rows: (start, stop) of the outputs that the update is added to; all of them when None.
        dropout: what the adapter's input is multiplied with, drawn from a seed or given in x's shape; None
            for one.
    """

    member: int
    A: Tensor
    B: Tensor
    scaling: float
    lora_bias: Tensor | None = None
    rows: tuple[int, int] | None = None
    dropout: SeededDropout | Tensor | None = None


class _Place(NamedTuple):
    """Where a term's numbers are: its member, rows there, and its slice of the stack's ranks."""

    member: int
    rows: tuple[int, int] | None
    start: int
    stop: int


class _Stack(NamedTuple):
    """Terms of one scaling and one dropout, whose down-projections are one product."""

    scaling: float
    dropout: SeededDropout | None
    places: tuple[_Place, ...]


def lora_linear(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    multiplier: Tensor | None = None,
) -> Tensor:
    """Return ``y = x W0^T + bias + scaling * ((x * multiplier) A^T) B^T``, differentiable in all but W0.

    Args:
        x: (..., in), any leading dimensions, also empty ones.
        W0: (out, in), frozen.
        bias: (out,), or None.
        A: (r, in); B: (out, r).
        scaling: ``lora_alpha / r`` or ``lora_alpha / sqrt(r)``.
        multiplier: x's shape; what dropout multiplies the adapter's input with, 0 or ``1 / (1 - p)``; None
            for one. It gets no gradient.

    Every operand is cast to `compute_dtype(x)` and y has that dtype, as ``F.linear`` does under autocast.
    So float32 A and B beside a bfloat16 base are master copies: their products are bfloat16, their
    gradients arrive in float32. Gradients have the dtype of the tensor they belong to. Differentiating
    twice is refused.

    Raises:
        ShapeError: the shapes do not fit.
        DTypeError: x and W0 differ in dtype without autocast.
        TargetError: W0 requires a gradient, which it would not get.
        ConfigError: on the way back, with ``create_graph``.

    Source: LoRA, arXiv 2106.09685, section 4.1; the gradients are those of
        `loracle.reference.linear_backward`.
    """
    return lora_products(x, (Member(W0, bias),), (Term(0, A, B, scaling, dropout=multiplier),))[0]


def lora_products(x: Tensor, members: Sequence[Member], terms: Sequence[Term]) -> tuple[Tensor, ...]:
    """Return each member's ``y = x W0^T + bias + sum of its terms``, (..., out).

    x is read, and its gradient formed, once for all: with the down-projections stacked,
    ``H = x [A_1; A_2; ...]^T`` (N, sum of r), the gradients are

        dH_i = dy_i B_i,   dx = sum_m dy_m W0_m + scaling * dH [A_1; A_2; ...]   (added up in place),
        dA = scaling * dH^T x,   dB_i = scaling * dy_i^T H_i

    Kept for them: x, once; H; and seeds for the masks of dropout. Neither x where no A trains, nor W0 where
    x needs no gradient. At least one member and one term. Dtypes, errors and source as for `lora_linear`.
    """
    check_products(x, members, terms)
    order: dict[tuple[float, SeededDropout | int | None], list[Term]] = {}
    for at, term in enumerate(terms):
        dropout = at if isinstance(term.dropout, Tensor) else term.dropout
        order.setdefault((term.scaling, dropout), []).append(term)
    stacks, masks = [], []
    for (scaling, _), own in order.items():
        ends = list(accumulate((term.A.shape[0] for term in own), initial=0))
        places = tuple(
            _Place(term.member, term.rows, start, stop)
            for term, (start, stop) in zip(own, pairwise(ends), strict=True)
        )
        drawn = own[0].dropout
        masks.append(drawn.reshape(-1, x.shape[-1]) if isinstance(drawn, Tensor) else None)
        stacks.append(_Stack(scaling, drawn if isinstance(drawn, SeededDropout) else None, places))
    sorted_terms = [term for own in order.values() for term in own]
    ys: tuple[Tensor, ...] = _LoraProducts.apply(  # type: ignore[no-untyped-call]
        tuple(stacks),
        compute_dtype(x),
        # Flattened out here: a view made inside the function could not be modified in place afterwards.
        x.reshape(-1, x.shape[-1]),
        *(member.W0 for member in members),
        *(member.bias for member in members),
        *masks,
        *(term.A for term in sorted_terms),
        *(term.B for term in sorted_terms),
        *(term.lora_bias for term in sorted_terms),
    )
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def check_products(x: Tensor, members: Sequence[Member], terms: Sequence[Term]) -> None:
    """Check what `lora_products` is given; for its errors see `lora_linear`."""
    for W0, bias in members:
        out_features, in_features = W0.shape
        check_shape("x", x, (*x.shape[:-1], in_features), W0)
        check_shape("bias", bias, (out_features,), W0)
        check_dtype(x, W0)
        check_frozen(W0)
    for term in terms:
        W0 = members[term.member].W0
        width = W0.shape[0] if term.rows is None else term.rows[1] - term.rows[0]
        r = term.A.shape[0]
        check_shape("lora_A", term.A, (r, W0.shape[1]), W0)
        check_shape("lora_B", term.B, (width, r), W0)
        check_shape("lora_bias", term.lora_bias, (width,), W0)
        if isinstance(term.dropout, Tensor):
            check_shape("multiplier", term.dropout, tuple(x.shape), W0)


class _LoraProducts(torch.autograd.Function):
    """See `lora_products`; x is (N, in) here, each y (N, out), terms in the order of the stacks.

    Narrow products are made as (sum of r, N): with few columns they take two to four times as long. They
    carry the scaling, so that nothing has to be scaled afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, stacks: tuple[_Stack, ...], dtype: torch.dtype, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        need_x, *need = ctx.needs_input_grad[2:]
        _, _, _, need_A, need_B, _ = _parts(need, stacks)
        if x.dtype is not dtype:
            x = x.to(dtype)
        cast: list[Any] = [t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors]
        W0s, biases, given, As, Bs, lora_biases = _parts(cast, stacks)
        ys = [_linear(x, W0, bias) for W0, bias in zip(W0s, biases, strict=True)]
        stacked, Hs = [], []
        term = 0
        for stack, multiplier in zip(stacks, given, strict=True):
            A = _stacked(As[term : term + len(stack.places)])
            H = _scaled_product(A, _dropped(x, stack, multiplier).t(), _whole_scaling(stack))
            for place in stack.places:
                y = _rows(ys[place.member], place)
                y.addmm_(H[place.start : place.stop].t(), Bs[term].t())
                if lora_biases[term] is not None:
                    y.add_(lora_biases[term], alpha=stack.scaling)
                term += 1
            stacked.append(A)
            Hs.append(H)
        # What a gradient needs is kept only when that gradient is asked for.
        train_A, nothing = any(need_A), [None]
        down = need_x or train_A
        ctx.save_for_backward(
            x if train_A else None,
            *(W0s if need_x else nothing * len(W0s)),
            *(given if down else nothing * len(given)),
            *(stacked if need_x else nothing * len(stacks)),
            *(Hs if any(need_B) else nothing * len(stacks)),
            *(Bs if down else nothing * len(Bs)),
        )
        ctx.stacks, ctx.dtypes, ctx.shape = stacks, [None if t is None else t.dtype for t in tensors], x.shape
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_twice("the LoRA product")
        like = next((dy for dy in dys if dy is not None), None)
        if like is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_autocast_enabled(like.device.type):
            # All operands have one dtype; an autocast that forward did not see must not change it.
            with torch.autocast(like.device.type, enabled=False):
                return _gradients(ctx, dys, like)
        return _gradients(ctx, dys, like)


def _gradients(ctx: Any, dys: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of what `_LoraProducts` was given; ``like`` is one of ``dys``."""
    stacks: tuple[_Stack, ...] = ctx.stacks
    need_x, *need = ctx.needs_input_grad[2:]
    need_W0, need_bias, _, need_A, need_B, need_lora_bias = _parts(need, stacks)
    _, bias_dtypes, _, A_dtypes, B_dtypes, lora_bias_dtypes = _parts(ctx.dtypes, stacks)
    m, s = len(need_W0), len(stacks)
    x, *saved = ctx.saved_tensors
    W0s, given, stacked, Hs, Bs = (
        saved[:m],
        saved[m : m + s],
        saved[m + s : m + 2 * s],
        saved[m + 2 * s : m + 3 * s],
        saved[m + 3 * s :],
    )
    dA: list[Tensor | None] = [None] * len(need_A)
    dB, dlora_bias = dA.copy(), dA.copy()
    dx = _times_weights(dys, W0s) if need_x else None
    term = 0
    for stack, multiplier, A, H in zip(stacks, given, stacked, Hs, strict=True):
        own = range(term, term + len(stack.places))
        term = own.stop
        parts = [_rows_of(dys[place.member], place) for place in stack.places]
        train_A = any(need_A[i] for i in own)
        if need_x or train_A:
            mask = _mask(like, ctx.shape, stack, multiplier)
            dH = _up(parts, Bs[own.start : own.stop], like, _whole_scaling(stack))
            if dx is not None:
                if mask is None:
                    dx.addmm_(dH.t(), A)
                else:
                    dx.addcmul_(dH.t() @ A, mask)
            if train_A:
                product = dH @ (x if mask is None else x * mask)  # (sum of r, in)
        for i, place, dy in zip(own, stack.places, parts, strict=True):
            if dy is None:
                continue
            if need_A[i]:
                dA[i] = product[place.start : place.stop].to(A_dtypes[i])
            if need_B[i]:
                dB[i] = (H[place.start : place.stop] @ dy).t().to(B_dtypes[i])
            if need_lora_bias[i]:
                dlora_bias[i] = scaled(dy.sum(0), stack.scaling, lora_bias_dtypes[i])
    dbias = [
        dy.sum(0).to(dtype) if needed and dy is not None else None
        for dy, needed, dtype in zip(dys, need_bias, bias_dtypes, strict=True)
    ]
    return None, None, dx, *[None] * m, *dbias, *[None] * s, *dA, *dB, *dlora_bias


def _parts(flat: Sequence[_T], stacks: tuple[_Stack, ...]) -> list[Sequence[_T]]:
    """Cut into W0 and bias of each member, the mask of each stack, and A, B and lora_bias of each term."""
    s, n = len(stacks), sum([len(stack.places) for stack in stacks])
    m = (len(flat) - s - 3 * n) // 2
    a, b, c = 2 * m, 2 * m + s, 2 * m + s + n
    return [flat[:m], flat[m:a], flat[a:b], flat[b:c], flat[c : c + n], flat[c + n :]]


def _stacked(matrices: Sequence[Any]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``scaling * a b``; the scaling is applied before the result is rounded to the dtype."""
    # With beta 0 the first argument is not read.
    return a @ b if scaling == 1.0 else torch.addmm(a.new_empty(1, 1), a, b, beta=0, alpha=scaling)


def _rows(y: Tensor, place: _Place) -> Tensor:
    return y if place.rows is None else y[:, place.rows[0] : place.rows[1]]


def _rows_of(dy: Tensor | None, place: _Place) -> Tensor | None:
    return dy if dy is None or place.rows is None else _rows(dy, place)


def _whole_scaling(stack: _Stack) -> float:
    """Return the scaling with what a seeded mask of zeros and ones leaves out of it."""
    return stack.scaling if stack.dropout is None else stack.scaling * stack.dropout.factor


def _dropped(x: Tensor, stack: _Stack, multiplier: Tensor | None) -> Tensor:
    mask = _mask(x, x.shape, stack, multiplier)
    return x if mask is None else mask.mul_(x) if multiplier is None else mask * x


def _mask(like: Tensor, shape: torch.Size, stack: _Stack, multiplier: Tensor | None) -> Tensor | None:
    return multiplier if stack.dropout is None else stack.dropout.mask(like, shape)


def _times_weights(dys: Sequence[Tensor | None], W0s: Sequence[Tensor]) -> Tensor:
    """Return the sum of dy W0 over the members, (N, in)."""
    dx: Tensor | None = None
    for dy, W0 in zip(dys, W0s, strict=True):
        if dy is not None:
            dx = dy @ W0 if dx is None else dx.addmm_(dy, W0)
    assert dx is not None
    return dx


def _up(parts: Sequence[Tensor | None], Bs: Sequence[Tensor], like: Tensor, scaling: float) -> Tensor:
    """Return ``scaling * (dy B)^T`` of each term, one above the other, (sum of r, N)."""
    return _stacked(
        [
            like.new_zeros(B.shape[1], like.shape[0])
            if dy is None
            else _scaled_product(B.t(), dy.t(), scaling)
            for dy, B in zip(parts, Bs, strict=True)
        ]
    )
