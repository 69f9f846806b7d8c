"""Work in a child process whose every change of the disk is held, and goes wrong where a test says."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from . import notifications
from .calls import Call, decode
from .notifications import Notification

Work = Callable[[], object]
How = Literal["done", "refused", "interrupted", "killed", "failed"]

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")
FAULTS = ("kill", "interrupt", "short", *ERRORS)
_TIMEOUT = 600.0
_FLOCK = "73 "
_NEEDS_ROOM = ("write", "mkdir", "link", "symlink")


@dataclass(frozen=True)
class Fault:
    """What goes wrong before which call, by its number.

    "kill" is SIGKILL, "interrupt" SIGINT, "short" a write of half the bytes into the last room of the disk;
    else an error's name. A full disk stays full, and a read-only one cannot be written from then on.
    """

    kind: str
    at: int


@dataclass(frozen=True)
class Ended:
    """How work ended, what it returned or the error said, and its calls, in the folder and elsewhere."""

    how: How
    message: str
    code: int
    calls: tuple[Call, ...]
    elsewhere: tuple[Call, ...]


class Child:
    """Work in a process of its own, which stops before each change of what is in ``root``, and with ``reads``
    before it opens a file there too."""

    def __init__(self, work: Work, root: str, *, reads: bool = False) -> None:
        self._root = f"{os.path.realpath(root)}/"
        self._held: Notification | None = None
        self.calls: list[Call] = []
        self._elsewhere: list[Call] = []
        self._socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            _work(work, theirs, reads=reads)
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
        (self._listener,) = descriptors
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)

    def next(self, *, may_wait: bool = False) -> Call | None:
        """The next change in the folder, held; None at the end, or where it waits for a lock and may."""
        end = time.monotonic() + _TIMEOUT
        while time.monotonic() < end:
            ready = self._poll.poll(20 if may_wait else 1000)
            if not ready and may_wait and self.waits_for_lock():
                return None
            if not ready:
                continue
            if not ready[0][1] & select.POLLIN:
                return None
            held = notifications.receive(self._listener)
            if held is None:
                continue
            call = decode(held)
            if call is None or not (f"{call.path}/".startswith(self._root) or call.to.startswith(self._root)):
                if call is not None:
                    self._elsewhere.append(call)
                notifications.let(self._listener, held)
                continue
            self._held = held
            self.calls.append(call)
            return call
        os.kill(self.pid, signal.SIGKILL)
        raise TimeoutError(f"no end after {_TIMEOUT} s; last: {self.calls[-1:]}")

    def waits_for_lock(self) -> bool:
        try:
            with open(f"/proc/{self.pid}/syscall") as file:
                return file.read().startswith(_FLOCK)
        except OSError:
            return False

    def let(self) -> None:
        """Let the held call happen."""
        assert self._held is not None
        notifications.let(self._listener, self._held)

    def fail(self, name: str) -> None:
        """Let the held call end with an error."""
        assert self._held is not None
        notifications.fail(self._listener, self._held, getattr(errno, name))

    def write_half(self) -> None:
        """Do half of the held write in its place."""
        assert self._held is not None
        call = self.calls[-1]
        half = len(call.data) // 2
        descriptor = os.open(f"/proc/{self._held.thread}/fd/{call.descriptor}", os.O_WRONLY)
        try:
            os.pwrite(descriptor, call.data[:half], call.offset)
        finally:
            os.close(descriptor)
        notifications.give(self._listener, self._held, half)

    def interrupt(self) -> None:
        """Ctrl-C while the call is held."""
        assert self._held is not None
        os.kill(self.pid, signal.SIGINT)
        if self._held.thread == self.pid:  # the call is given up for the signal
            for _ in range(1000):
                if not notifications.waits(self._listener, self._held):
                    return
                time.sleep(0.0001)
        self.let()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Ended:
        """Wait for the process, which makes no more calls."""
        report = self._socket.recv(1 << 16)
        os.waitpid(self.pid, 0)
        self._socket.close()
        os.close(self._listener)
        how, message, code = json.loads(report) if report else ("killed", "", -signal.SIGKILL)
        return Ended(how, message, code, tuple(self.calls), tuple(self._elsewhere))


def run(
    work: Work, root: str, fault: Fault | None = None, before: Callable[[int], None] | None = None
) -> Ended:
    """Do work to its end, with one fault or none; ``before`` is called before each call, with its number."""
    child = Child(work, root)
    at = -1
    while (call := child.next()) is not None:
        at += 1
        if before is not None:
            before(at)
        if fault is None or at < fault.at:
            child.let()
        elif at > fault.at:
            error = _lasting(fault.kind, call)
            child.fail(error) if error else child.let()
        elif fault.kind == "kill":
            child.kill()
        elif fault.kind == "interrupt":
            child.interrupt()
        elif fault.kind == "short":
            child.write_half() if call.kind == "write" and len(call.data) > 1 else child.fail("ENOSPC")
        else:
            child.fail(fault.kind)
    return child.end()


def _lasting(kind: str, call: Call) -> str | None:
    """The error that a call after the fault ends with too; None for none."""
    if kind in ("short", "ENOSPC", "EDQUOT"):
        wants = call.kind in _NEEDS_ROOM or (call.kind == "open" and call.creates)
        return None if not wants else "EDQUOT" if kind == "EDQUOT" else "ENOSPC"
    return "EROFS" if kind == "EROFS" and call.kind != "flush" else None


def _work(work: Work, to: socket.socket, *, reads: bool) -> None:
    """Do the work, say how it ended, and end the process."""
    from loracle.reference import LoracleError

    signal.signal(signal.SIGINT, signal.default_int_handler)
    how, message, code = "done", "", 0
    try:
        listener = notifications.listen(reads=reads)
        socket.send_fds(to, [b"."], [listener])
        os.close(listener)
        result = work()
        message = result if isinstance(result, str) else ""
    except LoracleError as error:
        how, message, code = "refused", str(error), error.exit_code
    except KeyboardInterrupt:
        how = "interrupted"
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told
        how, message = "failed", f"{type(error).__name__}: {error}"
    finally:
        to.send(json.dumps([how, message[:10_000], code]).encode())
        os._exit(0)
