"""Whether every weight of a candidate is bit for bit the correctly rounded merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..write import BoundTensors, Progress
from .ulps import bits

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not what it should be: `entries` of `total` differ, the first at `index`."""

    name: str
    entries: int
    total: int
    index: tuple[int, ...]
    expected: float
    got: float
    note: str

    def __str__(self) -> str:
        where = ",".join(map(str, self.index))
        return (
            f"{self.name}: {self.entries} of {self.total} entries differ, first [{where}]: "
            f"expected {self.expected!r}, got {self.got!r}{self.note}"
        )


def compare_tensor(
    name: str,
    got: np.ndarray[Any, Any],
    expected: np.ndarray[Any, Any],
    base: Callable[[], np.ndarray[Any, Any] | None] | None = None,
) -> TensorDifference | None:
    """None where the bits agree. `base`, for a merged tensor, gives the tensor without the adapter, or None
    where the base has none: a candidate equal to it says that nothing was merged."""
    ours, theirs = bits(got), bits(expected)
    step = _BLOCK_BYTES // ours.dtype.itemsize
    entries, first = 0, -1
    for start in range(0, ours.size, step):
        unequal = ours[start : start + step] != theirs[start : start + step]
        count = int(np.count_nonzero(unequal))
        if count and first < 0:
            first = start + int(unequal.argmax())
        entries += count
    if entries == 0:
        return None
    index = tuple(int(i) for i in np.unravel_index(first, expected.shape))
    note = ""
    without = None if base is None else base()
    if without is not None and np.array_equal(ours, bits(without)):
        note = "; it is the base's, bit for bit: the adapter was not merged into it"
    return TensorDifference(
        name, entries, expected.size, index, float(expected[index]), float(got[index]), note
    )


def compare_computed(
    tensors: BoundTensors, candidate: Mapping[str, np.ndarray[Any, Any]], progress: Progress | None = None
) -> list[TensorDifference]:
    """Compare what is computed of weights, initializer after initializer, in the order of `candidate`.

    Args:
        tensors: the merged model's.
        candidate: the initializers to compare.
    """
    merged = frozenset(tensors.source.merged_names)
    found = []
    for done, (name, got) in enumerate(candidate.items(), 1):
        changed = any(tensors.found[weight] in merged for weight in tensors.weights(name))
        without = (lambda name=name: tensors.base_tensor(name)) if changed else None
        difference = compare_tensor(name, got, tensors.tensor(name), without)
        if difference is not None:
            found.append(difference)
        tensors.release(name)
        if progress is not None:
            progress(done, len(candidate))
    return found
