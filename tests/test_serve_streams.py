"""A stream to a client that does not read is cut off, and what computes it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.types import Message

from loracle.serve.streams import EventStream, event


async def pieces() -> AsyncIterator[bytes]:
    yield b"one"
    yield b"two"


def test_an_event_is_one_line() -> None:
    assert event({"text": "a\n\u2028é😀"}) == 'data: {"text":"a\\n\u2028é😀"}\n\n'.encode()


@pytest.mark.parametrize("stuck_at", [0, 1, 2, None])
def test_a_client_that_does_not_read_is_left(stuck_at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracle.serve.streams._PATIENCE", 0.05)
    sent: list[Message] = []
    closed = []

    async def send(message: Message) -> None:
        if len(sent) == stuck_at:
            await asyncio.Event().wait()
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    async def respond() -> None:
        deadline = asyncio.get_running_loop().time()
        await EventStream(pieces(), deadline, lambda: closed.append(True))({}, receive, send)

    asyncio.run(respond())
    assert closed == [True]
    found = [(message.get("body"), message.get("more_body")) for message in sent]
    assert found == [(None, None), (b"one", True), (b"two", True), (b"", False)][:stuck_at]
