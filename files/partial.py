"""Output under way: a temporary sibling of its destination, locked for as long as its process lives.

A process that is killed leaves its sibling behind, without the lock; the next that writes to the same
destination removes it. Where the file system has no locks, nothing is taken for left behind.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .lock import try_lock

# A part of the name is enough to recognise it by, and keeps long names within the file system's limit.
_NAME_LENGTH = 32
_TOKEN_BYTES = 8


@contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """Yield a new empty folder beside ``final``; when the block ends, it is removed unless it was renamed.

    Raises OSError where the parent cannot be written.
    """
    own = _Own()
    try:
        yield _make(own, final, _new_folder)
    finally:
        try:
            for path in own.paths:
                shutil.rmtree(path, ignore_errors=True)  # an error of the block is the one to report
        finally:
            own.close()


@contextmanager
def partial_file(final: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield the path of a new file beside ``final`` and the file, open for writing; as `partial_folder`."""
    own = _Own()
    try:
        path = _make(own, final, _new_file)
        with open(own.descriptor, "wb", closefd=False) as file:
            yield path, file
    finally:
        try:
            for path in own.paths:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        finally:
            own.close()


def remove_abandoned(final: Path) -> None:
    """Remove the siblings of ``final`` that killed processes have left; what cannot be removed stays."""
    start = re.escape(f".{final.name[:_NAME_LENGTH]}.")
    pattern = re.compile(rf"{start}[0-9a-f]{{{2 * _TOKEN_BYTES}}}\.partial")
    with suppress(OSError):
        for name in os.listdir(final.parent):
            if pattern.fullmatch(name):
                with suppress(OSError):
                    _remove_unless_held(final.parent / name)


def discard(path: Path) -> None:
    """Remove a folder, whole in one step: it is renamed first. What cannot be removed stays.

    What a killed process leaves of it has a sibling's name, and is removed by `remove_abandoned`.
    """
    with suppress(OSError):
        gone = _sibling(path)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def is_at(descriptor: int, path: Path) -> bool:
    """Tell whether an open file or folder is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _sibling(final: Path) -> Path:
    return final.parent / f".{final.name[:_NAME_LENGTH]}.{secrets.token_hex(_TOKEN_BYTES)}.partial"


class _Own:
    """What is being made: names are noted before they are there, so that whoever makes them can remove them
    whenever Ctrl-C comes."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.descriptor = -1

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _make(own: _Own, final: Path, create: Callable[[Path], int]) -> Path:
    while True:
        path = _sibling(final)
        own.paths.append(path)
        with suppress(FileNotFoundError):
            own.descriptor = create(path)
            # between its making and its locking another process may have taken it for left behind
            if try_lock(own.descriptor) is not False and is_at(own.descriptor, path):
                return path
            own.close()
        if not final.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(final.parent))


def _new_folder(path: Path) -> int:
    os.mkdir(path)
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        with suppress(OSError):
            os.rmdir(path)
        raise


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _remove_unless_held(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        kind = os.fstat(descriptor).st_mode
        if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
            return
        # a sibling that became the destination meanwhile is at another path
        if try_lock(descriptor) and is_at(descriptor, path):
            if stat.S_ISDIR(kind):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    finally:
        os.close(descriptor)
