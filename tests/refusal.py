"""Checking an error and its whole message, for tests."""

import re
from collections.abc import Callable

import pytest


def refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    """Check that ``call`` raises ``kind`` with exactly this message, of one line."""
    with pytest.raises(kind, match=f"^{re.escape(message)}$") as caught:
        call()
    assert "\n" not in str(caught.value)
