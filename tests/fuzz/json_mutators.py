"""Changes of JSON documents: of their structure, and of how they are spelled."""

import copy
import json
import random
import re
from typing import Any

from .bytes_mutators import mutate_bytes

_RAW = "\x02"
_MOST_BRACKETS = 200
_RAW_VALUE = re.compile(r'"\\u0002(.*?)\\u0002"')

TEXTS = (
    "",
    "a",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "\0",
    "x" * 300,
    "x" * 5000,
    "é",
    "\U0001f600",
    "\ud800",
    "\n",
    "'",
    '"',
    "__metadata__",
    "true",
    "(a+)+$",
    "(",
    "[",
    ".*",
    "(?i)x",
    "a{1,99999}",
    "%n%s",
    "{0.__class__}",
    "F32",
    "BF16",
    "model.safetensors",
    "." * 40,
    "1" * 5000,
    "base_layer",
    "weight",
)
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    10**6,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    [],
    {},
    [0],
    [-1],
    [1] * 40,
    [1] * 70,
    [0, 2**62, 2**62],
    [2**32, 2**32],
    "x",
    ["a", "a"],
    [[]],
    {"a": 1},
)
_SPELLED = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1" * 400,
    "1" * 5000,
    "0." + "1" * 3000,
    "1e-9999",
    "01",
    "+1",
    "0x10",
    "[" * 50 + "]" * 50,
    "[" * 99 + "]" * 99,
    "[" * 900 + "]" * 900,
    "[" * 100_000,
    '{"a":' * 500 + "1" + "}" * 500,
    '{"a":1,"a":2}',
    r'"\ud800"',
    r'"\ud83d\ude00"',
    r'"\u0000"',
    "'x'",
    "tru",
    "",
    "[1,]",
    "/*x*/1",
    "[1 2]",
)


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """Return a document with one to four changes; some are no JSON any more."""
    if rng.random() < 0.15 or is_deep(content):
        return mutate_bytes(rng, content)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        document = change(rng, document)
    return spelled(document)


def is_deep(content: bytes) -> bool:
    """Whether a document may have too many levels to be changed by its structure."""
    return content.count(b"[") + content.count(b"{") > _MOST_BRACKETS


def spelled(document: Any) -> bytes:
    """Return a document as JSON, with what is marked to stand in it as it is."""
    text = json.dumps(document, allow_nan=True)
    return _RAW_VALUE.sub(_unquoted, text).encode("utf-8", "surrogatepass")


def _unquoted(found: re.Match[str]) -> str:
    try:
        return str(json.loads(f'"{found[1]}"'))
    except ValueError:  # another change has cut it
        return found[0]


def change(rng: random.Random, document: Any) -> Any:
    """Return the document with one change of a value or a key somewhere in it."""
    places = list(_places(document))
    if not places or rng.random() < 0.02:
        return value_for(rng, document)
    holder, key = rng.choice(places)
    if isinstance(holder, dict):
        kind = rng.randrange(10)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[text_for(rng, key)] = holder.pop(key)
        elif kind == 2:
            holder[text_for(rng, key)] = value_for(rng, holder[key])
        elif kind == 3 and len(places) > 1:
            other, theirs = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[theirs]))
        else:
            holder[key] = value_for(rng, holder[key])
        return document
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder.insert(key, holder[key])
    elif kind == 2:
        holder.reverse()
    else:
        holder[key] = value_for(rng, holder[key])
    return document


def value_for(rng: random.Random, value: Any) -> Any:
    """Return another value: of another kind, or near to this one."""
    kind = rng.randrange(8)
    if kind == 0:
        return f"{_RAW}{rng.choice(_SPELLED)}{_RAW}"
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return [value] if rng.random() < 0.5 else {"a": value}
    if kind > 4 and isinstance(value, int) and not isinstance(value, bool):
        return value + rng.choice((-1, 1, -value, value, 2**32, 2**63))
    if kind > 4 and isinstance(value, str):
        return text_for(rng, value)
    if kind > 4 and isinstance(value, list) and value:
        return copy.deepcopy(rng.choice((value * 2, value[1:], value[::-1], [*value, rng.choice(VALUES)])))
    return copy.deepcopy(rng.choice(VALUES))


def text_for(rng: random.Random, text: str) -> str:
    """Return another text, near to this one or not."""
    kind = rng.randrange(5)
    if kind == 0 or not text:
        return rng.choice(TEXTS)
    at = rng.randrange(len(text))
    if kind == 1:
        return text[:at] + rng.choice(TEXTS) + text[at:]
    if kind == 2:
        return text[:at] + text[at + 1 :]
    if kind == 3:
        return (
            text[:at] + chr(rng.choice((0, 10, 34, 46, 47, 92, 127, 233, 0xD800, 0x1F600))) + text[at + 1 :]
        )
    return text + text


def _places(document: Any) -> Any:
    stack = [document]
    while stack:
        holder = stack.pop()
        items = (
            holder.items()
            if isinstance(holder, dict)
            else enumerate(holder)
            if isinstance(holder, list)
            else ()
        )
        for key, value in items:
            yield holder, key
            if isinstance(value, dict | list):
                stack.append(value)
