"""Training data: JSON Lines, one example a line, in one of three forms."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loracle.reference import DataError, FileError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; ``role`` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Completion:
    """``{"prompt": ..., "completion": ...}``, with ``"system"`` where wanted: the completion is learned."""

    line: int
    system: str | None
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """``{"messages": [{"role": ..., "content": ...}, ...]}``: what the assistant says is learned."""

    line: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Text:
    """``{"text": ...}``: every token is learned."""

    line: int
    text: str


Example = Completion | Conversation | Text

_FORMS = ("prompt", "messages", "text")
_EXPECTED = 'an object with "prompt" and "completion", "messages", or "text"'


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSON Lines file in UTF-8; blank lines are skipped, keys beyond the form's are ignored.

    Raises:
        FileError: the file cannot be read.
        DataError: a line is not JSON, not of one form, or has nothing to learn, or there is no example at
            all; the message names the file and the line, counted from 1.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: expected a readable JSON Lines file, got {error.strerror}") from error
    examples: list[Example] = []
    # Split by the newline byte alone: U+2028 and its like may stand inside a string.
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            where = f"{path}, line {number}"
            examples.append(_example(_parsed(raw, where), number, where))
    if not examples:
        raise DataError(
            f"{path}: expected at least one example, got an empty file; write one JSON object a line"
        )
    return examples


def _parsed(raw: bytes, where: str) -> Mapping[str, object]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8, got byte 0x{raw[error.start]:02x}; re-encode the file"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: expected {_EXPECTED}, got malformed JSON ({error.msg}, column {error.colno})"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: expected {_EXPECTED}, got JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected {_EXPECTED}, got {_kind(value)}")
    return value


def _example(record: Mapping[str, object], line: int, where: str) -> Example:
    forms = [form for form in _FORMS if form in record]
    if len(forms) != 1:
        got = (
            f"{' and '.join(map(repr, forms))} together"
            if forms
            else f"keys {', '.join(map(repr, record)) or 'none'}"
        )
        raise DataError(f"{where}: expected {_EXPECTED}, got {got}")
    if forms == ["text"]:
        return Text(line, _filled(record, "text", where))
    if forms == ["prompt"]:
        system = None if record.get("system") is None else _string(record, "system", where)
        prompt = _string(record, "prompt", where)
        return Completion(line, system, prompt, _filled(record, "completion", where))
    return Conversation(line, _turns(record["messages"], where))


def _turns(messages: object, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages: expected a list of objects, got {_kind(messages)}")
    turns = []
    for index, message in enumerate(messages):
        place = f"{where}: messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f'{place}: expected {{"role": ..., "content": ...}}, got {_kind(message)}')
        extra = sorted(message.keys() - {"role", "content"})
        if extra:
            raise DataError(f"{place}: expected only role and content, got {', '.join(map(repr, extra))} too")
        role = _string(message, "role", place)
        if role not in ROLES:
            raise DataError(f"{place}: role: expected one of {', '.join(ROLES)}, got {role!r}")
        read = _filled if role == "assistant" else _string
        turns.append(Turn(role, read(message, "content", place)))
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: messages: expected at least one of role assistant to learn from, got none")
    return tuple(turns)


def _string(record: Mapping[str, object], key: str, where: str) -> str:
    if key not in record:
        raise DataError(f"{where}: expected the key {key!r}, got {', '.join(map(repr, record)) or 'none'}")
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: expected a string, got {_kind(value)}")
    return value


def _filled(record: Mapping[str, object], key: str, where: str) -> str:
    value = _string(record, key, where)
    if not value.strip():
        raise DataError(f"{where}: {key}: expected text to learn, got an empty string")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
