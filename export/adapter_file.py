"""An `.onnx_adapter` file: parameters under the names of a graph's inputs, then the task's document.

The format is onnxruntime's: a FlatBuffers table of three versions and of parameters, each with a name, sizes,
a type and bytes (`onnxruntime/lora/adapter_format/adapter_schema.fbs`). It has no place for anything else. A
FlatBuffers reader goes from offset to offset and never looks behind what it needs, so the document stands
there: JSON, its length in 8 bytes, and 8 bytes that tell that it is there. onnxruntime and onnxruntime-genai
load the file as they load any other.

Files are read here and not by onnxruntime, which believes the sizes of a parameter and would read past its
bytes where they are wrong.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from loracle.files.json_file import MAX_BYTES, check_regular_file, parse_json_object
from loracle.reference import ConfigError, FileError

Array = np.ndarray[Any, Any]

_IDENTIFIER = b"TORT"
_FORMAT_VERSION = 1
_MARK = b"\nLORACLE"
_LENGTH = struct.Struct("<Q")
_MOST_BYTES = 2**31 - 1  # FlatBuffers' offsets are signed 32-bit numbers
_ENTRY_BYTES = 1024  # a generous bound on what a parameter takes beside its bytes and its name
_TYPES: Mapping[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
}


class AdapterFile:
    """A read-only view of one `.onnx_adapter` file, mapped into memory.

    Attributes:
        path: the file.
        tensors: by their names, in the file's order; views of the file.
        document: what stands after the parameters; None in a file of another maker.

    Raises FileError: the file is missing, is no such file, or ends before a parameter does.
    """

    def __init__(self, path: Path) -> None:
        check_regular_file(path)
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FileError(f"{path}: cannot be read ({error}); check the file") from None
        self.document = self._read_document()
        self._named = 0
        try:
            self.tensors: dict[str, Array] = self._read_tensors()
        except (struct.error, IndexError, ValueError, OverflowError) as error:
            raise self._malformed(f"no parameters that can be read ({error})") from None

    def _read_document(self) -> dict[str, Any] | None:
        end = len(self._bytes) - len(_MARK) - _LENGTH.size
        if end < 0 or self._bytes[-len(_MARK) :] != _MARK:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes, end)
        if length > min(end, MAX_BYTES):
            raise self._malformed(f"a document of {length} bytes")
        return parse_json_object(self._bytes[end - length : end], f"{self.path} (document)")

    def _read_tensors(self) -> dict[str, Array]:
        if self._bytes[4:8] != _IDENTIFIER:
            raise self._malformed(f"no {_IDENTIFIER.decode()} at its fifth byte")
        root = self._follow(0)
        version = self._field(root, 0)
        found = 0 if version is None else self._integer("<i", version)
        if found != _FORMAT_VERSION:
            raise self._malformed(f"version {found} of the format")
        parameters = self._field(root, 3)
        tensors: dict[str, Array] = {}
        if parameters is None:
            return tensors
        first, count = self._vector(parameters, 4)
        for at in range(first, first + 4 * count, 4):
            name, tensor = self._parameter(self._follow(at))
            if name in tensors:
                raise self._malformed(f"two of {name}")
            tensors[name] = tensor
        return tensors

    def _parameter(self, table: int) -> tuple[str, Array]:
        fields = [self._field(table, number) for number in range(4)]
        name_at, sizes_at, type_at, data_at = fields
        if name_at is None or sizes_at is None or type_at is None or data_at is None:
            raise self._malformed("a parameter without a name, sizes, a type or bytes")
        start, length = self._vector(name_at, 1)
        self._named += length
        if self._named > len(self._bytes):  # names that lie on one another would take more than the file
            raise self._malformed("more names than bytes")
        name = self._bytes[start : start + length].decode()
        start, rank = self._vector(sizes_at, 8)
        shape = tuple(self._integer("<q", start + 8 * axis) for axis in range(rank))
        code = self._integer("<i", type_at)
        if code not in _TYPES:
            raise self._malformed(f"{name} of the type {code}")
        start, length = self._vector(data_at, 1)
        dtype = _TYPES[code]
        if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != length:
            raise self._malformed(f"{name} of shape {shape} and {dtype} in {length} bytes")
        return name, np.ndarray(shape, dtype, buffer=self._bytes, offset=start)

    def _field(self, table: int, number: int) -> int | None:
        """Where a table has a field; None where it has none."""
        fields = table - self._integer("<i", table)
        place = 4 + 2 * number
        if place + 2 > self._integer("<H", fields):
            return None
        offset = self._integer("<H", fields + place)
        return table + offset if offset else None

    def _vector(self, at: int, item: int) -> tuple[int, int]:
        """Where the first item of a vector is, and how many there are, of `item` bytes each."""
        start = self._follow(at)
        count = self._integer("<I", start)
        if start + 4 + count * item > len(self._bytes):
            raise IndexError(f"{count} items at byte {start}")
        return start + 4, count

    def _follow(self, at: int) -> int:
        return at + self._integer("<I", at)

    def _integer(self, kind: str, at: int) -> int:
        if at < 0:  # which `struct` would count from the end
            raise IndexError(f"byte {at}")
        (value,) = struct.unpack_from(kind, self._bytes, at)
        return int(value)

    def _malformed(self, what: str) -> FileError:
        return FileError(
            f"{self.path}: expected an adapter file of onnxruntime, got {what}; export the task again"
        )


def check_size(name: str, arrays: Mapping[str, Array]) -> int:
    """Bytes that a file of these arrays takes at most, without its document.

    Raises ConfigError, naming the task `name`: the format has no place for so many.
    """
    size = sum(array.nbytes + len(key) + _ENTRY_BYTES for key, array in arrays.items())
    if size > _MOST_BYTES:
        raise ConfigError(
            f"{name}: expected at most {_MOST_BYTES} bytes, as an .onnx_adapter file can hold, got {size}; "
            "choose another --form"
        )
    return size


def write_parameters(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write a new `.onnx_adapter` file, without a document.

    Args:
        arrays: of float16 or float32, by the names of the graph's inputs; `check_size` lets them pass.

    Raises OSError: it cannot be written. onnxruntime does not tell why.
    """
    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(1)
    content.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    )
    try:
        content.export_adapter(str(path))
    except RuntimeError as error:
        reason = "onnxruntime has failed to write it; is the disk full?"
        raise OSError(errno.EIO, reason, str(path)) from error


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """What stands after the parameters of a file that has this document."""
    text = json.dumps(document).encode()
    return text + _LENGTH.pack(len(text)) + _MARK
