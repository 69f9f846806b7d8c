"""Every entry of one weight of a candidate beside the correctly rounded merge, a block of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.files.updates import conversion_bound
from loracle.reference import ConfigError

from .one_weight import FLOAT64, OneWeight, coarser, row_blocks
from .ulps import bits, histogram, named, ulp_distance
from .verdict import Witness

Array = NDArray[Any]

BLOCK_ENTRIES = 1 << 21
"""So many entries are compared at a time: about 100 MB in all, where they differ."""

_FURTHEST = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Comparison:
    """What was counted.

    Attributes:
        unequal: entries whose bits are not the correctly rounded merge's.
        outside: entries further from it than a merge that rounds after every operation may be; all that are
            unequal, where there is no bound.
        not_finite: unequal entries that are NaN or infinite.
        ulps: see `WeightVerdict.ulps`.
        witness: the entry furthest away.
        is_base: whether all bits are those of the base's tensor.
    """

    entries: int
    unequal: int
    outside: int
    not_finite: int
    ulps: tuple[tuple[int, int], ...]
    witness: Witness | None
    is_base: bool


def compare(weight: OneWeight, held: Array) -> Comparison:
    """Compare a candidate's tensor, (rows, ...) in any floating-point dtype, with the merge rounded to it."""
    dtype = held.dtype
    counts = histogram(np.zeros(0, np.uint64))
    unequal = outside = not_finite = 0
    furthest, witness = np.uint64(0), None
    is_base = weight.base is not None
    for start, stop in row_blocks(held.shape, BLOCK_ENTRIES):
        got = np.ascontiguousarray(held[start:stop])
        want = weight.rows(start, stop, dtype)
        if is_base and weight.merged:
            base = weight.base_rows(start, stop, dtype)
            is_base = base is not None and np.array_equal(bits(got), bits(base))
        differs = bits(got) != bits(want)
        if not differs.any():
            counts[0] += got.size
            continue
        distance = ulp_distance(got, want)
        counts += histogram(distance)
        unequal += int(np.count_nonzero(differs))
        wrong = ~np.isfinite(got.astype(np.float64)).reshape(-1) & differs
        not_finite += int(np.count_nonzero(wrong))
        outside += int(np.count_nonzero(_outside(weight, start, stop, got, want).reshape(-1) & differs))
        steps = np.where(wrong, _FURTHEST, distance.reshape(-1))
        place = int(steps.argmax())
        if witness is None or steps[place] > furthest:
            row, *rest = (int(i) for i in np.unravel_index(place, got.shape))
            furthest = steps[place]
            witness = Witness(
                (start + row, *rest), float(want.reshape(-1)[place]), float(got.reshape(-1)[place])
            )
    return Comparison(held.size, unequal, outside, not_finite, named(counts), witness, is_base)


def _outside(weight: OneWeight, start: int, stop: int, got: Array, want: Array) -> NDArray[np.bool_]:
    """Which entries are further away than the bound of a merge in the base's or the candidate's dtype.

    What is wanted is half a unit in the last place off itself, at most.
    """
    dtype = got.dtype
    try:
        bound = weight.bound(start, stop, coarser(weight.start.dtype, dtype), dtype)
    except ConfigError:  # so few bits that there is none
        return np.ones(got.shape, np.bool_)
    exact = want.astype(FLOAT64)
    bound += conversion_bound(exact, dtype, FLOAT64)
    with np.errstate(invalid="ignore"):  # an infinity less a number
        inside: NDArray[np.bool_] = np.abs(got.astype(FLOAT64) - exact) <= bound
    return ~inside
