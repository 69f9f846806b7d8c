"""Every entry of one weight of a candidate beside the correctly rounded merge, a block of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loracle.files.updates import Linear, conversion_bound, merging
from loracle.reference import ConfigError

from .one_weight import FLOAT64, OneWeight, coarser, row_blocks
from .ulps import bits, histogram, named, ulp_distance
from .verdict import Witness

Array = NDArray[Any]

BLOCK_ENTRIES = 1 << 22
"""So many entries are compared at a time: about 200 MB in all, where they differ."""

FEW = 1e-3
"""Up to this share of a weight's entries are single ones."""

_FEW_ROWS = 4
"""Where fewer rows than one in so many have entries in doubt, the bound is computed for these alone."""

_HALF_ULP = 2.0**-7
"""More than rounding can have changed a number by, relative to it, in any of the dtypes."""

_FURTHEST = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Comparison:
    """What was counted.

    Attributes:
        unequal: entries whose bits are not the correctly rounded merge's.
        outside: entries further from it than a merge that rounds after every operation may be; all that are
            unequal, where there is no bound. Those of later rows are not counted once they are not `FEW`.
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
    counts = histogram(np.zeros(0, np.uint64))
    unequal = outside = not_finite = 0
    furthest, witness = np.uint64(0), None
    enough = FEW * held.size
    is_base = weight.base is not None
    for start, stop in row_blocks(held.shape, BLOCK_ENTRIES):
        got = np.ascontiguousarray(held[start:stop])
        apart = weight.differences(start, got)
        if is_base and weight.merged:
            is_base = _are_base(weight, start, stop, got)
        places = apart.places
        counts[0] += got.size - len(places)
        if not len(places):
            continue
        block = EntriesApart(weight, start, stop, places, got.reshape(-1)[places], apart.expected)
        distance = ulp_distance(block.got, block.want)
        counts += histogram(distance)
        unequal += len(places)
        wrong = ~np.isfinite(block.got.astype(FLOAT64))
        not_finite += int(np.count_nonzero(wrong))
        if outside <= enough:
            outside += _outside(block)
        steps = np.where(wrong, _FURTHEST, distance)
        most = int(steps.argmax())
        if witness is None or steps[most] > furthest:
            row, *rest = (int(i) for i in np.unravel_index(places[most], got.shape))
            furthest = steps[most]
            witness = Witness((start + row, *rest), float(block.want[most]), float(block.got[most]))
    return Comparison(held.size, unequal, outside, not_finite, named(counts), witness, is_base)


def _are_base(weight: OneWeight, start: int, stop: int, got: Array) -> bool:
    """Whether rows have the bits of the base's; the first decides it for most that do not."""
    for last in (start + 1, stop):
        base = weight.base_rows(start, last, got.dtype)
        if base is None or not np.array_equal(bits(got[: last - start]), bits(base)):
            return False
    return True


@dataclass(frozen=True, eq=False)
class EntriesApart:
    """Rows of a weight, and the entries in them that differ: their flat places, and both values."""

    weight: OneWeight
    start: int
    stop: int
    places: NDArray[np.intp]
    got: Array
    want: Array


def _outside(block: EntriesApart) -> int:
    """How many entries are further away than the bound of a merge in the base's or the candidate's dtype.

    What is wanted is half a unit in the last place off itself, at most.
    """
    weight, dtype = block.weight, block.got.dtype
    precision = coarser(weight.start.dtype, dtype)
    want = block.want.astype(FLOAT64)
    with np.errstate(invalid="ignore"):  # an infinity less a number
        gap = np.abs(block.got.astype(FLOAT64) - want) - conversion_bound(want, dtype, FLOAT64)
        left = np.flatnonzero(~(gap <= least_bound(block, precision)))
    if not len(left):
        return 0
    width = int(np.prod(weight.start.shape[1:], dtype=np.int64))
    rows = np.unique(block.places[left] // width)
    every = len(rows) > (block.stop - block.start) // _FEW_ROWS
    spans = (
        [(block.start, block.stop)] if every else [(block.start + row, block.start + row + 1) for row in rows]
    )
    count = 0
    for start, stop in spans:
        place = block.places[left] - (start - block.start) * width
        own = left[(place >= 0) & (place < (stop - start) * width)]
        try:
            bound = weight.bound(start, stop, precision, dtype).reshape(-1)
        except ConfigError:  # so few bits that there is none
            count += len(own)
            continue
        inside = gap[own] <= bound[block.places[own] - (start - block.start) * width]
        count += int(np.count_nonzero(~inside))
    return count


def least_bound(block: EntriesApart, precision: np.dtype[Any]) -> NDArray[np.float64]:
    """What a linear layer's bound is at least, computed quickly: the update is |scaling| |B||A| at most; it
    and W0 are rounded twice in the dtype merged in, r times in the sums, and once in the candidate's. 0 for
    other kinds."""
    update = block.weight.update
    if not isinstance(update, Linear):
        return np.zeros(len(block.places))
    own = merging(precision)
    last = float(ml_dtypes.finfo(block.got.dtype).eps) / 2
    roundings = 2 * own.form.unit_roundoff + update.pair.r * own.wide.unit_roundoff + last
    W0 = block.weight.start[block.start : block.stop].reshape(-1)[block.places].astype(FLOAT64)
    want = block.want.astype(FLOAT64)
    size: NDArray[np.float64] = np.abs(W0) + np.maximum(np.abs(want - W0) - np.abs(want) * _HALF_ULP, 0)
    return roundings * size
