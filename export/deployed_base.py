"""What every task of a deployment shares with the base: the tensors that its adapter leaves alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from loracle.reference import FileError

from .names import GRAPH_FILE
from .template import GraphTemplate
from .verification.weight_check import compare_tensor
from .write import BoundTensors, refer, stored

NO_DIGEST = "0" * 64
"""As long as any SHA-256, for where one comes to stand."""

UNDER_WAY = "task"
"""What files under way are named after: whatever a killed process leaves, the next task removes."""


def split(template: GraphTemplate, tensors: BoundTensors) -> tuple[list[ir.Value], list[ir.Value]]:
    """The stored initializers that the adapter changes, and the others."""
    merged = frozenset(tensors.source.merged_names)
    own: list[ir.Value] = []
    shared: list[ir.Value] = []
    for value in stored(template):
        changed = any(tensors.found[weight] in merged for weight in tensors.weights(str(value.name)))
        (own if changed else shared).append(value)
    return own, shared


def share(shared: Sequence[ir.Value], base: ir.Model, deployment: Path, tensors: BoundTensors) -> None:
    """Let each of `shared` be what lies in the base's data file, which must be the same bits.

    Raises FileError where it is not: the deployment's base is another model's.
    """
    for value in shared:
        name = str(value.name)
        tensor = base_tensor(value, base, deployment)
        got = tensor.numpy()
        for part, held in tensors.parts(name, got).items():
            difference = compare_tensor(part, held, tensors.tensor(part))
            if difference is not None:
                raise _another(deployment, str(difference))
        del got, held  # they are views of the mapped file
        tensor.release()
        tensors.release(name)
        refer(value, str(tensor.location), int(tensor.offset or 0), deployment)


def entry_of(value: ir.Value) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    """Name, dtype and shape of an initializer."""
    assert value.shape is not None
    assert value.dtype is not None
    return str(value.name), value.dtype.numpy(), tuple(int(size) for size in value.shape.numpy())


def base_tensor(value: ir.Value, base: ir.Model, deployment: Path) -> ir.ExternalTensor:
    """What the base holds in the place of an initializer; no byte of it is read.

    Raises FileError where that is nothing, or has another shape or dtype.
    """
    name, dtype, shape = entry_of(value)
    held = base.graph.initializers.get(name)
    tensor = None if held is None else held.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        raise _another(deployment, f"expected {name} in its data file, found none")
    if (tuple(tensor.shape.numpy()), tensor.dtype.numpy()) != (shape, dtype):
        raise _another(
            deployment,
            f"{name}: expected shape {shape} in {dtype}, got {tuple(tensor.shape.numpy())} in "
            f"{tensor.dtype.numpy()}",
        )
    return tensor


def _another(deployment: Path, difference: str) -> FileError:
    return FileError(
        f"{deployment / GRAPH_FILE}: {difference}; the deployment's base is another model, or in another "
        "--dtype; choose another --out"
    )


class Hashing:
    """A file, and the SHA-256 of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        """Write bytes."""
        self._digest.update(data)
        return self._file.write(data)

    def hexdigest(self) -> str:
        """The SHA-256 so far."""
        return self._digest.hexdigest()
