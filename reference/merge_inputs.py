"""What a merge asks of its arguments, checked before anything is computed or written."""

import math
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from .errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from .formats import Array, FloatFormat, first_nonfinite, float_format, largest_magnitude
from .tiles import Tile, first_position, tiles

MAX_THREADS = 8
_CHECKED_ENTRIES = 1 << 17


@dataclass(frozen=True, eq=False)
class MergeInputs:
    """Arguments of a merge that fit together: W0 (out, in), A (r, in), B (out, r), finite, of known
    dtypes."""

    W0: Array
    A: Array
    B: Array
    scaling: float
    target: FloatFormat
    update_is_zero: bool


def check_merge_inputs(
    W0: Array, A: Array, B: Array, scaling: float, dtype: DTypeLike | None, name: str
) -> MergeInputs:
    """Return the arguments as `MergeInputs`; reads every tensor once.

    Raises:
        DTypeError, ShapeError, NonFiniteError: naming the tensor, what was expected and what came.
    """
    A_name, B_name = f"lora_A of {name}", f"lora_B of {name}"
    tensors = {name: np.asarray(W0), A_name: np.asarray(A), B_name: np.asarray(B)}
    for tensor_name, tensor in tensors.items():
        float_format(tensor.dtype, tensor_name)
        if tensor.ndim != 2:
            raise ShapeError(f"{tensor_name}: expected a matrix, got shape {tensor.shape}; give it two axes")
    W0, A, B = tensors.values()
    (out_features, in_features), r = W0.shape, A.shape[0]
    remedy = "is the adapter for another model, or stored transposed?"
    if r < 1 or A.shape[1] != in_features:
        fit = f"(r, {in_features}) with r at least 1 to fit {name} {W0.shape}"
        raise ShapeError(f"{A_name}: expected {fit}, got {A.shape}; {remedy}")
    if B.shape != (out_features, r):
        fit = f"{(out_features, r)} to fit {name} {W0.shape} and lora_A {A.shape}"
        raise ShapeError(f"{B_name}: expected {fit}, got {B.shape}; {remedy}")
    scaling = float(scaling)
    if not math.isfinite(scaling):
        raise NonFiniteError(f"scaling of {name}: expected a finite number, got {scaling}; check lora_alpha")
    target = float_format(W0.dtype if dtype is None else dtype, f"dtype of the merged {name}")
    for tensor_name, tensor in tensors.items():
        _check_finite(tensor, tensor_name)
    return MergeInputs(W0, A, B, scaling, target, scaling == 0 or _is_zero(A) or _is_zero(B))


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
    if any(np.may_share_memory(out, tensor) for tensor in (inputs.W0, inputs.A, inputs.B)):
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


def _check_finite(matrix: Array, name: str) -> None:
    # One thread is enough: it is bound by memory, and takes a tenth of the merge.
    position = first_position(_pieces(matrix), 1, lambda: lambda tile: first_nonfinite(matrix[tile]))
    if position is not None:
        value = float(matrix[position])
        raise NonFiniteError(
            f"{name}: expected finite numbers, got {value} at {list(position)}; fetch it again"
        )


def _is_zero(matrix: Array) -> bool:
    return all(largest_magnitude(matrix[tile]) == 0 for tile in _pieces(matrix))


def _pieces(matrix: Array) -> list[Tile]:
    return tiles((matrix.shape[0], matrix.shape[1]), _CHECKED_ENTRIES, _CHECKED_ENTRIES)
