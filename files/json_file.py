"""JSON files that other people wrote: read whole, checked, with one-line errors."""

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from loracle.reference import FileError

MAX_BYTES = 100_000_000
"""The longest JSON document read: safetensors' own limit for a header, far above any configuration."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at ``path``.

    Stricter than ``json.load``: UTF-8, no duplicate keys, no NaN or Infinity, at most ``MAX_BYTES``.

    Raises:
        FileError: the file is missing, unreadable, too long, no JSON, or no object at its top level.
    """
    return parse_json_object(read_regular_file(path, MAX_BYTES), str(path))


def parse_json_object(text: bytes, source: str) -> dict[str, Any]:
    """Return the JSON object that ``text`` spells; ``source`` names it in errors. Raises: FileError."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
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
    check_regular_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    if len(content) > limit:
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
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path}: expected a file, got a folder, pipe or device; check the path")
    return status.st_size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return content


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
