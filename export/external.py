"""A graph in somebody's folder: parsed, its tensors whole, and its data where they may be."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from loracle.files.json_file import read_regular_file
from loracle.reference import FileError

from .names import SHARDS_KEY
from .shards import check_shards

_MOST_BYTES = 2**31 - 1  # of a message, by the protobuf library
_SHOWN = 200

# What parsing a file made to deceive has been seen to raise.
_UNREADABLE = (
    DecodeError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    MemoryError,
)


def load_graph(path: Path) -> ir.Model:
    """Parse an ONNX file; no tensor of its data files is read.

    Every tensor of the model, wherever it stands (initializers, attributes of nodes, graphs in nodes,
    functions), holds as many numbers as its shape says, or lies in a regular file of the model's own folder.

    Raises FileError: the file is missing or no ONNX model, a tensor has not the data that its shape asks for,
    its data lie outside the folder or do not fit their file, or a checkpoint's shard that the model refers to
    is another by now.
    """
    model = parse_graph(path)
    check_shards(model.metadata_props.get(SHARDS_KEY), path.parent, str(path))
    for name, tensor in _tensors(model):
        try:
            _check_tensor(path.parent, name, tensor)
        except _UNREADABLE as error:
            raise FileError(
                f"{path}: {name[:_SHOWN]}: expected a tensor, got one that cannot be read ({_reason(error)})"
            ) from None
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and value.dtype not in (None, tensor.dtype):
            raise FileError(f"{path}: {value.name}: expected {value.dtype}, got a tensor of {tensor.dtype}")
    return model


def parse_graph(path: Path) -> ir.Model:
    """Parse an ONNX file, whatever it refers to. Raises FileError: it is missing or no ONNX model."""
    if not path.is_file():
        raise FileError(f"{path}: expected an exported model, found none")
    content = read_regular_file(path, _MOST_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            proto = onnx.load_model_from_string(content)
            _check_texts(proto)
            model = ir.serde.deserialize_model(proto)
        # onnx-ir keeps to the folder where it knows one: the path of a file in the current folder names none
        folder = os.path.abspath(path.parent)
        for _, tensor in _tensors(model):
            if isinstance(tensor, ir.ExternalTensor):
                tensor.base_dir = folder
    except _UNREADABLE as error:
        raise FileError(f"{path}: expected an ONNX model: {_reason(error)}") from None
    return model


def data_files(model: ir.Model) -> tuple[str, ...]:
    """The names of the files in which a model's tensors lie, of the folder of the model."""
    tensors = (tensor for _, tensor in _tensors(model))
    return tuple(dict.fromkeys(str(own.location) for own in tensors if isinstance(own, ir.ExternalTensor)))


def _check_texts(proto: Message) -> None:
    """Raise ValueError where a text is not in UTF-8: the protobuf library gives its bytes instead."""
    waiting = [proto]
    while waiting:
        message = waiting.pop()
        if isinstance(message, onnx.TensorProto):  # without a look at its numbers
            own: Iterable[Any] = (
                message.name,
                message.doc_string,
                message.external_data,
                message.metadata_props,
            )
        else:
            own = [value for field, value in message.ListFields() if field.type != FieldDescriptor.TYPE_BYTES]
        for value in own:
            for part in (value,) if isinstance(value, str | bytes | Message | int | float) else value:
                if isinstance(part, Message):
                    waiting.append(part)
                elif isinstance(part, bytes):
                    raise ValueError(f"{part[:_SHOWN]!r} is no text in UTF-8")


def _reason(error: BaseException) -> str:
    """What went wrong at first: onnx-ir puts what it was parsing around that, at every level."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__)[:_SHOWN]


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """All tensors, with a name for messages."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from _of_initializers(graph)
        yield from _of_nodes(graph)
    for function in model.functions.values():
        for name, attribute in function.attributes.items():
            yield from _of_attribute(name, attribute)
        yield from _of_nodes(function.graph)
        for graph in function.subgraphs():
            yield from _of_initializers(graph)
            yield from _of_nodes(graph)


def _of_initializers(graph: ir.Graph) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value


def _of_nodes(graph: ir.Graph) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for node in graph:
        for name, attribute in node.attributes.items():
            yield from _of_attribute(f"{name} of {node.op_type} {node.name}", attribute)


def _of_attribute(name: str, attribute: ir.Attr) -> Iterator[tuple[str, ir.TensorProtocol]]:
    if attribute.is_ref() or attribute.value is None:
        return
    if attribute.type == ir.AttributeType.TENSOR:
        yield name, attribute.value
    elif attribute.type == ir.AttributeType.TENSORS:
        for tensor in attribute.value:
            yield name, tensor


def _check_tensor(folder: Path, name: str, tensor: ir.TensorProtocol) -> None:
    shape = tuple(int(size) for size in tensor.shape.numpy())
    size = math.prod(shape)
    if any(axis < 0 for axis in shape):
        raise ValueError(f"shape {shape}")
    if isinstance(tensor, ir.ExternalTensor):
        _check_external(folder, name, tensor, -(-size * tensor.dtype.bitwidth // 8))
        return
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        raw, held = tensor.raw.raw_data, tensor.raw.ByteSize()  # a number takes at least a bit
        whole = (
            len(raw) == -(-size * tensor.dtype.bitwidth // 8) if raw else not size or _has_numbers(tensor.raw)
        )
        if size > 8 * held or not whole:
            raise ValueError(f"shape {shape} in {held} bytes")
    if tensor.numpy().shape != shape:
        raise ValueError(f"shape {shape}")


def _has_numbers(proto: onnx.TensorProto) -> bool:
    fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
    return any(len(getattr(proto, field)) for field in fields)


def _check_external(folder: Path, name: str, tensor: ir.ExternalTensor, expected: int) -> None:
    location = str(tensor.location)
    if Path(location).name != location or location in ("", ".", ".."):
        raise FileError(f"{name}: expected its data in a file of the model's own folder, got {location!r}")
    path = folder / location
    if path.is_symlink() or not path.is_file():
        raise FileError(f"{name}: expected its data in {path}, found no such file")
    status = path.stat()
    if status.st_nlink > 1:
        raise FileError(
            f"{name}: expected its data in {path} alone, found a file that has other names as well, which "
            "onnx does not read; copy it"
        )
    offset = int(tensor.offset or 0)
    length = expected if tensor.length is None else int(tensor.length)
    if offset < 0 or length != expected or offset + length > status.st_size:
        raise FileError(
            f"{name}: expected {expected} bytes at offset {offset} of {path.name}, "
            f"got a length of {length} in a file of {status.st_size} bytes"
        )
