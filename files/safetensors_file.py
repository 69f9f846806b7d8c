"""One safetensors file, mapped into memory: tensors are views of the file, never copies.

Source: the safetensors format, 8 bytes of little-endian header length, a JSON header, the tensors' bytes.
"""

import hashlib
import math
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from loracle.reference import FileError

from .json_file import MAX_BYTES, check_regular_file, parse_json_object
from .mapped_view import MappedView, read_ahead

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""The format's names of dtypes and NumPy's."""

LENGTH_BYTES = 8
_PROBE_BYTES = 64
_MOST_AXES = 32  # of an array, in every version of NumPy


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: dtype, shape, and first byte in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


class SafetensorsFile:
    """A read-only view of one safetensors file.

    Attributes:
        path: the file.
        entries: tensor name to entry, in the order of the tensors' bytes.
        metadata: the header's ``__metadata__``, strings to strings.

    Raises:
        FileError: the file is missing, is no safetensors file by the library's own validation (header length,
            JSON, dtypes, offsets without holes and overlaps), or has a dtype or a shape that NumPy has not.
    """

    def __init__(self, path: Path) -> None:
        check_regular_file(path)
        self.path = path
        try:
            with safe_open(path, framework="np"):  # validates, reads no tensor
                pass
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except SafetensorError as error:
            raise FileError(f"{path}: not a safetensors file ({error}); download or save it again") from None
        except (OSError, ValueError) as error:
            raise FileError(f"{path}: cannot be read ({error}); check the file") from None
        length = int.from_bytes(self._bytes[:LENGTH_BYTES], "little")
        if length > min(MAX_BYTES, len(self._bytes) - LENGTH_BYTES):
            raise FileError(f"{path}: header of {length} bytes does not fit the file; download it again")
        start = LENGTH_BYTES + length
        self._header_end = start
        header = parse_json_object(self._bytes[LENGTH_BYTES:start], f"{path} (header)")
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        entries = {name: self._entry(name, header[name], start) for name in header}
        by_offset = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes))
        self.entries: dict[str, TensorEntry] = dict(by_offset)

    def tensor(self, name: str) -> NDArray[Any]:
        """Return the tensor as a read-only array over the mapped file; KeyError when there is none."""
        entry = self.entries[name]
        return np.ndarray(entry.shape, entry.dtype, buffer=self._bytes, offset=entry.offset)

    def view(self, name: str) -> MappedView:
        """Return where the tensor lies; KeyError when there is none."""
        entry = self.entries[name]
        return MappedView(self.path, entry.offset, entry.shape, self.tensor(name).strides, entry.dtype)

    def expect(self, name: str) -> None:
        """Have the system read the tensor ahead, in the background."""
        entry = self.entries[name]
        read_ahead(self._bytes, entry.offset, entry.nbytes)

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from this process; they are read again when needed."""
        entry = self.entries[name]
        first = -(-entry.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (entry.offset + entry.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED, first, whole)

    @property
    def nbytes(self) -> int:
        """The file's bytes."""
        return len(self._bytes)

    def fingerprint(self) -> str:
        """Return what tells the file from another with the same tensors: the SHA-256 of the header, and of 64
        bytes at the beginning, in the middle and at the end of each tensor. Most of the file is not read."""
        digest = hashlib.sha256(self._bytes[: self._header_end])
        for entry in self.entries.values():
            last = entry.offset + max(0, entry.nbytes - _PROBE_BYTES)
            for start in (entry.offset, (entry.offset + last) // 2, last):
                digest.update(self._bytes[start : min(start + _PROBE_BYTES, entry.offset + entry.nbytes)])
        return digest.hexdigest()

    def _entry(self, name: str, described: Any, start: int) -> TensorEntry:
        try:
            code, shape, (begin, end) = (
                described["dtype"],
                tuple(described["shape"]),
                described["data_offsets"],
            )
        except (TypeError, KeyError, ValueError):
            raise FileError(
                f"{self.path}: malformed header entry of {name}; download the file again"
            ) from None
        if code not in DTYPES:
            known = ", ".join(DTYPES)
            raise FileError(
                f"{self.path}: {name} has dtype {code}, expected one of {known}; convert the checkpoint"
            )
        entry = TensorEntry(DTYPES[code], shape, start + begin)
        # without an entry a tensor may have sizes whose product no array has
        if (
            len(shape) > _MOST_AXES
            or math.prod(size or 1 for size in shape) * entry.dtype.itemsize > sys.maxsize
        ):
            raise FileError(
                f"{self.path}: {name} has a shape of {len(shape)} axes that no array has; download it again"
            )
        # the library has checked this on the same path; the mapping is another reading of it
        if entry.nbytes != end - begin or start + end > len(self._bytes):
            raise FileError(f"{self.path}: {name} does not lie within the file; download the file again")
        return entry
