"""Weights that are a base plus a low-rank update, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import merge
from loracle.torch_impl.extraction.weights import Weight

Array = NDArray[Any]


def rounded_weight(
    shape: tuple[int, int], r: int, seed: int, dtype: Any = np.float32, size: float = 1.0
) -> Weight:
    """A random base, and its correctly rounded merge with random factors."""
    rng = np.random.default_rng(seed)
    before = rng.standard_normal(shape).astype(dtype)
    A = rng.standard_normal((r, shape[1])).astype(np.float32)
    B = (size * rng.standard_normal((shape[0], r))).astype(np.float32)
    return Weight("w", before, merge(before, A, B, 1.0), shape)


def whole_weight(shape: tuple[int, int], r: int, seed: int, most: int = 3) -> Weight:
    """A base and factors of small integers: the merge is exact, and many of its entries are zero."""
    rng = np.random.default_rng(seed)
    before = rng.integers(-8, 9, shape).astype(np.float32)
    A, B = rng.integers(-most, most + 1, (r, shape[1])), rng.integers(-most, most + 1, (shape[0], r))
    return Weight("w", before, before + (B @ A).astype(np.float32), shape)
