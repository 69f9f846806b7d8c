"""`loracle run`: generate with onnxruntime alone."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loracle.reference import ConfigError

from ..guard import one_line_errors
from ..options import Debug, Json

if TYPE_CHECKING:
    from loracle.export.generation import BatchSession
    from loracle.export.streaming import AnswerText

_NEW_TOKENS = 128


def command(
    model: Annotated[
        Path, typer.Argument(help="Folder that `loracle export` wrote, or the graph of a linked task.")
    ],
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="What to answer; several are answered as one batch.")
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="The task in the folder; left out, the base model.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            help=f"Most tokens to write; left out, {_NEW_TOKENS}, or what the context has room for.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            help="0: greedy, always the most likely token. Above 0: draw tokens, as transformers does.",
        ),
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Draw from this many most likely tokens; 0: from all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the most likely tokens that sum to this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn: the same seed, the same text.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Text that ends an answer, and is left out; repeatable."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")
    ] = False,
    threads: Annotated[int, typer.Option("--threads", help="onnxruntime's threads; 0: its own choice.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer every PROMPT, streaming the text; classify it, or fill its mask, where the model does that.

    Greedy unless --temperature is given: the settings in generation_config.json are not used, but for its end
    tokens.
    """
    with one_line_errors(debug):
        from loracle.export import Sampling, TextModel, generate
        from loracle.export.encoder_answers import encoder_task

        from .run_encoder import print_answers

        if max_new_tokens is not None and max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens: expected at least 1, got {max_new_tokens}")
        sampling = Sampling(temperature, top_k, top_p, seed)
        if sampling.greedy and (top_k, top_p) != (0, 1.0):
            raise ConfigError(
                "--top-k, --top-p: expected a --temperature above 0 beside them, got greedy decoding"
            )
        model, task = _located(model, name)
        if encoder_task(model) is not None:
            print_answers(model, prompt, task=task, threads=threads, as_json=as_json)
            return
        text = TextModel(model)
        stop_tokens, stop_strings = text.stop_rules(stop or ())
        prompts = [text.encode_prompt(one, system=system, raw=raw) for one in prompt]
        session, new_tokens = _opened(model, task, prompts, max_new_tokens, threads)
        answers = [text.answer(stop_strings) for _ in prompts]
        printer = _Printer(answers, quiet=as_json)
        started = time.perf_counter()
        first = None
        for row, token in generate(
            session,
            prompts,
            new_tokens,
            sampling=sampling,
            stop=stop_tokens,
            finished=lambda row: answers[row].stopped,
        ):
            if first is None:
                first = time.perf_counter()
            answer = answers[row]
            piece = answer.push(token)
            if answer.stopped or token in stop_tokens or len(answer.tokens) == new_tokens:
                printer.end(row, piece + answer.close())
            elif piece:
                printer.write(row, piece)
        seconds = time.perf_counter() - (first or started)
        # Those of the first step are not timed.
        later = sum(len(answer.tokens) for answer in answers) - len(answers)
        rate = later / seconds if later else None
        if as_json:
            typer.echo(
                json.dumps(
                    {
                        "answers": [
                            {
                                "text": answer.text,
                                "tokens": answer.tokens,
                                "prompt_tokens": len(ids),
                                "finish_reason": answer.finish_reason(stop_tokens),
                            }
                            for answer, ids in zip(answers, prompts, strict=True)
                        ],
                        "seconds_to_first_token": (first or started) - started,
                        "tokens_per_second": rate,
                    }
                )
            )
        elif sys.stderr.isatty() and rate is not None:
            typer.echo(f"{later + len(answers)} tokens, {rate:.1f} tokens/s", err=True)


def _located(model: Path, name: str | None) -> tuple[Path, str | None]:
    """The graph of a linked task; or the folder, and the name of a task that is given to its graph."""
    from loracle.export.task_names import find_task

    if name is None:
        return model, None
    form, path = find_task(model, name)
    return (path, None) if form == "linked" else (model, name)


def _opened(
    model: Path, task: str | None, prompts: list[list[int]], wanted: int | None, threads: int
) -> tuple[BatchSession, int]:
    """A session with room for the prompts and their answers, and the most new tokens of one."""
    from loracle.export import Deployment, Seq2SeqSession, open_decoder
    from loracle.export.seq2seq_model import is_seq2seq, open_seq2seq

    if not is_seq2seq(model):
        new_tokens = _room(model, prompts, wanted)
        capacity = max(map(len, prompts)) + new_tokens
        if task is not None:
            return Deployment(model, threads=threads).decoder(task, capacity, len(prompts)), new_tokens
        return open_decoder(model, capacity, threads=threads, batch=len(prompts)), new_tokens
    opened = open_seq2seq(model, threads)
    new_tokens = wanted or _NEW_TOKENS
    if opened.positions is not None:
        room = opened.positions - len(opened.start) + 1  # the last token is not read
        if room < (wanted or 1):
            raise ConfigError(
                f"--max-new-tokens: expected at most {room} in a target of {opened.positions} positions, "
                f"got {wanted}; shorten the answer"
            )
        new_tokens = min(new_tokens, room)
    capacity = len(opened.start) + new_tokens - 1
    return Seq2SeqSession(opened, capacity, batch=len(prompts)), new_tokens


def _room(model: Path, prompts: list[list[int]], wanted: int | None) -> int:
    """Most new tokens: those wanted, if the model's context has room for them beside the longest prompt."""
    from loracle.export.context import context_length

    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ConfigError(f"--prompt: expected some text, got no token in prompt {lengths.index(0) + 1}")
    context = context_length(model)
    if context is None:
        return wanted or _NEW_TOKENS
    room = context - max(lengths)
    if room < (wanted or 1):
        raise ConfigError(
            f"--max-new-tokens: expected at most {max(room, 0)} beside a prompt of {max(lengths)} tokens in "
            f"a context of {context}, got {wanted or _NEW_TOKENS}; shorten the prompt or the answer"
        )
    return wanted or min(_NEW_TOKENS, room)


class _Printer:
    """Prints the answers in order: the first that has not ended as it comes, later ones in their turn."""

    def __init__(self, answers: list[AnswerText], *, quiet: bool) -> None:
        self._answers = answers
        self._ended = [False] * len(answers)
        self._row = 0
        self._quiet = quiet
        if len(answers) > 1:
            self._put("[1] ")

    def write(self, row: int, piece: str) -> None:
        """Print a piece of a row's text now, if it is that row's turn."""
        if row == self._row:
            self._put(piece)

    def end(self, row: int, piece: str) -> None:
        """Print the last piece of a row's text, and go on to the next row where it is that one's turn."""
        self._ended[row] = True
        self.write(row, piece)
        while self._row < len(self._ended) and self._ended[self._row]:
            self._row += 1
            self._put("\n")
            if self._row < len(self._ended):
                self._put(f"[{self._row + 1}] {self._answers[self._row].text}")

    def _put(self, piece: str) -> None:
        if not self._quiet:
            sys.stdout.write(piece)
            sys.stdout.flush()
