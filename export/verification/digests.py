"""SHA-256 of the files of a verification's inputs, computed while their tensors are compared."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loracle.files.json_file import check_regular_file
from loracle.reference import FileError

_BLOCK_BYTES = 1 << 20
_THREADS = 2


@dataclass(frozen=True)
class FileDigest:
    """One file: its name in the folder that was given, its size, and its SHA-256 in hexadecimal digits."""

    name: str
    size: int
    sha256: str

    def line(self) -> bytes:
        """What `sha256sum` prints of the file, with the end of the line."""
        name = self.name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        mark = "" if name == self.name else "\\"
        return f"{mark}{self.sha256}  ".encode() + os.fsencode(name) + b"\n"

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return {"name": self.name, "bytes": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class InputFiles:
    """Where the files of one input of a verification are.

    Attributes:
        role: "base", "adapter" or "candidate".
        kind: "checkpoint", "onnx", "task" or "adapter".
        path: as it was given.
        files: their names in the folder that was given, or that the given file lies in, and where they are.
    """

    role: str
    kind: str
    path: str
    files: Mapping[str, Path]


@dataclass(frozen=True)
class InputDigest:
    """One input of a verification, by the content of its files; else as `InputFiles`."""

    role: str
    kind: str
    path: str
    files: tuple[FileDigest, ...]

    @property
    def name(self) -> str:
        """The path's last component."""
        return Path(os.path.abspath(self.path)).name or self.path

    @property
    def size(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)

    @property
    def sha256(self) -> str:
        """Of all files: the SHA-256 of the lines `sha256  name` that `sha256sum` prints of them, sorted."""
        return hashlib.sha256(b"".join(sorted(file.line() for file in self.files))).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The fields and what follows from them."""
        return {
            "name": self.name,
            "path": self.path,
            "kind": self.kind,
            "bytes": self.size,
            "sha256": self.sha256,
            "files": [file.to_json() for file in self.files],
        }


class Digests:
    """Digests files in threads: a context manager. A file of several inputs is read once.

    Where the block ends before all is read, by an error or by Ctrl-C, reading ends with it.

    Args:
        threads: how many files are read at a time.
    """

    def __init__(self, threads: int = _THREADS) -> None:
        self._threads = threads

    def __enter__(self) -> Self:
        self._left = threading.Event()
        self._pool = ThreadPoolExecutor(self._threads)
        self._running: dict[Hashable, Future[tuple[int, str]]] = {}
        self._inputs: list[tuple[InputFiles, dict[str, Future[tuple[int, str]]]]] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._pool.shutdown(cancel_futures=True)

    def add(self, own: InputFiles) -> None:
        """Begin to read an input's files, each in blocks, whatever its size."""
        self._inputs.append((own, {name: self._start(path) for name, path in own.files.items()}))

    def wait(self) -> tuple[InputDigest, ...]:
        """Return the digests of all inputs, in the order in which they were added, when they are done.

        Raises FileError: a file is missing, cannot be read, or is no regular file.
        """
        return tuple(
            InputDigest(
                own.role,
                own.kind,
                own.path,
                tuple(FileDigest(name, *future.result()) for name, future in futures.items()),
            )
            for own, futures in self._inputs
        )

    def _start(self, path: Path) -> Future[tuple[int, str]]:
        place: Hashable = path
        with suppress(OSError, ValueError):  # reported where the file is opened
            status = os.stat(path)
            place = status.st_dev, status.st_ino
        if place not in self._running:
            self._running[place] = self._pool.submit(_digest, path, self._left)
        return self._running[place]


def _digest(path: Path, left: threading.Event) -> tuple[int, str]:
    """Size and SHA-256 of a file; nobody asks for them once the block is left."""
    check_regular_file(path)
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_BLOCK_BYTES)
    try:
        with path.open("rb") as file:
            while not left.is_set() and (read := file.readinto(buffer)):
                digest.update(memoryview(buffer)[:read])
                size += read
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    return size, digest.hexdigest()
