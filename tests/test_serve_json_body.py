"""Bodies that are no strict JSON are refused, whatever Python's parser would make of them."""

import pytest

from loracle.serve.errors import RequestError
from loracle.serve.json_body import parse_object


def test_an_object_is_what_it_says() -> None:
    text = '{"a": 1, "b": [1.5, true, null, "\\ud83d\\ude00 é\\u0000"], "c": {"a": -0.0}}'
    assert parse_object(text.encode()) == {"a": 1, "b": [1.5, True, None, "😀 é\0"], "c": {"a": 0.0}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected JSON"),
        (b'{"a": 1', "expected JSON"),
        (b'{"a": 1} x', "expected JSON"),
        (b"[1]", "expected an object, got list"),
        (b"1", "expected an object, got int"),
        (b"null", "expected an object, got NoneType"),
        (b'{"a": NaN}', "expected finite numbers, got NaN"),
        (b'{"a": [-Infinity]}', "expected finite numbers, got -Infinity"),
        (b'{"a": 1e999}', "expected finite numbers, got '1e999'"),
        (b'{"a": -1.5E+4000}', "expected finite numbers"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b'{"a": 1, "a": 1}', "expected each name once, got 'a' twice"),
        (b'{"x": {"b": 1, "a": 2, "b": 1}}', "expected each name once, got 'b' twice"),
        (b'{"a": "\xff"}', "expected UTF-8, got byte 0xff at 7"),
        (b'{"a": "\xed\xa0\x80"}', "expected UTF-8, got byte 0xed at 7"),
        ('{"a": 1}'.encode("utf-16"), "expected UTF-8"),
        ('\ufeff{"a": 1}'.encode(), "expected JSON"),
        (b"[" * 100_000, "expected JSON, got more levels than can be read"),
        (b'{"a":' * 100_000, "expected JSON, got more levels than can be read"),
    ],
)
def test_anything_else_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_object(body)
    assert caught.value.status == 400
    assert str(caught.value).startswith(f"the body: {message}")
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"a": "\\ud800"}', "a"),
        (b'{"a": [[{"c": "x\\udfffy"}]]}', "a"),
        (b'{"\\ud800": 1}', "\\ud800"),
        (b'{"a": {"\\ud83d": 1}}', "a"),
    ],
)
def test_half_characters_are_refused_wherever_they_are(body: bytes, field: str) -> None:
    with pytest.raises(RequestError, match="lone surrogate") as caught:
        parse_object(body)
    assert (caught.value.status, caught.value.param) == (400, field)


def test_many_equal_names_take_no_long_time() -> None:
    names = b",".join(b'"%d": 0' % number for number in range(100_000))
    with pytest.raises(RequestError, match="'99999' twice"):
        parse_object(b"{" + names + b', "99999": 0}')
