"""One weight of a merged model, row by row: merged, without the adapter, and how far off others may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loracle.files import MergedWeights
from loracle.files.updates import Bound, Linear, Update, conversion_bound, convert
from loracle.reference import MergeDifferences

from .ulps import bits

Array = NDArray[Any]
FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True, eq=False)
class OneWeight:
    """The weight `start` with `update`, row by row.

    Attributes:
        name: as the base's checkpoint has it.
        start: what the update changes, (rows, ...): the base's tensor, or the adapter's in its place.
        update: None where there is none.
        base: the base's tensor; None where it has none.
        threads: for each merge; one per CPU by default.
    """

    name: str
    start: Array
    update: Update | None
    base: Array | None
    threads: int | None = None

    @property
    def merged(self) -> bool:
        """Whether the adapter changes or brings this weight."""
        return self.update is not None or self.base is not self.start

    def rows(self, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
        """The rows of the merged weight, each entry rounded once to `dtype`."""
        own = self.start[start:stop]
        if self.update is None:
            return convert(own, dtype, self.name)
        return self.update.rows(own, start, dtype, self.threads, self.name)

    def differences(self, start: int, held: Array) -> MergeDifferences:
        """Where rows that somebody holds, from `start` on, have other bits than the merge in their dtype."""
        own = self.start[start : start + len(held)]
        if isinstance(self.update, Linear):
            return self.update.differences(own, start, held, self.threads, self.name)
        expected = self.rows(start, start + len(held), held.dtype)
        places = np.flatnonzero(bits(held) != bits(expected))
        return MergeDifferences(places, expected.reshape(-1)[places])

    def wide(self, start: int, stop: int) -> Array:
        """The rows in float64, off by a few of its roundings at most."""
        own = self.start[start:stop]
        return (
            self.update.wide(own, start)
            if isinstance(self.update, Linear)
            else self.rows(start, stop, FLOAT64)
        )

    def base_rows(self, start: int, stop: int, dtype: np.dtype[Any]) -> Array | None:
        """The rows without the adapter."""
        return None if self.base is None else convert(self.base[start:stop], dtype, self.name)

    def bound(self, start: int, stop: int, precision: np.dtype[Any], dtype: np.dtype[Any]) -> Bound:
        """How far from the exact rows those of a merge may be that rounds after every operation."""
        own = self.start[start:stop]
        if self.update is None:
            return conversion_bound(own, precision, dtype)
        return self.update.bound(own, start, precision, dtype)


def weight_of(weights: MergedWeights, name: str) -> OneWeight:
    """Return a weight of the model; a scalar is a row of one entry."""
    start = weights.start(name)
    update = weights.update(name)
    base = start if name not in weights.merged_names or update is not None else weights.base_tensor(name)
    if start.ndim == 0:
        start = start.reshape(1)
        base = None if base is None else base.reshape(1)
    if name not in weights.merged_names:
        base = start
    return OneWeight(name, start, update, base, weights.threads)


def row_blocks(shape: tuple[int, ...], entries: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about so many entries."""
    size = max(1, int(np.prod(shape[1:], dtype=np.int64)))
    step = max(1, entries // size)
    for start in range(0, shape[0], step):
        yield start, min(shape[0], start + step)


def coarser(one: np.dtype[Any], other: np.dtype[Any]) -> np.dtype[Any]:
    """The floating-point dtype with fewer bits for the fraction: others may have merged in it."""
    return max(one, other, key=lambda dtype: float(ml_dtypes.finfo(dtype).eps))
