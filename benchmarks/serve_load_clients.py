"""The clients of `benchmarks.serve_load`: those that ask and read, and those that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from loracle.export.names import TASK_SUFFIX

from .serve_load_cases import Case, Expected

_JSON = {"Content-Type": "application/json"}
_SECONDS = 120.0


@dataclass(frozen=True)
class Answered:
    """A request that was answered.

    Attributes:
        at: when it ended, on the monotonic clock.
        seconds: it took.
        first: seconds until text came; None for one that was not streamed.
        tokens: of the answer.
        text: the answer.
    """

    case: Case
    at: float
    seconds: float
    first: float | None
    tokens: int
    text: str


@dataclass
class Seen:
    """What all clients have seen.

    Attributes:
        answered: the answers to those that ask and read.
        errors: what must not be.
        bad: how often the server was treated badly in which way, and answered as it should.
    """

    answered: list[Answered] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)


async def ask(client: httpx2.AsyncClient, case: Case, *, stream: bool) -> Answered:
    """One request. Raises RuntimeError for another answer than 200, or a stream that ends with an error."""
    began = time.monotonic()
    if not stream:
        response = await client.post(case.path, json=case.body())
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.text[:200]}")
        body = response.json()
        choice = body["choices"][0]
        text = choice["message"]["content"] if case.chat else choice["text"]
        ended = time.monotonic()
        return Answered(case, ended, ended - began, None, body["usage"]["completion_tokens"], text)
    first = None
    pieces: list[str] = []
    tokens = None
    body = case.body(stream=True, stream_options={"include_usage": True})
    async with client.stream("POST", case.path, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:200]!r}")
        async for chunk in _chunks(response):
            if "error" in chunk:
                raise RuntimeError(f"in a stream: {chunk['error']}")
            if first is None:
                first = time.monotonic() - began
            for choice in chunk["choices"]:
                pieces.append(choice["delta"].get("content", "") if case.chat else choice["text"])
            if chunk["usage"] is not None:
                tokens = chunk["usage"]["completion_tokens"]
    if tokens is None:
        raise RuntimeError("a stream without an end")
    ended = time.monotonic()
    return Answered(case, ended, ended - began, first, tokens, "".join(pieces))


async def _chunks(response: httpx2.Response) -> AsyncIterator[dict]:  # type: ignore[type-arg]
    """A stream's objects, up to its end mark."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))


async def good_client(
    client: httpx2.AsyncClient, number: int, cases: Sequence[Case], end: float, seen: Seen
) -> None:
    """Ask one question after the other until the time is over; half of the answers are streamed."""
    draw = random.Random(number)
    while time.monotonic() < end:
        case = draw.choice(cases)
        try:
            seen.answered.append(await ask(client, case, stream=draw.random() < 0.5))
        except (httpx2.HTTPError, RuntimeError, ValueError, KeyError) as error:
            seen.errors.append(f"{case.task}: {type(error).__name__}: {error}")


async def leaving_client(
    client: httpx2.AsyncClient, number: int, cases: Sequence[Case], end: float, seen: Seen
) -> None:
    """Ask, and cut the connection: at once, or when the first bytes have come."""
    draw = random.Random(number)
    url = client.base_url
    while time.monotonic() < end:
        body = json.dumps(draw.choice(cases).body(stream=True, max_tokens=200)).encode()
        case_path = "/v1/completions" if b'"prompt"' in body else "/v1/chat/completions"
        reader, writer = await asyncio.open_connection(url.host, url.port)
        head = f"POST {case_path} HTTP/1.1\r\nHost: x\r\n{_head(len(body))}\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        kind = "killed in the stream" if draw.random() < 0.5 else "killed while it waits"
        if kind == "killed in the stream":
            await asyncio.wait_for(reader.read(100), _SECONDS)
        writer.transport.abort()
        seen.bad[kind] += 1
        await asyncio.sleep(1.0)


def _head(length: int) -> str:
    return f"Content-Type: application/json\r\nContent-Length: {length}\r\n"


async def wrong_client(client: httpx2.AsyncClient, task: str, end: float, seen: Seen) -> None:
    """Ask what must be refused, and check how it is."""
    valid = {"model": task, "prompt": "one", "max_tokens": 1}
    large = json.dumps({**valid, "user": "x" * (3 << 20)}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(large), 1 << 16):
            yield large[at : at + (1 << 16)]

    wrong: list[tuple[str, bytes | None, int]] = [
        ("malformed JSON", b'{"model": ', 400),
        ("invalid UTF-8", b'{"model": "\xff"}', 400),
        ("NaN", b'{"model": "x", "prompt": "a", "temperature": NaN}', 400),
        ("too deep JSON", b"[" * 100_000, 400),
        ("wrong type", json.dumps({**valid, "max_tokens": "1"}).encode(), 400),
        ("unsupported field", json.dumps({**valid, "best_of": 2}).encode(), 400),
        ("too many tokens", json.dumps({**valid, "max_tokens": 10**9}).encode(), 400),
        ("unknown task", json.dumps({**valid, "model": "nobody"}).encode(), 404),
        ("path for a task", json.dumps({**valid, "model": "../../etc/passwd"}).encode(), 404),
        ("oversized body", large, 413),
        ("oversized body in pieces", None, 413),
    ]
    while time.monotonic() < end:
        for kind, content, status in wrong:
            try:
                response = await client.post(
                    "/v1/completions", content=pieces() if content is None else content, headers=_JSON
                )
                if response.status_code == status and response.json()["error"]["message"]:
                    seen.bad[kind] += 1
                else:
                    seen.errors.append(f"{kind}: {response.status_code}: {response.text[:200]}")
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                seen.errors.append(f"{kind}: {type(error).__name__}: {error}")
            await asyncio.sleep(0.2)


async def removing_client(
    client: httpx2.AsyncClient,
    folder: Path,
    expected: Mapping[Case, Expected],
    kept: Path,
    end: float,
    seen: Seen,
) -> None:
    """Ask a task while its file is removed and put back: the right answer, or none.

    Args:
        expected: what the task answers.
        kept: another link to its file.
    """
    cases = list(expected)
    place = folder / f"{cases[0].task}{TASK_SUFFIX}"
    draw = random.Random(0)

    async def one() -> None:
        case = draw.choice(cases)
        try:
            answered = await ask(client, case, stream=False)
        except RuntimeError as error:
            kind = "removed: 404" if str(error).startswith("404") else ""
        except httpx2.HTTPError as error:
            seen.errors.append(f"removed: {type(error).__name__}: {error}")
            return
        else:
            kind = "removed: answered"
            seen.answered.append(answered)
        if kind:
            seen.bad[kind] += 1
        else:
            seen.errors.append("removed: neither an answer nor 404")

    while time.monotonic() < end:
        asking = [asyncio.create_task(one()) for _ in range(2)]
        await asyncio.sleep(draw.random())
        place.unlink()
        asking.append(asyncio.create_task(one()))
        await asyncio.gather(*asking)
        linked = folder / "put-back"
        os.link(kept, linked)
        linked.replace(place)
        await one()


async def run_clients(
    address: str,
    clients: int,
    cases: Sequence[Case],
    removable: Mapping[Case, Expected],
    folder: Path,
    kept: Path,
    seconds: float,
) -> Seen:
    """All clients, until the time is over and the last answer has come."""
    seen = Seen()
    end = time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=address, timeout=_SECONDS, limits=limits) as client:
        await asyncio.gather(
            *(good_client(client, number, cases, end, seen) for number in range(clients)),
            *(leaving_client(client, number, cases, end, seen) for number in range(2)),
            wrong_client(client, cases[0].task, end, seen),
            removing_client(client, folder, removable, kept, end, seen),
        )
    return seen
