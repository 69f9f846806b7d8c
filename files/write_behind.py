"""Writing while the next bytes are computed."""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread
from types import TracebackType
from typing import Any

from .safetensors_writer import Sink

LIMIT_BYTES = 64 * 2**20
"""The most bytes that wait to be written, unless one piece alone is larger."""


class WriteBehind:
    """A sink that hands what it is given, in order, to another one from a thread of its own.

    What is written must not change afterwards. Used in a ``with`` block, which ends when all is written.

    Args:
        sink: what is written to; nobody else may write to it meanwhile.
        limit: the most bytes in flight: `write` waits for room, or, for a larger piece, until none are.

    Raises:
        Whatever the sink raises: from the next `write`, or at the end of the block. Nothing is written after.
    """

    def __init__(self, sink: Sink, limit: int = LIMIT_BYTES) -> None:
        self._sink = sink
        self._limit = limit
        self._pieces: deque[memoryview] = deque()
        self._in_flight = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="write behind", daemon=True)

    def __enter__(self) -> WriteBehind:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            if error is not None:
                self._pieces.clear()
            self._changed.notify_all()
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def write(self, data: Any, /) -> int:
        """Take ``data`` to be written; return its bytes."""
        piece = memoryview(data).cast("B")
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._error is not None
                    or not self._in_flight
                    or self._in_flight + piece.nbytes <= self._limit
                )
            )
            if self._error is not None:
                raise self._error
            self._pieces.append(piece)
            self._in_flight += piece.nbytes
            self._changed.notify_all()
        return piece.nbytes

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._closed)
                if not self._pieces:
                    return
                piece = self._pieces.popleft()
            try:
                self._sink.write(piece)
            except BaseException as error:  # noqa: BLE001 - it is raised where the bytes came from
                with self._changed:
                    self._error = error
                    self._pieces.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._in_flight -= piece.nbytes
                self._changed.notify_all()
            del piece
