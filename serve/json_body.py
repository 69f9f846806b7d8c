"""A request's body: read in pieces up to a limit, and parsed as strict JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from starlette.requests import Request

from .errors import RequestError, shortened, wrong

# Clients that send before they read see the answer only when they are done: some more is read, and dropped.
_PATIENCE = 8


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises RequestError: 415 where it says that it is no JSON, or is compressed; 413 where it has more bytes
    than `most`. No more than these are ever kept.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            415,
            f"Content-Type: expected application/json, got {shortened(kind)}",
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "Content-Encoding: expected none", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    told = int(length) if length.isdecimal() and len(length) <= 20 else 0
    body = bytearray()
    total = 0
    if told <= _PATIENCE * most:
        async for piece in request.stream():
            total += len(piece)
            if total <= most:
                body += piece
            elif total > _PATIENCE * most:
                break
    if max(told, total) > most:
        raise RequestError(
            413,
            f"the body: expected at most {most} bytes, got more",
            code="request_too_large",
            headers={"Connection": "close"},
        )
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object in which all numbers are finite, all strings are Unicode and no name comes twice.

    Raises RequestError: it is none.
    """
    try:
        found = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        raise _malformed(f"expected UTF-8, got byte {body[error.start]:#04x} at {error.start}") from error
    except RecursionError as error:
        raise _malformed("expected JSON, got more levels than can be read") from error
    except ValueError as error:
        raise _malformed(f"expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise _malformed(f"expected an object, got {type(found).__name__}")
    _check_strings(found)
    return found


def _malformed(message: str) -> RequestError:
    return RequestError(400, f"the body: {message}", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise _malformed(f"expected each name once, got {shortened(twice)} twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _malformed(f"expected finite numbers, got {shortened(text)}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise _malformed(f"expected finite numbers, got {name}")


def _check_strings(found: dict[str, Any]) -> None:
    """Raise RequestError where a string has half of a character: no tokenizer takes it."""
    left: list[tuple[str, Any]] = list(found.items())
    while left:
        field, value = left.pop()
        if isinstance(value, dict):
            left.extend((field, part) for pair in value.items() for part in pair)
        elif isinstance(value, list):
            left.extend((field, part) for part in value)
        for text in (field, value):
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    name = field.encode("ascii", "backslashreplace").decode()[:80]
                    raise wrong(name, "expected Unicode text, got a lone surrogate") from error
