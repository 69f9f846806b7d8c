"""The fields of a request's object, each checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import RequestError, shortened, wrong


class Fields:
    """Reads an object's fields. A field that is null counts as absent.

    Args:
        body: the object.
        known: the fields that are read.
        ignored: fields that may be there and change no answer.
        neutral: fields that would change the answer, and the values with which they do not.

    Raises RequestError: 400 for a field that is not among them, or has another value.
    """

    def __init__(
        self,
        body: Mapping[str, Any],
        *,
        known: frozenset[str],
        ignored: frozenset[str],
        neutral: Mapping[str, tuple[object, ...]],
    ) -> None:
        self._body = body
        for name, value in body.items():
            if name in known or name in ignored or (value is None and name in neutral):
                continue
            if name not in neutral:
                raise RequestError(
                    400,
                    f"{shortened(name)}: expected one of the fields that there are, got another",
                    param=name[:80],
                    code="unknown_field",
                )
            if not any(_same(value, one) for one in neutral[name]):
                raise RequestError(
                    400,
                    f"{name}: expected none, for it is not supported, got {shortened(value)}",
                    param=name,
                    code="unsupported_field",
                )

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self._body.get(name)
        if not isinstance(value, str):
            raise wrong(name, f"expected a string, got {_kind(value)}")
        return value

    def value(self, name: str) -> Any:
        """What is there, unchecked; None where nothing is."""
        return self._body.get(name)

    def number(self, name: str, lowest: float, highest: float, default: float) -> float:
        """A number in a range."""
        value = self._body.get(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise wrong(name, f"expected a number, got {_kind(value)}")
        if not lowest <= value <= highest:
            raise wrong(name, f"expected {lowest:g} to {highest:g}, got {shortened(value)}")
        return float(value)

    def integer(self, name: str, lowest: int, highest: int) -> int | None:
        """An integer in a range; None where there is none."""
        value = self._body.get(name)
        if value is None:
            return None
        if type(value) is not int:
            raise wrong(name, f"expected an integer, got {_kind(value)}")
        if not lowest <= value <= highest:
            raise wrong(name, f"expected {lowest} to {highest}, got {shortened(value)}")
        return value

    def flag(self, name: str) -> bool:
        """True or false, which is also what an absent one is."""
        value = self._body.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise wrong(name, f"expected true or false, got {_kind(value)}")
        return value

    def strings(self, name: str, most: int) -> tuple[str, ...]:
        """A string, or a list of at most `most`; none of them empty."""
        value = self._body.get(name)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise wrong(name, f"expected a string or a list of strings, got {_kind(value)}")
        if len(found) > most:
            raise wrong(name, f"expected at most {most}, got {len(found)}")
        if "" in found:
            raise wrong(name, "expected some text, got an empty string")
        return tuple(found)


def _same(value: object, wanted: object) -> bool:
    """Equality in which true is not 1; 0 and 0.0 are one number."""
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def _kind(value: object) -> str:
    """What something is, in JSON's words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {type(None): "none", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
