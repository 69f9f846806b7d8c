"""The LoRA products of layers that share one input, as one autograd function with in-place additions."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .dropout import SeededDropout
from .function_rules import check_dtype, check_frozen, check_shape, compute_dtype, refuse_twice, scaled

_T = TypeVar("_T")
_linear = nn.functional.linear
_unsafe_view = torch.ops.aten._unsafe_view.default


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
    stacks, masks, sorted_terms = [], [], []
    for scaling, drawn, own in _alike(terms):
        places, start = [], 0
        for term in own:
            stop = start + term.A.shape[0]
            places.append(_Place(term.member, term.rows, start, stop))
            start = stop
        masks.append(drawn.reshape(-1, x.shape[-1]) if isinstance(drawn, Tensor) else None)
        stacks.append(_Stack(scaling, drawn if isinstance(drawn, SeededDropout) else None, tuple(places)))
        sorted_terms += own
    ys: tuple[Tensor, ...] = _LoraProducts.apply(  # type: ignore[no-untyped-call]
        tuple(stacks),
        compute_dtype(x),
        x,
        *[member.W0 for member in members],
        *[member.bias for member in members],
        *masks,
        *[term.A for term in sorted_terms],
        *[term.B for term in sorted_terms],
        *[term.lora_bias for term in sorted_terms],
    )
    return ys


def _alike(terms: Sequence[Term]) -> list[tuple[float, SeededDropout | Tensor | None, list[Term]]]:
    """Return the terms of one scaling and one dropout together, in the order of their first ones."""
    order: dict[tuple[float, SeededDropout | int | None], list[Term]] = {}
    for at, term in enumerate(terms):
        # A mask that is given is its own alone.
        dropout = at if isinstance(term.dropout, Tensor) else term.dropout
        order.setdefault((term.scaling, dropout), []).append(term)
    return [(scaling, own[0].dropout, own) for (scaling, _), own in order.items()]


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
    """See `lora_products`; terms are in the order of the stacks.

    Inside, x is (N, in) and each y (N, out). Every narrow product reads its long operand by rows, and has
    the scaling as a factor, so that nothing has to be scaled afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, stacks: tuple[_Stack, ...], dtype: torch.dtype, x: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        need_x, *need = ctx.needs_input_grad[2:]
        _, _, _, need_A, need_B, _ = _parts(need, stacks)
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        if x.dtype is not dtype:
            x = x.to(dtype)
        W0s, biases, given, As, Bs, lora_biases = _parts(tensors, stacks)
        W0s = [_cast(W0, dtype) for W0 in W0s]
        given = [_cast(multiplier, dtype) for multiplier in given]
        ys = [_linear(x, W0, _cast(bias, dtype)) for W0, bias in zip(W0s, biases, strict=True)]
        stacked, Hs, Bts = [], [], []
        term = 0
        for stack, multiplier in zip(stacks, given, strict=True):
            A = _cast(_stacked(As[term : term + len(stack.places)]), dtype)
            H = x.new_empty(x.shape[0], A.shape[0])
            H.addmm_(_dropped(x, stack, multiplier), A.t(), beta=0, alpha=_whole_scaling(stack))
            for place in stack.places:
                y = _rows(ys[place.member], place)
                Bt = _transposed(Bs[term], dtype)
                y.addmm_(_ranks(H, place), Bt)
                if lora_biases[term] is not None:
                    y.add_(_cast(lora_biases[term], dtype), alpha=stack.scaling)
                Bts.append(Bt)
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
            *(Bts if down else nothing * len(Bts)),
        )
        ctx.stacks, ctx.dtypes, ctx.shape = stacks, [None if t is None else t.dtype for t in tensors], shape
        ctx.set_materialize_grads(False)
        # Not `view`: views made in here could not be modified in place afterwards.
        return tuple([_unsafe_view(y, (*shape[:-1], y.shape[1])) for y in ys])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_twice("the LoRA product")
        like = next((dy for dy in dys if dy is not None), None)
        if like is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_autocast_enabled(like.device.type):
            # All operands have one dtype; an autocast that forward did not see must not change it.
            with torch.autocast(like.device.type, enabled=False):
                return _gradients(ctx, dys)
        return _gradients(ctx, dys)


def _gradients(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients of what `_LoraProducts` was given; not all of ``dys`` are None."""
    stacks: tuple[_Stack, ...] = ctx.stacks
    need_x, *need = ctx.needs_input_grad[2:]
    need_W0, need_bias, _, need_A, need_B, need_lora_bias = _parts(need, stacks)
    _, bias_dtypes, _, A_dtypes, B_dtypes, lora_bias_dtypes = _parts(ctx.dtypes, stacks)
    m, s = len(need_W0), len(stacks)
    x, *saved = ctx.saved_tensors
    W0s, given, stacked, Hs, Bts = (
        saved[:m],
        saved[m : m + s],
        saved[m + s : m + 2 * s],
        saved[m + 2 * s : m + 3 * s],
        saved[m + 3 * s :],
    )
    dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
    like = next(dy for dy in dys if dy is not None)
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
            mask = _mask(like, (like.shape[0], ctx.shape[-1]), stack, multiplier)
            dH = _up(parts, Bts[own.start : own.stop], like, stack)
            if dx is not None:
                if mask is None:
                    dx.addmm_(dH, A)
                else:
                    dx.addcmul_(dH @ A, mask)
            if train_A:
                product = dH.t() @ (x if mask is None else x * mask)  # (sum of r, in)
        for i, place, dy in zip(own, stack.places, parts, strict=True):
            if dy is None:
                continue
            if need_A[i]:
                dA[i] = _cast(_between(product, place), A_dtypes[i])
            if need_B[i]:
                dB[i] = _transposed(_ranks(H, place).t() @ dy, B_dtypes[i]).contiguous()
            if need_lora_bias[i]:
                dlora_bias[i] = scaled(dy.sum(0), stack.scaling, lora_bias_dtypes[i])
    dbias = [
        dy.sum(0).to(dtype) if needed and dy is not None else None
        for dy, needed, dtype in zip(dys, need_bias, bias_dtypes, strict=True)
    ]
    dx = None if dx is None else dx.view(ctx.shape)
    return None, None, dx, *[None] * m, *dbias, *[None] * s, *dA, *dB, *dlora_bias


def _parts(flat: Sequence[_T], stacks: tuple[_Stack, ...]) -> list[Sequence[_T]]:
    """Cut into W0 and bias of each member, the mask of each stack, and A, B and lora_bias of each term."""
    s, n = len(stacks), sum([len(stack.places) for stack in stacks])
    m = (len(flat) - s - 3 * n) // 2
    a, b, c = 2 * m, 2 * m + s, 2 * m + s + n
    return [flat[:m], flat[m:a], flat[a:b], flat[b:c], flat[c : c + n], flat[c + n :]]


def _cast(tensor: Any, dtype: Any) -> Any:
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def _transposed(matrix: Any, dtype: Any) -> Tensor:
    """Return ``matrix^T`` in ``dtype``: contiguous where it is cast, which takes no further pass."""
    transposed: Tensor = matrix.t()
    if transposed.dtype is dtype:
        return transposed
    return transposed.to(dtype, memory_format=torch.contiguous_format)


def _stacked(matrices: Sequence[Any]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _between(product: Tensor, place: _Place) -> Tensor:
    """Return the rows that are a place's ranks."""
    return product[place.start : place.stop] if place.stop - place.start < product.shape[0] else product


def _ranks(H: Tensor, place: _Place) -> Tensor:
    """Return the columns that are a place's ranks."""
    return H[:, place.start : place.stop] if place.stop - place.start < H.shape[1] else H


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


def _mask(like: Tensor, shape: tuple[int, ...], stack: _Stack, multiplier: Tensor | None) -> Tensor | None:
    return multiplier if stack.dropout is None else stack.dropout.mask(like, shape)


def _times_weights(dys: Sequence[Tensor | None], W0s: Sequence[Tensor]) -> Tensor:
    """Return the sum of dy W0 over the members, (N, in)."""
    dx: Tensor | None = None
    for dy, W0 in zip(dys, W0s, strict=True):
        if dy is not None:
            dx = dy @ W0 if dx is None else dx.addmm_(dy, W0)
    assert dx is not None
    return dx


def _up(parts: Sequence[Tensor | None], Bts: Sequence[Tensor], like: Tensor, stack: _Stack) -> Tensor:
    """Return ``scaling * dy B`` of each term, side by side, (N, sum of r)."""
    dH = like.new_empty(like.shape[0], stack.places[-1].stop)
    for place, dy, Bt in zip(stack.places, parts, Bts, strict=True):
        own = _ranks(dH, place)
        if dy is None:
            own.zero_()
        else:
            # float32 products with B as it is, some columns wide, take twice as long.
            own.addmm_(dy, Bt.contiguous().t(), beta=0, alpha=_whole_scaling(stack))
    return dH
