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
when. It stays under that name when the task is renamed, for as long as a graph refers to it. The base and
other tasks are not written to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracle.files import require_space
from loracle.files.atomic import flush_folder, flush_tree, reported
from loracle.files.lock import locked
from loracle.files.partial import partial_folder, remove_abandoned

from .deployed_base import UNDER_WAY, Hashing, share, split
from .external import load_graph
from .matching import WeightSource
from .names import GRAPH_FILE, GRAPH_SUFFIX, SHARDS_KEY, TASK_KEY
from .task_document import document_text
from .task_names import check_name, require_new
from .template import GraphTemplate
from .verified import forget
from .write import BoundTensors, Progress, graph_bytes, lay_out, refer, write_data

LINKED = "linked"
"""The form's name."""
_DATA_FILE = re.compile(r".+\.[0-9a-f]{16}\.onnx_data")
_BASE_DATA = re.compile(r"model\.[0-9a-f]{16}\.onnx_data")


def write_linked(
    template: GraphTemplate,
    source: WeightSource,
    deployment: Path,
    name: str,
    progress: Progress | None = None,
    *,
    document: Mapping[str, Any],
    replace: bool = False,
) -> int:
    """Add the task `name` to a deployment; return the bytes of its graph and data file.

    Args:
        template: the graph; it is used up.
        source: the merged weights.
        deployment: a folder with an exported base model in the template's dtype.
        name: letters, digits, `.`, `_` and `-`.
        progress: called with (bytes written, bytes in all), after the comparison with the base.
        document: what the graph's metadata say of the adapter, see `task_document.py`.
        replace: whether a task of this name may be there; its graph is exchanged in one step.

    Raises:
        ConfigError: `name` cannot be a task's.
        FileError: the task is there, the base is missing, another model or in another dtype, or the disk has
            no room. TargetError, ShapeError: `source` is not of the template's model.
        The deployment is as before then.
    """
    check_name(name)
    graph = deployment / f"{name}{GRAPH_SUFFIX}"
    require_new(deployment, name, LINKED, replace=replace)
    tensors = BoundTensors([template], source)
    own, shared = split(template, tensors)
    base = load_graph(deployment / GRAPH_FILE)
    share(shared, base, deployment, tensors)
    if SHARDS_KEY in base.metadata_props:
        template.model.metadata_props[SHARDS_KEY] = base.metadata_props[SHARDS_KEY]
    layout = lay_out(own)
    under_way = deployment / UNDER_WAY
    remove_abandoned(under_way)
    # the task's graph is as large as the base's
    require_space(deployment, layout.nbytes + (deployment / GRAPH_FILE).stat().st_size)
    with reported(graph), partial_folder(under_way) as folder:
        with open(folder / "data", "xb") as file:
            hashing = Hashing(file)
            write_data(hashing, layout, tensors, progress)
        digest = hashing.hexdigest()
        data = f"{name}.{digest[:16]}.onnx_data"
        for value in own:
            refer(value, data, layout.offsets[str(value.name)], deployment)
        template.model.metadata_props[TASK_KEY] = document_text(document, len(own), layout.nbytes, digest)
        content = graph_bytes(template)
        (folder / "graph").write_bytes(content)
        flush_tree(folder)
        with locked(deployment / GRAPH_FILE):
            require_new(deployment, name, LINKED, replace=replace)
            try:
                os.replace(folder / "data", deployment / data)
                flush_folder(deployment)
                os.replace(folder / "graph", graph)
                flush_folder(deployment)
                forget(deployment, name)
            finally:
                remove_unmentioned(deployment)
    return layout.nbytes + len(content)


def own_data(graph: ir.Model) -> tuple[str, ...]:
    """The data files that a linked task's graph refers to, but the base's; sorted."""
    tensors = (value.const_value for value in graph.graph.initializers.values())
    files = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return tuple(
        sorted(name for name in files if _DATA_FILE.fullmatch(name) and not _BASE_DATA.fullmatch(name))
    )


def base_data(digest: str) -> str:
    """What the data file of a base in its checkpoint's folder is called, by the SHA-256 of its content."""
    return f"{Path(GRAPH_FILE).stem}.{digest[:16]}.onnx_data"


def linked_bytes(template: GraphTemplate, source: WeightSource) -> int:
    """The bytes of a task's data file.

    Raises TargetError or ShapeError where `source` is not of the template's model.
    """
    own, _ = split(template, BoundTensors([template], source))
    return lay_out(own).nbytes


def remove_unmentioned(deployment: Path) -> None:
    """Remove the data files of tasks that no graph of the deployment refers to, where that is possible."""
    with suppress(OSError):
        unmentioned = {name for name in os.listdir(deployment) if _DATA_FILE.fullmatch(name)}
        for path in deployment.glob(f"*{GRAPH_SUFFIX}"):
            graph = path.read_bytes()
            unmentioned = {name for name in unmentioned if os.fsencode(name) not in graph}
        for name in unmentioned:
            (deployment / name).unlink()
