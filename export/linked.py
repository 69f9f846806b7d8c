"""A deployment of many tasks: each costs only the tensors that its adapter changes.

    DIR/model.onnx, DIR/model.onnx_data        the base model, an ordinary export
    DIR/french.onnx                            the task `french`: the base's graph
    DIR/french.<hash>.onnx_data                its merged tensors

A task's graph refers to the base's data file for every tensor that its adapter leaves alone; these bytes
are compared with the checkpoint's when the task is added. All files lie side by side because onnxruntime,
onnx and onnx-ir open data in the graph's own folder or below alone: they refuse `..`, absolute paths and
links that lead out, onnx and onnx-ir hard links too. So each of them opens `DIR/french.onnx` as it is.

A task appears, changes and goes in one step, the rename or removal of its graph. Its data file is there
before, named by its content (SHA-256), so that no graph ever refers to another's data, whatever is killed
when. The base and other tasks are not written to.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from loracle.files import require_space
from loracle.files.atomic import flush_folder, flush_tree, reported
from loracle.files.lock import locked
from loracle.files.partial import partial_folder, remove_abandoned
from loracle.reference import FileError

from .deployed_base import UNDER_WAY, Hashing, share, split
from .external import load_graph
from .matching import WeightSource
from .names import GRAPH_FILE, GRAPH_SUFFIX
from .task_names import check_name, is_name
from .template import GraphTemplate
from .write import BoundTensors, Progress, graph_bytes, lay_out, refer, write_data

_DATA_FILE = re.compile(r".+\.([0-9a-f]{16})\.onnx_data")
_MENTIONED = re.compile(rb"\.([0-9a-f]{16})\.onnx_data")


def write_linked(
    template: GraphTemplate,
    source: WeightSource,
    deployment: Path,
    name: str,
    progress: Progress | None = None,
    *,
    replace: bool = False,
) -> int:
    """Add the task `name` to a deployment; return the bytes of its graph and data file.

    Args:
        template: the graph; it is used up.
        source: the merged weights.
        deployment: a folder with an exported base model in the template's dtype.
        name: letters, digits, `.`, `_` and `-`.
        progress: called with (bytes written, bytes in all), after the comparison with the base.
        replace: whether a task of this name may be there; its graph is exchanged in one step.

    Raises:
        ConfigError: `name` cannot be a task's.
        FileError: the task is there, the base is missing, another model or in another dtype, or the disk has
            no room. TargetError, ShapeError: `source` is not of the template's model.
        The deployment is as before then.
    """
    graph = _graph_file(deployment, name)
    _require_new(graph, replace)
    tensors = BoundTensors([template], source)
    own, shared = split(template, tensors)
    share(shared, load_graph(deployment / GRAPH_FILE), deployment, tensors)
    layout = lay_out(own)
    under_way = deployment / UNDER_WAY
    remove_abandoned(under_way)
    # the task's graph is as large as the base's
    require_space(deployment, layout.nbytes + (deployment / GRAPH_FILE).stat().st_size)
    with reported(graph), partial_folder(under_way) as folder:
        with open(folder / "data", "xb") as file:
            hashing = Hashing(file)
            write_data(hashing, layout, tensors, progress)
        data = f"{name}.{hashing.hexdigest()[:16]}.onnx_data"
        for value in own:
            refer(value, data, layout.offsets[str(value.name)], deployment)
        content = graph_bytes(template)
        (folder / "graph").write_bytes(content)
        flush_tree(folder)
        with locked(deployment / GRAPH_FILE):
            _require_new(graph, replace)
            try:
                os.replace(folder / "data", deployment / data)
                flush_folder(deployment)
                os.replace(folder / "graph", graph)
                flush_folder(deployment)
            finally:
                _remove_unmentioned(deployment)
    return layout.nbytes + len(content)


def remove_task(deployment: Path, name: str) -> None:
    """Remove a task from a deployment: its graph in one step, then its data file.

    Raises:
        ConfigError: `name` cannot be a task's. FileError: there is no such task, or it cannot be removed.
    """
    graph = task_graph(deployment, name)
    with reported(graph), locked(deployment / GRAPH_FILE):
        graph.unlink()
        flush_folder(deployment)
        _remove_unmentioned(deployment)


def task_graph(deployment: Path, name: str) -> Path:
    """The graph of a deployment's task.

    Raises:
        ConfigError: `name` cannot be a task's. FileError: there is no such task.
    """
    graph = _graph_file(deployment, name)
    if not graph.is_file():
        there = ", ".join(task_names(deployment)) or "none"
        raise FileError(f"{graph}: expected one of the deployment's tasks ({there}), found none")
    return graph


def task_names(deployment: Path) -> tuple[str, ...]:
    """The names of a deployment's tasks, sorted."""
    graphs = deployment.glob(f"*{GRAPH_SUFFIX}")
    return tuple(sorted(path.stem for path in graphs if is_name(path.stem)))


def task_size(deployment: Path, name: str) -> int:
    """The bytes of a task's graph and of the data that are its own.

    Raises:
        ConfigError: `name` cannot be a task's. FileError: there is no such task.
    """
    graph = task_graph(deployment, name)
    content = graph.read_bytes()
    own = {found.decode() for found in _MENTIONED.findall(content)}
    files = [path for path in deployment.iterdir() if (m := _DATA_FILE.fullmatch(path.name)) and m[1] in own]
    return len(content) + sum(path.stat().st_size for path in files)


def linked_bytes(template: GraphTemplate, source: WeightSource) -> int:
    """The bytes of a task's data file.

    Raises TargetError or ShapeError where `source` is not of the template's model.
    """
    own, _ = split(template, BoundTensors([template], source))
    return lay_out(own).nbytes


def _graph_file(deployment: Path, name: str) -> Path:
    check_name(name)
    return deployment / f"{name}{GRAPH_SUFFIX}"


def _require_new(graph: Path, replace: bool) -> None:
    if not replace and os.path.lexists(graph):
        raise FileError(f"{graph}: the deployment has this task; choose another name or remove it")


def _remove_unmentioned(deployment: Path) -> None:
    """Remove the data files of tasks that no graph of the deployment refers to, where that is possible."""
    with suppress(OSError):
        mentioned = {
            found.decode()
            for path in deployment.glob(f"*{GRAPH_SUFFIX}")
            for found in _MENTIONED.findall(path.read_bytes())
        }
        for name in os.listdir(deployment):
            matched = _DATA_FILE.fullmatch(name)
            if matched and matched[1] not in mentioned:
                (deployment / name).unlink()
