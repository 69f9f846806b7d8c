"""Multi-head attention with LoRA on query, key, value and output, forward and backward."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import linear
from .attention_inputs import (
    Attention,
    AttentionGradients,
    ProjectionGradients,
    Projections,
    Rotary,
    attended,
    check_attention,
)
from .errors import ConfigError
from .formats import Array
from .operands import Operand, add_up, product, restructure, scale
from .rotary import rotate, rotate_backward, signed
from .softmax import backward as softmax_backward
from .softmax import softmax, weighted


def attention_scores(
    x: Array, projections: Projections, attention: Attention, *, rotary: Rotary | None = None
) -> Array:
    """Return the scores, (N, H, T, T), that softmax is taken of, not masked.

    ``scale * q k^T`` for each head, with q and k rotated. Arguments and errors as in `attention_forward`;
    object arrays need no probabilities here.
    """
    check_attention(x, projections, attention, rotary)
    q, k = (linear.forward(x, own.W0, own.adapters, own.bias) for own in (projections.q, projections.k))
    query, key = turned_heads(q, k, attention, signed_tables(rotary))
    scores: Array = scores_of(query, key, attention)
    return scores


def attention_forward(
    x: Array,
    projections: Projections,
    attention: Attention,
    *,
    rotary: Rotary | None = None,
    mask: Array | None = None,
    probabilities: Array | None = None,
) -> Array:
    """Return the output of an attention block, (N, T, d).

    With q, k, v the projections of x, each cut into heads and q and k rotated by the tables, head h of the
    context is ``P v``, ``P = softmax(scale * q k^T)`` over the keys attended to, where k and v are those of
    key-value head ``h // (H / K)``. The output is the projection o of the heads' contexts side by side.

    Args:
        x: (N, T, d).
        projections: see `Projections`; each has any number of adapters and their dropout.
        attention: see `Attention`.
        rotary: cos and sin, (T, D) each, see `rotary_tables`; None for a model without.
        mask: boolean, (T, T) or (N, 1, T, T), True where a key (last axis) is attended to; with
            ``attention.causal`` both must allow it.
        probabilities: (N, H, T, T), to be used in the place of softmax's. Object arrays, for exact
            arithmetic, need them, since softmax is irrational; where a row's highest scores are equal, and
            the others so much lower that the exponential underflows, it is exact and known.

    All arrays have one dtype and the work is done in it, as in `linear_forward`. In floating point this is
    one evaluation among many: `attention_forward_bound` says how far any may be off.

    Raises:
        ShapeError, DTypeError: naming the tensor, what was expected and what came.
        ConfigError: a query with no key to attend to, or objects without probabilities.
        NonFiniteError: a score is NaN or infinite.

    Source: arXiv 1706.03762, section 3.2; transformers' ``LlamaAttention``; LoRA, arXiv 2106.09685, 4.2.
    """
    check_attention(x, projections, attention, rotary, probabilities=probabilities)
    context = _attend(x, projections, attention, rotary, mask, probabilities).context
    o = projections.o
    y: Array = linear.forward(context, o.W0, o.adapters, o.bias)
    return y


def attention_backward(
    dy: Array,
    x: Array,
    projections: Projections,
    attention: Attention,
    *,
    rotary: Rotary | None = None,
    mask: Array | None = None,
    probabilities: Array | None = None,
) -> AttentionGradients:
    """Return the gradients of a scalar whose gradient with respect to y is ``dy``, (N, T, d).

    With dc the gradient of a head's context and P its probabilities, ``dv = P^T dc``, ``dP = dc v^T``,
    ``dS = P * (dP - rowsum(P * dP))``, ``dq = scale * dS k``, ``dk = scale * dS^T q``; dk and dv are summed
    over the heads that share them, and the projections' gradients are those of `adapted_linear_backward`.

    Arguments, dtypes and errors as in `attention_forward`.
    """
    check_attention(x, projections, attention, rotary, probabilities=probabilities, dy=dy)
    forward = _attend(x, projections, attention, rotary, mask, probabilities)
    o = projections.o
    output = linear.backward(dy, forward.context, o.W0, o.adapters)
    tables = signed_tables(rotary)
    dheads = attend_backward(output.dx, forward, attention, tables, lambda dp, p, *_: weighted(dp, p))
    terms = [
        linear.backward(dhead, x, own.W0, own.adapters)
        for dhead, own in zip(dheads, (projections.q, projections.k, projections.v), strict=True)
    ]
    dq, dk, dv, do = (_projection_gradients(own) for own in (*terms, output))
    return AttentionGradients(terms[0].dx + terms[1].dx + terms[2].dx, dq, dk, dv, do)


class Attended(NamedTuple):
    """What attention computes: query, key and value, (N, H, T, D), rotated and with key and value repeated
    for the heads that share them; probabilities, (N, H, T, T); and context, (N, T, H D).
    """

    query: Operand
    key: Operand
    value: Operand
    probabilities: Operand
    context: Operand


def attend(
    q: Operand,
    k: Operand,
    v: Operand,
    attention: Attention,
    tables: tuple[Operand, Operand] | None,
    normalise: Callable[[Operand], Operand],
) -> Attended:
    """Attend on operands of any kind, given the projections (N, T, features); nothing is checked.

    ``tables`` are cos and the signed sin; ``normalise`` takes scores to probabilities.
    """
    query, key = turned_heads(q, k, attention, tables)
    value = _repeated(_heads(v, attention), attention)
    probabilities = normalise(scores_of(query, key, attention))
    return Attended(query, key, value, probabilities, _side_by_side(product(probabilities, value)))


def attend_backward(
    dcontext: Operand,
    forward: Attended,
    attention: Attention,
    tables: tuple[Operand, Operand] | None,
    mean: Callable[[Operand, Operand, Operand, Operand], Operand],
) -> tuple[Operand, Operand, Operand]:
    """Return the gradients of the q, k and v of `attend`, on operands of any kind.

    ``mean`` gives ``rowsum(P * dP)``, (N, H, T, 1), from dP, P, and the heads of dcontext and of context.
    """
    query, key, value, probabilities, context = forward
    dhead = _heads(dcontext, attention)
    dvalue = product(_transposed(probabilities), dhead)
    dprobabilities = product(dhead, _transposed(value))
    rows = mean(dprobabilities, probabilities, dhead, _heads(context, attention))
    dscores = scale(softmax_backward(dprobabilities, probabilities, rows), attention.score_scale)
    dquery, dkey = product(dscores, key), _gathered(product(_transposed(dscores), query), attention)
    if tables is not None:
        dquery, dkey = rotate_backward(dquery, *tables), rotate_backward(dkey, *tables)
    return _side_by_side(dquery), _side_by_side(dkey), _side_by_side(_gathered(dvalue, attention))


def turned_heads(
    q: Operand, k: Operand, attention: Attention, tables: tuple[Operand, Operand] | None
) -> tuple[Operand, Operand]:
    """Return query and key, (N, H, T, D), rotated, with each key repeated for the heads that share it."""
    query, key = _heads(q, attention), _heads(k, attention)
    if tables is not None:
        query, key = rotate(query, *tables), rotate(key, *tables)
    return query, _repeated(key, attention)


def scores_of(query: Operand, key: Operand, attention: Attention) -> Operand:
    """Return ``scale * query key^T``, (N, H, T, T)."""
    return scale(product(query, _transposed(key)), attention.score_scale)


def signed_tables(rotary: Rotary | None) -> tuple[Array, Array] | None:
    """Return cos and the signed sin."""
    return None if rotary is None else (rotary[0], signed(rotary[1]))


def _attend(
    x: Array,
    projections: Projections,
    attention: Attention,
    rotary: Rotary | None,
    mask: Array | None,
    probabilities: Array | None,
) -> Attended:
    counts = attended(mask, attention.causal, (x.shape[0], attention.heads, x.shape[1], x.shape[1]))
    if probabilities is None and x.dtype == object:
        raise ConfigError(
            "probabilities: expected an array for object arrays, got None; softmax has no exact value"
        )
    inputs = (projections.q, projections.k, projections.v)
    q, k, v = (linear.forward(x, own.W0, own.adapters, own.bias) for own in inputs)
    return attend(
        q,
        k,
        v,
        attention,
        signed_tables(rotary),
        lambda scores: softmax(scores, counts) if probabilities is None else probabilities,
    )


def _projection_gradients(terms: linear.LinearTerms) -> ProjectionGradients:
    own = linear.layer_gradients(terms.dx, terms.dbias, terms.adapters)
    return ProjectionGradients(own.dbias, own.adapters)


def _heads(values: Operand, attention: Attention) -> Operand:
    """Return (N, T, heads D) as (N, heads, T, D)."""
    width = attention.head_dim

    def cut(a: Array) -> Array:
        return a.reshape(*a.shape[:2], a.shape[2] // width, width).swapaxes(1, 2)

    return restructure(values, cut)


def _side_by_side(values: Operand) -> Operand:
    """Return (N, heads, T, D) as (N, T, heads D)."""
    return restructure(
        values, lambda a: a.swapaxes(1, 2).reshape(a.shape[0], a.shape[2], a.shape[1] * a.shape[3])
    )


def _transposed(values: Operand) -> Operand:
    return restructure(values, lambda a: a.swapaxes(-1, -2))


def _repeated(values: Operand, attention: Attention) -> Operand:
    """Return the K heads as H, each as often as query heads share it, one copy after the other."""
    return restructure(values, lambda a: np.repeat(a, attention.group, axis=1))


def _gathered(values: Operand, attention: Attention) -> Operand:
    """Return the sums over the heads that share one: the transpose of `_repeated`."""
    group = attention.group

    def gather(a: Array) -> Array:
        sums: Array = a.reshape(a.shape[0], a.shape[1] // group, group, *a.shape[2:]).sum(axis=2)
        return sums

    return add_up(values, gather, group)
