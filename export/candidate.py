"""Open somebody's exported folder for inspection: the graph parsed, its tensors mapped, nothing trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError

from loracle.reference import FileError

from .exporter import DTYPES
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
    if not path.is_file():
        raise FileError(f"{path}: expected an exported model, found none")
    try:
        model = ir.load(path)
    except (DecodeError, ValueError, TypeError) as error:
        raise FileError(f"{path}: expected an ONNX model: {error}") from error
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(folder, name, tensor)
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    types = {ir.DataType.FLOAT: DTYPES["fp32"], ir.DataType.FLOAT16: DTYPES["fp16"]}
    if logits is None or logits.dtype not in types:
        got = "none" if logits is None else str(logits.dtype)
        raise FileError(f"{path}: expected an output {LOGITS} in float32 or float16, got {got}")
    return Candidate(folder, model, types[logits.dtype])


def _check_external(folder: Path, name: str, tensor: ir.ExternalTensor) -> None:
    location = str(tensor.location)
    if Path(location).name != location or location in ("", ".", ".."):
        raise FileError(f"{name}: expected its data in a file of the model's own folder, got {location!r}")
    path = folder / location
    if path.is_symlink() or not path.is_file():
        raise FileError(f"{name}: expected its data in {path}, found no such file")
    size = path.stat().st_size
    offset, expected = int(tensor.offset or 0), math.prod(tensor.shape.numpy()) * int(tensor.dtype.itemsize)
    length = expected if tensor.length is None else int(tensor.length)
    if offset < 0 or length != expected or offset + length > size:
        raise FileError(
            f"{name}: expected {expected} bytes at offset {offset} of {path.name}, "
            f"got a length of {length} in a file of {size} bytes"
        )
