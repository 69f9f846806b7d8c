"""A safetensors file written front to back: the whole header first, then one tensor after the other.

Source: the safetensors format, 8 bytes of little-endian header length, a JSON header padded with spaces to a
multiple of 8, the tensors' bytes without holes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loracle.reference import DTypeError

from .safetensors_file import DTYPES, LENGTH_BYTES

Layout = Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]]
"""Name, dtype and shape of each tensor, in the order of their bytes."""


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: Any, /) -> Any: ...


_CODES = {dtype: code for code, dtype in DTYPES.items()}


def safetensors_header(
    layout: Layout, metadata: Mapping[str, str], *, alignment: int = LENGTH_BYTES
) -> bytes:
    """Return everything that precedes the first tensor's bytes: a multiple of ``alignment``, itself one of 8.

    Raises:
        DTypeError: the format has no name for a dtype.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in layout:
        if dtype not in _CODES:
            raise DTypeError(f"{name}: safetensors has no dtype {dtype}; convert the tensor")
        end = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % alignment)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def write_array(file: Sink, array: NDArray[Any]) -> None:
    """Write the array's elements in C order; nothing is copied when they lie that way already."""
    contiguous = np.ascontiguousarray(array).reshape(-1)
    file.write(contiguous.view(np.uint8).data)


def write_safetensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a new file of a few tensors: in the mapping's order, with the same bytes for the same input.

    Raises:
        DTypeError: the format has no name for a dtype.
        OSError: ``path`` exists or cannot be written.
    """
    layout = [(name, array.dtype, array.shape) for name, array in tensors.items()]
    header = safetensors_header(layout, metadata or {})
    with path.open("xb") as file:
        file.write(header)
        for array in tensors.values():
            write_array(file, array)
