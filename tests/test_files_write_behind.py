"""Bytes written by a thread behind the one that makes them: in order, bounded, and no error lost."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from loracle.files.write_behind import WriteBehind


class Gate:
    """A sink that writes only when it is let."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.written: list[bytes] = []
        self.open = threading.Semaphore(0)
        self.fails_at = fails_at

    def write(self, data: Any) -> None:
        self.open.acquire()
        if len(self.written) == self.fails_at:
            raise OSError(28, "No space left on device")
        self.written.append(bytes(data))


def test_everything_is_written_in_order_by_the_end_of_the_block() -> None:
    sink = Gate()
    sink.open.release(100)
    with WriteBehind(sink, limit=5) as behind:
        for number in range(100):
            assert behind.write(bytes([number])) == 1
    assert b"".join(sink.written) == bytes(range(100))


def test_an_array_of_any_dtype_is_its_bytes() -> None:
    sink = Gate()
    sink.open.release()
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    with WriteBehind(sink) as behind:
        assert behind.write(array.data) == 12
    assert sink.written == [array.tobytes()]


def test_no_more_than_the_limit_is_in_flight() -> None:
    """Catches a bound that leaves out the piece that is being written."""
    sink = Gate()
    with WriteBehind(sink, limit=10) as behind:
        behind.write(b"x" * 6)
        behind.write(b"y" * 4)
        third = threading.Thread(target=behind.write, args=(b"z",))
        third.start()
        third.join(0.2)
        assert third.is_alive(), "ten bytes are in flight"
        sink.open.release()
        third.join(10)
        assert not third.is_alive()
        sink.open.release(2)
    assert sink.written == [b"x" * 6, b"y" * 4, b"z"]


def test_a_piece_above_the_limit_waits_for_all_before_it() -> None:
    sink = Gate()
    with WriteBehind(sink, limit=4) as behind:
        behind.write(b"abc")
        large = threading.Thread(target=behind.write, args=(b"d" * 9,))
        large.start()
        large.join(0.2)
        assert large.is_alive()
        sink.open.release()
        large.join(10)
        assert not large.is_alive()
        sink.open.release()
    assert sink.written == [b"abc", b"d" * 9]


def write_all(sink: Gate, *pieces: bytes, limit: int = 100) -> None:
    with WriteBehind(sink, limit) as behind:
        for piece in pieces:
            behind.write(piece)


@pytest.mark.parametrize("fails_at", [0, 1])
def test_the_sinks_error_comes_out_at_the_latest_at_the_end(fails_at: int) -> None:
    sink = Gate(fails_at=fails_at)
    sink.open.release(10)
    with pytest.raises(OSError, match="No space left"):
        write_all(sink, b"a", b"b")
    assert len(sink.written) == fails_at


def test_after_an_error_nothing_more_is_written() -> None:
    sink = Gate(fails_at=0)
    sink.open.release(10)
    with pytest.raises(OSError, match="No space left"):
        write_all(sink, b"a", b"b", b"c", limit=1)
    assert sink.written == []


def interrupted(sink: Gate) -> None:
    with WriteBehind(sink) as behind:
        behind.write(b"a")
        behind.write(b"b")
        sink.open.release(10)
        raise KeyError("merge")


def test_the_callers_own_error_ends_the_thread() -> None:
    sink = Gate()
    with pytest.raises(KeyError, match="merge"):
        interrupted(sink)
    assert b"".join(sink.written) in (b"", b"a", b"ab")
    assert not [thread for thread in threading.enumerate() if thread.name == "write behind"]
