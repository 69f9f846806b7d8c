"""Prompts and text without transformers, compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from export_fixtures import make_model, write_tokenizer
from transformers import AutoTokenizer

from loracle.export import TextModel
from loracle.reference import ConfigError, FileError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 'naïve' in English? <b>&amp;</b>"},
]


def test_chat_prompt_is_the_one_transformers_renders(tmp_path: Path) -> None:
    model = make_model(tmp_path / "base")
    theirs = AutoTokenizer.from_pretrained(model)
    rendered = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ours = TextModel(model)
    assert ours.chat(MESSAGES) == rendered
    assert "<b>&amp;</b>" in rendered
    expected = theirs(rendered, add_special_tokens=False)["input_ids"]
    assert ours.encode_prompt(MESSAGES[1]["content"], system="Be brief.") == expected


def test_without_a_template_the_prompt_stands_as_it_is(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    text = TextModel(tmp_path)
    assert text.encode_prompt("ab") == text.encode("ab")
    with pytest.raises(ConfigError, match="found none"):
        text.chat(MESSAGES)


def test_a_template_that_refuses_gives_its_reason(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="roles must alternate"):
        TextModel(tmp_path).chat(MESSAGES)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ConfigError, match="refuses"):
        TextModel(tmp_path).chat(MESSAGES)


def test_streamed_pieces_join_to_the_text_and_split_no_character(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = TextModel(tmp_path)
    ids = text.encode("né 👍 fin")
    pieces = list(text.stream(iter(ids)))
    assert "".join(pieces) == "né 👍 fin"
    assert "�" not in "".join(pieces)
    assert len(pieces) < len(ids)  # a byte a token: the emoji's four come as one piece
    assert pieces[0] == "n"
    assert "".join(text.stream(iter(ids[:-5]))).startswith("né ")


def test_special_tokens_are_not_printed_and_stop_tokens_are_read(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [3, 257]}))
    text = TextModel(tmp_path)
    assert text.stop == frozenset({3, 257})
    assert text.decode([*text.encode("ok"), 257]) == "ok"
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": [7]}}))
    assert TextModel(tmp_path).stop == frozenset({7})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert TextModel(tmp_path).stop == frozenset({7})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert TextModel(tmp_path).stop == frozenset({5})
    for wrong in (True, [3, "x"], -1):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(FileError, match=r"eos_token_id: expected a token or a list of tokens, got"):
            TextModel(tmp_path)


def test_stop_strings_that_are_special_tokens_are_counted_among_the_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = TextModel(tmp_path)
    assert text.stop_rules(["</s>", "\n\n", "</"]) == (frozenset({257}), ("\n\n", "</"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert TextModel(tmp_path).stop_rules(["</s>"]) == (frozenset({3, 257}), ())
    with pytest.raises(ConfigError, match="stop: expected some text, got an empty string"):
        text.stop_rules([""])


def test_missing_or_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"tokenizer\.json"):
        TextModel(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FileError, match=r"tokenizer_config\.json"):
        TextModel(tmp_path)
