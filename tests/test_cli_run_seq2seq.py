"""`loracle run` on an encoder and a decoder: a source in, its target out."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import make
from cli_runs import answers, call
from export_fixtures import write_tokenizer

from loracle.export import Seq2SeqSession, TextModel, export, generate

PROMPTS = ("translate: hello", "a")
GIVEN = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
DRAWN = ("--temperature", "1.0", "--seed", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BART, which has no more than 128 positions."""
    base = make(tmp_path_factory.mktemp("run") / "base", "bart")
    write_tokenizer(base)
    (base / "chat_template.jinja").unlink()
    export(base, base.parent / "onnx")
    return base.parent / "onnx"


def test_each_prompt_is_a_source_whose_target_is_the_answer(folder: Path) -> None:
    text = TextModel(folder)
    sources = [text.encode(prompt) for prompt in PROMPTS]
    tokens: list[list[int]] = [[], []]
    session = Seq2SeqSession(folder, 9, batch=2)
    for row, token in generate(session, sources, 9, stop=frozenset({2})):
        tokens[row].append(token)
    found = answers(folder, *GIVEN, "--max-new-tokens", 9)
    assert [answer["tokens"] for answer in found] == tokens
    assert [answer["prompt_tokens"] for answer in found] == [len(source) for source in sources]
    for answer in found:
        assert answer["text"] == text.decode(answer["tokens"]).rstrip("\ufffd")


def test_what_is_drawn_is_printed_and_ends_at_a_stop_string(folder: Path) -> None:
    whole = answers(folder, *GIVEN, *DRAWN, "--max-new-tokens", 12)
    assert whole == answers(folder, *GIVEN, *DRAWN, "--max-new-tokens", 12)
    code, out, _ = call(folder, *GIVEN, *DRAWN, "--max-new-tokens", 12)
    assert (code, out) == (0, "".join(f"[{n}] {answer['text']}\n" for n, answer in enumerate(whole, 1)))
    stop = whole[0]["text"][3]
    found = answers(folder, *GIVEN, *DRAWN, "--max-new-tokens", 12, "--stop", stop)
    assert found[0]["text"] == whole[0]["text"].partition(stop)[0]
    assert found[0]["finish_reason"] == "stop"


def test_an_answer_ends_with_the_positions(folder: Path) -> None:
    (answer,) = answers(folder, "--prompt", "a", *DRAWN, "--max-new-tokens", 128)
    assert len(answer["tokens"]) == 128 or answer["finish_reason"] == "stop"
    code, _, err = call(folder, "--prompt", "a", "--max-new-tokens", 129)
    assert code != 0
    assert err.splitlines() == [
        "error: --max-new-tokens: expected at most 128 in a target of 128 positions, got 129; "
        "shorten the answer"
    ]


def test_an_empty_prompt_is_refused_in_one_line(folder: Path) -> None:
    code, _, err = call(folder, "--prompt", "")
    assert code != 0
    assert err.splitlines() == ["error: prompt 1: expected 1 to 128 tokens, got 0; shorten the text"]
