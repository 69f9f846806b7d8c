"""A deployment's task, opened for inspection: what `verify` looks at beside the base's graph and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import Adapter
from loracle.files.safetensors_file import LENGTH_BYTES, SafetensorsFile
from loracle.reference import ConfigError, FileError

from ..deployed_tasks import DeployedTask, deployed_task
from ..linked import LINKED
from ..names import GRAPH_FILE, GRAPH_SUFFIX, SWAPPABLE_FILE, TASK_SUFFIX
from ..swappable import SWAPPABLE, swapped_names
from ..task_document import task_document
from ..task_names import is_name
from .candidate import Candidate, open_candidate
from .report import Check

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class OpenedTask:
    """A task, and the model that it is with its base.

    Attributes:
        candidate: its tensors are the task's where the task has one, and else the base's.
        brought: the names of the tensors in a swappable task's file; None in another form.
    """

    task: DeployedTask
    candidate: Candidate
    brought: frozenset[str] | None


def task_in_path(path: Path, name: str | None) -> tuple[Path, str | None]:
    """Folder and name of a task that is given by its folder and `name`, or by its file; another path has no
    name."""
    if name is None:
        for suffix in (TASK_SUFFIX, GRAPH_SUFFIX):
            stem = path.name.removesuffix(suffix)
            if stem != path.name and is_name(stem):
                return path.parent, stem
    return path, name


def open_task(folder: Path, name: str) -> OpenedTask:
    """Parse a linked or swappable task.

    Raises:
        ConfigError: `name` cannot be a task's, or the task is in another form.
        FileError: there is no such task, its file is malformed, or a tensor in it is none of the graph's
            inputs.
    """
    task = deployed_task(folder, name)
    if task.form == LINKED:
        return OpenedTask(task, open_candidate(task.files[0], (GRAPH_FILE,)), None)
    if task.form != SWAPPABLE:
        raise ConfigError(f"{name}: expected a task whose adapter is merged, got the form {task.form}")
    file = SafetensorsFile(task.files[0])
    tensors = {tensor: file.tensor(tensor) for tensor in file.entries}
    opened = open_candidate(folder / SWAPPABLE_FILE, (GRAPH_FILE,))
    _bind(opened.models[GRAPH_FILE].graph, tensors, task.files[0])
    return OpenedTask(task, replace(opened, weights=tensors), frozenset(tensors))


def constants_again(graph: ir.Graph, weights: frozenset[str]) -> tuple[str, ...]:
    """Take the inputs of a graph that are initializers among `weights` away, in place; return their names."""
    taken = tuple(name for name in swapped_names(graph) if name in weights)
    for value in [value for value in graph.inputs if str(value.name) in taken]:
        graph.inputs.remove(value)
    return taken


def check_document(task: DeployedTask, adapter: Adapter, adapter_dir: str | Path) -> Check:
    """Whether a task's document says what its file holds, and what adapter it is of."""
    name = "document names the task's bytes and the adapter"
    if task.document is None:
        return Check(name, True, "no document; add the task again to have one")
    expected = {**task_document(task.form, adapter, adapter_dir), **_content(task)}
    del expected["version"]
    held = task.document.to_json()
    failures = tuple(
        f"{field}: expected {value}, got {held[field]}"
        for field, value in expected.items()
        if held[field] != value
    )
    return Check(name, not failures, f"SHA-256 {str(expected['sha256'])[:12]}", failures)


def _bind(graph: ir.Graph, tensors: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    """Let a task's tensors be the values of the inputs that they are given to."""
    inputs = set(swapped_names(graph))
    for name, tensor in tensors.items():
        if name not in inputs:
            raise FileError(
                f"{path}: {name}: expected one of the inputs of {SWAPPABLE_FILE}, found none; is the task "
                "another model's?"
            )
        graph.initializers[name].const_value = ir.tensor(tensor, name=name)


def _content(task: DeployedTask) -> dict[str, Any]:
    """Number, bytes and SHA-256 of the tensors that a task brings, from its files."""
    digest, nbytes = hashlib.sha256(), 0
    for path, start in _data(task):
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                nbytes += len(block)
    return {"tensors": _tensors(task), "bytes": nbytes, "sha256": digest.hexdigest()}


def _data(task: DeployedTask) -> list[tuple[Path, int]]:
    """The files with a task's tensors, and where these begin."""
    if task.form == LINKED:
        return [(path, 0) for path in task.files[1:]]
    (path,) = task.files
    with path.open("rb") as file:
        return [(path, LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little"))]


def _tensors(task: DeployedTask) -> int:
    if task.form == SWAPPABLE:
        return len(SafetensorsFile(task.files[0]).entries)
    own = {path.name for path in task.files[1:]}
    (model,) = open_candidate(task.files[0], (GRAPH_FILE,)).models.values()
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(isinstance(tensor, ir.ExternalTensor) and str(tensor.location) in own for tensor in tensors)
