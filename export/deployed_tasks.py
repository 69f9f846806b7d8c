"""What is deployed in a folder: read from the tasks' own files, each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracle.files.safetensors_file import SafetensorsFile
from loracle.reference import FileError

from .adapter_file import AdapterFile
from .external import load_graph
from .linked import own_data
from .names import GRAPH_FILE, TASK_KEY
from .options import noted_options
from .task_document import TaskDocument, parse_document, read_document
from .task_names import find_task, find_tasks
from .verified import Verified, read_verified

_VERSION = 1


@dataclass(frozen=True)
class DeployedTask:
    """One task.

    Attributes:
        form: "linked", "swappable" or "adapter-inputs".
        files: its own; the first makes the task be there.
        document: what it was made of; None where another program, or an older version, has written it.
        verified: the record of a verification of the bytes that the document names; None where there is none.
    """

    name: str
    form: str
    files: tuple[Path, ...]
    document: TaskDocument | None
    verified: Verified | None

    @property
    def nbytes(self) -> int:
        """The bytes of its files."""
        return sum(path.stat().st_size for path in self.files)

    def to_json(self) -> dict[str, Any]:
        """The task's entry in the manifest."""
        named = [field.name for field in fields(TaskDocument) if field.name != "form"]
        described = dict.fromkeys(named) if self.document is None else self.document.to_json()
        return {
            "name": self.name,
            **described,
            "form": self.form,
            "files": _sizes(self.files),
            "verified": None if self.verified is None else self.verified.to_json(),
        }


def deployed_task(deployment: Path, name: str) -> DeployedTask:
    """One task of a deployment.

    Raises:
        ConfigError: `name` cannot be a task's. FileError: there is no such task, or its file is malformed.
    """
    form, path = find_task(deployment, name)
    document, files = _READERS[form](path)
    if document is not None and document.form != form:
        raise FileError(f"{path}: form: expected {form}, got {document.form}; add the task again")
    verified = None if document is None else read_verified(deployment, name, document.sha256)
    return DeployedTask(name, form, files, document, verified)


def deployed_tasks(deployment: Path) -> tuple[DeployedTask, ...]:
    """The tasks of a deployment, by their names.

    Raises FileError: the folder has no base, or a task's file is malformed.
    """
    base_graph(deployment)
    return tuple(deployed_task(deployment, name) for name, _ in find_tasks(deployment))


def manifest(deployment: Path) -> dict[str, Any]:
    """What is deployed, as `schemas/deployment.schema.json` describes it. Raises FileError: as
    `deployed_tasks`."""
    path = base_graph(deployment)
    base = load_graph(path)
    options = noted_options(base, str(path))
    return {
        "version": _VERSION,
        "base": {
            "dtype": options.dtype,
            "quantization": options.quantization,
            "portable": options.portable,
            "files": _sizes([path, *(deployment / name for name in _data_files(base))]),
        },
        "tasks": [task.to_json() for task in deployed_tasks(deployment)],
    }


def base_graph(deployment: Path) -> Path:
    """The graph of a deployment's base. Raises FileError where there is none."""
    path = deployment / GRAPH_FILE
    if not path.is_file():
        raise FileError(f"{path}: expected a deployment's base, found none; make one with `loracle export`")
    return path


def _data_files(model: ir.Model) -> list[str]:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})


def _sizes(files: Iterable[Path]) -> list[dict[str, Any]]:
    return [{"name": path.name, "bytes": path.stat().st_size} for path in files]


_Read = tuple[TaskDocument | None, tuple[Path, ...]]


def _read_linked(path: Path) -> _Read:
    model = load_graph(path)
    text = model.metadata_props.get(TASK_KEY)
    document = None if text is None else parse_document(text, f"{path} (metadata)")
    return document, (path, *(path.parent / name for name in own_data(model)))


def _read_swappable(path: Path) -> _Read:
    text = SafetensorsFile(path).metadata.get(TASK_KEY)
    return None if text is None else parse_document(text, f"{path} (header)"), (path,)


def _read_adapter(path: Path) -> _Read:
    content = AdapterFile(path).document
    return None if content is None else read_document(content, f"{path} (document)"), (path,)


_READERS: Mapping[str, Callable[[Path], _Read]] = {
    "linked": _read_linked,
    "swappable": _read_swappable,
    "adapter-inputs": _read_adapter,
}
