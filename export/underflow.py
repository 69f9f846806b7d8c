"""What float16 takes away from small weights: entries that become zero, and entries that lose precision."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from loracle.files import MergedWeights

Array = np.ndarray[Any, Any]

_BLOCK = 1 << 20
_FLOAT16_EXPONENT = 0x7C00


@dataclass(frozen=True)
class Underflow:
    """Entries of weights below 2^-14, the smallest normal number of float16, after their rounding to it.

    Attributes:
        zeros: entries that are zero, and were not in the checkpoint, or in what the adapter brings whole.
        zeroed_tensors: weights that have such entries.
        subnormals: entries that are not zero: they have less than 11 significant bits.
    """

    zeros: int = 0
    zeroed_tensors: int = 0
    subnormals: int = 0


class CountedWeights:
    """Merged weights whose small entries are counted when they are read in float16, as `MergedWeights`.

    A tensor is looked at when it has just been computed; nothing is read a second time for it, but blocks of
    the checkpoint that become zero somewhere.
    """

    def __init__(self, weights: MergedWeights) -> None:
        self._weights = weights
        # (name, first row) -> zeros and subnormal numbers among the rows read at once
        self._counts: dict[tuple[str, int], tuple[int, int]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return self._weights.names

    @property
    def merged_names(self) -> Collection[str]:
        return self._weights.merged_names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def tensor(self, name: str, dtype: Any = None) -> Array:
        tensor: Array = self._weights.tensor(name, dtype)
        if tensor.dtype == np.float16:
            self._counts[name, 0] = _count(tensor, self._weights.start(name))
        return tensor

    def rows(self, name: str, start: int, stop: int, dtype: Any = None) -> Array:
        rows: Array = self._weights.rows(name, start, stop, dtype)
        if rows.dtype == np.float16:
            self._counts[name, start] = _count(rows, self._weights.start(name)[start:stop])
        return rows

    def base_tensor(self, name: str, dtype: Any = None) -> Array | None:
        return self._weights.base_tensor(name, dtype)

    def release(self, name: str) -> None:
        self._weights.release(name)

    def underflow(self) -> Underflow:
        """The sums over all tensors read so far."""
        zeroed = {name for (name, _), (zeros, _) in self._counts.items() if zeros}
        counts = self._counts.values()
        return Underflow(sum(zeros for zeros, _ in counts), len(zeroed), sum(small for _, small in counts))


def _count(tensor: Array, start: Array) -> tuple[int, int]:
    """Entries of a float16 tensor that are zero and are not in `start`, and those that are subnormal."""
    if start.dtype == np.float16 and np.may_share_memory(tensor, start):
        return 0, 0
    bits, before = _bits(tensor), _bits(start)
    zeros = subnormals = 0
    for at in range(0, bits.size, _BLOCK):
        block = bits[at : at + _BLOCK]
        small = int(np.count_nonzero((block & _FLOAT16_EXPONENT) == 0))
        if small == 0:
            continue
        zero = (block << 1) == 0
        subnormals += small - int(np.count_nonzero(zero))
        zeros += int(np.count_nonzero(zero & ((before[at : at + _BLOCK] << 1) != 0)))
    return zeros, subnormals


def _bits(array: Array) -> Array:
    """The entries' bits, flat; shifted left by one, a floating-point zero of either sign is 0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.dtype(f"u{array.dtype.itemsize}"))
