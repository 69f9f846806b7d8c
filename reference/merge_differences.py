"""Where somebody's merged weight is not the correctly rounded one, and what it should hold there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ShapeError
from .factors import Factors, norm_bound
from .formats import Array, FloatFormat, first_nonfinite, nonfinite_mask
from .low_rank import LowRank
from .merge import merge_tiles, overflow_error
from .merge_block import FLOAT32_SIZE, FLOAT32_TERMS, NOTHING, PENDING_ENTRIES, BlockMerger
from .merge_entries import Index
from .merge_inputs import check_merge_inputs, check_threads
from .merge_nearness import NearnessEvaluator
from .merge_proof import evaluation_error
from .rounding import round_to
from .single_entries import single_entries
from .tiles import Position, Tile, first_position

# Where more than this share of a tile is not proven to be right, merging the next ones is faster.
_FEW = 1 / 64


@dataclass(frozen=True, eq=False)
class MergeDifferences:
    """The entries of a weight whose bits are not those of the merge.

    Attributes:
        places: (n,) where they are: indices into the flat weight, ascending.
        expected: (n,) the correctly rounded merge there, in the weight's dtype.
    """

    places: NDArray[np.intp]
    expected: Array


def merge_differences(
    W0: Array,
    adapters: Sequence[LowRank],
    merged: Array,
    *,
    fan_in_fan_out: bool = False,
    threads: int | None = None,
    name: str = "W0",
) -> MergeDifferences:
    """Return the entries in which ``merged`` has other bits than `merge_adapters` in its dtype gives.

    The same as comparing all bits, but where most entries are right these are only proven to be, which is
    faster than computing them; nothing of the weight's size is allocated.

    Args:
        W0, adapters, fan_in_fan_out, threads, name: as for `merge_adapters`.
        merged: what is held against them, of W0's shape, in any of the four dtypes, NaN and infinities
            included.

    Raises:
        DTypeError, ShapeError, NonFiniteError, ConfigError: as `merge_adapters` does; an overflow of the
            merge too. ShapeError also where ``merged`` has another shape than W0.
    """
    threads = check_threads(threads)
    inputs = check_merge_inputs(
        W0, adapters, merged.dtype, threads, name, fan_in_fan_out=fan_in_fan_out, read_W0=False
    )
    if merged.shape != inputs.W0.shape:
        raise ShapeError(
            f"merged {name}: expected shape {inputs.W0.shape}, got {merged.shape}; is it another weight?"
        )
    found: list[MergeDifferences] = []
    overflows: list[Position] = []
    for factors in inputs.ranges:
        rows = slice(factors.start, factors.stop)
        own = (slice(None), rows) if fan_in_fan_out else (rows, slice(None))
        comparers = _compare_range(
            factors.T if fan_in_fan_out else factors, inputs.W0[own], merged[own], inputs.target, threads
        )
        for comparer in comparers:
            down, right = (0, factors.start) if fan_in_fan_out else (factors.start, 0)
            overflows += [(i + down, j + right) for i, j in comparer.overflows]
            found += [
                MergeDifferences((i + down) * merged.shape[1] + j + right, expected)
                for i, j, expected in comparer.found
            ]
    if overflows:
        raise overflow_error(inputs, min(overflows), threads, name)
    if not found:
        return MergeDifferences(np.empty(0, np.intp), np.empty(0, inputs.target.dtype))
    places = np.concatenate([own.places for own in found])
    expected = np.concatenate([own.expected for own in found])
    order = np.argsort(places, kind="stable")
    return MergeDifferences(places[order], expected[order])


def _compare_range(
    factors: Factors, W0: Array, merged: Array, target: FloatFormat, threads: int
) -> "list[TileComparer]":
    """Compare one range of the weight, given as it is stored; return what found the differences."""
    comparers: list[TileComparer] = []

    def make_worker() -> Callable[[Tile], None]:
        comparers.append(TileComparer(factors, W0, merged, target))
        return comparers[-1].compare

    first_position(merge_tiles((W0.shape[0], W0.shape[1]), max(1, factors.r)), threads, make_worker)
    for comparer in comparers:
        comparer.finish()
    return comparers


class TileComparer:
    """Compares tiles of one range of rows one after the other; owns the scratch memory of one thread.

    In stages, as `BlockMerger`: all entries are tested (see `merge_nearness`), and what is not proven to be
    right is computed. Where that is much of a tile, the next ones are merged and compared.
    """

    def __init__(self, factors: Factors, W0: Array, merged: Array, target: FloatFormat) -> None:
        """Take the range of the weight that the factors update, and what it is said to become."""
        self._factors, self._W0, self._merged, self._target = factors, W0, merged, target
        self._zero = factors.is_zero
        # The interval around an entry never closes in the very format that it is computed in.
        self._near = target.precision < 53 and not self._zero
        self._float32 = target.dtype.itemsize == 2 and factors.r <= FLOAT32_TERMS
        self._panel_columns = slice(0, 0)
        self._panel = np.empty((factors.r, 0))
        self._panel_norms = np.empty(0)
        self._evaluators: dict[np.dtype[Any], NearnessEvaluator] = {}
        self._pending = [NOTHING]
        self.found: list[tuple[Index, Index, Array]] = []
        self.overflows: list[Position] = []

    def compare(self, tile: Tile) -> None:
        """Look at the entries of a tile; some may wait for `finish`."""
        if not self._near:
            self._compare_all(tile)
            return
        rows, columns = tile
        places, width = self._unproven(tile), columns.stop - columns.start
        if len(places) > _FEW * width * (rows.stop - rows.start):
            self._near = False
            self._compare_all(tile)
            return
        i, j = np.divmod(places, width)
        self._pending.append((i + rows.start, j + columns.start))
        if sum(len(i) for i, _ in self._pending) > PENDING_ENTRIES:
            self._settle_pending()

    def finish(self) -> None:
        """Look at the entries that wait."""
        self._settle_pending()

    def _settle_pending(self) -> None:
        """Compute the entries that wait, one by one."""
        if len(self._pending) == 1:
            return
        i, j = (np.concatenate(indices) for indices in zip(*self._pending, strict=True))
        self._pending = [NOTHING]
        finite = ~nonfinite_mask(self._W0[i, j])
        self._add_overflows(i[~finite], j[~finite])
        i, j = i[finite], j[finite]
        expected = single_entries(self._factors, self._W0, i, j, self._target)
        self._add_overflows(*(place[nonfinite_mask(expected)] for place in (i, j)))
        bits = self._target.bits
        apart = self._merged[i, j].view(bits) != expected.view(bits)
        self.found.append((i[apart], j[apart], expected[apart]))

    def _unproven(self, tile: Tile) -> Index:
        """Return the flat indices in the tile of what is not proven; a few rows are tested at a time, so that
        they stay in the cache."""
        self._load_panel(tile[1])
        W0, merged = self._W0[tile], self._merged[tile]
        B = self._factors.left(tile[0]) * self._factors.scalings
        norms = norm_bound(B, axis=1)
        most, column = float(norms.max()), float(self._panel_norms.max())
        largest = max(column, most, most * column)
        dtype = np.dtype(np.float32 if self._float32 and largest < FLOAT32_SIZE else np.float64)
        if dtype not in self._evaluators:
            self._evaluators[dtype] = NearnessEvaluator(self._panel, dtype, self._target)
        evaluator = self._evaluators[dtype]
        narrow = self._target.dtype.itemsize == 2
        indices = [np.empty(0, np.intp)]
        with np.errstate(all="ignore"):
            for start in range(0, len(B), evaluator.rows):
                block = slice(start, start + evaluator.rows)
                error = evaluation_error(
                    dtype, B.shape[1], norms[block].max(), self._panel_norms, through_float32=narrow
                )
                places = evaluator.unproven(W0[block], B[block], error, merged[block])
                indices.append(places + start * merged.shape[1])
        return np.concatenate(indices)

    def _load_panel(self, columns: slice) -> None:
        if columns != self._panel_columns:
            self._panel_columns = columns
            self._panel = self._factors.panel(columns)
            self._panel_norms = norm_bound(self._panel, axis=0)
            self._evaluators = {}

    def _compare_all(self, tile: Tile) -> None:
        """Merge the tile and compare all of it."""
        rows, columns = tile
        W0, merged = self._W0[tile], self._merged[tile]
        expected = np.empty(merged.shape, self._target.dtype)
        if self._zero:
            expected[...] = round_to(W0, self._target.dtype)
            first = first_nonfinite(expected)
        else:
            merger = BlockMerger(self._factors.part(rows, columns), W0, None, expected, self._target)
            merger.merge((slice(0, len(W0)), slice(0, W0.shape[1])))
            first = merger.finish()
        if first is not None:
            self.overflows.append((first[0] + rows.start, first[1] + columns.start))
        bits = self._target.bits
        i, j = np.nonzero(merged.view(bits) != expected.view(bits))
        self.found.append((i + rows.start, j + columns.start, expected[i, j]))

    def _add_overflows(self, i: Index, j: Index) -> None:
        self.overflows += zip(i.tolist(), j.tolist(), strict=True)
