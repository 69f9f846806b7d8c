"""The fields of a result file: each is what a reader needs, or the file is refused, and the field named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loracle.reference import FileError

from ..json_fields import FLAG, TEXT, Rule, is_count, is_number

_LARGEST = 1e15
"""Of any number: what is larger was not measured, and cannot be drawn."""
_SMALLEST = 1e-15
_SHOWN = 80
_TEXT_SHOWN = 500

_NUMBER = Rule(lambda value: is_number(value) and abs(value) <= _LARGEST, "a number")
_POSITIVE = Rule(
    lambda value: is_number(value) and _SMALLEST <= value <= _LARGEST, f"a number above {_SMALLEST:g}"
)
_COUNT = Rule(lambda value: is_count(value) and value <= _LARGEST, "an integer of at least 0")
_LEAST_ONE = Rule(lambda value: _COUNT.fits(value) and value >= 1, "an integer of at least 1")
_OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
_LIST = Rule(lambda value: isinstance(value, list), "a list")


@dataclass(frozen=True)
class Fields:
    """An object in a result file.

    Attributes:
        content: its fields; those that are not asked for may be anything.
        where: the file, and the object's place in it.
        remedy: what makes the file again.
    """

    content: Mapping[str, Any]
    where: str
    remedy: str

    def number(self, name: str) -> float:
        """Return a number."""
        return float(self._get(name, _NUMBER))

    def positive(self, name: str) -> float:
        """Return a number above 0."""
        return float(self._get(name, _POSITIVE))

    def count(self, name: str) -> int:
        """Return an integer of at least 0."""
        return int(self._get(name, _COUNT))

    def least_one(self, name: str) -> int:
        """Return an integer of at least 1."""
        return int(self._get(name, _LEAST_ONE))

    def flag(self, name: str) -> bool:
        """Return true or false."""
        return bool(self._get(name, FLAG))

    def text(self, name: str) -> str:
        """Return a text, cut where it is too long for a page."""
        found: str = self._get(name, TEXT)
        return found if len(found) <= _TEXT_SHOWN else found[:_TEXT_SHOWN] + "…"

    def maybe_number(self, name: str) -> float | None:
        """Return a number, or None where it is null."""
        return None if self._is_null(name) else self.number(name)

    def maybe_positive(self, name: str) -> float | None:
        """Return a number above 0, or None where it is null."""
        return None if self._is_null(name) else self.positive(name)

    def maybe_least_one(self, name: str) -> int | None:
        """Return an integer of at least 1, or None where it is null."""
        return None if self._is_null(name) else self.least_one(name)

    def part(self, name: str) -> Fields:
        """Return an object."""
        return Fields(self._get(name, _OBJECT), f"{self.where}: {name}", self.remedy)

    def maybe_part(self, name: str) -> Fields | None:
        """Return an object, or None where it is null."""
        return None if self._is_null(name) else self.part(name)

    def parts(self, name: str) -> tuple[Fields, ...]:
        """Return a list of objects."""
        found = []
        for place, own in enumerate(self._get(name, _LIST)):
            where = f"{self.where}: {name}[{place}]"
            found.append(Fields(self._check(own, _OBJECT, where), where, self.remedy))
        return tuple(found)

    def some_parts(self, name: str) -> tuple[Fields, ...]:
        """Return a list of at least one object."""
        found = self.parts(name)
        if not found:
            raise FileError(f"{self.where}: {name}: expected at least one object, got none; {self.remedy}")
        return found

    def interval(self, name: str) -> tuple[float, float]:
        """Return a list of two numbers above 0, the second not below the first."""
        rule = Rule(
            lambda value: (
                isinstance(value, list)
                and len(value) == 2
                and all(map(_POSITIVE.fits, value))
                and value[0] <= value[1]
            ),
            "two numbers above 0 in order",
        )
        low, high = self._get(name, rule)
        return float(low), float(high)

    def positives(self, name: str) -> tuple[int, ...]:
        """Return a list of integers of at least 1."""
        return tuple(
            self._check(own, _LEAST_ONE, f"{self.where}: {name}[{place}]")
            for place, own in enumerate(self._get(name, _LIST))
        )

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Return the fields that are texts, cut where they are too long for a page."""
        return tuple((name[:_SHOWN], self.text(name)) for name, own in self.content.items() if TEXT.fits(own))

    def _is_null(self, name: str) -> bool:
        return name in self.content and self.content[name] is None

    def _get(self, name: str, rule: Rule) -> Any:
        where = f"{self.where}: {name}"
        if name not in self.content:
            raise FileError(f"{where}: expected {rule.words}, found none; {self.remedy}")
        return self._check(self.content[name], rule, where)

    def _check(self, value: Any, rule: Rule, where: str) -> Any:
        if not rule.fits(value):
            raise FileError(f"{where}: expected {rule.words}, got {str(value)[:_SHOWN]!r}; {self.remedy}")
        return value
