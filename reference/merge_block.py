"""The tiles of a merge in floating point, with a proof for each entry that its rounding is the correct
one.
"""

import math
from typing import Any

import numpy as np

from .error_free import Float64
from .factors import Factors, norm_bound
from .formats import Array, FloatFormat, largest_magnitude, nonfinite_mask
from .merge_entries import Index
from .merge_interval import IntervalEvaluator
from .merge_proof import evaluation_error
from .single_entries import single_entries
from .tiles import Position, Tile

NOTHING: tuple[Index, Index] = (np.empty(0, np.intp), np.empty(0, np.intp))

# Entries that are left wait until there are this many: computing them costs calls, not entries.
PENDING_ENTRIES = 1 << 13
# Beyond these, float32 is left for float64: too many terms for its bound, or too near the end of its range.
FLOAT32_TERMS = 1 << 10
FLOAT32_SIZE = 2.0**120
# Where float32 leaves more than this share of a tile uncertain, float64 is faster.
_FLOAT32_SHARE = 1 / 128


class BlockMerger:
    """Merges tiles of one range of rows one after the other; owns the scratch memory of one thread.

    In stages, each for the entries that the one before it did not prove right (see `merge_proof`): all
    entries in floating point, in float32 for a 16-bit target and in float64 for float32; then, when some have
    gathered or with `finish`, single entries, for a 16-bit target in float64, and `merged_entries`. Each
    gives the correct rounding or none, so which of them an entry goes through cannot be seen in the result.
    """

    def __init__(
        self, factors: Factors, W0: Array, largest: float | None, out: Array, target: FloatFormat
    ) -> None:
        """Take the range of the weight that the factors update, and where to write.

        ``largest`` is the largest magnitude in the weight; None where it is not known yet, not even to be
        finite.
        """
        self._factors, self._W0, self._largest = factors, W0, largest
        self._out, self._target = out, target
        self._narrow = target.dtype.itemsize == 2
        self._float32 = self._narrow and factors.r <= FLOAT32_TERMS
        self._panel_columns = slice(0, 0)
        self._panel = np.empty((factors.r, 0))
        self._panel_norm = 0.0
        self._evaluators: dict[np.dtype[Any], IntervalEvaluator] = {}
        self._pending = [NOTHING]
        self._overflows: list[Position] = []

    def merge(self, tile: Tile) -> None:
        """Write the tile, but for entries that wait for `finish`, and not where the weight is not finite."""
        rows, columns = tile
        largest = largest_magnitude(self._W0[tile]) if self._largest is None else self._largest
        if not math.isfinite(largest):
            self._overflows.append((rows.start, columns.start))
            return
        if self._target.precision == 53:
            # The ends never round to one number in the very format that they are computed in.
            uncertain = np.arange((rows.stop - rows.start) * (columns.stop - columns.start))
        else:
            self._load_panel(columns)
            with np.errstate(all="ignore"):
                B = self._factors.left(rows) * self._factors.scalings
                uncertain = self._round_certain(self._W0[tile], B, largest, self._out[tile])
        i, j = np.divmod(uncertain, columns.stop - columns.start)
        self._pending.append((i + rows.start, j + columns.start))
        if sum(len(i) for i, _ in self._pending) > PENDING_ENTRIES:
            self._settle_pending()

    def finish(self) -> Position | None:
        """Write the entries that wait; return where in the range the first of all overflows, or None.

        A tile whose weight is not finite counts as an overflow at its first entry.
        """
        self._settle_pending()
        return min(self._overflows, default=None)

    def _load_panel(self, columns: slice) -> None:
        if columns != self._panel_columns:
            self._panel_columns = columns
            self._panel = self._factors.panel(columns)
            self._panel_norm = float(norm_bound(self._panel, axis=0).max())
            self._evaluators = {}

    def _round_certain(self, W0: Array, B: Float64, largest: float, out: Array) -> Index:
        """Round W0 + B @ panel into ``out``; return the flat indices of what is not proven right."""
        norms = norm_bound(B, axis=1)
        most = float(norms.max())
        if max(largest, self._panel_norm, most, most * self._panel_norm) >= FLOAT32_SIZE or not self._float32:
            return self._round_all(W0, B, norms, largest, out, np.dtype(np.float64))
        uncertain = self._round_all(W0, B, norms, largest, out, np.dtype(np.float32))
        self._float32 = len(uncertain) <= _FLOAT32_SHARE * out.size
        return uncertain

    def _round_all(
        self, W0: Array, B: Float64, norms: Float64, largest: float, out: Array, dtype: np.dtype[Any]
    ) -> Index:
        """Evaluate all entries in ``dtype``, a few rows at a time so that they stay in the cache."""
        evaluator = self._evaluators.get(dtype)
        if evaluator is None:
            evaluator = self._evaluators[dtype] = IntervalEvaluator(self._panel, dtype, self._target)
        error = evaluation_error(dtype, B.shape[1], norms, self._panel_norm, through_float32=self._narrow)
        bits, indices = self._target.bits, [NOTHING[0]]
        for start in range(0, len(B), evaluator.rows):
            block = slice(start, start + evaluator.rows)
            result, absolute = out[block], float(error.absolute[block].max())
            most = largest + float(norms[block].max()) * self._panel_norm
            other = evaluator.round_ends(W0[block], B[block], error.relative, absolute, most, result)
            uncertain = result.view(bits) != other.view(bits)
            if not most < self._target.largest / 2:
                uncertain |= nonfinite_mask(result)
            if uncertain.any():
                indices.append(np.flatnonzero(uncertain) + start * out.shape[1])
        return np.concatenate(indices)

    def _settle_pending(self) -> None:
        """Compute the entries that wait, one by one."""
        i, j = (np.concatenate(indices) for indices in zip(*self._pending, strict=True))
        self._pending = [NOTHING]
        entries = single_entries(self._factors, self._W0, i, j, self._target)
        self._out[i, j] = entries
        overflows = np.flatnonzero(nonfinite_mask(entries))
        self._overflows += zip(i[overflows].tolist(), j[overflows].tolist(), strict=True)
