"""The fields of a JSON object that somebody wrote: these and no others, each what it should be."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loracle.reference import FileError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 80


@dataclass(frozen=True)
class Rule:
    """What a field must be, as a test and in words."""

    fits: Callable[[Any], bool]
    words: str


def is_number(value: Any) -> bool:
    """Whether it is a number that float64 has; True and False are none."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # a comparison takes integers of any size
    )


def is_count(value: Any) -> bool:
    """Whether it is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_set(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether it is a sorted list of distinct values, at least one, that all fit."""
    return isinstance(value, list) and bool(value) and all(map(fits, value)) and value == sorted(set(value))


def one_of(*values: Any) -> Rule:
    """One of these values."""
    return Rule(
        lambda value: any(type(value) is type(own) and value == own for own in values),
        " or ".join(map(repr, values)),
    )


NUMBER = Rule(is_number, "a number")
COUNT = Rule(is_count, "an integer of at least 0")
FLAG = Rule(lambda value: isinstance(value, bool), "true or false")
TEXT = Rule(lambda value: isinstance(value, str), "a text")
SHA256 = Rule(
    lambda value: isinstance(value, str) and _SHA256.fullmatch(value) is not None, "64 digits of a SHA-256"
)
OBJECT = Rule(lambda value: isinstance(value, dict), "an object")


def check_fields(content: Mapping[str, Any], rules: Mapping[str, Rule], source: str, remedy: str) -> None:
    """Raise FileError unless an object has the fields of `rules` and no others, each as its rule has it."""
    for name, rule in rules.items():
        if name not in content:
            raise FileError(f"{source}: {name}: expected {rule.words}, found none; {remedy}")
        if not rule.fits(content[name]):
            raise FileError(
                f"{source}: {name}: expected {rule.words}, got {str(content[name])[:_SHOWN]!r}; {remedy}"
            )
    for name in content:
        if name not in rules:
            raise FileError(f"{source}: {name[:_SHOWN]!r}: expected no such field, found one; {remedy}")
