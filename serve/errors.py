"""Why a request is refused, and OpenAI's object for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loracle.reference import LoracleError

GONE = 499
"""Not sent, for the client is gone; the status that logs and metrics show."""


class RequestError(LoracleError):
    """A request that gets an error.

    Args:
        status: HTTP's.
        message: one line, for the client: nothing of the server's files is in it.
        param: the field at fault.
        code: a word that programs may look for.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response's object."""
        return {
            "error": {
                "message": str(self),
                "type": error_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }


def error_type(status: int) -> str:
    """OpenAI's word for a kind of error."""
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def wrong(param: str, message: str) -> RequestError:
    """A field that has not what was expected."""
    return RequestError(400, f"{param}: {message}", param=param, code="invalid_value")


def shortened(value: object, most: int = 80) -> str:
    """How a value looks in a message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def internal_error() -> RequestError:
    """The server is at fault; the log says how."""
    return RequestError(500, "the server failed to answer; its log says more", code="internal_error")


def shutting_down() -> RequestError:
    """The server is about to end."""
    return RequestError(
        503,
        "the server is shutting down; ask again later",
        code="shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )
