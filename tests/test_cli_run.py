"""`loracle run` as a user meets it: several prompts, stop strings, sampling, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runs import answers, call
from export_fixtures import make_model

from loracle.cli.commands.run import _Printer
from loracle.export import TextModel, export

PROMPTS = ("hello", "what is this?", "a")
GIVEN = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
DRAWN = ("--temperature", "1.0", "--top-k", "60", "--top-p", "0.95", "--seed", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = make_model(tmp_path_factory.mktemp("run") / "base")
    export(base, base.parent / "onnx")
    return base.parent / "onnx"


@pytest.mark.parametrize("options", [(), DRAWN])
def test_several_prompts_are_answered_as_each_alone(folder: Path, options: tuple[str, ...]) -> None:
    batch = answers(folder, *GIVEN, "--max-new-tokens", 12, *options)
    alone = [answers(folder, "--prompt", prompt, "--max-new-tokens", 12, *options)[0] for prompt in PROMPTS]
    assert batch == alone
    text = TextModel(folder)
    for answer, prompt in zip(batch, PROMPTS, strict=True):
        assert answer["text"] == text.decode(answer["tokens"]).rstrip("\ufffd")
        assert answer["prompt_tokens"] == len(text.encode_prompt(prompt))
        assert answer["finish_reason"] == "length"
        assert len(answer["tokens"]) == 12


def test_the_printed_text_is_that_of_the_answers(folder: Path) -> None:
    options = ("--max-new-tokens", 12, *DRAWN)
    texts = [answer["text"] for answer in answers(folder, *GIVEN, *options)]
    code, out, err = call(folder, "--prompt", PROMPTS[0], *options)
    assert (code, out, err) == (0, texts[0] + "\n", "")
    code, out, err = call(folder, *GIVEN, *options)
    assert (code, out, err) == (0, "".join(f"[{n}] {text}\n" for n, text in enumerate(texts, 1)), "")


def test_an_answer_ends_before_the_stop_string_and_the_others_go_on(folder: Path) -> None:
    options = (*GIVEN, "--max-new-tokens", 12, *DRAWN)
    whole = answers(folder, *options)
    text = whole[0]["text"]
    stop = text[3:6]
    assert text.index(stop) == 3
    assert not any(stop in answer["text"] for answer in whole[1:])
    cut = answers(folder, *options, "--stop", stop, "--stop", "never there")
    assert cut[1:] == whole[1:]
    assert cut[0]["text"] == text[:3]
    assert cut[0]["finish_reason"] == "stop"
    assert len(cut[0]["tokens"]) < 12
    _, out, _ = call(folder, "--prompt", PROMPTS[0], "--max-new-tokens", 12, *DRAWN, "--stop", stop)
    assert out == text[:3] + "\n"


def test_the_beginning_of_a_stop_string_at_the_end_of_an_answer_is_printed(folder: Path) -> None:
    options = ("--prompt", PROMPTS[0], "--max-new-tokens", 12)
    (whole,) = answers(folder, *options)
    stop = whole["text"][-1] + "never there"
    assert answers(folder, *options, "--stop", stop) == [whole]
    assert call(folder, *options, "--stop", stop)[1] == whole["text"] + "\n"


def test_a_top_k_of_one_is_greedy(folder: Path) -> None:
    options = (*GIVEN, "--max-new-tokens", 6)
    assert answers(folder, *options, "--temperature", 2, "--top-k", 1) == answers(folder, *options)


def test_a_special_token_as_a_stop_string_ends_the_answer(folder: Path, tmp_path: Path) -> None:
    """It never shows in text. A token of the answer is made special, and the answer ends there."""
    whole = answers(folder, "--prompt", "hello", "--max-new-tokens", 12, *DRAWN)[0]["tokens"]
    at = next(i for i in range(3, 12) if whole[i] not in whole[:i])
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tokenizer = TextModel(folder).tokenizer
    name = tokenizer.id_to_token(whole[at])
    tokenizer.add_special_tokens([name])
    (tmp_path / "tokenizer.json").unlink()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = answers(tmp_path, "--prompt", "hello", "--max-new-tokens", 12, *DRAWN, "--stop", name)[0]
    assert found["tokens"] == whole[: at + 1]
    assert found["finish_reason"] == "stop"


def test_the_seed_decides_what_is_drawn(folder: Path) -> None:
    def drawn(seed: int) -> list[int]:
        options = ("--max-new-tokens", 12, "--temperature", 1, "--seed", seed)
        tokens: list[int] = answers(folder, "--prompt", "hello", *options)[0]["tokens"]
        return tokens

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_left_out_the_answer_has_the_room_that_the_context_has(folder: Path) -> None:
    (answer,) = answers(folder, "--prompt", "hello", "--raw")
    assert answer["finish_reason"] == "length"
    assert answer["prompt_tokens"] + len(answer["tokens"]) == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-new-tokens", 0), "--max-new-tokens: expected at least 1, got 0"),
        (
            ("--raw", "--max-new-tokens", 124),
            "--max-new-tokens: expected at most 123 beside a prompt of 5 tokens in a context of 128, "
            "got 124; shorten the prompt or the answer",
        ),
        (
            ("--top-p", 0.5),
            "--top-k, --top-p: expected a --temperature above 0 beside them, got greedy decoding",
        ),
        (("--temperature", 1, "--top-p", 2), "top_p: expected 0 to 1, got 2.0"),
        (("--stop", ""), "stop: expected some text, got an empty string"),
        (("--raw", "--prompt", ""), "--prompt: expected some text, got no token in prompt 2"),
    ],
)
def test_wrong_options_are_one_line_and_an_exit_code(
    folder: Path, arguments: tuple[object, ...], message: str
) -> None:
    assert call(folder, "--prompt", "hello", *arguments) == (2, "", f"error: {message}\n")


def test_the_first_answer_that_has_not_ended_is_printed_as_it_comes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Answer:
        text = ""

    rows = [Answer() for _ in range(3)]
    printer = _Printer(rows, quiet=False)  # type: ignore[arg-type]
    shown = []

    def put(row: int, piece: str, *, last: bool = False) -> None:
        rows[row].text += piece
        (printer.end if last else printer.write)(row, piece)
        shown.append(capsys.readouterr().out)

    put(0, "a")
    put(1, "b")
    put(2, "c", last=True)
    put(0, "d", last=True)
    put(1, "e")
    put(1, "f", last=True)
    assert shown == ["[1] a", "", "", "d\n[2] b", "e", "f\n[3] c\n"]
