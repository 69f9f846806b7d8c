"""One request that is being answered, as the event loop sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from .errors import GONE, RequestError
from .rows import Event, Piece


class Job:
    """Takes what the worker says of a request's prompts, and hands it to the request.

    Made in the event loop. `send` may be called by any thread.

    Args:
        seconds: from when on the request is ended with 504.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self.deadline = self._loop.time() + seconds
        self._seconds = seconds

    def send(self, event: Event) -> None:
        """Take an event."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def leave(self) -> None:
        """The client is gone."""
        self._queue.put_nowait(RequestError(GONE, "the client is gone"))

    async def events(self, answers: int) -> AsyncIterator[Piece]:
        """All pieces of as many answers, as they come.

        Raises RequestError: an answer fails, the time is over, or the client is gone.
        """
        while answers:
            try:
                async with asyncio.timeout_at(self.deadline):
                    event = await self._queue.get()
            except TimeoutError as error:
                raise self.too_late() from error
            if isinstance(event, RequestError):
                raise event
            if event.reason is not None:
                answers -= 1
            yield event

    def too_late(self) -> RequestError:
        """The request took too long."""
        return RequestError(
            504, f"the request took more than the {self._seconds:g} seconds that it may take", code="timeout"
        )
