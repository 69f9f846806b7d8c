"""Training data: JSON Lines, one example a line, in one of the forms that the task takes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True)
class Labelled:
    """``{"text": ..., "label": ...}``, with ``"text_pair"`` where wanted: the class of the text is learned.

    A class is named by a string or numbered by an integer.
    """

    line: int
    text: str
    text_pair: str | None
    label: str | int


@dataclass(frozen=True)
class Tagged:
    """``{"tokens": [...], "tags": [...]}``: the class of each word is learned; as many tags as tokens."""

    line: int
    tokens: tuple[str, ...]
    tags: tuple[str | int, ...]


Example = Completion | Conversation | Text | Labelled | Tagged

Form = Literal["completion", "messages", "text", "labelled", "tagged"]

LANGUAGE_FORMS: tuple[Form, ...] = ("completion", "messages", "text")
"""The forms that a causal language model learns from."""

_KEY = {
    "completion": "prompt",
    "messages": "messages",
    "text": "text",
    "labelled": "text",
    "tagged": "tokens",
}
_SHOWN = {
    "completion": '"prompt" and "completion"',
    "messages": '"messages"',
    "text": '"text"',
    "labelled": '"text" and "label"',
    "tagged": '"tokens" and "tags"',
}


def read_examples(path: str | Path, forms: Sequence[Form] = LANGUAGE_FORMS) -> list[Example]:
    """Read a JSON Lines file in UTF-8; blank lines are skipped, keys beyond the form's are ignored.

    Args:
        path: of the file.
        forms: those that a line may have, `Task.forms`.

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
    expected = f"an object with {_listed([_SHOWN[form] for form in forms])}"
    examples: list[Example] = []
    # Split by the newline byte alone: U+2028 and its like may stand inside a string.
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            where = f"{path}, line {number}"
            examples.append(_example(_parsed(raw, where, expected), forms, number, where, expected))
    if not examples:
        raise DataError(
            f"{path}: expected at least one example, got an empty file; write one JSON object a line"
        )
    return examples


def _parsed(raw: bytes, where: str, expected: str) -> Mapping[str, object]:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8, got byte 0x{raw[error.start]:02x}; re-encode the file"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: expected {expected}, got malformed JSON ({error.msg}, column {error.colno})"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: expected {expected}, got JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected {expected}, got {_kind(value)}")
    return value


def _example(
    record: Mapping[str, object], forms: Sequence[Form], line: int, where: str, expected: str
) -> Example:
    found = [form for form in forms if _KEY[form] in record]
    if len(found) != 1:
        got = (
            f"{' and '.join(repr(_KEY[form]) for form in found)} together"
            if found
            else f"keys {', '.join(map(repr, record)) or 'none'}"
        )
        raise DataError(f"{where}: expected {expected}, got {got}")
    return _READERS[found[0]](record, line, where)


def _text(record: Mapping[str, object], line: int, where: str) -> Text:
    return Text(line, _filled(record, "text", where))


def _completion(record: Mapping[str, object], line: int, where: str) -> Completion:
    system, prompt = _optional(record, "system", where), _string(record, "prompt", where)
    return Completion(line, system, prompt, _filled(record, "completion", where))


def _conversation(record: Mapping[str, object], line: int, where: str) -> Conversation:
    return Conversation(line, _turns(record["messages"], where))


def _labelled(record: Mapping[str, object], line: int, where: str) -> Labelled:
    text, pair = _filled(record, "text", where), _optional(record, "text_pair", where)
    return Labelled(line, text, pair, _class(_present(record, "label", where), f"{where}: label"))


def _tagged(record: Mapping[str, object], line: int, where: str) -> Tagged:
    columns = []
    for key in ("tokens", "tags"):
        value = _present(record, key, where)
        if not isinstance(value, list):
            raise DataError(f"{where}: {key}: expected a list, got {_kind(value)}")
        columns.append(value)
    tokens, tags = columns
    if not tokens or len(tokens) != len(tags):
        raise DataError(
            f"{where}: tags: expected one for each token, at least one, "
            f"got {len(tokens)} tokens and {len(tags)} tags"
        )
    for index, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip():
            got = "an empty string" if isinstance(token, str) else _kind(token)
            raise DataError(f"{where}: tokens[{index}]: expected a word, got {got}")
    classes = tuple(_class(tag, f"{where}: tags[{index}]") for index, tag in enumerate(tags))
    return Tagged(line, tuple(tokens), classes)


_READERS: Mapping[str, Callable[[Mapping[str, object], int, str], Example]] = {
    "completion": _completion,
    "messages": _conversation,
    "text": _text,
    "labelled": _labelled,
    "tagged": _tagged,
}


def _class(value: object, where: str) -> str | int:
    """Read a class: its name, or its number."""
    if isinstance(value, float):
        raise DataError(
            f"{where}: expected a class's name or an integer, got {value}; regression is not supported"
        )
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        got = "an empty string" if value == "" else _kind(value)
        raise DataError(f"{where}: expected a class's name or an integer, got {got}")
    return value


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


def _present(record: Mapping[str, object], key: str, where: str) -> object:
    if key not in record:
        raise DataError(f"{where}: expected the key {key!r}, got {', '.join(map(repr, record)) or 'none'}")
    return record[key]


def _optional(record: Mapping[str, object], key: str, where: str) -> str | None:
    return None if record.get(key) is None else _string(record, key, where)


def _string(record: Mapping[str, object], key: str, where: str) -> str:
    value = _present(record, key, where)
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


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, or {names[-1]}"
