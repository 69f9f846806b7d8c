"""Checking an error and its whole message, for tests."""

import re
from collections.abc import Callable

import pytest

from loracle.reference import LoracleError


def refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    """Check that ``call`` raises ``kind`` with exactly this message, of one line."""
    with pytest.raises(kind, match=f"^{re.escape(message)}$") as caught:
        call()
    assert "\n" not in str(caught.value)


def read_or_refused(call: Callable[[], object]) -> str | None:
    """Return the message of the LoracleError that ``call`` raises, of one line; None where it returns."""
    try:
        call()
    except LoracleError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    assert len(message) < 600
    return message
