"""A response of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"

# Seconds beyond a request's time in which a client must take what has been written for it.
_PATIENCE = 10.0


def event(value: Any) -> bytes:
    """An object as one event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Events that are sent as they come.

    Args:
        events: whole events.
        deadline: on the event loop's clock; a client that has not taken them soon after it is cut off.
        close: called when the last one is sent, and when none can be any more.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], deadline: float, close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._deadline = deadline
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; see ASGI."""
        try:
            async with asyncio.timeout_at(self._deadline + _PATIENCE):
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
                async for events in self._events:
                    await send({"type": "http.response.body", "body": events, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return  # without an end, so that the server closes the connection
        finally:
            self._close()
