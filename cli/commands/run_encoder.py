"""`loracle run` on a model that does not generate: classes, classes of tokens, or tokens for a mask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from loracle.export.encoder_answers import Scored


def print_answers(
    model: Path, prompts: Sequence[str], *, task: str | None = None, threads: int, as_json: bool
) -> None:
    """Print what the model, or a task that is bound to its inputs, says of each text, one line a class or
    token."""
    from loracle.export.encoder_answers import answer_texts

    answers = answer_texts(model, prompts, task=task, threads=threads)
    if as_json:
        typer.echo(json.dumps({"answers": [[_as_object(one) for one in answer] for answer in answers]}))
        return
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        start = f"[{number}] " if len(prompts) > 1 else ""
        for one in answer:
            of = "" if one.place is None else f"  {prompt[slice(*one.place)]!r}"
            typer.echo(f"{start}{one.label}  {one.score:.3f}{of}")


def _as_object(one: Scored) -> dict[str, Any]:
    place = {} if one.place is None else {"start": one.place[0], "end": one.place[1]}
    return {"label": one.label, "score": one.score, **place}
