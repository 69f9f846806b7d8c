"""The pages of a model's data files that a process holds, and need not.

onnxruntime maps weights, and lays most of them out anew: the mapped ones are read once and stay. A tied
embedding is such a weight: a session needs a few rows of it, and has a whole copy as its output layer.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(\S.*)")


def release_mapped(folder: Path) -> int:
    """Let go of the pages of a folder's files that are mapped into this process; return the bytes that were
    resident.

    What is needed again is read again, from the system's cache of the file. A mapping that has been written
    to is left alone. Where the system does not tell what is mapped (it is not Linux), nothing happens.
    """
    if not _MAPS.is_file() or not hasattr(mmap, "MADV_DONTNEED"):
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    released = 0
    for start, stop, resident in list(_clean_mappings(folder.resolve())):
        if resident and advise(start, stop - start, mmap.MADV_DONTNEED) == 0:
            released += resident
    return released


def _clean_mappings(folder: Path) -> Iterator[tuple[int, int, int]]:
    """First byte, end and resident bytes of each mapping of a folder's file that holds the file's own bytes
    alone."""
    place: tuple[int, int] | None = None
    resident = 0
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if found := _MAPPING.fullmatch(line):
            inside = Path(found[3]).parent == folder
            place = (int(found[1], 16), int(found[2], 16)) if inside else None
        elif place is not None and line.startswith("Rss:"):
            resident = _bytes(line)
        elif place is not None and line.startswith("Anonymous:") and _bytes(line) == 0:
            yield (*place, resident)


def _bytes(line: str) -> int:
    """`Rss:   12 kB` -> 12288."""
    return int(line.split()[1]) * 1024
