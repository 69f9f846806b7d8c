"""Attention blocks for tests: problems of both tiers, and their exact values in rational arithmetic."""

from dataclasses import fields, replace
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from exact_linear import rational
from hypothesis import reject
from hypothesis import strategies as st
from numpy.typing import DTypeLike

from loracle.reference import (
    Attention,
    AttentionGradients,
    LowRank,
    Projection,
    Projections,
    attention_backward,
    attention_forward,
    attention_scores,
    linear,
    rotary_tables,
)
from loracle.reference.attention import attend, attend_backward
from loracle.reference.attention_inputs import attended
from loracle.reference.softmax import weighted

NAMES = ("q", "k", "v", "o")


class Block(NamedTuple):
    """x, dy (N, T, d), and what `attention_forward` takes beside x."""

    x: Any
    dy: Any
    projections: Projections
    attention: Attention
    rotary: tuple[Any, Any] | None
    mask: Any

    def __repr__(self) -> str:
        shapes = [(own.W0.shape, [a.A.shape for a in own.adapters]) for own in self.projections]
        return f"Block(x {self.x.shape}, {self.attention}, {shapes}, rotary={self.rotary}, mask={self.mask})"

    def map(self, change: Any) -> "Block":
        """Return the block with ``change`` made to every array of numbers."""

        def optional(array: Any) -> Any:
            return None if array is None else change(array)

        def adapter(own: LowRank) -> LowRank:
            arrays = {name: optional(getattr(own, name)) for name in ("A", "B", "bias", "dropout")}
            return replace(own, **arrays)

        projections = [
            Projection(change(own.W0), tuple(map(adapter, own.adapters)), optional(own.bias))
            for own in self.projections
        ]
        rotary = None if self.rotary is None else (change(self.rotary[0]), change(self.rotary[1]))
        return self._replace(
            x=change(self.x), dy=change(self.dy), projections=Projections(*projections), rotary=rotary
        )

    def astype(self, dtype: DTypeLike) -> "Block":
        return self.map(lambda array: array.astype(dtype))

    def with_projection(self, name: str, **changes: Any) -> "Block":
        own = replace(getattr(self.projections, name), **changes)
        return self._replace(projections=replace(self.projections, **{name: own}))

    def counts(self) -> Any:
        n, length, _ = self.x.shape
        return attended(self.mask, self.attention.causal, (n, self.attention.heads, length, length))


def forward(block: Block, probabilities: Any = None) -> Any:
    return attention_forward(
        block.x,
        block.projections,
        block.attention,
        rotary=block.rotary,
        mask=block.mask,
        probabilities=probabilities,
    )


def backward(block: Block, probabilities: Any = None) -> AttentionGradients:
    return attention_backward(
        block.dy,
        block.x,
        block.projections,
        block.attention,
        rotary=block.rotary,
        mask=block.mask,
        probabilities=probabilities,
    )


def flat(gradients: AttentionGradients) -> dict[str, Any]:
    """Return the gradients, or bounds of them, by name: dx, q.dbias, q.dA, q.dA1 of a second adapter, ..."""
    arrays = {"dx": gradients.dx}
    for name in NAMES:
        own = getattr(gradients, name)
        arrays[f"{name}.dbias"] = own.dbias
        for number, adapter in enumerate(own.adapters):
            for field in fields(adapter):
                value = getattr(adapter, field.name)
                if value is not None:
                    suffix = str(number) if number else ""
                    arrays[f"{name}.{field.name}{suffix}{'B' * (field.name == 'dbias')}"] = value
    return arrays


def everything(block: Block, probabilities: Any = None) -> dict[str, Any]:
    return {"y": forward(block, probabilities), **flat(backward(block, probabilities))}


def exactly(block: Block) -> Block:
    """Return the block with its floating-point numbers as Fractions."""
    return block.map(lambda array: array if array.dtype == object else rational(array))


def scores_of(block: Block) -> Any:
    return attention_scores(block.x, block.projections, block.attention, rotary=block.rotary)


def highest_scores(block: Block) -> Any:
    """Return where the scores of a row, of those that count, are the highest."""
    scores = np.where(block.counts(), scores_of(block), -(10**9))
    return scores == scores.max(axis=-1, keepdims=True)


def tied_probabilities(block: Block) -> Any:
    """Return, as Fractions, 1 / n for the n highest scores of a row, 0 for the others."""
    ones = np.where(highest_scores(block).astype(bool), Fraction(1), Fraction(0))
    return ones / ones.sum(axis=-1, keepdims=True)


def decimal_probabilities(block: Block) -> Any:
    """Return softmax of the exact scores, to 2^-200, as Fractions: computed in decimal arithmetic."""
    scores, counts = scores_of(exactly(block)), block.counts()
    with localcontext() as context:
        context.prec = 80
        numbers = [
            (Decimal(s.numerator) / Decimal(s.denominator)).exp() if on else Decimal(0)
            for s, on in zip(scores.ravel(), counts.ravel(), strict=True)
        ]
        rows = np.array(numbers, dtype=object).reshape(scores.shape)
        shares = rows / rows.sum(axis=-1, keepdims=True)
        scaled = [Fraction(int(share * 2**200), 2**200) for share in shares.ravel()]
    return np.array(scaled, dtype=object).reshape(scores.shape)


def exact_values(block: Block) -> dict[str, Any]:
    """Return y and the gradients of a gaussian block to about sixty digits."""
    return everything(exactly(block), decimal_probabilities(block))


# By significant bits: largest N, T, d, r and integer; the scale, above which exp of its negative underflows.
_LIMITS = {
    8: (1, 2, 2, 1, 1, 128.0),
    11: (1, 3, 3, 1, 1, 128.0),
    24: (2, 3, 4, 2, 2, 256.0),
    53: (2, 4, 6, 7, 3, 1024.0),
}


@st.composite
def exact_blocks(draw: st.DrawFn, precision: int) -> Block:
    """Small integers, quarter turns, and scores that are equal or too far apart for exp: softmax is exact.

    The highest scores of each row are 1, 2 or 4: their probability is 1, 1/2 or 1/4. No partial sum needs
    more than ``precision`` bits.
    """
    n, length, d, r, size, scale = _LIMITS[precision]
    heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)] if size > 1 else [(1, 1), (2, 1)]))
    attention = Attention(*heads, 2, scale=scale, causal=draw(st.booleans()))
    shape = (draw(st.integers(1, n)), draw(st.integers(2, length)), draw(st.integers(1, d)))
    ranks = [draw(st.integers(1, r)) for _ in NAMES]
    turned, masked = draw(st.booleans()), draw(st.booleans())
    # The gradient of tied scores takes more bits than float16 has, but for the smallest blocks.
    tied = precision > 11 and draw(st.booleans())
    seed = draw(st.integers(0, 2**32 - 1))
    found = None
    for attempt in range(40):
        rng = np.random.default_rng((seed, attempt))
        block = _exact_block(rng, shape, ranks, attention, size, turned, masked, tied)
        ties = set(highest_scores(block).sum(axis=-1).ravel())
        if ties <= {1, 2, 4} and _largest(block) * (16 if size > 1 else 4) <= 2**precision:
            found = block
            if not tied or gradients_pass_softmax(block):
                break
    return reject() if found is None else found


def gradients_pass_softmax(block: Block) -> bool:
    """Return whether there are ties that matter: what passes softmax reaches query and key."""
    gradients = backward(block)
    own = gradients.k.adapters[0]
    return bool(gradients.q.dbias.any() and (own.dA.any() or own.dB.any()))


def _largest(block: Block) -> float:
    """Return the largest sum of magnitudes in the forward and the backward pass: no partial sum is larger."""
    x, dy, (q, k, v, o), attention, rotary, _ = block.map(np.abs)
    tables = rotary
    projected = [linear.forward(x, own.W0, own.adapters, own.bias) for own in (q, k, v)]
    probabilities = tied_probabilities(block).astype(float)
    kept: list[Any] = []

    def normalise(scores: Any) -> Any:
        kept.append(scores)
        return probabilities

    forward = attend(*projected, attention, tables, normalise)
    y = linear.forward(forward.context, o.W0, o.adapters, o.bias)
    output = linear.backward(dy, forward.context, o.W0, o.adapters)
    dheads = attend_backward(output.dx, forward, attention, tables, lambda dp, p, *_: -weighted(dp, p))
    terms = [linear.backward(d, x, own.W0, own.adapters) for d, own in zip(dheads, (q, k, v), strict=True)]
    dx = sum(own.dx for own in terms)
    arrays = [*kept, *forward, y, *dheads, dx, *projected, output.dx]
    for own in (*terms, output):
        arrays += [own.dbias, own.adapters[0].dA, own.adapters[0].dB, own.adapters[0].dx]
    return max(float(array.max()) for array in arrays)


def _exact_block(
    rng: Any, shape: Any, ranks: Any, attention: Attention, size: int, turned: bool, masked: bool, tied: bool
) -> Block:
    n, length, d = shape
    width, inner = attention.key_value_heads * attention.head_dim, attention.heads * attention.head_dim

    def integers(*shape: int) -> Any:
        return rng.integers(-size, size + 1, shape) * (rng.random(shape) < (0.7 if size > 1 else 0.5)) * 1.0

    def projection(r: int, outputs: int, inputs: int) -> Projection:
        own = LowRank(
            integers(r, inputs),
            integers(outputs, r),
            float(rng.choice([0.5, 1.0, 2.0])) if size > 1 else 1.0,
            dropout=rng.integers(0, 2, (n, length, inputs)) * (2.0 if size > 1 else 1.0),
        )
        return Projection(integers(outputs, inputs), (own,), integers(outputs))

    shapes = [(inner, d), (width, d), (width, d), (d, inner)]
    projections = Projections(*(projection(r, *s) for r, s in zip(ranks, shapes, strict=True)))
    if tied:
        # Queries of one component: keys that differ in the other have equal scores, and move the gradient.
        for array in (projections.q.W0, projections.q.adapters[0].B, projections.q.bias):
            array[1::2] = 0
    quarters = rng.integers(0, 4, (length, attention.head_dim // 2))
    cos, sin = np.array([1.0, 0, -1, 0])[quarters], np.array([0.0, 1, 0, -1])[quarters]
    rotary = (np.tile(cos, 2), np.tile(sin, 2)) if turned else None
    mask = rng.random((length, length) if n > 1 else (n, 1, length, length)) < 0.7
    mask |= np.eye(length, dtype=bool)
    x, dy = integers(n, length, d), integers(n, length, d)
    return Block(x, dy, projections, attention, rotary, mask if masked else None)


def gaussian_block(
    seed: int,
    *,
    n: int = 2,
    length: int = 5,
    d: int = 8,
    heads: tuple[int, int, int] = (4, 2, 4),
    r: int = 2,
    adapters: int = 1,
    rotary: bool = True,
    masked: bool = False,
    causal: bool = True,
    scale: float | None = None,
    size: float = 1.0,
    keep: float = 0.5,
    dtype: DTypeLike = np.float32,
) -> Block:
    """Gaussians, the weights over the root of the inputs, so that activations have the size ``size``."""
    rng = np.random.default_rng(seed)
    attention = Attention(*heads, scale=scale, causal=causal)
    width, inner = attention.key_value_heads * attention.head_dim, attention.heads * attention.head_dim

    def projection(outputs: int, inputs: int) -> Projection:
        own = tuple(
            LowRank(
                rng.normal(0, inputs**-0.5, (r, inputs)),
                rng.normal(0, r**-0.5, (outputs, r)),
                float(rng.choice([0.5, 1 / 3, -1.7])),
                bias=rng.normal(0, 1, outputs) if number else None,
                dropout=(rng.random((n, length, inputs)) < keep) / keep if keep < 1 else None,
            )
            for number in range(adapters)
        )
        return Projection(rng.normal(0, inputs**-0.5, (outputs, inputs)), own, rng.normal(0, 0.3, outputs))

    shapes = [(inner, d), (width, d), (width, d), (d, inner)]
    projections = Projections(*(projection(*shape) for shape in shapes))
    mask = (rng.random((n, 1, length, length)) < 0.7) | np.eye(length, dtype=bool)
    return Block(
        rng.normal(0, size, (n, length, d)),
        rng.normal(0, 1, (n, length, d)),
        projections,
        attention,
        rotary_tables(np.arange(length), attention.head_dim) if rotary else None,
        mask if masked else None,
    ).astype(dtype)
