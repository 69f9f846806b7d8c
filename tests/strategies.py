"""Hypothesis strategies for LoRA problems: shapes and a seed are drawn, the numbers come from the seed.

Two tiers. In the *exact* tier the numbers are small integers and powers of two, so small that every partial
sum of the forward and the backward pass, in any order, is a number of the dtype: all implementations must
agree bit for bit. In the *derived* tier the numbers are gaussian and implementations must stay within the
bounds of `loracle.reference`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import DTypeLike

from loracle.reference.formats import float_format

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, eq=False)
class LoraProblem:
    """x, dropout (batch, in); dy (batch, out); W0 (out, in); A (r, in); B (out, r); bias (out,)."""

    x: Any
    dy: Any
    W0: Any
    A: Any
    B: Any
    bias: Any
    dropout: Any
    scaling: float

    def astype(self, dtype: DTypeLike) -> "LoraProblem":
        """Return the same problem with every array rounded to ``dtype``."""
        arrays = (getattr(self, name).astype(dtype) for name in ARRAYS)
        return LoraProblem(*arrays, self.scaling)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {getattr(self, name).shape}" for name in ARRAYS)
        return f"LoraProblem({shapes}, scaling={self.scaling})"


ARRAYS = ("x", "dy", "W0", "A", "B", "bias", "dropout")

# Largest batch, in, out, r and integer for which no partial sum leaves the dtype's exact integers, in
# quarters.
_EXACT_LIMITS = {
    BFLOAT16: (2, 3, 3, 1, 1),
    np.dtype(np.float16): (3, 6, 6, 2, 1),
    np.dtype(np.float32): (4, 16, 16, 8, 5),
    np.dtype(np.float64): (4, 16, 16, 8, 50),
}


def exact_limit(dtype: DTypeLike) -> float:
    """Return up to what magnitude every multiple of a quarter is a number of ``dtype``."""
    return 2.0 ** float_format(dtype).precision / 4


@st.composite
def exact_problems(draw: st.DrawFn, dtype: DTypeLike) -> LoraProblem:
    """Small integers, scaling a power of two from 1/4 to 4, dropout 0 or 2 (p = 1/2); arrays of ``dtype``."""
    batch, inputs, outputs, rank, size = _EXACT_LIMITS[np.dtype(dtype)]
    shape = [draw(st.integers(1, most)) for most in (batch, inputs, outputs, rank)]
    scaling = draw(st.sampled_from([0.25, 0.5, 1.0, 2.0] + ([4.0] if size > 1 else [])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return _problem(
        rng, *shape, scaling, lambda *s: rng.integers(-size, size + 1, s).astype(float), 0.5
    ).astype(dtype)


@st.composite
def lora_problems(draw: st.DrawFn, most: int = 12, dtype: DTypeLike = np.float64) -> LoraProblem:
    """Gaussians of one of three sizes, any scaling, r possibly above in and out; arrays of ``dtype``."""
    batch, inputs, outputs, rank = (draw(st.integers(1, most)) for _ in range(4))
    scaling = draw(st.sampled_from([1.0, 2.0, 0.5, 1 / 3, -1.7, 0.0, 16 / 8**0.5]))
    keep = draw(st.sampled_from([1.0, 0.9, 0.5]))
    size = draw(st.sampled_from([1.0, 0.02, 30.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return _problem(
        rng, batch, inputs, outputs, rank, scaling, lambda *s: rng.normal(0, size, s), keep
    ).astype(dtype)


@st.composite
def matrices(draw: st.DrawFn, most: int = 7) -> Any:
    """Gaussians of float64 in three sizes, some of low rank, some with columns of very different sizes."""
    m, n = draw(st.integers(1, most)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([1.0, 0.02, 30.0]))
    kind = draw(st.sampled_from(["full", "low", "graded"]))
    if kind == "low":
        return size * rng.standard_normal((m, 1)) @ rng.standard_normal((1, n))
    matrix = size * rng.standard_normal((m, n))
    return matrix * 10.0 ** -np.arange(n) if kind == "graded" else matrix


def _problem(
    rng: np.random.Generator,
    batch: int,
    inputs: int,
    outputs: int,
    r: int,
    scaling: float,
    numbers: Callable[..., Any],
    keep: float,
) -> LoraProblem:
    return LoraProblem(
        x=numbers(batch, inputs),
        dy=numbers(batch, outputs),
        W0=numbers(outputs, inputs),
        A=numbers(r, inputs),
        B=numbers(outputs, r),
        bias=numbers(outputs),
        dropout=(rng.random((batch, inputs)) < keep) / keep,
        scaling=scaling,
    )
