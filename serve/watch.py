"""Around every request: a name for it, a line in the log and a count, and never a word of a prompt."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics

LOG = logging.getLogger("loracle.serve")

MODEL_ROUTE = "/v1/models/"
_KEY = "loracle.record"


@dataclass
class Record:
    """What is known of a request so far.

    Attributes:
        task: of one that there is, what it is called; "" until then.
        status: HTTP's; 500 until a response begins.
        started: on the monotonic clock.
        first_token: seconds until it came; None until then.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(12))
    task: str = ""
    status: int = 500
    prompt_tokens: int = 0
    answer_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None


def record_of(scope: Scope) -> Record:
    """The record of a request."""
    record: Record = scope[_KEY]
    return record


class Watched:
    """Counts the requests of an application, and logs them."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; see ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self._app({**scope, _KEY: record}, receive, watched)
        finally:
            self._close(record, scope["path"])

    def _close(self, record: Record, path: str) -> None:
        route = path if path in self._routes else "other"
        if path.startswith(MODEL_ROUTE):
            route = f"{MODEL_ROUTE}{{model}}"
        seconds = time.monotonic() - record.started
        metrics = self._metrics
        metrics.requests.labels(route, str(record.status), record.task).inc()
        metrics.seconds.labels(route).observe(seconds)
        if record.task:
            metrics.prompt_tokens.labels(record.task).inc(record.prompt_tokens)
            metrics.answer_tokens.labels(record.task).inc(record.answer_tokens)
        if record.first_token is not None:
            metrics.first_token.labels(record.task).observe(record.first_token)
        LOG.info(
            "%s %s %s %d %d+%d tokens %.0f ms",
            *(record.id, route, record.task or "-", record.status),
            *(record.prompt_tokens, record.answer_tokens, 1e3 * seconds),
        )
