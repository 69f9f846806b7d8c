"""Initializers that are made of weights: how they are put together, and taken apart where they can be.

The weights are merged and rounded one by one before. Where a recipe has `parts`, bits are moved, never
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .block_codes import BITS, block_codes, code_shapes

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

ROWS = "rows"
"""The rows of one weight after those of another: `[W1; W2]`, of the same row length."""

TRANSPOSED = "transposed"
"""One weight with its rows as columns, (in, out)."""

STACKED = "stacked"
"""One weight of each expert after the other, (E, out, in)."""

STACKED_IN_TURN = "stacked in turn"
"""Two weights of each expert, (E, 2 out, in), a row of the first and a row of the second in turn."""

CODES, SCALES, ZERO_POINTS = QUANTITIES = ("codes", "scales", "zero points")
"""What the rows of weights become when they are quantised; see `code_recipe`."""


@dataclass(frozen=True)
class Recipe:
    """One way to make an initializer of weights.

    Attributes:
        shape: of the initializer, from the weights' shapes.
        pieces: the initializer from the weights, or from what `compute` made of them, as arrays that follow
            one another in memory.
        parts: the weights, as views where that is possible, from the initializer and their shapes; None
            where it does not hold them.
        compute: what several initializers are taken from, from the weights and their names; computed once
            for all of them. None where they are taken from the weights.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    pieces: Callable[[Iterable[Array]], Iterable[Array]]
    parts: Callable[[Array, Sequence[Shape]], list[Array]] | None
    compute: Callable[[Sequence[Array], Sequence[str]], Sequence[Array]] | None = None

    @property
    def in_order(self) -> bool:
        """Whether the initializer is the weights' bytes, one weight after the other."""
        return self.pieces is iter


def _rows_shape(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _rows_parts(array: Array, shapes: Sequence[Shape]) -> list[Array]:
    ends = np.cumsum([shape[0] for shape in shapes])
    return [array[end - shape[0] : end] for end, shape in zip(ends, shapes, strict=True)]


def _transposed_shape(shapes: Sequence[Shape]) -> Shape:
    return shapes[0][::-1]


def _transposed_pieces(weights: Iterable[Array]) -> Iterator[Array]:
    return (np.ascontiguousarray(weight.T) for weight in weights)


def _transposed_parts(array: Array, _: Sequence[Shape]) -> list[Array]:
    return [array.T]


def code_recipe(quantity: str, bits: int, *, columns: bool) -> str:
    """The recipe of one of `QUANTITIES`: of codes of the rows of weights, or of their columns."""
    return f"{quantity} of {bits} bits{' by columns' if columns else ''}"


def _code_recipes(bits: int, columns: bool) -> dict[str, Recipe]:
    def shape(place: int, shapes: Sequence[Shape]) -> Shape:
        turned = [own[::-1] if columns else own for own in shapes]
        return code_shapes(sum(own[0] for own in turned), turned[0][1], bits)[place]

    def piece(place: int, computed: Iterable[Array]) -> Iterable[Array]:
        return [list(computed)[place]]

    compute = partial(block_codes, bits=bits, columns=columns)
    return {
        code_recipe(quantity, bits, columns=columns): Recipe(
            partial(shape, place), partial(piece, place), None, compute
        )
        for place, quantity in enumerate(QUANTITIES)
    }


def _stacked_shape(shapes: Sequence[Shape]) -> Shape:
    return (len(shapes), *shapes[0])


def _stacked_parts(array: Array, _: Sequence[Shape]) -> list[Array]:
    return list(array)


def _in_turn_shape(shapes: Sequence[Shape]) -> Shape:
    height, width = shapes[0]
    return (len(shapes) // 2, 2 * height, width)


def _in_turn_pieces(weights: Iterable[Array]) -> Iterator[Array]:
    pairs = iter(weights)
    for first, second in zip(pairs, pairs, strict=True):
        yield np.stack([first, second], 1)


def _in_turn_parts(array: Array, _: Sequence[Shape]) -> list[Array]:
    return [expert[first::2] for expert in array for first in range(2)]


RECIPES = {
    ROWS: Recipe(_rows_shape, iter, _rows_parts),
    TRANSPOSED: Recipe(_transposed_shape, _transposed_pieces, _transposed_parts),
    STACKED: Recipe(_stacked_shape, iter, _stacked_parts),
    STACKED_IN_TURN: Recipe(_in_turn_shape, _in_turn_pieces, _in_turn_parts),
}
for _bits in BITS.values():
    for _columns in (False, True):
        RECIPES |= _code_recipes(_bits, _columns)
