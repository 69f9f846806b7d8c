"""From a request to its response, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from .errors import GONE, RequestError
from .forms import FinishReason, Form, Head, Object, Usage
from .job import Job
from .json_body import read_body
from .rows import Piece
from .service import Prepared, Service
from .streams import DONE, EventStream, event
from .watch import Record, record_of


async def respond(service: Service, form: Form, request: Request) -> Response:
    """The response to a request for completions or for a chat's next turn.

    Raises RequestError: nothing can be answered.
    """
    record = record_of(request.scope)
    service.require_ready()
    job = Job(service.settings.timeout)
    try:
        async with asyncio.timeout_at(job.deadline):
            body = await read_body(request, service.settings.max_body_bytes)
            prepared = await asyncio.get_running_loop().run_in_executor(
                service.preparing, service.prepare, form, body, job
            )
    except TimeoutError as error:
        raise job.too_late() from error
    record.task = prepared.asked.model
    service.require_ready()
    service.scheduler.submit(prepared.rows)
    record.prompt_tokens = prepared.prompt_tokens
    exchange = _Exchange(service, form, prepared, job, record)
    watcher = asyncio.create_task(_watch(request.receive, job))

    def close() -> None:
        watcher.cancel()
        service.scheduler.cancel(prepared.rows)

    with ExitStack() as stack:
        stack.callback(close)
        if not prepared.asked.stream:
            return await exchange.whole()
        # A stream begins with the first token: what fails before that is an error with a status of its own.
        events = await exchange.events()
        return EventStream(events, job.deadline, stack.pop_all().close)


async def _watch(receive: Receive, job: Job) -> None:
    """Tell when the client goes away: the body has been read, and nothing else can come."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.leave()


class _Exchange:
    """One request whose prompts wait for their answers."""

    def __init__(self, service: Service, form: Form, prepared: Prepared, job: Job, record: Record) -> None:
        self._form = form
        self._asked = prepared.asked
        self._count = len(prepared.rows)
        self._head = Head(f"{form.prefix}{record.id}", int(time.time()), prepared.asked.model)
        self._record = record
        self._tokens = [0] * self._count
        self._pieces = job.events(self._count)

    async def whole(self) -> Response:
        """The response with the whole answers. Raises RequestError: one fails."""
        texts: list[list[str]] = [[] for _ in range(self._count)]
        reasons: list[FinishReason] = ["length"] * self._count
        async for piece in self._counted():
            texts[piece.index].append(piece.text)
            if piece.reason is not None:
                reasons[piece.index] = piece.reason
        choices = [
            self._form.choice(index, "".join(text), reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return JSONResponse(self._head.object(self._form.whole, choices, usage=self._usage))

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as events, once a token has come. Raises RequestError: one fails before."""
        pieces = self._counted()
        return self._events(await anext(pieces), pieces)

    async def _events(self, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        openings = map(self._form.opening, range(self._count))
        for opening in openings:
            if opening is not None:
                yield self._chunk([opening])
        piece: Piece | None = first
        try:
            while piece is not None:
                for choice in self._choices(piece):
                    yield self._chunk([choice])
                piece = await anext(pieces, None)
        except RequestError as error:
            if error.status != GONE:
                yield event(error.body)
            self._record.status = error.status
            return
        if self._asked.include_usage:
            yield self._chunk([], self._usage)
        yield DONE

    def _choices(self, piece: Piece) -> list[Object]:
        """A piece in the response's objects: its text, if it has any, and why the answer ends, if it does."""
        index, text, reason = piece.index, piece.text, piece.reason
        found = [self._form.piece(index, text, None)] if text else []
        if reason is not None:
            found.append(self._form.piece(index, "", reason))
        return found

    def _chunk(self, choices: list[Object], usage: Object | None = None) -> bytes:
        kind = self._form.chunk
        if not self._asked.include_usage:
            return event(self._head.object(kind, choices))
        return event(self._head.object(kind, choices, usage=usage))

    @property
    def _usage(self) -> Object:
        return Usage(self._record.prompt_tokens, sum(self._tokens)).body

    async def _counted(self) -> AsyncIterator[Piece]:
        """The pieces, counted."""
        async for piece in self._pieces:
            if self._record.first_token is None:
                self._record.first_token = time.monotonic() - self._record.started
            self._tokens[piece.index] = piece.tokens
            self._record.answer_tokens = sum(self._tokens)
            yield piece
