"""A graph in somebody's folder: parsed, and its data where they may be."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError

from loracle.reference import FileError

from .names import SHARDS_KEY
from .shards import check_shards


def load_graph(path: Path) -> ir.Model:
    """Parse an ONNX file; no tensor of its data files is read.

    Raises FileError: the file is missing or no ONNX model, a tensor's data lie outside its folder or do not
    fit their file, or a checkpoint's shard that it refers to is another by now.
    """
    model = parse_graph(path)
    check_shards(model.metadata_props.get(SHARDS_KEY), path.parent, str(path))
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(path.parent, name, tensor)
    return model


def parse_graph(path: Path) -> ir.Model:
    """Parse an ONNX file, whatever it refers to. Raises FileError: it is missing or no ONNX model."""
    if not path.is_file():
        raise FileError(f"{path}: expected an exported model, found none")
    try:
        return ir.load(path)
    except (DecodeError, ValueError, TypeError) as error:
        raise FileError(f"{path}: expected an ONNX model: {error}") from error


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
