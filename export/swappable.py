"""A task whose merged tensors are inputs: one session on one base for any number of them.

    DIR/model.onnx, DIR/model.onnx_data        the base model, an ordinary export
    DIR/swappable.onnx                         the base's graph and data once more; what some task changes is
                                               an initializer and an input
    DIR/french.task.safetensors                the task `french`: its merged tensors, under the names of these
                                               inputs

An input with an initializer need not be given: it is the base's tensor then. So a session on
`swappable.onnx` is the base model, and any task whose tensors it is given. Nothing is added to the graph, and
no tensor of the base is stored twice.

A task appears, changes and goes in one step, the rename or removal of its file. Where the task changes
tensors that were no inputs yet, the graph is exchanged before, in one step too. To other tasks that makes no
difference but in speed: onnxruntime lays out constants ahead of time, and not inputs.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracle.files import require_space
from loracle.files.atomic import flush_folder, reported, write_atomic
from loracle.files.lock import locked
from loracle.files.partial import partial_file, remove_abandoned
from loracle.files.safetensors_file import SafetensorsFile
from loracle.files.safetensors_writer import safetensors_header

from .deployed_base import NO_DIGEST, UNDER_WAY, Hashing, base_tensor, entry_of, share, split
from .external import load_graph
from .matching import WeightSource
from .names import GRAPH_FILE, SWAPPABLE_FILE, TASK_KEY
from .task_document import document_text
from .task_names import require_new, swappable_names, task_file
from .template import GraphTemplate
from .verified import forget
from .write import ALIGNMENT, BoundTensors, Progress, lay_out, write_data

SWAPPABLE = "swappable"
"""The form's name."""


def write_swappable(
    template: GraphTemplate,
    source: WeightSource,
    deployment: Path,
    name: str,
    progress: Progress | None = None,
    *,
    document: Mapping[str, Any],
    replace: bool = False,
) -> int:
    """Add the task `name` to a deployment; return the bytes of its file.

    Args:
        template: the graph; it is used up.
        source: the merged weights.
        deployment: a folder with an exported base model in the template's dtype.
        name: letters, digits, `.`, `_` and `-`.
        progress: called with (bytes written, bytes in all), after the comparison with the base.
        document: what the file's header says of the adapter, see `task_document.py`.
        replace: whether a task of this name may be there; its file is exchanged in one step.

    Raises:
        ConfigError: `name` cannot be a task's.
        FileError: the task is there, the base is missing, another model or in another dtype, or the disk has
            no room. TargetError, ShapeError: `source` is not of the template's model.
        The deployment's tasks are as before then.
    """
    path = task_file(deployment, name)
    require_new(deployment, name, SWAPPABLE, replace=replace)
    tensors = BoundTensors([template], source)
    own, shared = split(template, tensors)
    base = load_graph(deployment / GRAPH_FILE)
    for value in own:
        base_tensor(value, base, deployment)
    share(shared, base, deployment, tensors)
    layout = lay_out(own, alignment=1)
    entries = [entry_of(value) for value in own]

    def header(digest: str) -> bytes:
        # The first tensor starts at a page.
        return safetensors_header(
            entries,
            {TASK_KEY: document_text(document, len(own), layout.nbytes, digest)},
            alignment=ALIGNMENT,
        )

    size = len(header(NO_DIGEST)) + layout.nbytes
    remove_abandoned(deployment / UNDER_WAY)
    require_space(deployment, size + (deployment / GRAPH_FILE).stat().st_size)
    with reported(path), partial_file(deployment / UNDER_WAY) as (temporary, file):
        file.write(header(NO_DIGEST))
        hashing = Hashing(file)
        write_data(hashing, layout, tensors, progress)
        file.seek(0)
        file.write(header(hashing.hexdigest()))
        file.flush()
        os.fsync(file.fileno())
        with locked(deployment / GRAPH_FILE):
            require_new(deployment, name, SWAPPABLE, replace=replace)
            _make_inputs(deployment, list(layout.offsets))
            os.replace(temporary, path)
            flush_folder(deployment)
            forget(deployment, name)
    return size


def with_inputs(base: ir.Model, names: Collection[str]) -> ir.Model:
    """The base's graph with these initializers among its inputs, in the graph's order; changed in place."""
    held = {str(value.name) for value in base.graph.inputs}
    for name, value in base.graph.initializers.items():
        if name in names and name not in held:
            base.graph.inputs.append(value)
    return base


def swapped_names(graph: ir.Graph) -> tuple[str, ...]:
    """The initializers of a graph that are its inputs."""
    return tuple(str(value.name) for value in graph.inputs if str(value.name) in graph.initializers)


def drop_inputs(deployment: Path) -> None:
    """Let `swappable.onnx` have no inputs that no task has tensors for; without tasks, remove it.

    Raises FileError where a task's file cannot be read; OSError where the folder cannot be written.
    """
    path = deployment / SWAPPABLE_FILE
    needed = {
        tensor
        for name in swappable_names(deployment)
        for tensor in SafetensorsFile(task_file(deployment, name)).entries
    }
    if not needed:
        path.unlink(missing_ok=True)
        return
    base = load_graph(deployment / GRAPH_FILE)
    own = {str(value.name) for value in base.graph.inputs}
    if set(swapped_names(load_graph(path).graph)) - own - needed:
        write_atomic(path, bytes(ir.to_proto(with_inputs(base, needed)).SerializeToString()))


def _make_inputs(deployment: Path, names: Collection[str]) -> None:
    """Let `swappable.onnx` have these initializers among its inputs, and those that it has."""
    path = deployment / SWAPPABLE_FILE
    held = swapped_names(load_graph(path).graph) if path.is_file() else ()
    if path.is_file() and set(names) <= set(held):
        return
    graph = with_inputs(load_graph(deployment / GRAPH_FILE), {*held, *names})
    write_atomic(path, bytes(ir.to_proto(graph).SerializeToString()))
