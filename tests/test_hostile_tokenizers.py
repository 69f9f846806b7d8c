"""Tokenizer files that are made to deceive, and what lies beside them: chat templates, end tokens."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fuzz import seeds
from limited import run_limited
from refusal import read_or_refused

from loracle.export.text import TextModel
from loracle.export.texts import texts_of
from loracle.export.tokenizer_file import read_tokenizer, tokenizer_errors
from loracle.reference import ConfigError, FileError, LoracleError

BPE, WORDPIECE, UNIGRAM = range(3)
MESSAGES = [{"role": "user", "content": "abc"}]


def folder_of(folder: Path, kind: int = BPE, **changes: Any) -> Path:
    """A folder with a tokenizer, some of its top-level keys changed."""
    folder.mkdir(exist_ok=True)
    for name, content in seeds.tokenizers()[kind].items():
        (folder / name).write_bytes(content)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def use(folder: Path) -> None:
    text = TextModel(folder)
    text.decode(text.encode("abc xé <s>"))
    text.encoding("a", "b")
    text.encode_prompt("a")


@pytest.mark.parametrize("kind", [BPE, WORDPIECE, UNIGRAM])
def test_a_tokenizer_cut_anywhere_is_refused(tmp_path: Path, kind: int) -> None:
    folder = folder_of(tmp_path / "t", kind)
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    for end in range(0, len(whole) - 1, 17):
        path.write_bytes(whole[:end])
        with pytest.raises(FileError, match=r"tokenizer\.json: expected a fast tokenizer's file") as caught:
            TextModel(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [BPE, WORDPIECE, UNIGRAM])
def test_every_seventh_flipped_bit_is_refused_or_used(tmp_path: Path, kind: int) -> None:
    folder = folder_of(tmp_path / "t", kind)
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    refusals = 0
    for bit in range(0, 8 * len(whole), 49):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        refusals += read_or_refused(lambda: use(folder)) is not None
    assert refusals


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (BPE, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}),
        (BPE, {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}),
        (BPE, {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
        (WORDPIECE, {"model": {"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]"}}),
        (UNIGRAM, {"model": {"type": "Unigram", "vocab": [], "unk_id": 7}}),
        (UNIGRAM, {"model": {"type": "Unigram", "vocab": [["", 1e308]], "unk_id": None}}),
        (BPE, {"model": {"type": "Nonsense"}}),
        (
            BPE,
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "("},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
        ),
        (BPE, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),
        (BPE, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////////w=="}}),
        (
            BPE,
            {
                "added_tokens": [
                    {
                        "id": 99,
                        "content": "",
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "special": True,
                    }
                ]
            },
        ),
        (
            BPE,
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "none", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            },
        ),
        (
            BPE,
            {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}},
        ),
        (
            BPE,
            {
                "padding": {
                    "strategy": {"Fixed": 2**40},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "a",
                }
            },
        ),
        (
            BPE,
            {
                "decoder": {
                    "type": "Sequence",
                    "decoders": [{"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}],
                }
            },
        ),
        (BPE, {"version": 7}),
    ],
)
def test_an_odd_tokenizer_is_refused_or_used(tmp_path: Path, kind: int, changes: Mapping[str, Any]) -> None:
    folder = folder_of(tmp_path / "t", kind, **changes)
    read_or_refused(lambda: use(folder))


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"{}"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FileError, match=r"tokenizer\.json"):
        TextModel(tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "absent", "."):
        with pytest.raises(FileError, match="found none"):
            read_tokenizer(tmp_path / name)


def test_a_panic_is_a_refusal_and_every_other_error_is_not(tmp_path: Path) -> None:
    panic = type("PanicException", (BaseException,), {})
    for error in (Exception("a\nb"), panic("index out of bounds")):
        with pytest.raises(FileError, match="one that cannot be used"), tokenizer_errors(tmp_path):
            raise error
    for other in (KeyboardInterrupt(), MemoryError(), ConfigError("x"), RuntimeError("x")):
        with pytest.raises(type(other)), tokenizer_errors(tmp_path):
            raise other


def test_a_tokenizer_without_end_takes_no_memory(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "t")
    os.truncate(folder / "tokenizer.json", 2**40)
    code = """
import sys
from loracle.export.text import TextModel
from loracle.reference import FileError
limit()
try:
    TextModel(sys.argv[1])
except FileError as error:
    print(error)
"""
    assert "expected at most 100000000 bytes" in run_limited(code, folder)


TEMPLATES: Mapping[str, str] = {
    "no template": "{% for %}",
    "a missing name": "{{ nobody.a.b }}",
    "a division by zero": "{{ 1 // 0 }}",
    "a number too large": "{{ 2.0 ** 10000 }}",
    "a wrong type": "{{ 'a' + 1 }}",
    "a missing key": "{{ messages[7]['x'] }}",
    "an endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a wrong format": "{{ '%d' % 'x' }}",
    "a range too long": "{% for i in range(10 ** 9) %}{% endfor %}",
    "a refusal": "{{ raise_exception('not like this') }}",
    "Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "Python by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "Python by attr": "{{ messages | attr('__class__') | attr('__init__') | attr('__globals__') }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "a change": "{{ messages.append(1) }}",
    "a wrong date": "{{ strftime_now(3) }}",
    "a call of nothing": "{{ none() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_can_only_fail(tmp_path: Path, name: str, place: str) -> None:
    folder = folder_of(tmp_path / "t")
    (folder / "chat_template.jinja").unlink()
    content = TEMPLATES[name]
    (folder / place).write_text(
        content if place.endswith("jinja") else json.dumps({"chat_template": content})
    )
    text = TextModel(folder)
    shown: list[str] = []
    message = read_or_refused(lambda: shown.append(text.chat(MESSAGES)))
    if message is not None:
        assert "chat template: it refuses the messages" in message
    else:  # what a sandbox shows of what it does not give
        assert len(shown[0]) < 100
        assert "<class" not in shown[0]


def test_a_template_that_takes_all_memory_fails_where_memory_ends(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "t")
    (folder / "chat_template.jinja").write_text("{{ 'a' * 10 ** 11 }}")
    code = """
import sys
from loracle.export.text import TextModel
from loracle.reference import ConfigError
limit()
try:
    TextModel(sys.argv[1]).chat([])
except ConfigError as error:
    print("refused")
"""
    assert run_limited(code, folder) == "refused\n"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("chat_template.jinja", b"\xff\xfe", FileError),
        ("tokenizer_config.json", b'{"bos_token": {"a": 1}}', None),
        ("tokenizer_config.json", b'{"bos_token": [1], "chat_template": [1]}', None),
        ("tokenizer_config.json", b'{"a": 1, "a": 2}', FileError),
        ("generation_config.json", b'{"eos_token_id": -1}', FileError),
        ("generation_config.json", b'{"eos_token_id": [true]}', FileError),
        ("generation_config.json", b'{"eos_token_id": {"a": 1}}', FileError),
        ("generation_config.json", b'{"eos_token_id": [[1]]}', FileError),
        ("generation_config.json", b"[" * 100_000, FileError),
        ("genai_config.json", b'{"model": 3}', None),
    ],
)
def test_odd_files_beside_a_tokenizer(
    tmp_path: Path, name: str, content: bytes, kind: type[LoracleError] | None
) -> None:
    folder = folder_of(tmp_path / "t")
    (folder / name).write_bytes(content)
    call: Callable[[Path], None] = use
    if kind is None:
        call(folder)
        return
    with pytest.raises(kind, match=name.replace(".", r"\.")):
        call(folder)


@pytest.mark.parametrize("size", [10_000_001, 10**12, 10**400, 0, -1, "10", None])
def test_a_vocabulary_of_any_claimed_size_takes_no_memory(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        texts_of(tmp_path, {"vocab_size": size}, None)
