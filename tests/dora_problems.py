"""DoRA problems for tests: layers whose norms are whole numbers, gaussian layers, and norms enclosed by
rationals.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
from exact_linear import rational
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import DTypeLike
from strategies import exact_limit

from loracle.reference import LowRank, dora
from loracle.reference.dora import DoraGradients, dora_backward, dora_forward

GRADIENTS = tuple(field.name for field in fields(DoraGradients))
ARRAYS = ("x", "dy", "W0", "A", "B", "bias", "magnitude", "dropout", "norm")


@dataclass(frozen=True, eq=False)
class DoraProblem:
    """x, dropout (N, in); dy (N, out); W0 (out, in); A (r, in); B (out, r); bias, magnitude, norm (out,)."""

    x: Any
    dy: Any
    W0: Any
    A: Any
    B: Any
    bias: Any
    magnitude: Any
    dropout: Any
    scaling: float
    norm: Any = None

    @property
    def adapter(self) -> LowRank:
        return LowRank(self.A, self.B, self.scaling, dropout=self.dropout)

    @property
    def weight(self) -> tuple[Any, LowRank]:
        return self.W0, self.adapter

    def map(self, convert: Callable[[Any], Any]) -> "DoraProblem":
        present = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        return replace(self, **{name: convert(array) for name, array in present.items()})

    def astype(self, dtype: DTypeLike) -> "DoraProblem":
        return self.map(lambda array: array.astype(dtype))

    def forward(self) -> Any:
        return dora_forward(self.x, *self.weight, self.magnitude, bias=self.bias, norm=self.norm)

    def backward(self) -> DoraGradients:
        return dora_backward(self.dy, self.x, *self.weight, self.magnitude, norm=self.norm)

    def __repr__(self) -> str:
        return f"DoraProblem(x {self.x.shape}, W0 {self.W0.shape}, r {len(self.A)}, scaling {self.scaling})"


def adapted_rows(problem: DoraProblem) -> Any:
    """Return W0 + scaling * B A in fractions."""
    W0, A, B = (rational(array) for array in (problem.W0, problem.A, problem.B))
    return W0 + Fraction(problem.scaling) * (B @ A)


def enclosed_norms(problem: DoraProblem) -> tuple[Any, Any]:
    """Return a rational just below and one just above each norm, 2^-200 of it apart or less."""
    rows = adapted_rows(problem)
    below, above = [], []
    for row in rows:
        square = Fraction(sum(w * w for w in row))
        shift = 200 + max(0, square.denominator.bit_length() - square.numerator.bit_length())
        floor = math.isqrt(square.numerator * 4**shift // square.denominator)
        below.append(Fraction(floor, 2**shift))
        above.append(Fraction(floor + 1, 2**shift))
    return np.array(below, dtype=object), np.array(above, dtype=object)


def exact_problems_of(problem: DoraProblem) -> list[DoraProblem]:
    """Return the problem in fractions twice: the exact y and gradients, linear or inverse in the norm, lie
    between.
    """
    return [replace(problem.map(rational), norm=norm) for norm in enclosed_norms(problem)]


# Rows of whole numbers whose squares sum to a perfect square, and that square's root.
_ROWS = [
    ((1,), 1),
    ((2,), 2),
    ((3, 4), 5),
    ((1, 2, 2), 3),
    ((2, 3, 6), 7),
    ((1, 4, 8), 9),
    ((4, 4, 7), 9),
    ((3, 1, 1, 1, 2), 4),
]
# Largest batch, in, out, r and entry of x, B and dy; how many of the rows above.
_LIMITS = {8: (2, 3, 3, 1, 1, 4), 11: (3, 5, 5, 2, 1, 8), 24: (4, 9, 9, 4, 4, 8), 53: (4, 9, 9, 4, 20, 8)}


@st.composite
def exact_dora_problems(draw: st.DrawFn, dtype: DTypeLike) -> DoraProblem:
    """Whole norms and small quarters throughout; scaling, magnitude / norm and dropout are 0 or powers of
    two, or 3.
    """
    limit = exact_limit(dtype)
    most = _LIMITS[int(math.log2(4 * limit))]
    batch, inputs, outputs, r = (draw(st.integers(1, high)) for high in most[:4])
    scaling = draw(st.sampled_from([0.5, 1.0, 2.0, -1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = most[4]

    def whole(*shape: int) -> Any:
        return rng.integers(-size, size + 1, shape).astype(float)

    fitting = [(row, n) for row, n in _ROWS[: most[5]] if len(row) <= inputs]
    chosen = [fitting[k] for k in rng.integers(0, len(fitting), outputs)]
    rows = np.zeros((outputs, inputs))
    for i, (row, _) in enumerate(chosen):
        rows[i, rng.permutation(inputs)[: len(row)]] = row * rng.choice([-1, 1], len(row))
    A, B = rng.integers(-1, 2, (r, inputs)).astype(float), rng.integers(-1, 2, (outputs, r)).astype(float)
    norm = np.array([float(n) for _, n in chosen])
    ratios = [1.0, 2.0, 0.5, -1.0, 0.0, 3.0]
    problem = DoraProblem(
        x=whole(batch, inputs),
        dy=whole(batch, outputs),
        W0=rows - scaling * (B @ A),
        A=A,
        B=B,
        bias=whole(outputs),
        magnitude=norm * rng.choice(ratios, outputs),
        dropout=rng.integers(0, 2, (batch, inputs)) * 2.0 if draw(st.booleans()) else None,
        scaling=scaling,
    )
    assume(_largest_partial_sum(problem, norm) < limit)
    return problem.astype(dtype)


def _largest_partial_sum(problem: DoraProblem, norm: Any) -> float:
    """Return a bound on every partial sum, whatever the order: the layer without its signs."""
    p = replace(problem.map(np.abs), scaling=abs(problem.scaling))
    g, less = p.magnitude / norm, np.abs(problem.magnitude / norm - 1)
    y = dora.forward(p.x, p.W0, p.adapter, g, less, p.bias) + less * p.bias * 2
    terms = dora.backward(p.dy, p.x, p.W0, p.adapter, g, less)
    dg = terms.dg + (p.dy * p.bias * 2).sum(axis=0)
    return max(float(array.max()) for array in (y, *terms, dg))


@st.composite
def dora_problems(draw: st.DrawFn, dtype: DTypeLike, most: int = 8) -> DoraProblem:
    """Gaussians; the magnitudes are near the norms or anything, negative and zero included."""
    batch, inputs, outputs, r = (draw(st.integers(1, most)) for _ in range(4))
    scaling = draw(st.sampled_from([1.0, 2.0, 0.5, 1 / 3, -1.7, 0.0]))
    size = draw(st.sampled_from([1.0, 0.02, 5.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    near = draw(st.booleans())
    return gaussian_problem(rng, (batch, inputs, outputs, r), scaling, size, near=near).astype(dtype)


def gaussian_problem(
    rng: np.random.Generator,
    shape: tuple[int, int, int, int],
    scaling: float,
    size: float,
    *,
    near: bool = True,
    dropout: bool = True,
) -> DoraProblem:
    batch, inputs, outputs, r = shape
    W0, A, B = (rng.normal(0, size, s) for s in ((outputs, inputs), (r, inputs), (outputs, r)))
    norm = np.linalg.norm(W0 + scaling * B @ A, axis=1)
    return DoraProblem(
        x=rng.normal(0, 1, (batch, inputs)),
        dy=rng.normal(0, 1, (batch, outputs)),
        W0=W0,
        A=A,
        B=B,
        bias=rng.normal(0, 1, outputs),
        magnitude=norm * rng.normal(1, 0.05, outputs) if near else rng.normal(0, 1, outputs) * (outputs > 1),
        dropout=rng.choice([0.0, 1 / 0.9], (batch, inputs), p=[0.1, 0.9]) if dropout else None,
        scaling=scaling,
    )
