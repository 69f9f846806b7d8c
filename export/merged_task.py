"""Adapters that are merged into memory, from the weights of an exported base: no checkpoint is needed.

A base in float32 has the very numbers of a checkpoint in float32, bfloat16 or float16, so the merged tensors
are those that an export writes, bit for bit. A base in float16 may have been rounded when it was exported; a
merge would round again, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from loracle.files import MergedWeights, read_adapter
from loracle.files.checkpoint import is_tied
from loracle.files.json_file import read_json_object
from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import ConfigError, FileError

from .external import load_graph
from .names import DATA_FILE, GRAPH_FILE, SWAPPABLE_FILE
from .opening import open_graph
from .swappable import swapped_names, with_inputs

Array = np.ndarray[Any, Any]


class ExportedBase:
    """The weights of an exported base model, read as a checkpoint is; see `loracle.files.Tensors`.

    Raises FileError: there is no base in the folder, or no `config.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.dir = folder
        self.config: Mapping[str, Any] = read_json_object(folder / CONFIG_FILE)
        graph = load_graph(folder / GRAPH_FILE).graph
        self._tensors = {
            name: value.const_value
            for name, value in graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        self.names: tuple[str, ...] = tuple(self._tensors)
        self.shards: Mapping[str, tuple[str, ...]] = {DATA_FILE: self.names}

    @cached_property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor."""
        return is_tied(self.config, self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(int(size) for size in self._tensor(name).shape.numpy())

    def dtype(self, name: str) -> np.dtype[Any]:
        """The tensor's dtype in the graph."""
        dtype: np.dtype[Any] = self._tensor(name).dtype.numpy()
        return dtype

    def tensor(self, name: str) -> Array:
        """The tensor, mapped."""
        array: Array = self._tensor(name).numpy()
        return array

    def release(self, name: str) -> None:
        """Let go of the memory that the mapped tensor takes."""
        self._tensor(name).release()

    def _tensor(self, name: str) -> ir.ExternalTensor:
        if name not in self._tensors:
            raise FileError(f"{self.dir / GRAPH_FILE}: has no tensor {name}; is this the right model?")
        return self._tensors[name]


def merge_task(folder: Path, adapter: Path) -> dict[str, Array]:
    """The tensors that an adapter changes in the base of a deployment, each entry rounded once.

    Raises:
        LoracleError: the adapter is another model's, or cannot be merged.
        ConfigError: the base's weights are not in float32, or the adapter brings a head or a vocabulary of
            its own.
    """
    weights = _weights(ExportedBase(folder), adapter)
    merged = {}
    for name in weights.merged_names:
        if weights.dtype(name) != np.float32:
            raise ConfigError(
                f"{name}: expected a base in float32 to merge {adapter} into, got {weights.dtype(name)}, "
                "which may have been rounded already; add the task with `loracle tasks add`"
            )
        merged[name] = np.array(weights.tensor(name))
    return merged


def open_with_inputs(folder: Path, adapters: Iterable[Path], threads: int) -> onnxruntime.InferenceSession:
    """A session on the base whose inputs are what adapters change, and what the folder's tasks change.

    Raises LoracleError: there is no base, or an adapter is another model's.
    """
    swappable = folder / SWAPPABLE_FILE
    names = set(swapped_names(load_graph(swappable).graph)) if swappable.is_file() else set()
    base = ExportedBase(folder)
    for adapter in adapters:
        names.update(_weights(base, adapter).merged_names)
    graph = with_inputs(load_graph(folder / GRAPH_FILE), names)
    return open_graph(bytes(ir.to_proto(graph).SerializeToString()), folder, threads)


def _weights(base: ExportedBase, adapter: Path) -> MergedWeights:
    weights = MergedWeights(base, read_adapter(adapter))
    if weights.config != base.config:
        raise ConfigError(
            f"{adapter}: expected an adapter of the base's own weights, got one that brings a head or a "
            "vocabulary; export it in a folder of its own"
        )
    return weights
