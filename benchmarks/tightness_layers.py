"""How tight the bounds of every kind of layer are: the reference in float32 against itself in float64.

Seeded gaussian problems of k at most 64. float64's own error, 2^-29 of float32's, is left out of account.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from loracle import reference as lora

Array = np.ndarray[Any, Any]
Compared = tuple[str, Array, Array, Array]
F32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Numbers:
    """Seeded gaussians that are float32 numbers, in either dtype."""

    seed: int

    def __call__(self, number: int, *shape: int, size: float = 1.0) -> Array:
        rng = np.random.default_rng((self.seed, number))
        return (rng.standard_normal(shape) * size).astype(F32)


def wide(array: Array) -> Array:
    return array.astype(np.float64)


def adapter(numbers: Numbers, number: int, A: tuple[int, ...], B: tuple[int, ...]) -> lora.LowRank:
    return lora.LowRank(numbers(number, *A), numbers(number + 1, *B), 0.5)


def widened(own: lora.LowRank) -> lora.LowRank:
    return lora.LowRank(wide(own.A), wide(own.B), own.scaling)


def layers(seed: int) -> Iterator[Compared]:
    """Yield kind, float32's result, float64's, and the bound, forward and backward of each kind of layer."""
    n = Numbers(seed)
    yield from convolution(n)
    yield from embedding(n)
    yield from experts(n)
    yield from dora(n)
    yield from attention(n)
    yield from adamw(n)


def gradients(kind: str, narrow: Any, exact: Any, bounds: Any) -> Iterator[Compared]:
    for name in ("dx", "dbias"):
        yield f"{kind}, gradients", getattr(narrow, name), getattr(exact, name), getattr(bounds, name)
    for own, truth, bound in zip(narrow.adapters, exact.adapters, bounds.adapters, strict=True):
        for name in ("dA", "dB"):
            yield f"{kind}, gradients", getattr(own, name), getattr(truth, name), getattr(bound, name)


def convolution(n: Numbers) -> Iterator[Compared]:
    x, W0, own = n(1, 2, 6, 8, 7), n(2, 8, 6, 3, 3), adapter(n, 3, (4, 6, 3, 3), (8, 4))
    y = lora.convolution_forward(x, W0, [own])
    exact = lora.convolution_forward(wide(x), wide(W0), [widened(own)])
    yield "convolution, forward", y, exact, lora.convolution_forward_bound(x, W0, [own], F32)
    dy = n(5, *y.shape)
    narrow = lora.convolution_backward(dy, x, W0, [own])
    truth = lora.convolution_backward(wide(dy), wide(x), wide(W0), [widened(own)])
    yield from gradients("convolution", narrow, truth, lora.convolution_backward_bound(dy, x, W0, [own], F32))


def embedding(n: Numbers) -> Iterator[Compared]:
    ids = np.arange(40) % 23
    W0, own = n(1, 23, 16), adapter(n, 2, (8, 23), (16, 8))
    y = lora.embedding_forward(ids, W0, [own])
    exact = lora.embedding_forward(ids, wide(W0), [widened(own)])
    yield "embedding, forward", y, exact, lora.embedding_forward_bound(ids, W0, [own], F32)
    dy = n(4, *y.shape)
    narrow = lora.embedding_backward(dy, ids, W0, [own])[0]
    truth = lora.embedding_backward(wide(dy), ids, wide(W0), [widened(own)])[0]
    bound = lora.embedding_backward_bound(dy, ids, W0, [own], F32)[0]
    for name in ("dA", "dB"):
        yield "embedding, gradients", getattr(narrow, name), getattr(truth, name), getattr(bound, name)


def experts(n: Numbers) -> Iterator[Compared]:
    expert = np.arange(24) % 3
    x, W0, own = n(1, 24, 32), n(2, 3, 16, 32), adapter(n, 3, (3, 4, 32), (3, 16, 4))
    y = lora.experts_forward(x, expert, W0, [own])
    exact = lora.experts_forward(wide(x), expert, wide(W0), [widened(own)])
    yield "experts, forward", y, exact, lora.experts_forward_bound(x, expert, W0, [own], F32)
    dy = n(5, *y.shape)
    narrow = lora.experts_backward(dy, x, expert, W0, [own])
    truth = lora.experts_backward(wide(dy), wide(x), expert, wide(W0), [widened(own)])
    yield from gradients("experts", narrow, truth, lora.experts_backward_bound(dy, x, expert, W0, [own], F32))


def dora(n: Numbers) -> Iterator[Compared]:
    x, W0, own, m = (
        n(1, 16, 64),
        n(2, 48, 64),
        adapter(n, 3, (8, 64), (48, 8)),
        np.abs(n(5, 48)) + F32.type(1),
    )
    y = lora.dora_forward(x, W0, own, m)
    exact = lora.dora_forward(wide(x), wide(W0), widened(own), wide(m))
    yield "DoRA, forward", y, exact, lora.dora_forward_bound(x, W0, own, m, F32)
    dy = n(6, *y.shape)
    narrow = lora.dora_backward(dy, x, W0, own, m)
    truth = lora.dora_backward(wide(dy), wide(x), wide(W0), widened(own), wide(m))
    bound = lora.dora_backward_bound(dy, x, W0, own, m, F32)
    for name in ("dx", "dA", "dB", "dmagnitude"):
        yield "DoRA, gradients", getattr(narrow, name), getattr(truth, name), getattr(bound, name)


def attention(n: Numbers) -> Iterator[Compared]:
    heads = lora.Attention(heads=4, key_value_heads=2, head_dim=8)
    widths = {"q": (32, 24), "k": (16, 24), "v": (16, 24), "o": (24, 32)}
    own = {
        name: lora.Projection(
            n(10 * i, *shape, size=0.2),
            (lora.LowRank(n(10 * i + 1, 4, shape[1], size=0.2), n(10 * i + 2, shape[0], 4, size=0.2), 0.5),),
        )
        for i, (name, shape) in enumerate(widths.items(), 1)
    }
    projections = lora.Projections(**own)
    exactly = lora.Projections(
        **{name: lora.Projection(wide(p.W0), (widened(p.adapters[0]),)) for name, p in own.items()}
    )
    tables = lora.rotary_tables(np.arange(12), 8)
    rotary = (tables[0].astype(F32), tables[1].astype(F32))
    turned = (wide(rotary[0]), wide(rotary[1]))
    x = n(1, 2, 12, 24)
    y = lora.attention_forward(x, projections, heads, rotary=rotary)
    exact = lora.attention_forward(wide(x), exactly, heads, rotary=turned)
    yield (
        "attention, forward",
        y,
        exact,
        lora.attention_forward_bound(x, projections, heads, F32, rotary=rotary),
    )
    dy = n(2, *y.shape)
    narrow = lora.attention_backward(dy, x, projections, heads, rotary=rotary)
    truth = lora.attention_backward(wide(dy), wide(x), exactly, heads, rotary=turned)
    bound = lora.attention_backward_bound(dy, x, projections, heads, F32, rotary=rotary)
    yield "attention, gradients", narrow.dx, truth.dx, bound.dx
    for name in widths:
        parts = (getattr(gradient, name).adapters[0] for gradient in (narrow, truth, bound))
        a, b, c = parts
        for tensor in ("dA", "dB"):
            yield "attention, gradients", getattr(a, tensor), getattr(b, tensor), getattr(c, tensor)


def adamw(n: Numbers) -> Iterator[Compared]:
    options = lora.AdamWOptions(lr=1e-3)
    p, g, m, v = n(1, 64, 32), n(2, 64, 32), n(3, 64, 32), np.abs(n(4, 64, 32))
    state = lora.AdamWState(7, m, v)
    narrow, _ = lora.adamw_step(p, g, state, options)
    truth, _ = lora.adamw_step(wide(p), wide(g), lora.AdamWState(7, wide(m), wide(v)), options)
    yield "AdamW step", narrow, truth, lora.adamw_step_bound(p, g, state, options, F32).parameter
