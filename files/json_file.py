"""JSON files that other people wrote: read whole, checked, with one-line errors."""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from loracle.reference import FileError

MAX_BYTES = 100_000_000
"""The longest JSON document read: safetensors' own limit for a header, far above any configuration."""

MAX_DEPTH = 100
"""The most objects and lists inside one another: deeper ones could neither be shown nor copied."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at ``path``.

    Stricter than ``json.load``: UTF-8 in the file and in its strings, no duplicate keys, no NaN and no
    infinity, at most ``MAX_BYTES`` and ``MAX_DEPTH``.

    Raises:
        FileError: the file is missing, unreadable, too long, no JSON, or no object at its top level.
    """
    return parse_json_object(read_regular_file(path, MAX_BYTES), str(path))


def parse_json_object(text: bytes, source: str) -> dict[str, Any]:
    """Return the JSON object that ``text`` spells; ``source`` names it in errors. Raises: FileError."""
    try:
        content = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check_depth(content)
        if _SURROGATE.search(text):  # halves of a character: strings that no file can hold
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source}: not valid JSON ({error}); restore the file") from None
    if not isinstance(content, dict):
        raise FileError(f"{source}: expected a JSON object, got {type(content).__name__}; restore the file")
    return content


def read_regular_file(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file of at most ``limit`` bytes.

    Raises:
        FileError: the file is missing, unreadable, too long, or a folder, pipe or device.
    """
    size = check_regular_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(size + 1) if size <= limit else b""
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    if max(size, len(content)) > limit:
        raise FileError(f"{path}: expected at most {limit} bytes, got more; is this the right file?")
    return content


def check_regular_file(path: Path) -> int:
    """Return the size in bytes of the regular file at ``path``, or that it links to.

    Raises:
        FileError: there is none. A pipe would block for ever when opened, a device never end.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:  # a zero byte in the name, or half a character
        raise FileError(f"{str(path)!r}: no name of a file ({error}); check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path}: expected a file, got a folder, pipe or device; check the path")
    return status.st_size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:80]!r}")
            seen.add(key)
    return content


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:40]} is larger than any float")
    return value


def _check_depth(content: object) -> None:
    level: list[Any] = [content] if isinstance(content, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} objects and lists inside one another")
