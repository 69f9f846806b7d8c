"""The signatures of a model's weights: what they are without the adapter, and merged with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from loracle.files.adapter import FLOATS

from ..matching import WeightSource
from .content_signature import Signature, as_signature, matrix_shape, sampled, signature, similarity

Array = np.ndarray[Any, Any]
Shape = tuple[int, int]

_MERGED = 0.75
"""The least similarity to a merged matrix that counts: an update that is turned round, and one and a half
times as large as the weight, has less in common with it."""


@dataclass(frozen=True, eq=False)
class Group:
    """Weights that are matrices of one shape.

    Attributes:
        shape: (rows, columns).
        names: in the order of the model's layers.
        variants: (n, k) each, the signatures of what each of the n weights may be: the base's, and merged.
    """

    shape: Shape
    names: tuple[str, ...]
    variants: tuple[Array, ...]

    @property
    def entries(self) -> int:
        """Of a signature."""
        return int(self.variants[0].shape[1])

    def similarity(self, found: Array, weights: Array | slice = slice(None)) -> Array:
        """Return (m, n): how like each row of `found` (m, k) is to each of the n weights, at best.

        Of a matrix's transpose a merged weight may have its update in common: it counts where that is not
        enough.
        """
        best, *others = (similarity(found, variant[weights]) for variant in self.variants)
        for merged in others:
            counts = (merged >= _MERGED) | (self.shape[1] == 1)
            np.maximum(best, merged, out=best, where=counts)
        return best

    @cached_property
    def twins(self) -> Array:
        """Return (n,): for each weight the first of those with its signatures."""
        whole = np.ascontiguousarray(np.concatenate(self.variants, axis=1))
        first: dict[bytes, int] = {}
        return np.array([first.setdefault(row.tobytes(), index) for index, row in enumerate(whole)])


def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """The key that sorts `layers.2` before `layers.10`."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,9})", name))


def weight_groups(weights: WeightSource) -> dict[Shape, Group]:
    """Return all weights in floating point by the shapes of their matrices.

    Of the base a few entries are read; where an adapter changes a weight a few of its rows are merged.
    """
    merged = frozenset(weights.merged_names)
    found: dict[Shape, list[tuple[str, Signature, Signature]]] = {}
    for name in sorted(weights.names, key=natural_order):
        shape = weights.shape(name)
        base = weights.base_tensor(name)
        if base is None or base.shape != shape:
            base = weights.tensor(name)
        if base.dtype in FLOATS and base.size:
            own = signature(base.reshape(matrix_shape(shape)))
            after = _merged_signature(weights, name, base.dtype) if name in merged else own
            found.setdefault(matrix_shape(shape), []).append((name, own, after))
        weights.release(name)
    return {shape: _group(shape, rows) for shape, rows in found.items()}


def array_groups(arrays: Mapping[str, Array], convert: Callable[[Array], Array]) -> dict[Shape, Group]:
    """Return arrays by the shapes of their matrices; `convert` is applied to their signatures (1, k)."""
    found: dict[Shape, list[tuple[str, Signature, Signature]]] = {}
    for name in sorted(arrays, key=natural_order):
        shape = matrix_shape(arrays[name].shape)
        own = convert(signature(arrays[name].reshape(shape))[None])[0]
        found.setdefault(shape, []).append((name, own, own))
    return {shape: _group(shape, rows) for shape, rows in found.items()}


def _group(shape: Shape, rows: Iterable[tuple[str, Signature, Signature]]) -> Group:
    names, own, after = zip(*rows, strict=True)
    first, second = np.stack(own), np.stack(after)
    variants = (first,) if np.array_equal(first, second) else (first, second)
    return Group(shape, names, variants)


def _merged_signature(weights: WeightSource, name: str, dtype: np.dtype[Any]) -> Signature:
    shape = weights.shape(name)
    rows, columns = sampled(*matrix_shape(shape))
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    if shape[:1] != matrix_shape(shape)[:1]:
        return signature(weights.tensor(name, wide).reshape(matrix_shape(shape)))
    parts = [
        weights.rows(name, start, stop, wide).reshape(stop - start, -1)[:, columns]
        for start, stop in _runs(rows)
    ]
    return as_signature(np.concatenate(parts))


def _runs(indices: Array) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive indices."""
    ends = np.flatnonzero(np.diff(indices) > 1)
    for first, last in zip([0, *(ends + 1)], [*ends, len(indices) - 1], strict=True):
        yield int(indices[first]), int(indices[last]) + 1
