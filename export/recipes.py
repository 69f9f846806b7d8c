"""Initializers that hold several weights: how they are put together, and taken apart.

The weights are merged and rounded one by one before; here bits are moved, never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

ROWS = "rows"
"""The rows of one weight after those of another: `[W1; W2]`, of the same row length."""


@dataclass(frozen=True)
class Recipe:
    """One way to put weights together.

    Attributes:
        shape: of the initializer, from the weights' shapes.
        pieces: the initializer from the weights, as arrays that follow one another in memory.
        parts: the weights, as views where that is possible, from the initializer and their shapes.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    pieces: Callable[[Sequence[Array]], Sequence[Array]]
    parts: Callable[[Array, Sequence[Shape]], list[Array]]


def _rows_shape(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _rows_parts(array: Array, shapes: Sequence[Shape]) -> list[Array]:
    ends = np.cumsum([shape[0] for shape in shapes])
    return [array[end - shape[0] : end] for end, shape in zip(ends, shapes, strict=True)]


RECIPES = {ROWS: Recipe(_rows_shape, list, _rows_parts)}
