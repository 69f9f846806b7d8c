"""How long a regular expression may take on a text, found without running it.

Python's engine tries one way after another, and some expressions have more ways than anyone can wait for:
``(a+)+b`` takes 2^n steps on n times "a". An adapter's configuration is somebody's file, so the ways are
counted before it is followed.

A bound on the ways is kept as ``factor * C(n + free, free)``: ``free`` repeats share a text of n characters.
"""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

MOST_WAYS = 10_000_000
"""The most ways that are tried: about a second."""

_UNROLLED = 16
_CHARACTERS = frozenset(range(256))
_CATEGORIES = {
    codes.CATEGORY_DIGIT: r"\d",
    codes.CATEGORY_NOT_DIGIT: r"\D",
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: r"\w",
    codes.CATEGORY_NOT_WORD: r"\W",
}
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)

Item = tuple[Any, Any]


class _Ways(NamedTuple):
    factor: int
    free: int

    def then(self, other: "_Ways") -> "_Ways":
        return _Ways(min(self.factor * other.factor, MOST_WAYS + 1), self.free + other.free)

    def either(self, other: "_Ways") -> "_Ways":
        return _Ways(min(self.factor + other.factor, MOST_WAYS + 1), max(self.free, other.free))


_ONE = _Ways(1, 0)
_ENDLESS = _Ways(MOST_WAYS + 1, 0)


def takes_too_long(expression: str, length: int) -> bool:
    """Tell whether a valid expression may try more than ``MOST_WAYS`` ways on ``length`` characters.

    One in which a repeat holds another is taken to, unless the inner one can end in one place alone.
    """
    factor, free = _ways_of(expression)
    return factor * math.comb(length + free, free) > MOST_WAYS


@lru_cache(maxsize=1024)
def _ways_of(expression: str) -> _Ways:
    parsed = parser.parse(expression)
    return _sequence(list(parsed), bool(parsed.state.flags & re.IGNORECASE))


def _sequence(items: Sequence[Item], ignore_case: bool, after: Item | None = None) -> _Ways:
    """The ways of items one after the other; ``after`` is what comes next, where that is certain."""
    ways = _ONE
    for item, following in zip(items, [*items, after][1:], strict=True):
        ways = ways.then(_item(item, following, ignore_case))
    return ways


def _item(item: Item, following: Item | None, ignore_case: bool) -> _Ways:
    code, value = item
    if code is codes.BRANCH:
        ways = _Ways(0, 0)
        for branch in value[1]:
            ways = ways.either(_sequence(list(branch), ignore_case, following))
        return ways
    if code in _REPEATS:
        least, most, body = value
        return _repeat(least, most, body, following, ignore_case)
    if code is codes.SUBPATTERN:
        return _sequence(list(value[3]), ignore_case or bool(value[1]), following)
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return _sequence(list(value[1]), ignore_case)
    if code is codes.ATOMIC_GROUP:
        return _sequence(list(value), ignore_case)
    if code is codes.GROUPREF_EXISTS:
        own = [_sequence(list(part), ignore_case) for part in value[1:] if part is not None]
        return own[0].either(own[1] if len(own) > 1 else _ONE)
    return _ONE  # one character, a position, or what a group has matched


def _repeat(least: int, most: int, body: Any, following: Item | None, ignore_case: bool) -> _Ways:
    inner = list(body)
    own = _sequence(inner, ignore_case)
    if own == _ONE:
        if least == most or (not ignore_case and len(inner) == 1 and _apart(inner[0], following)):
            return _ONE
        return _Ways(1, 1)
    if most == 1:
        return own.either(_ONE)
    if most > _UNROLLED:
        return _ENDLESS
    ways = _ONE
    for _ in range(most):
        ways = ways.then(own.either(_ONE))
    return ways


def _apart(item: Item, following: Item | None) -> bool:
    """Whether both are single characters that are never the same: the repeat ends in one place alone."""
    if following is None:
        return False
    one, other = _members(item), _members(following)
    return one is not None and other is not None and not one & other


def _members(item: Item) -> frozenset[int] | None:
    """The characters below 256 that an item may be; those above stand with 255. None: it is no character."""
    code, value = item
    if code is codes.LITERAL:
        return frozenset({min(value, 255)})
    if code is codes.NOT_LITERAL:
        return _CHARACTERS - ({value} if value < 255 else set())
    if code in (codes.ANY, codes.ANY_ALL):
        return _CHARACTERS
    if code is codes.RANGE:
        return frozenset(range(min(value[0], 255), min(value[1], 255) + 1))
    if code is codes.CATEGORY:
        known = _CATEGORIES.get(value)
        if known is None:
            return _CHARACTERS
        return frozenset(c for c in _CHARACTERS if c == 255 or re.match(known, chr(c), re.DOTALL))
    if code is codes.IN:
        negated = value[0][0] is codes.NEGATE
        parts = [_members(part) for part in value[negated:]]
        joined = frozenset().union(*(part for part in parts if part is not None))
        return (_CHARACTERS - joined) | {255} if negated else joined
    return None
