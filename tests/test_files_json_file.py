"""JSON that other people wrote: what is accepted, and in one line why not."""

import os
import re
from pathlib import Path

import pytest

from loracle.files import json_file
from loracle.files.json_file import (
    MAX_DEPTH,
    check_regular_file,
    parse_json_object,
    read_json_object,
    read_regular_file,
)
from loracle.reference import FileError


def nested(depth: int, opening: str = '{"a":', closing: str = "}") -> bytes:
    """An object with so many levels, itself among them."""
    return ('{"a":' + opening * (depth - 1) + "1" + closing * (depth - 1) + "}").encode()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (b"{}", {}),
        (b'{"a": 1, "b": [true, null, 1.5]}', {"a": 1, "b": [True, None, 1.5]}),
        (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
        ('{"ä": "€ 😀"}'.encode(), {"ä": "€ 😀"}),
        (rb'{"a": "\ud83d\ude00"}', {"a": "😀"}),
        (rb'{"a": "\u00e4"}', {"a": "ä"}),
        (b'{"a": 1e308}', {"a": 1e308}),
        (b'{"a": -1e-400}', {"a": -0.0}),
    ],
)
def test_objects_are_read(text: bytes, content: dict[str, object]) -> None:
    assert parse_json_object(text, "x") == content


@pytest.mark.parametrize("brackets", [('{"a":', "}"), ("[", "]")])
def test_objects_and_lists_may_lie_in_one_another_so_deep(brackets: tuple[str, str]) -> None:
    assert parse_json_object(nested(MAX_DEPTH, *brackets), "x")
    message = (
        f"x: not valid JSON (more than {MAX_DEPTH} objects and lists inside one another); restore the file"
    )
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        parse_json_object(nested(MAX_DEPTH + 1, *brackets), "x")
    with pytest.raises(FileError, match=r"^x: not valid JSON"):
        parse_json_object(nested(200_000, *brackets), "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"a": NaN}', r"\(NaN is not a JSON number\)"),
        (b'{"a": [-Infinity]}', r"\(-Infinity is not a JSON number\)"),
        (b'{"a": 1e309}', r"\(1e309 is larger than any float\)"),
        (b'{"a": -1e309}', r"\(-1e309 is larger than any float\)"),
        (b'{"a": ' + b"1" * 50 + b"e999}", r"\(" + "1" * 40 + r" is larger than any float\)"),
        (b'{"b": 1, "a": 2, "a": 3}', r"\(duplicate key 'a'\)"),
        (b'{"c": {"b": 1, "b": 1}}', r"\(duplicate key 'b'\)"),
        (b'{"' + b"k" * 90 + b'": 1, "' + b"k" * 90 + b'": 2}', r"\(duplicate key '" + "k" * 80 + r"'\)"),
        (b'{"a": "\xff"}', "codec can't decode"),
        ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
        (rb'{"a": "\ud83d"}', "surrogates not allowed"),
        (rb'{"\uDE00": 1}', "surrogates not allowed"),
        (rb'{"a": "\uDe00\ud83D"}', "surrogates not allowed"),
    ],
)
def test_what_is_no_json_is_said_with_the_reason(text: bytes, message: str) -> None:
    with pytest.raises(FileError, match=rf"^x: not valid JSON \(?.*{message}.*; restore the file$") as caught:
        parse_json_object(text, "x")
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("text", "kind"), [(b"[]", "list"), (b"1", "int"), (b'"a"', "str"), (b"null", "NoneType")]
)
def test_what_is_no_object_is_refused(text: bytes, kind: str) -> None:
    with pytest.raises(FileError, match=f"^x: expected a JSON object, got {kind}; restore the file$"):
        parse_json_object(text, "x")


def test_a_file_is_read_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": 1}')
    assert read_json_object(path) == {"a": 1}
    path.write_bytes(b"[]")
    with pytest.raises(FileError, match=f"^{re.escape(str(path))}: expected a JSON object"):
        read_json_object(path)
    monkeypatch.setattr(json_file, "MAX_BYTES", 7)
    path.write_bytes(b'{"a": 1}')
    message = f"{path}: expected at most 7 bytes, got more; is this the right file?"
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        read_json_object(path)


def test_a_file_may_have_so_many_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert read_regular_file(path, 10) == b"0123456789"
    assert read_regular_file(path, 11) == b"0123456789"
    with pytest.raises(FileError, match="expected at most 9 bytes"):
        read_regular_file(path, 9)
    path.write_bytes(b"")
    assert read_regular_file(path, 0) == b""
    assert check_regular_file(path) == 0


def test_a_file_that_grows_while_it_is_read_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    monkeypatch.setattr(json_file, "check_regular_file", lambda _: 4)
    assert read_regular_file(path, 5) == b"01234"
    with pytest.raises(FileError, match="expected at most 4 bytes, got more"):
        read_regular_file(path, 4)


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    monkeypatch.setattr(json_file, "check_regular_file", lambda _: 4)
    message = f"{path}: cannot be read (No such file or directory); check the file"
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        read_regular_file(path, 5)


def test_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    message = f"{path}: cannot be read (No such file or directory); check the path"
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        check_regular_file(path)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        message = f"{other}: expected a file, got a folder, pipe or device; check the path"
        with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
            check_regular_file(other)
    with pytest.raises(
        FileError, match=r"^'a\\x00b': no name of a file \(embedded null byte\); check the path$"
    ):
        check_regular_file(Path("a\0b"))


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    (tmp_path / "link").symlink_to("x")
    assert check_regular_file(tmp_path / "link") == 3
