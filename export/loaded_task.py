"""A task's merged tensors in memory: mapped from its file, and bound as they lie there.

Needs onnxruntime and NumPy alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from loracle.files.safetensors_file import SafetensorsFile
from loracle.reference import FileError

from .adapter_file import AdapterFile
from .names import ADAPTER_SUFFIX

Array = np.ndarray[Any, Any]
Signature = tuple[int, ...]


@dataclass(frozen=True)
class LoadedTask:
    """The tensors of one task.

    Attributes:
        weights: what a session is given, by the names of its inputs. Each value keeps its memory.
        nbytes: of all of them.
        signature: tells whether the task's file is still the one that was loaded; empty for what was merged.
    """

    weights: Mapping[str, onnxruntime.OrtValue]
    nbytes: int
    signature: Signature = ()


def signature_of(path: Path) -> Signature | None:
    """What changes when another file takes the place of this one; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def map_task(path: Path, signature: Signature, device: str) -> LoadedTask:
    """Map a task's file; on a CPU no byte is copied.

    Raises FileError: it is missing, or neither a safetensors nor an adapter file.
    """
    if path.suffix == ADAPTER_SUFFIX:
        return load_task(AdapterFile(path).tensors, device, signature)
    file = SafetensorsFile(path)
    for name, entry in file.entries.items():
        if entry.dtype.isbuiltin != 1:
            raise FileError(
                f"{path}: {name}: expected a dtype that onnxruntime takes from NumPy, got {entry.dtype}; add "
                "the task again"
            )
    return load_task({name: file.tensor(name) for name in file.entries}, device, signature)


def load_task(tensors: Mapping[str, Array], device: str, signature: Signature = ()) -> LoadedTask:
    """Tensors as a session takes them; on a CPU no byte is copied."""
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in tensors.items()
    }
    return LoadedTask(values, sum(array.nbytes for array in tensors.values()), signature)


def check_inputs(source: str, task: LoadedTask, session: onnxruntime.InferenceSession) -> None:
    """Raise FileError unless a session takes every tensor of a task as it is.

    A dimension that the graph leaves open, a rank, must be one number wherever it has the same name.
    """
    inputs = {entry.name: entry for entry in session.get_overridable_initializers()}
    free: dict[str, int] = {}
    for name, value in task.weights.items():
        if name not in inputs:
            raise FileError(
                f"{source}: {name}: expected one of the graph's inputs, found none; is the task another "
                "model's?"
            )
        entry = inputs[name]
        got = (value.data_type(), tuple(value.shape()))
        if got[0] != entry.type or not _fits(entry.shape, got[1], free):
            raise FileError(
                f"{source}: {name}: expected shape {tuple(entry.shape)} in {entry.type}, got {got[1]} in "
                f"{got[0]}; is the task another model's?"
            )
    for name, entry in inputs.items():
        if name not in task.weights and not free.keys().isdisjoint(entry.shape):
            raise FileError(f"{source}: expected {name} beside the other matrix of its layer, found none")


def _fits(declared: Sequence[int | str], shape: Sequence[int], free: dict[str, int]) -> bool:
    """Whether a shape is the declared one; `free` has the numbers of open dimensions, and gets new ones."""
    return len(declared) == len(shape) and all(
        size == (free.setdefault(known, size) if isinstance(known, str) else known)
        for known, size in zip(declared, shape, strict=True)
    )
