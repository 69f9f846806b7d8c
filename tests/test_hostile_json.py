"""JSON that is made to deceive: what a strict reader refuses, in one line, in bounded memory and time."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from limited import run_limited

from loracle.files.json_file import (
    MAX_BYTES,
    MAX_DEPTH,
    check_regular_file,
    parse_json_object,
    read_json_object,
)
from loracle.reference import FileError, LoracleError

DOCUMENT = {"a": [1, 2.5, "é", None, {"b": True}], "c": "\U0001f600", "d": {}}


def nested(depth: int) -> str:
    """An object with ``depth`` levels."""
    return '{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested(MAX_DEPTH + 1), f"more than {MAX_DEPTH} objects and lists inside one another"),
        (nested(900), "inside one another"),
        ('{"a":' * 900 + "1" + "}" * 900, "inside one another"),
        ("[" * 100_000, "recursion"),
        ('{"a":' * 100_000, "recursion"),
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "duplicate key 'c'"),
        ('{"K": 1, "K": 2}'.replace("K", "k" * 1000), "duplicate key 'k{80}'"),
        ('{"a": 1e999}', "1e999 is larger than any float"),
        ('{"a": [-1e400]}', "-1e400 is larger than any float"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        (r'{"a": "\ud800"}', "surrogates not allowed"),
        (r'{"\uDFFF": 1}', "surrogates not allowed"),
        (r'{"a": "\ude00\ud83d"}', "surrogates not allowed"),
        ("5", "expected a JSON object, got int"),
        ('"x"', "expected a JSON object, got str"),
        ("[]", "expected a JSON object, got list"),
        ("", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_what_is_no_strict_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(FileError, match=message) as caught:
        parse_json_object(text.encode("utf-8"), "x.json")
    assert str(caught.value).startswith("x.json: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("content", [b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', '{"a": 1}'.encode("utf-16")])
def test_what_is_not_in_utf_8_is_refused(content: bytes) -> None:
    with pytest.raises(FileError, match="not valid JSON"):
        parse_json_object(content, "x.json")


def test_what_is_unusual_and_right_is_read() -> None:
    assert parse_json_object(nested(MAX_DEPTH).encode(), "x")["a"] is not None
    found = parse_json_object(rb'{"a": "\ud83d\ude00", "b": "\u0000", "c": 1e-400, "d": "\\ud800"}', "x")
    assert found == {"a": "\U0001f600", "b": "\0", "c": 0.0, "d": "\\ud800"}
    assert parse_json_object(b'{"a": ' + b"9" * 4300 + b"}", "x")["a"] > 10**4000


def test_a_document_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = json.dumps(DOCUMENT).encode()
    path = tmp_path / "x.json"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(FileError):
            read_json_object(path)
    path.write_bytes(whole)
    assert read_json_object(path) == DOCUMENT


def test_every_flipped_bit_is_refused_or_read_as_the_changed_text_says() -> None:
    whole = json.dumps(DOCUMENT).encode()
    refusals = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found: Any = parse_json_object(bytes(flipped), "x")
        except LoracleError:
            refusals += 1
            continue
        assert found == json.loads(flipped)
    assert 0 < refusals < 8 * len(whole)


def test_many_keys_with_a_duplicate_at_the_end_take_no_longer_than_many_keys() -> None:
    keys = ",".join(f'"{number}":0' for number in range(50_000))
    started = time.process_time()
    with pytest.raises(FileError, match="duplicate key '49999'"):
        parse_json_object(b"{" + keys.encode() + b',"49999":0}', "x")
    assert time.process_time() - started < 5


def test_a_file_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: no byte of it is on the disk
    code = """
import sys
from pathlib import Path
from loracle.files.json_file import read_json_object
from loracle.reference import FileError
limit()
try:
    read_json_object(Path(sys.argv[1]))
except FileError as error:
    print(error)
"""
    assert f"expected at most {MAX_BYTES} bytes" in run_limited(code, path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "x/" * 3000])
def test_what_is_no_name_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match=r"no name of a file|cannot be read"):
        check_regular_file(tmp_path / name)
