"""Reading JSON Lines: the three forms, and a message with the line for everything else."""

from pathlib import Path

import pytest

from loracle.reference import DataError, FileError
from loracle.torch_impl.data import Completion, Conversation, Text, Turn, read_examples


def test_the_three_forms_are_read_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"  # a byte order mark, as some editors write
        + b'{"prompt": "p", "completion": "c", "source": 3}\r\n'
        + b"\n"
        + '{"system": "s", "prompt": "", "completion": "a\u2028b"}\n'.encode()
        + b'{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "y"}]}\n'
        + b'{"text": "t"}'
    )
    assert read_examples(path) == [
        Completion(1, None, "p", "c"),
        Completion(3, "s", "", "a\u2028b"),
        Conversation(4, (Turn("user", ""), Turn("assistant", "y"))),
        Text(5, "t"),
    ]


GOOD = '{"text": "fine"}\n'

MALFORMED = {
    "not json": ("{]", "malformed JSON"),
    "a number": ("3", "got a number"),
    "a list": ("[]", "got a list"),
    "null": ("null", "got null"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "no form": ('{"input": "x"}', "keys 'input'"),
    "no keys": ("{}", "keys none"),
    "two forms": ('{"text": "x", "prompt": "y"}', "'prompt' and 'text' together"),
    "no completion": ('{"prompt": "x"}', "the key 'completion'"),
    "empty completion": ('{"prompt": "x", "completion": " \\n"}', "completion: expected text to learn"),
    "prompt of a wrong type": ('{"prompt": 1, "completion": "y"}', "prompt: expected a string, got a number"),
    "system of a wrong type": (
        '{"system": [], "prompt": "x", "completion": "y"}',
        "system: expected a string",
    ),
    "empty text": ('{"text": ""}', "text: expected text to learn"),
    "messages no list": ('{"messages": {}}', "messages: expected a list"),
    "message no object": ('{"messages": ["hi"]}', "messages[0]: expected"),
    "no role": ('{"messages": [{"content": "x"}]}', "messages[0]: expected the key 'role'"),
    "unknown role": ('{"messages": [{"role": "tool", "content": "x"}]}', "got 'tool'"),
    "calls": (
        '{"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}',
        "only role and content, got 'tool_calls'",
    ),
    "no assistant": ('{"messages": [{"role": "user", "content": "x"}]}', "role assistant"),
    "silent assistant": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}',
        "messages[1]: content: expected text to learn",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_named(tmp_path: Path, name: str) -> None:
    line, message = MALFORMED[name]
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert message in str(caught.value)
    assert f"{path}, line 3" in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b'{"text": "\xe9"}')
    with pytest.raises(DataError, match="line 2: expected UTF-8, got byte 0xe9"):
        read_examples(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_examples_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="at least one example"):
        read_examples(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileError, match="JSON Lines"):
            read_examples(path)
