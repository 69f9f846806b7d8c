"""Lists of numbers as options have them."""

from collections.abc import Callable
from typing import Any

from loracle.reference import ConfigError


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Return the numbers of ``1,2,3``, each an int or a float as ``kind`` is.

    Raises:
        ConfigError: one is none; the message names the option.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise ConfigError(f"{option}: expected {what} with commas between, got {text!r}") from None
