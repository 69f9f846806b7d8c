"""What a merge asks of its arguments, checked before anything is computed or written."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import DTypeLike

from .errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from .factors import Factors, row_ranges
from .formats import Array, FloatFormat, first_nonfinite, float_format, largest_magnitude
from .linear_shapes import adapter_suffix, rows_of
from .low_rank import LowRank
from .tiles import Tile, first_position, tiles

MAX_THREADS = 8
_CHECKED_ENTRIES = 1 << 17


@dataclass(frozen=True, eq=False)
class MergeInputs:
    """Arguments of a merge that fit together: W0 as stored and what is added to each range of its outputs.

    All are of known dtypes, and finite; ``largest`` is the largest magnitude in W0. Where it is None, W0 has
    not been read yet and may hold anything.
    """

    W0: Array
    ranges: tuple[Factors, ...]
    target: FloatFormat
    largest: float | None


def check_merge_inputs(
    W0: Array,
    adapters: Sequence[LowRank],
    dtype: DTypeLike | None,
    threads: int,
    name: str,
    *,
    fan_in_fan_out: bool = False,
    read_W0: bool = True,
) -> MergeInputs:
    """Return the arguments as `MergeInputs`; dropout and lora_B's bias play no part.

    Every tensor is read once, W0 only if ``read_W0``.

    Raises:
        DTypeError, ShapeError, NonFiniteError, ConfigError: naming the tensor, what was expected and what
        came.
    """
    W0 = np.asarray(W0)
    _check_matrix(W0, name)
    checked = [
        _check_adapter(W0.T if fan_in_fan_out else W0, adapter, name, adapter_suffix(number, adapters))
        for number, adapter in enumerate(adapters)
    ]
    target = float_format(W0.dtype if dtype is None else dtype, f"dtype of the merged {name}")
    largest = check_finite(W0, name, threads) if read_W0 else None
    for number, adapter in enumerate(checked):
        suffix = adapter_suffix(number, adapters)
        check_finite(adapter.A, f"lora_A{suffix} of {name}", 1)
        check_finite(adapter.B, f"lora_B{suffix} of {name}", 1)
    ranges = row_ranges(W0.shape[1 if fan_in_fan_out else 0], checked)
    return MergeInputs(W0, tuple(ranges), target, largest)


def _check_adapter(W0: Array, adapter: LowRank, name: str, suffix: str) -> LowRank:
    """Return the adapter with arrays for tensors, once they fit W0."""
    A, B = np.asarray(adapter.A), np.asarray(adapter.B)
    A_name, B_name = f"lora_A{suffix} of {name}", f"lora_B{suffix} of {name}"
    _check_matrix(A, A_name)
    _check_matrix(B, B_name)
    in_features, r = W0.shape[1], A.shape[0]
    remedy = "is the adapter for another model, or stored transposed?"
    if r < 1 or A.shape[1] != in_features:
        fit = f"(r, {in_features}) with r at least 1 to fit {name} {W0.shape}"
        raise ShapeError(f"{A_name}: expected {fit}, got {A.shape}; {remedy}")
    expected = (rows_of(adapter, W0.shape[0], f"{suffix} of {name}"), r)
    if B.shape != expected:
        fit = f"{expected} to fit {name} {W0.shape} and lora_A {A.shape}"
        raise ShapeError(f"{B_name}: expected {fit}, got {B.shape}; {remedy}")
    scaling = float(adapter.scaling)
    if not math.isfinite(scaling):
        raise NonFiniteError(
            f"scaling{suffix} of {name}: expected a finite number, got {scaling}; check lora_alpha"
        )
    return replace(adapter, A=A, B=B, scaling=scaling)


def check_out(out: Array, inputs: MergeInputs, name: str) -> None:
    """Check that ``out`` can take the result.

    Raises:
        DTypeError, ShapeError: it has another dtype or shape.
        ConfigError: it is read-only, or overlaps an input that is still to be read.
    """
    name = f"out of {name}"
    dtype, shape = inputs.target.dtype, inputs.W0.shape
    if out.dtype != dtype:
        raise DTypeError(f"{name}: expected {dtype}, got {out.dtype}; allocate it in that dtype")
    if out.shape != shape:
        raise ShapeError(f"{name}: expected shape {shape}, got {out.shape}; allocate it in that shape")
    if not out.flags.writeable:
        raise ConfigError(f"{name}: expected a writable array, got a read-only one; pass a writable one")
    factors = (tensor for own in inputs.ranges for A, B, _ in own.groups for tensor in (A, B))
    if any(np.may_share_memory(out, tensor) for tensor in (inputs.W0, *factors)):
        raise ConfigError(f"{name}: expected memory of its own, got an input's; pass a new array")


def check_threads(threads: int | None) -> int:
    """Return how many threads to use: ``threads``, or one per CPU that this process may run on; at most 8.

    Raises:
        ConfigError: ``threads`` is less than 1.
    """
    if threads is None:
        affinity = getattr(os, "sched_getaffinity", None)
        threads = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    if threads < 1:
        raise ConfigError(f"threads: expected at least 1, got {threads}; leave it out to use every CPU")
    return min(threads, MAX_THREADS)


def _check_matrix(tensor: Array, name: str) -> None:
    float_format(tensor.dtype, name)
    if tensor.ndim != 2:
        raise ShapeError(f"{name}: expected a matrix, got shape {tensor.shape}; give it two axes")


def check_finite(matrix: Array, name: str, threads: int) -> float:
    """Return the largest magnitude of the matrix, once it is known to be finite.

    Raises:
        NonFiniteError: naming the first NaN or infinity, in the order of rows.
    """
    largest: list[float] = []

    def check(tile: Tile) -> tuple[int, int] | None:
        magnitude = largest_magnitude(matrix[tile])
        largest.append(magnitude)
        return None if math.isfinite(magnitude) else first_nonfinite(matrix[tile])

    pieces = tiles((matrix.shape[0], matrix.shape[1]), _CHECKED_ENTRIES, _CHECKED_ENTRIES)
    position = first_position(pieces, threads, lambda: check)
    if position is not None:
        value = float(matrix[position])
        raise NonFiniteError(
            f"{name}: expected finite numbers, got {value} at {list(position)}; fetch it again"
        )
    return max(largest, default=0.0)
