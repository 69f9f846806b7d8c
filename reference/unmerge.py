"""Taking low-rank updates out of a merged weight, bit for bit, without a second copy of the weight."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import DTypeError, ShapeError
from .formats import Array, float_format
from .low_rank import LowRank
from .merge import merge_adapters
from .tiles import tiles

_PIECE_ENTRIES = 1 << 20


@dataclass(frozen=True, eq=False)
class UnmergeRecord:
    """What subtracting the update does not restore: flat positions, and W0's numbers there.

    A merge rounds, so some numbers of W0 cannot be had back from the merged weight alone. Both the merge and
    the subtraction are correctly rounded, hence the same on every machine, and so the record holds anywhere.
    """

    shape: tuple[int, ...]
    positions: NDArray[np.int64]
    values: Array

    @property
    def nbytes(self) -> int:
        """The memory that the record takes, in bytes."""
        return self.positions.nbytes + self.values.nbytes


def unmerge_record(
    W0: Array,
    merged: Array,
    adapters: Sequence[LowRank],
    *,
    fan_in_fan_out: bool = False,
    threads: int | None = None,
    name: str = "W0",
) -> UnmergeRecord:
    """Return what `unmerge` needs to make W0 of the merged weight again.

    Args:
        W0, merged: (out, in), or (in, out) with ``fan_in_fan_out``, of one dtype; ``merged`` is the result of
            `merge_adapters` for these adapters.

    Raises:
        ShapeError, DTypeError: ``merged`` is not as W0. Others as `merge_adapters`.
    """
    _check_alike(W0, merged, name)
    near = _subtracted(merged, adapters, fan_in_fan_out, threads, name)
    bits = float_format(W0.dtype).bits
    positions: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for rows, columns in tiles((W0.shape[0], W0.shape[1]), _PIECE_ENTRIES, W0.shape[1]):
        given = np.ascontiguousarray(W0[rows, columns])
        differs = near[rows, columns].view(bits) != given.view(bits)
        positions.append(np.flatnonzero(differs) + rows.start * W0.shape[1])
    found = np.concatenate(positions)
    return UnmergeRecord(W0.shape, found, W0[np.unravel_index(found, W0.shape)])


def unmerge(
    merged: Array,
    adapters: Sequence[LowRank],
    record: UnmergeRecord,
    *,
    fan_in_fan_out: bool = False,
    threads: int | None = None,
    name: str = "W0",
) -> Array:
    """Return W0, bit for bit: ``merged`` minus the updates, and the record's numbers in their place.

    Args: as for `unmerge_record`, with the same adapters.

    Raises:
        ShapeError, DTypeError: the record is of another weight. Others as `merge_adapters`.
    """
    if record.shape != merged.shape:
        raise ShapeError(
            f"record of {name}: expected shape {merged.shape}, got {record.shape}; find its own record"
        )
    if record.values.dtype != merged.dtype:
        raise DTypeError(
            f"record of {name}: expected {merged.dtype}, got {record.values.dtype}; find its own record"
        )
    W0 = _subtracted(merged, adapters, fan_in_fan_out, threads, name)
    W0[np.unravel_index(record.positions, W0.shape)] = record.values
    return W0


def _subtracted(
    merged: Array, adapters: Sequence[LowRank], fan_in_fan_out: bool, threads: int | None, name: str
) -> Array:
    """Return the merged weight minus the updates, rounded once."""
    turned = [replace(adapter, scaling=-adapter.scaling) for adapter in adapters]
    return merge_adapters(merged, turned, fan_in_fan_out=fan_in_fan_out, threads=threads, name=name)


def _check_alike(W0: Array, merged: Array, name: str) -> None:
    if merged.shape != W0.shape:
        raise ShapeError(f"merged {name}: expected shape {W0.shape}, got {merged.shape}; merge this W0")
    if merged.dtype != W0.dtype:
        raise DTypeError(f"merged {name}: expected {W0.dtype}, got {merged.dtype}; merge to W0's own dtype")
