"""Open somebody's exported folder for inspection: the graph parsed, its tensors mapped, nothing trusted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.reference import FileError

from .exporter import DTYPES
from .external import load_graph
from .names import GRAPH_FILE, LOGITS


@dataclass(frozen=True)
class Candidate:
    """A parsed `model.onnx` whose external tensors lie inside `folder`."""

    folder: Path
    model: ir.Model
    dtype: np.dtype[Any]

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        """The initializer `name`, mapped from the data file."""
        value = self.model.graph.initializers[name].const_value
        assert value is not None
        array: np.ndarray[Any, Any] = value.numpy()
        return array


def open_candidate(folder: str | Path) -> Candidate:
    """Parse `folder/model.onnx`.

    Raises FileError: the file is missing or no ONNX model, a tensor's data lie outside the folder or do not
    fit their file, or the model has no `logits` of a supported type.
    """
    folder = Path(folder)
    path = folder / GRAPH_FILE
    model = load_graph(path)
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    types = {ir.DataType.FLOAT: DTYPES["fp32"], ir.DataType.FLOAT16: DTYPES["fp16"]}
    if logits is None or logits.dtype not in types:
        got = "none" if logits is None else str(logits.dtype)
        raise FileError(f"{path}: expected an output {LOGITS} in float32 or float16, got {got}")
    return Candidate(folder, model, types[logits.dtype])
