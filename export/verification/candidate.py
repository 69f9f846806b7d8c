"""Somebody's exported folder, opened for inspection: graphs parsed, tensors mapped, nothing trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.reference import FileError

from ..external import load_graph
from ..names import GRAPH_FILE, GRAPH_SUFFIX
from ..options import GraphOptions, noted_options


@dataclass(frozen=True)
class Candidate:
    """Parsed graphs, whose external tensors lie inside `folder`.

    Attributes:
        models: by the names that the files of an exported model have.
        graph: the first of their files.
        options: what they say they were made with.
        weights: a swappable task's, which a session on the graph has to be given.
    """

    folder: Path
    models: Mapping[str, ir.Model]
    graph: Path
    options: GraphOptions
    weights: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def initializer(self, name: str) -> ir.Value | None:
        """The initializer of a name, of the first graph that has it."""
        found = (model.graph.initializers.get(name) for model in self.models.values())
        return next((value for value in found if value is not None), None)

    def is_shared(self, file: str, name: str) -> bool:
        """Whether an initializer of a graph is `initializer(name)`: of one place, or of equal bits."""
        first, own = self.initializer(name), self.models[file].graph.initializers.get(name)
        if first is None or own is None or first.const_value is None or own.const_value is None:
            return first is own
        one, other = first.const_value, own.const_value
        if isinstance(one, ir.ExternalTensor) and isinstance(other, ir.ExternalTensor):
            places = [(tensor.path, tensor.offset, tensor.length, tensor.dtype) for tensor in (one, other)]
            if places[0] == places[1]:
                return True
        return bool(one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes())

    def tensor(self, name: str) -> np.ndarray[Any, Any] | None:
        """The initializer's tensor, mapped from the data file; None where there is none."""
        value = self.initializer(name)
        if value is None or value.const_value is None:
            return None
        array: np.ndarray[Any, Any] = value.const_value.numpy()
        return array

    def release(self, name: str) -> None:
        """Let go of the mapped pages of an initializer's tensor; arrays handed out must not be used again."""
        value = self.initializer(name)
        if value is not None and isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.release()


def is_exported(path: Path) -> bool:
    """Whether `path` is an exported folder, or one graph of a deployment with several tasks."""
    return path.suffix == GRAPH_SUFFIX or any(path.glob(f"*{GRAPH_SUFFIX}"))


def open_candidate(path: Path, files: Sequence[str]) -> Candidate:
    """Parse the graphs of a model.

    Args:
        path: folder of an exported model; or the graph of a task, for a model with one graph.
        files: the names that an exported model's graphs have.

    Raises FileError: a file is missing or no ONNX model, a tensor's data lie outside the folder or do not
    fit their file, or the graphs do not say how they were made, or were made in different ways.
    """
    if path.suffix == GRAPH_SUFFIX:
        if tuple(files) != (GRAPH_FILE,):
            raise FileError(f"{path}: expected the folder of a model with several graphs, got one of them")
        graphs = {GRAPH_FILE: path}
    else:
        graphs = {file: path / file for file in files}
    models = {file: load_graph(graph) for file, graph in graphs.items()}
    options = {file: noted_options(model, str(graphs[file])) for file, model in models.items()}
    first = next(iter(files))
    for file, own in options.items():
        if own != options[first]:
            raise FileError(f"{graphs[file]}: expected to be made with {options[first]}, got {own}")
    return Candidate(graphs[first].parent, models, graphs[first], options[first])
