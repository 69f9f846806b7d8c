"""Problems for the layers with any number of adapters, in the exact and the derived tier of `strategies`.

Every kind of problem has the same methods, so that one check serves all layers: ``forward`` and ``backward``
call the reference, the bounds are those of `loracle.reference`, and the gradients come as a dict whose keys
name the tensor: "x", "bias", or the number of an adapter and the name of its tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, Protocol, Self

import numpy as np
from exact_linear import error, rational
from hypothesis import strategies as st
from numpy.typing import DTypeLike
from strategies import BFLOAT16

from loracle.reference import (
    LayerGradients,
    LowRank,
    adapted_linear_backward,
    adapted_linear_backward_bound,
    adapted_linear_forward,
    adapted_linear_forward_bound,
    embedding_backward,
    embedding_backward_bound,
    embedding_forward,
    embedding_forward_bound,
    experts_backward,
    experts_backward_bound,
    experts_forward,
    experts_forward_bound,
)
from loracle.reference.formats import FORMATS

Key = str | tuple[int, str]
Gradients = dict[Key, Any]
Convert = Callable[[Any], Any]
DTYPES = [form.dtype for form in FORMATS]


@dataclass(frozen=True, eq=False)
class Problem:
    """What all problems share; the fields of a subclass that are float arrays are converted together."""

    dy: Any
    W0: Any
    adapters: tuple[LowRank, ...]

    def map(self, convert: Convert) -> Self:
        """Return the problem with every floating-point array converted; indices stay."""
        changed: dict[str, Any] = {
            field.name: convert(getattr(self, field.name))
            for field in fields(self)
            if isinstance(getattr(self, field.name), np.ndarray)
            and getattr(self, field.name).dtype.kind not in "iu"
        }
        return replace(self, **changed, adapters=tuple(map_adapter(own, convert) for own in self.adapters))

    def astype(self, dtype: DTypeLike) -> Self:
        return self.map(lambda array: array.astype(dtype))

    def rational(self) -> Self:
        return self.map(rational)

    def tensor(self, key: Key) -> Any:
        return getattr(self, key) if isinstance(key, str) else getattr(self.adapters[key[0]], key[1])

    def with_tensor(self, key: Key, value: Any) -> Self:
        if isinstance(key, str):
            return replace(self, **{key: value})
        number, name = key
        changed = [replace(o, **{name: value}) if i == number else o for i, o in enumerate(self.adapters)]
        return replace(self, adapters=tuple(changed))

    def with_adapter(self, number: int, **changes: Any) -> Self:
        changed = [replace(own, **changes) if i == number else own for i, own in enumerate(self.adapters)]
        return replace(self, adapters=tuple(changed))


class Layer(Protocol):
    """The methods of a problem that call the reference."""

    def forward(self) -> Any: ...
    def backward(self) -> Gradients: ...
    def forward_bound(self, precision: Any) -> Any: ...
    def backward_bound(self, precision: Any) -> Gradients: ...


@dataclass(frozen=True, eq=False)
class LinearProblem(Problem):
    """x (..., in), dy (..., out), W0 (out, in) or, with fan_in_fan_out, (in, out), bias (out,) or None."""

    x: Any
    bias: Any = None
    fan_in_fan_out: bool = False

    def forward(self) -> Any:
        return adapted_linear_forward(
            self.x, self.W0, self.adapters, bias=self.bias, fan_in_fan_out=self.fan_in_fan_out
        )

    def backward(self) -> Gradients:
        return named(
            adapted_linear_backward(
                self.dy, self.x, self.W0, self.adapters, fan_in_fan_out=self.fan_in_fan_out
            )
        )

    def forward_bound(self, precision: Any) -> Any:
        return adapted_linear_forward_bound(
            self.x, self.W0, self.adapters, precision, bias=self.bias, fan_in_fan_out=self.fan_in_fan_out
        )

    def backward_bound(self, precision: Any) -> Gradients:
        return named(
            adapted_linear_backward_bound(
                self.dy, self.x, self.W0, self.adapters, precision, fan_in_fan_out=self.fan_in_fan_out
            )
        )


@dataclass(frozen=True, eq=False)
class EmbeddingProblem(Problem):
    """ids (...), dy (..., d), W0 (V, d)."""

    ids: Any
    embed_scale: float | None = None
    padding_idx: int | None = None

    def forward(self) -> Any:
        return embedding_forward(self.ids, self.W0, self.adapters, embed_scale=self.embed_scale)

    def backward(self) -> Gradients:
        arguments = self.dy, self.ids, self.W0, self.adapters
        return dict(
            adapter_gradients(
                embedding_backward(*arguments, embed_scale=self.embed_scale, padding_idx=self.padding_idx)
            )
        )

    def forward_bound(self, precision: Any) -> Any:
        return embedding_forward_bound(
            self.ids, self.W0, self.adapters, precision, embed_scale=self.embed_scale
        )

    def backward_bound(self, precision: Any) -> Gradients:
        arguments = self.dy, self.ids, self.W0, self.adapters, precision
        bounds = embedding_backward_bound(
            *arguments, embed_scale=self.embed_scale, padding_idx=self.padding_idx
        )
        return dict(adapter_gradients(bounds))


@dataclass(frozen=True, eq=False)
class ExpertsProblem(Problem):
    """x (N, in), expert (N,), dy (N, out), W0 (E, out, in) or (E, in, out), bias (E, out) or None."""

    x: Any
    expert: Any
    bias: Any = None
    fan_in_fan_out: bool = False

    def forward(self) -> Any:
        return experts_forward(
            self.x,
            self.expert,
            self.W0,
            self.adapters,
            bias=self.bias,
            fan_in_fan_out=self.fan_in_fan_out,
        )

    def backward(self) -> Gradients:
        arguments = self.dy, self.x, self.expert, self.W0, self.adapters
        return named(experts_backward(*arguments, fan_in_fan_out=self.fan_in_fan_out))

    def forward_bound(self, precision: Any) -> Any:
        arguments = self.x, self.expert, self.W0, self.adapters, precision
        return experts_forward_bound(*arguments, bias=self.bias, fan_in_fan_out=self.fan_in_fan_out)

    def backward_bound(self, precision: Any) -> Gradients:
        arguments = self.dy, self.x, self.expert, self.W0, self.adapters, precision
        return named(experts_backward_bound(*arguments, fan_in_fan_out=self.fan_in_fan_out))


def map_adapter(own: LowRank, convert: Convert) -> LowRank:
    def optional(array: Any) -> Any:
        return None if array is None else convert(array)

    return replace(
        own, A=convert(own.A), B=convert(own.B), bias=optional(own.bias), dropout=optional(own.dropout)
    )


def named(gradients: LayerGradients) -> Gradients:
    return {"x": gradients.dx, "bias": gradients.dbias, **dict(adapter_gradients(gradients.adapters))}


def adapter_gradients(adapters: Any) -> Iterator[tuple[Key, Any]]:
    for number, own in enumerate(adapters):
        yield (number, "A"), own.dA
        yield (number, "B"), own.dB
        if own.dbias is not None:
            yield (number, "bias"), own.dbias


# Largest batch, in, out, r, number of adapters, integer and scaling such that no partial sum leaves the exact
# integers, in quarters, of the dtype: with x, W0, A, B at most ``size`` and dropout at most 2.
_EXACT = {
    BFLOAT16: (2, 3, 3, 1, 2, 1, 2.0),
    np.dtype(np.float16): (3, 5, 5, 2, 3, 1, 2.0),
    np.dtype(np.float32): (5, 9, 9, 4, 3, 4, 4.0),
    np.dtype(np.float64): (5, 9, 9, 4, 3, 40, 4.0),
}
_SCALINGS = [1.0, 2.0, 0.5, 1 / 3, -1.7, 16 / 8**0.5, 0.0]


@dataclass(frozen=True)
class Draws:
    """The drawn shape of a problem, and where its numbers come from."""

    batch: int
    inputs: int
    outputs: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    numbers: Callable[..., Any]
    rng: np.random.Generator
    exact: bool

    def dropout(self, shape: tuple[int, ...]) -> Any:
        keep = 0.5 if self.exact else self.rng.choice([0.9, 0.5])
        return (self.rng.random(shape) < keep) / keep if self.rng.random() < 0.6 else None

    def some(self, *shape: int) -> Any:
        """Numbers, or None in one of three cases."""
        return self.numbers(*shape) if self.rng.random() < 2 / 3 else None


@st.composite
def draws(draw: st.DrawFn, dtype: DTypeLike, exact: bool, most: int) -> Draws:
    limits = _EXACT[np.dtype(dtype)] if exact else (most, most, most, most, 3, 0, 0.0)
    batch, inputs, outputs = (draw(st.integers(1, limit)) for limit in limits[:3])
    ranks = draw(st.lists(st.integers(1, int(limits[3])), min_size=0, max_size=int(limits[4])))
    allowed = [s for s in (0.25, 0.5, -1.0, 2.0, 4.0) if s <= limits[6]] if exact else _SCALINGS
    scalings = [draw(st.sampled_from(allowed)) for _ in ranks]
    spread = draw(st.sampled_from([1.0, 0.02, 5.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = int(limits[5])

    def numbers(*shape: int) -> Any:
        whole = rng.integers(-size, size + 1, shape).astype(float)
        return whole if exact else rng.normal(0, spread, shape)

    return Draws(int(batch), int(inputs), int(outputs), tuple(ranks), tuple(scalings), numbers, rng, exact)


@st.composite
def linear_problems(
    draw: st.DrawFn, dtype: DTypeLike, *, exact: bool = False, most: int = 8, rows: bool = True
) -> LinearProblem:
    d = draw(draws(dtype, exact, most))
    lead = (d.batch,) if d.rng.random() < 0.7 else (1, d.batch)
    adapters = []
    for r, scaling in zip(d.ranks, d.scalings, strict=True):
        own = None
        if rows and d.rng.random() < 0.5:
            start, stop = sorted(map(int, d.rng.integers(0, d.outputs + 1, 2)))
            own = slice(start, stop)
        out = d.outputs if own is None else own.stop - own.start
        A, B, bias = d.numbers(r, d.inputs), d.numbers(out, r), d.some(out)
        adapters.append(LowRank(A, B, scaling, bias=bias, dropout=d.dropout((*lead, d.inputs)), rows=own))
    fan_in_fan_out = bool(d.rng.random() < 0.5)
    return LinearProblem(
        dy=d.numbers(*lead, d.outputs),
        W0=d.numbers(d.inputs, d.outputs) if fan_in_fan_out else d.numbers(d.outputs, d.inputs),
        adapters=tuple(adapters),
        x=d.numbers(*lead, d.inputs),
        bias=d.some(d.outputs),
        fan_in_fan_out=fan_in_fan_out,
    ).astype(dtype)


@st.composite
def embedding_problems(
    draw: st.DrawFn, dtype: DTypeLike, *, exact: bool = False, most: int = 8
) -> EmbeddingProblem:
    d = draw(draws(dtype, exact, most))
    lead = (d.batch,) if d.rng.random() < 0.5 else (1, d.batch)
    scales = (None, 0.5, 2.0) if exact else (None, 2.0, 7.5, float(np.float32(48.0**0.5)))
    return EmbeddingProblem(
        dy=d.numbers(*lead, d.outputs),
        W0=d.numbers(d.inputs, d.outputs),
        adapters=tuple(
            LowRank(d.numbers(r, d.inputs), d.numbers(d.outputs, r), scaling)
            for r, scaling in zip(d.ranks, d.scalings, strict=True)
        ),
        ids=d.rng.integers(0, d.inputs, lead),
        embed_scale=draw(st.sampled_from(scales)),
        padding_idx=int(d.rng.integers(0, d.inputs)) if d.rng.random() < 0.5 else None,
    ).astype(dtype)


@st.composite
def experts_problems(
    draw: st.DrawFn, dtype: DTypeLike, *, exact: bool = False, most: int = 7
) -> ExpertsProblem:
    d = draw(draws(dtype, exact, most))
    experts = draw(st.integers(1, 4))
    fan_in_fan_out = bool(d.rng.random() < 0.5)
    shape = (d.inputs, d.outputs) if fan_in_fan_out else (d.outputs, d.inputs)
    return ExpertsProblem(
        dy=d.numbers(d.batch, d.outputs),
        W0=d.numbers(experts, *shape),
        adapters=tuple(
            LowRank(
                d.numbers(experts, r, d.inputs),
                d.numbers(experts, d.outputs, r),
                scaling,
                dropout=d.dropout((d.batch, d.inputs)),
            )
            for r, scaling in zip(d.ranks, d.scalings, strict=True)
        ),
        x=d.numbers(d.batch, d.inputs),
        expert=d.rng.integers(0, experts, d.batch),
        bias=d.some(experts, d.outputs),
        fan_in_fan_out=fan_in_fan_out,
    ).astype(dtype)


def assert_exact_tier(problem: Any) -> None:
    """Computed in the dtype and in exact arithmetic, y and the gradients are the same numbers."""
    exact = problem.rational()
    y, gradients, expected = problem.forward(), problem.backward(), exact.backward()
    assert y.dtype == problem.W0.dtype
    assert y.tolist() == exact.forward().tolist()
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert gradient.dtype == problem.W0.dtype
        assert gradient.tolist() == expected[key].tolist()


def assert_difference_quotients(exact: Any, seed: int = 0, skip: Any = lambda key, index: False) -> None:
    """Among Fractions each gradient is the difference quotient: a layer is linear in each of its tensors."""
    rng = np.random.default_rng(seed)

    def loss(problem: Any) -> Any:
        return (problem.dy * problem.forward()).sum()

    for key, gradient in exact.backward().items():
        tensor = exact.tensor(key)
        if tensor is None:
            continue
        assert gradient.shape == tensor.shape
        positions = {tuple(map(int, rng.integers(0, tensor.shape))) for _ in range(4 * (tensor.size > 0))}
        for index in sorted(positions):
            moved = tensor.copy()
            moved[index] += Fraction(7, 3)
            if not skip(key, index):
                quotient = (loss(exact.with_tensor(key, moved)) - loss(exact)) / Fraction(7, 3)
                assert quotient == gradient[index], (key, index)


def finite(array: Any) -> bool:
    return bool(np.isfinite(array.astype(np.float64)).all())


def assert_within_bounds(problem: Any) -> None:
    """Computed in its dtype the problem stays within the bounds, wherever nothing overflows."""
    dtype, exact = problem.W0.dtype, problem.rational()
    with np.errstate(over="ignore", invalid="ignore"):
        y, gradients = problem.forward(), problem.backward()
    if finite(y):
        bound = problem.forward_bound(dtype)
        assert bound.shape == y.shape
        assert (error(y, exact.forward()) <= bound).all()
    bounds, expected = problem.backward_bound(dtype), exact.backward()
    assert bounds.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert bounds[key].shape == gradient.shape
        if finite(gradient):
            assert (error(gradient, expected[key]) <= bounds[key]).all(), key


def breaks_forward(wrong: Any, right: Any, dtype: DTypeLike) -> bool:
    """Whether y of ``wrong`` lies outside the bound around the exact y of ``right``."""
    outside = error(wrong.forward(), right.rational().forward()) > right.forward_bound(dtype)
    return bool(outside.any())


def broken_gradients(wrong: Any, right: Any, dtype: DTypeLike) -> set[Key]:
    """Which gradients of ``wrong`` lie outside the bounds around the exact ones of ``right``."""
    exact, bounds = right.rational().backward(), right.backward_bound(dtype)
    return {
        key
        for key, gradient in wrong.backward().items()
        if key in exact
        and gradient.shape == exact[key].shape
        and (error(gradient, exact[key]) > bounds[key]).any()
    }
