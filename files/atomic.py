"""Output that is there whole or not at all.

Everything is written beside its destination under a temporary name, flushed to the disk, and renamed in one
step; whatever goes wrong before that step (an error, a full disk, Ctrl-C) removes what was written. What a
killed process has left is removed by the next that writes to the same destination (`partial.py`).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loracle.reference import FileError

from .partial import partial_file, partial_folder, remove_abandoned

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Tried(Exception):  # noqa: N818
    pass


@contextmanager
def output_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new empty folder that becomes ``path`` when the block ends without an exception.

    ``path`` may be absent or an empty folder; a symbolic link to one is followed. The folder yielded is a
    sibling of ``path``, so that the rename stays on one file system. Of two processes that write to one
    ``path`` at a time, the one that ends first succeeds.

    Raises:
        FileError: ``path`` exists and is not an empty folder, or is a mount point; its parent is missing, or
            the file system refuses a write (disk full, no permission). An OSError of the block is reported
            alike.
    """
    final = _destination(path)
    if os.path.lexists(final):
        _require_empty_folder(final)
        if os.path.ismount(final):
            raise _mounted(final)
    remove_abandoned(final)
    with reported(final), partial_folder(final) as temporary:
        yield temporary
        flush_tree(temporary)
        _rename_folder(temporary, final)
        flush_folder(final.parent)


def check_output_folder(path: str | os.PathLike[str]) -> None:
    """Refuse what `output_folder` would, before anything slow is done; nothing is left there.

    Raises:
        FileError: see `output_folder`.
    """
    with suppress(_Tried), output_folder(path):
        raise _Tried


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to the file at ``path``, replacing it in one step.

    Raises:
        FileError: ``path`` is a folder, its parent is missing, or the file system refuses the write.
    """
    final = _destination(path)
    if final.is_dir():
        raise FileError(f"{final}: expected a file, got a folder; choose another name")
    remove_abandoned(final)
    with reported(final), partial_file(final) as (temporary, file):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, final)
        flush_folder(final.parent)


def _destination(path: str | os.PathLike[str]) -> Path:
    try:
        final = Path(os.path.realpath(path))
        if os.path.isdir(final.parent):
            with suppress(FileNotFoundError):
                os.lstat(final)
            return final
    except (OSError, ValueError) as error:  # a name that is too long, or has a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileError(f"{path}: cannot be an output ({reason}); choose another name") from None
    raise FileError(f"{final}: the folder {final.parent} does not exist; create it or choose another path")


def _require_empty_folder(final: Path) -> None:
    try:
        empty = final.is_dir() and not any(final.iterdir())
    except OSError as error:
        raise FileError(f"{final}: cannot be read ({error.strerror}); choose another --out") from None
    if not empty:
        raise FileError(f"{final}: exists and is not empty; choose another --out or remove it")


def flush_tree(folder: Path) -> None:
    """Wait until a folder, and every file and folder in it, is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush(Path(parent, name))
        _flush(Path(parent))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can tell."""
    with suppress(OSError):  # the output is in place; some file systems cannot flush a folder
        _flush(folder)


def _rename_folder(temporary: Path, final: Path) -> None:
    try:
        os.rename(temporary, final)  # an empty folder is replaced, anything else is refused by the system
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            _require_empty_folder(final)
        if error.errno == errno.EBUSY:  # another path of the same file system is mounted there
            raise _mounted(final) from None
        raise


def _mounted(final: Path) -> FileError:
    return FileError(
        f"{final}: a mount point, which cannot get its content in one step; "
        f"choose a folder in it, such as {final / 'model'}"
    )


@contextmanager
def reported(final: Path) -> Iterator[None]:
    """Turn an OSError of the block into a FileError that names ``final``; nothing was written then."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise FileError(
                f"{final}: disk full ({error.strerror}); free some space, nothing was written"
            ) from None
        where = f" {error.filename}" if error.filename else ""
        raise FileError(
            f"{final}: cannot be written ({error.strerror or error}{where}); nothing was written"
        ) from None
