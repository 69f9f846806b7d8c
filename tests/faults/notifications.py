"""System calls of a child process, held until its parent answers them: seccomp's user notifications.

Unlike functions put in the place of Python's, nothing passes by them: calls of C code (matplotlib's images,
safetensors, protobuf) and of every thread are seen too. Linux on x86-64 alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from dataclasses import dataclass

_ARCHITECTURE = 0xC000003E  # AUDIT_ARCH_X86_64
_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER = 317, 1, 1 << 3
_SET_NO_NEW_PRIVS = 38
_RECEIVE, _ANSWER, _VALID = 0xC0502100, 0xC0182101, 0x40082102
_CONTINUE = 1
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NAMES = {
    **{
        1: "write",
        18: "pwrite64",
        20: "writev",
        40: "sendfile",
        74: "fsync",
        75: "fdatasync",
        76: "truncate",
    },
    **{77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link", 87: "unlink"},
    **{88: "symlink", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 265: "linkat", 266: "symlinkat"},
    **{316: "renameat2", 326: "copy_file_range", 2: "open", 257: "openat"},
    # Other ways to change files. None of them is used; one that is used is a fault of the harness.
    **{26: "msync", 133: "mknod", 162: "sync", 275: "splice", 276: "tee", 277: "sync_file_range"},
    **{278: "vmsplice", 285: "fallocate", 296: "pwritev", 304: "open_by_handle_at", 306: "syncfs"},
    **{328: "pwritev2", 259: "mknodat", 425: "io_uring_setup", 437: "openat2", 206: "io_setup", 9: "mmap"},
    # What is said about a file.
    **{90: "chmod", 91: "fchmod", 92: "chown", 93: "fchown", 94: "lchown", 132: "utime", 235: "utimes"},
    **{260: "fchownat", 261: "futimesat", 268: "fchmodat", 280: "utimensat", 452: "fchmodat2"},
    **{188: "setxattr", 189: "lsetxattr", 190: "fsetxattr", 197: "removexattr", 198: "lremovexattr"},
}
"""Every system call by which a file or folder can be changed, by its number."""

# Of these only some calls are of interest: the argument, and the bits of it that make them so.
_ONLY_WITH = {"open": (1, WRITING), "openat": (2, WRITING), "mmap": (3, 1)}  # 1: MAP_SHARED


@dataclass(frozen=True)
class Notification:
    """A call that waits for its answer: of which thread, its name and arguments."""

    key: int
    thread: int
    name: str
    arguments: tuple[int, ...]


def available() -> str | None:
    """Why system calls cannot be held on this machine; None where they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"system calls are held on Linux on x86-64 alone, this is {platform.platform()}"
    child = os.fork()
    if not child:
        try:
            listen()
        except OSError:
            os._exit(1)
        os._exit(0)
    return (
        None if os.waitpid(child, 0)[1] == 0 else "the kernel has no seccomp notifications for this process"
    )


def listen(*, reads: bool = False) -> int:
    """Hold the calls in `NAMES` of this thread, and of those that it starts; return where they are received.

    There is no way back: for a process that ends soon. Raises OSError where the kernel does not let it.

    Args:
        reads: whether files that are opened to be read are held too.
    """
    program = b"".join(_program(reads=reads))
    buffer = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    listener = libc.syscall(
        ctypes.c_long(_SECCOMP),
        ctypes.c_long(_SET_MODE_FILTER),
        ctypes.c_long(_NEW_LISTENER),
        ctypes.c_char_p(filter_),
    )
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


def _program(*, reads: bool) -> list[bytes]:
    """The filter, in the kernel's instructions."""

    def instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("HBBI", code, then, otherwise, value)

    program = [
        instruction(_LOAD, _ARCH),
        instruction(_EQUAL, _ARCHITECTURE, 1, 0),
        instruction(_RETURN, _ALLOW),
        instruction(_LOAD, _NUMBER),
    ]
    for number, name in NAMES.items():
        if name in _ONLY_WITH and not (reads and name != "mmap"):
            argument, bits = _ONLY_WITH[name]
            program += [
                instruction(_EQUAL, number, 0, 4),
                instruction(_LOAD, _ARGUMENTS + 8 * argument),
                instruction(_ANY_BIT, bits, 1, 0),
                instruction(_RETURN, _ALLOW),
                instruction(_RETURN, _NOTIFY),
            ]
        else:
            program += [instruction(_EQUAL, number, 0, 1), instruction(_RETURN, _NOTIFY)]
    return [*program, instruction(_RETURN, _ALLOW)]


def receive(listener: int) -> Notification | None:
    """The next call; None where it has gone meanwhile, with its process or by a signal."""
    data = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, data)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    key, thread, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", data)
    return Notification(key, thread, NAMES[number], tuple(arguments))


def let(listener: int, held: Notification) -> None:
    """Let a call happen."""
    _answer(listener, struct.pack("QqiI", held.key, 0, 0, _CONTINUE))


def fail(listener: int, held: Notification, code: int) -> None:
    """Let a call end with an error, without an effect."""
    _answer(listener, struct.pack("QqiI", held.key, 0, -code, 0))


def give(listener: int, held: Notification, value: int) -> None:
    """Let a call end with a value, without an effect."""
    _answer(listener, struct.pack("QqiI", held.key, value, 0, 0))


def waits(listener: int, held: Notification) -> bool:
    """Whether a call still waits for its answer."""
    try:
        fcntl.ioctl(listener, _VALID, struct.pack("Q", held.key))
    except OSError:
        return False
    return True


def _answer(listener: int, answer: bytes) -> None:
    try:
        fcntl.ioctl(listener, _ANSWER, answer)
    except OSError as error:
        if error.errno != errno.ENOENT:  # the process has ended, or a signal came in between
            raise
