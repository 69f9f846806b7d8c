"""Arrays that lie in a mapped file, described so that another process can map them too."""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import FileError

from .json_file import check_regular_file


@dataclass(frozen=True)
class MappedView:
    """A part of a file as an array of any strides.

    Attributes:
        path: the file. offset: of the array's first entry, in bytes.
        shape, strides: as of an array, strides in bytes and not negative.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def within(view: NDArray[Any], whole: NDArray[Any], path: Path, offset: int) -> MappedView | None:
        """Describe a view of ``whole``, the contiguous array that the file at ``path`` holds at ``offset``.

        None where it is no view of it, but a copy or another array.
        """
        distance = view.ctypes.data - whole.ctypes.data
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        inside = distance >= 0 and distance + last + view.itemsize <= whole.nbytes
        if not view.size or not inside or any(stride < 0 for stride in view.strides):
            return None
        return MappedView(path, offset + distance, view.shape, view.strides, view.dtype)

    def open(self, *, soon: bool = False) -> NDArray[Any]:
        """Map it, read-only. The mapping ends with the last array on it.

        Args:
            soon: have the system read it ahead, in the background.

        Raises:
            FileError: the file is not there, or too short.
        """
        check_regular_file(self.path)
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        skipped = self.offset % mmap.ALLOCATIONGRANULARITY
        length = skipped + last + self.dtype.itemsize
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self.offset + last + self.dtype.itemsize:
                raise FileError(f"{self.path}: too short for what it should hold; copy it again")
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=self.offset - skipped)
        if soon:
            read_ahead(mapped, 0, length)
        return np.ndarray(self.shape, self.dtype, mapped, skipped, self.strides)


def read_ahead(mapped: mmap.mmap, start: int, nbytes: int) -> None:
    """Have the system read a part of a mapped file in the background, where it takes such advice."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if nbytes and hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED, first, start + nbytes - first)
