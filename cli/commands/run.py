"""`loracle run`: generate with onnxruntime alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from loracle.reference import ConfigError

from ..guard import one_line_errors
from ..options import Debug, Json


def command(
    model: Annotated[Path, typer.Argument(help="Folder that `loracle export` wrote.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What to answer.")],
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to write.")] = 128,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")
    ] = False,
    threads: Annotated[int, typer.Option("--threads", help="onnxruntime's threads; 0: its own choice.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer PROMPT, the most likely token at a time, streaming the text."""
    with one_line_errors(debug):
        from loracle.export import DecoderSession, TextModel, greedy

        if max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens: expected at least 1, got {max_new_tokens}")
        text = TextModel(model)
        ids = text.encode_prompt(prompt, system=system, raw=raw)
        session = DecoderSession(model, len(ids) + max_new_tokens, threads=threads)
        tokens: list[int] = []
        started = time.perf_counter()
        first = started

        def generated() -> Iterator[int]:
            nonlocal first
            for token, _ in greedy(session, ids, max_new_tokens, text.stop):
                if not tokens:
                    first = time.perf_counter()
                tokens.append(token)
                yield token

        answer = ""
        for piece in text.stream(generated()):
            answer += piece
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        ended = time.perf_counter()
        rate = (len(tokens) - 1) / (ended - first) if len(tokens) > 1 else None
        if as_json:
            typer.echo(
                json.dumps(
                    {
                        "text": answer,
                        "tokens": tokens,
                        "prompt_tokens": len(ids),
                        "seconds_to_first_token": first - started,
                        "tokens_per_second": rate,
                    }
                )
            )
        else:
            sys.stdout.write("\n")
            if sys.stderr.isatty() and rate is not None:
                typer.echo(f"{len(tokens)} tokens, {rate:.1f} tokens/s", err=True)
