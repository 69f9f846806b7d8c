"""What a held system call is about to do to which file, read out of the process that makes it."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Literal

from .notifications import WRITING, Notification

Kind = Literal[
    *("open", "read", "write", "truncate", "flush"),
    *("rename", "mkdir", "rmdir", "unlink", "link", "symlink", "other"),
]
_HERE = -100  # AT_FDCWD
_REMOVE_FOLDER = 0x200  # AT_REMOVEDIR
_WRITES_TO_MAP = 2  # PROT_WRITE


@dataclass(frozen=True)
class Call:
    """A change of the disk, or a wait for it.

    Attributes:
        kind: "open" is for writing, "read" for reading, "flush" an fsync, "other" what else changes a file.
        name: the system call's.
        path: absolute, no link among its parents.
        to: the other path of a rename or a link.
        data: what is written, from `offset` on.
        offset: of a truncation the new length.
        creates: whether an open makes the file where it is not there.
        empties: whether an open truncates it.
        descriptor: what is written to.
    """

    kind: Kind
    name: str
    path: str
    to: str = ""
    data: bytes = b""
    offset: int = 0
    creates: bool = False
    empties: bool = False
    descriptor: int = -1


def decode(held: Notification) -> Call | None:
    """The call; None where no file on a disk is concerned: pipes, sockets, devices, files without a name."""
    name, a = held.name, held.arguments
    reader = _Reader(held.thread)
    if name in ("open", "openat", "creat"):
        at = 1 if name == "openat" else 0
        flags = WRITING if name == "creat" else a[at + 1]
        path = reader.path(_HERE if at == 0 else _signed(a[0]), a[at])
        kind: Kind = "open" if flags & WRITING else "read"
        made, emptied = bool(flags & os.O_CREAT), bool(flags & os.O_TRUNC)
        return _on_disk(Call(kind, name, path, creates=made, empties=emptied))
    if name in ("write", "pwrite64", "writev", "sendfile", "copy_file_range"):
        return _written(name, a, reader)
    if name in ("fsync", "fdatasync"):
        return _on_disk(Call("flush", name, reader.opened(a[0])))
    if name == "ftruncate":
        return _on_disk(Call("truncate", name, reader.opened(a[0]), offset=a[1]))
    if name == "truncate":
        return _on_disk(Call("truncate", name, reader.path(_HERE, a[0]), offset=a[1]))
    if name in ("rename", "link"):
        return _on_disk(Call(name, name, reader.path(_HERE, a[0]), reader.path(_HERE, a[1])))
    if name in ("renameat", "renameat2", "linkat"):
        one, other = reader.path(_signed(a[0]), a[1]), reader.path(_signed(a[2]), a[3])
        return _on_disk(Call("link" if name == "linkat" else "rename", name, one, other))
    if name in ("mkdir", "rmdir", "unlink"):
        return _on_disk(Call(name, name, reader.path(_HERE, a[0])))
    if name == "mkdirat":
        return _on_disk(Call("mkdir", name, reader.path(_signed(a[0]), a[1])))
    if name == "unlinkat":
        path = reader.path(_signed(a[0]), a[1])
        return _on_disk(Call("rmdir" if a[2] & _REMOVE_FOLDER else "unlink", name, path))
    if name == "mmap":
        descriptor = _signed(a[4])
        if descriptor < 0 or not a[2] & _WRITES_TO_MAP:
            return None
        return _on_disk(Call("other", name, reader.opened(descriptor)))
    return Call("other", name, f"/{name}")


def _written(name: str, a: tuple[int, ...], reader: _Reader) -> Call | None:
    descriptor = a[2] if name == "copy_file_range" else a[0]
    path = reader.opened(descriptor)
    if _on_disk(Call("write", name, path)) is None:
        return None
    offset = reader.position(descriptor)
    if name == "writev":
        vector = reader.memory(a[1], 16 * a[2])
        data = b"".join(reader.memory(*struct.unpack_from("QQ", vector, 16 * at)) for at in range(a[2]))
    elif name == "sendfile":
        data = reader.content(a[1], a[2], a[3])
    elif name == "copy_file_range":
        data = reader.content(a[0], a[1], a[4])
        offset = reader.number(a[3]) if a[3] else offset
    else:
        data = reader.memory(a[1], a[2])
        offset = a[3] if name == "pwrite64" else offset
    return Call("write", name, path, data=data, offset=offset, descriptor=descriptor)


def _on_disk(call: Call) -> Call | None:
    path = call.path
    if (
        not path.startswith("/")
        or path.endswith(" (deleted)")
        or path.startswith(("/dev/", "/proc/", "/sys/"))
    ):
        return None
    return call


def _signed(argument: int) -> int:
    value = argument & 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


class _Reader:
    """Memory and files of a thread that waits."""

    def __init__(self, thread: int) -> None:
        self._of = f"/proc/{thread}"

    def memory(self, address: int, size: int) -> bytes:
        if not size:
            return b""
        descriptor = os.open(f"{self._of}/mem", os.O_RDONLY)
        try:
            return os.pread(descriptor, size, address)
        finally:
            os.close(descriptor)

    def number(self, address: int) -> int:
        return int.from_bytes(self.memory(address, 8), "little")

    def path(self, folder: int, address: int) -> str:
        text = os.fsdecode(self.memory(address, 4096).partition(b"\0")[0])
        if not text.startswith("/"):
            start = os.readlink(f"{self._of}/cwd") if folder == _HERE else self.opened(folder)
            text = os.path.join(start, text)
        return os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))

    def opened(self, descriptor: int) -> str:
        return os.readlink(f"{self._of}/fd/{descriptor & 0xFFFFFFFF}")

    def position(self, descriptor: int) -> int:
        with open(f"{self._of}/fdinfo/{descriptor & 0xFFFFFFFF}") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        if int(fields["flags"], 8) & os.O_APPEND:
            return os.stat(f"{self._of}/fd/{descriptor}").st_size
        return int(fields["pos"])

    def content(self, descriptor: int, start: int, size: int) -> bytes:
        """Bytes of a file that is read, from where an address says, or from where it has come to."""
        offset = self.number(start) if start else self.position(descriptor)
        with open(f"{self._of}/fd/{descriptor}", "rb") as file:
            file.seek(offset)
            return file.read(size)
