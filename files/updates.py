"""What one tensor of a checkpoint becomes: a merge, or rows that are replaced, for any range of its rows."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loracle.reference import (
    DTypeError,
    LowRank,
    MergeDifferences,
    NonFiniteError,
    Precision,
    dora_merge_bound,
    expert_factors_from_peft,
    merge_adapters,
    merge_bias,
    merge_bound,
    merge_convolution,
    merge_differences,
    merge_dora,
    merge_experts,
    round_to,
)

from .lora_pair import FLOATS, LoraPair

Array = NDArray[Any]
Bound = NDArray[np.float64]

BLOCK_BYTES = 16 * 2**20
"""Bytes of float64 that the conversion of one tensor works on at a time."""


class Update(Protocol):
    """Computes rows of the tensor that takes the place of a base's."""

    def rows(self, base: Array, start: int, target: np.dtype[Any], threads: int | None, label: str) -> Array:
        """Return what ``base``, the base's rows from ``start`` on, become, rounded once to ``target``."""
        ...

    def bound(self, base: Array, start: int, precision: np.dtype[Any], target: np.dtype[Any]) -> Bound:
        """Return a bound on the distance of a merge that rounds after every operation, of the shape of
        ``base``: evaluated in ``precision``, see `merging`, and rounded to ``target`` at the end.

        Raises ConfigError where there is none.
        """
        ...


@dataclass(frozen=True, eq=False)
class Linear:
    """``W0 + scaling * B @ A`` on a weight (out, in), or on (in, out) where ``turned``."""

    pair: LoraPair
    turned: bool = False

    def rows(self, base: Array, start: int, target: np.dtype[Any], threads: int | None, label: str) -> Array:
        adapters = [self._own(start, start + len(base))]
        return merge_adapters(
            base, adapters, fan_in_fan_out=self.turned, dtype=target, threads=threads, name=label
        )

    def bound(self, base: Array, start: int, precision: np.dtype[Any], target: np.dtype[Any]) -> Bound:
        """See `Update`."""
        W0 = base.T if self.turned else base
        bound = merge_bound(W0, [self._own(start, start + len(base))], merging(precision), dtype=target)
        return bound.T if self.turned else bound

    def differences(
        self, base: Array, start: int, merged: Array, threads: int | None, label: str
    ) -> MergeDifferences:
        """Return where ``merged`` has other bits than `rows`, in its dtype, and what is right there."""
        adapters = [self._own(start, start + len(base))]
        return merge_differences(
            base, adapters, merged, fan_in_fan_out=self.turned, threads=threads, name=label
        )

    def wide(self, base: Array, start: int) -> Array:
        """Return what ``base`` becomes in plain float64, not rounded once: for a look at what is wrong."""
        own = self._own(start, start + len(base))
        delta = own.scaling * (own.B.astype(np.float64) @ own.A.astype(np.float64))
        return base.astype(np.float64) + (delta.T if self.turned else delta)

    def _own(self, start: int, stop: int) -> LowRank:
        pair = self.pair
        A, B = (pair.A[:, start:stop], pair.B) if self.turned else (pair.A, pair.B[start:stop])
        return LowRank(A, B, pair.scaling)


@dataclass(frozen=True, eq=False)
class Convolution:
    """``W0 + scaling * B @ A`` on a weight (out, in, *kernel)."""

    pair: LoraPair

    def rows(self, base: Array, start: int, target: np.dtype[Any], threads: int | None, label: str) -> Array:
        adapters = [LowRank(self.pair.A, self.pair.B[start : start + len(base)], self.pair.scaling)]
        return merge_convolution(base, adapters, dtype=target, threads=threads, name=label)

    def bound(self, base: Array, start: int, precision: np.dtype[Any], target: np.dtype[Any]) -> Bound:
        """See `Update`."""
        A, B = as_matrices(self.pair, slice(start, start + len(base)))
        adapters = [LowRank(A, B, self.pair.scaling)]
        return merge_bound(_matrix(base), adapters, merging(precision), dtype=target).reshape(base.shape)


@dataclass(frozen=True, eq=False)
class Dora:
    """``magnitude * w / ||w||``, ``w = W0 + scaling * B @ A``, on (out, in) or (out, in, *kernel)."""

    pair: LoraPair

    def rows(self, base: Array, start: int, target: np.dtype[Any], threads: int | None, label: str) -> Array:
        pair, own = self.pair, slice(start, start + len(base))
        assert pair.magnitude is not None, label
        A, B = as_matrices(pair, own)
        merged = merge_dora(
            _matrix(base),
            A,
            B,
            pair.scaling,
            pair.magnitude.reshape(-1)[own],
            dtype=target,
            threads=threads,
            name=label,
        )
        return merged.reshape(base.shape)

    def bound(self, base: Array, start: int, precision: np.dtype[Any], target: np.dtype[Any]) -> Bound:
        """See `Update`."""
        pair, own = self.pair, slice(start, start + len(base))
        assert pair.magnitude is not None
        A, B = as_matrices(pair, own)
        adapter = LowRank(A, B, pair.scaling)
        magnitude = pair.magnitude.reshape(-1)[own]
        return dora_merge_bound(_matrix(base), adapter, magnitude, merging(precision), dtype=target).reshape(
            base.shape
        )


@dataclass(frozen=True, eq=False)
class Stacked:
    """``W0[e] + scaling * B[e] @ A[e]`` on a weight (E, out, in), or on (E, in, out) where ``turned``."""

    pair: LoraPair
    experts: int
    turned: bool

    def rows(self, base: Array, start: int, target: np.dtype[Any], threads: int | None, label: str) -> Array:
        A, B = expert_factors_from_peft(self.pair.A, self.pair.B, self.experts)
        own = slice(start, start + len(base))
        adapters = [LowRank(A[own], B[own], self.pair.scaling)]
        return merge_experts(
            base, adapters, fan_in_fan_out=self.turned, dtype=target, threads=threads, name=label
        )

    def bound(self, base: Array, start: int, precision: np.dtype[Any], target: np.dtype[Any]) -> Bound:
        """See `Update`."""
        A, B = expert_factors_from_peft(self.pair.A, self.pair.B, self.experts)
        bounds = np.empty(base.shape)
        for place, matrix in enumerate(base):
            expert = start + place
            W0 = matrix.T if self.turned else matrix
            own = merge_bound(
                W0, [LowRank(A[expert], B[expert], self.pair.scaling)], merging(precision), dtype=target
            )
            bounds[place] = own.T if self.turned else own
        return bounds


@dataclass(frozen=True, eq=False)
class Bias:
    """``bias + scaling * lora_B's bias``."""

    pair: LoraPair

    def rows(self, base: Array, start: int, target: np.dtype[Any], threads: int | None, label: str) -> Array:
        assert self.pair.bias is not None, label
        own = LowRank(self.pair.A, self.pair.B, self.pair.scaling, bias=self.pair.bias)
        adapter = replace(own, bias=self.pair.bias[start : start + len(base)])
        return merge_bias(base, [adapter], dtype=target, name=label)

    def bound(self, base: Array, start: int, precision: np.dtype[Any], target: np.dtype[Any]) -> Bound:
        """See `Update`."""
        assert self.pair.bias is not None
        B = self.pair.bias[start : start + len(base), None]
        adapter = LowRank(np.ones((1, 1), B.dtype), B, self.pair.scaling)
        return merge_bound(base[:, None], [adapter], merging(precision), dtype=target)[:, 0]


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The rows of the trained tokens, in the place of the base's."""

    indices: tuple[int, ...]
    values: Array

    def rows(self, base: Array, start: int, target: np.dtype[Any], threads: int | None, label: str) -> Array:
        merged = np.array(convert(base, target, label))
        own = [(row, token - start) for row, token in enumerate(self.indices)]
        own = [(row, place) for row, place in own if 0 <= place < len(base)]
        for row, place in own:
            merged[place] = convert(self.values[row], target, f"{label}, row {start + place}")
        return merged

    def bound(self, base: Array, start: int, precision: np.dtype[Any], target: np.dtype[Any]) -> Bound:
        """See `Update`: nothing is computed, but rows may be converted by way of ``precision``."""
        exact = self.rows(base, start, np.dtype(np.float64), None, "rows")
        return conversion_bound(exact, precision, target)


def merging(dtype: np.dtype[Any]) -> Precision:
    """Return the precision of a merge in a dtype: of 16 bits, products are summed in float32 by every library
    and device that trains in it, and then rounded."""
    return Precision(dtype, accumulator=np.float32 if dtype.itemsize == 2 else None)


def conversion_bound(exact: Array, precision: np.dtype[Any], target: np.dtype[Any]) -> Bound:
    """Return how far numbers move that are rounded to ``precision`` and then to ``target``."""
    size = np.abs(exact.astype(np.float64))
    bound: Bound = np.zeros(size.shape)
    for dtype in (precision, target):
        info = ml_dtypes.finfo(dtype)
        bound += float(info.eps) / 2 * (size + bound) + float(info.smallest_subnormal)
    return bound


def as_matrices(pair: LoraPair, rows: slice) -> tuple[Array, Array]:
    """Return A (r, in) and the rows of B (out, r), each kernel's taps in one row of A."""
    return pair.A.reshape(len(pair.A), -1), pair.B.reshape(len(pair.B), -1)[rows]


def _matrix(base: Array) -> Array:
    return base.reshape(len(base), -1)


def convert(base: Array, target: np.dtype[Any], label: str) -> Array:
    """Return ``base`` in another floating-point dtype, each entry rounded once; itself in its own dtype.

    Raises:
        DTypeError: either dtype is none of float16, bfloat16, float32 and float64.
        NonFiniteError: a finite value becomes infinite.
    """
    if base.dtype == target:
        return base
    if base.dtype not in FLOATS or target not in FLOATS:
        raise DTypeError(
            f"{label}: cannot be converted from {base.dtype} to {target}; leave its dtype as it is"
        )
    result = np.empty(base.shape, target)
    source, sink = base.reshape(-1), result.reshape(-1)
    step = BLOCK_BYTES // 8
    for start in range(0, source.size, step):
        block = source[start : start + step]
        rounded = round_to(block, target)
        overflown = np.isinf(rounded) & np.isfinite(block)
        if overflown.any():
            index = np.unravel_index(start + int(overflown.argmax()), base.shape)
            value = float(block[int(overflown.argmax())])
            raise NonFiniteError(
                f"{label}: {value} at {tuple(map(int, index))} overflows {target}; choose a wider dtype"
            )
        sink[start : start + step] = rounded
    return result


def same_bits(one: Array, other: Array) -> bool:
    """Tell whether two arrays have the same dtype, shape and bits, a block at a time."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return all(
        np.array_equal(a[start : start + BLOCK_BYTES], b[start : start + BLOCK_BYTES])
        for start in range(0, len(a), BLOCK_BYTES)
    )
