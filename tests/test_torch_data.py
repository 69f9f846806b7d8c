"""Reading JSON Lines: the forms, and a message with the line for everything else."""

from pathlib import Path

import pytest

from loracle.reference import DataError, FileError
from loracle.torch_impl.data import (
    Completion,
    Conversation,
    Example,
    Form,
    Labelled,
    Tagged,
    Text,
    Turn,
    read_examples,
)


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


def read(tmp_path: Path, line: str, form: Form) -> Example:
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    (example,) = read_examples(path, (form,))
    return example


def test_labelled_texts_are_read(tmp_path: Path) -> None:
    cases = {
        '{"text": "t", "label": "yes", "messages": []}': Labelled(1, "t", None, "yes"),
        '{"text": "t", "text_pair": "", "label": 3}': Labelled(1, "t", "", 3),
        '{"text": "t", "text_pair": null, "label": -1}': Labelled(1, "t", None, -1),
    }
    for line, expected in cases.items():
        assert read(tmp_path, line, "labelled") == expected


def test_tagged_words_are_read(tmp_path: Path) -> None:
    line = '{"tokens": ["a", "b"], "tags": ["O", "B"]}'
    assert read(tmp_path, line, "tagged") == Tagged(1, ("a", "b"), ("O", "B"))
    assert read(tmp_path, '{"tokens": ["a"], "tags": [0]}', "tagged") == Tagged(1, ("a",), (0,))


MALFORMED_CLASSES: dict[str, tuple[Form, str, str]] = {
    "a fraction": (
        "labelled",
        '{"text": "t", "label": 0.5}',
        "label: expected a class's name or an integer, got 0.5; regression is not supported",
    ),
    "a whole fraction": ("labelled", '{"text": "t", "label": 1.0}', "regression is not supported"),
    "a boolean": ("labelled", '{"text": "t", "label": true}', "got a boolean"),
    "no name": ("labelled", '{"text": "t", "label": ""}', "got an empty string"),
    "null": ("labelled", '{"text": "t", "label": null}', "got null"),
    "no label": ("labelled", '{"text": "t"}', "expected the key 'label', got 'text'"),
    "no text": (
        "labelled",
        '{"prompt": "p", "label": 1}',
        "expected an object with \"text\" and \"label\", got keys 'prompt', 'label'",
    ),
    "a number for a pair": ("labelled", '{"text": "t", "text_pair": 1, "label": 1}', "text_pair: expected a"),
    "no tokens": (
        "tagged",
        '{"text": "t", "label": 1}',
        'expected an object with "tokens" and "tags", got keys',
    ),
    "tokens of a string": ("tagged", '{"tokens": "a", "tags": []}', "tokens: expected a list, got a string"),
    "no tags": ("tagged", '{"tokens": ["a"]}', "expected the key 'tags'"),
    "fewer tags": (
        "tagged",
        '{"tokens": ["a", "b"], "tags": ["O"]}',
        "tags: expected one for each token, at least one, got 2 tokens and 1 tags",
    ),
    "nothing": ("tagged", '{"tokens": [], "tags": []}', "at least one, got 0 tokens"),
    "an empty word": (
        "tagged",
        '{"tokens": ["a", " "], "tags": [1, 2]}',
        "tokens[1]: expected a word, got an",
    ),
    "a number for a word": ("tagged", '{"tokens": [3], "tags": [1]}', "tokens[0]: expected a word, got a nu"),
    "a fraction for a tag": (
        "tagged",
        '{"tokens": ["a"], "tags": [0.5]}',
        "tags[0]: expected a class's name",
    ),
    "a conversation for masks": ("text", '{"messages": []}', 'expected an object with "text", got keys'),
    "a text for a source": ("completion", '{"text": "t"}', 'an object with "prompt" and "completion", got'),
}


@pytest.mark.parametrize("name", MALFORMED_CLASSES)
def test_a_malformed_line_of_another_form_is_named(tmp_path: Path, name: str) -> None:
    form, line, message = MALFORMED_CLASSES[name]
    with pytest.raises(DataError) as caught:
        read(tmp_path, line, form)
    assert message in str(caught.value)
    assert "data.jsonl, line 1: " in str(caught.value)
    assert "\n" not in str(caught.value)
