"""Answers to held-out prompts from a deployment, with onnxruntime alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loracle.export import Deployment, greedy


@dataclass(frozen=True)
class HeldOut:
    """A task's held-out rows, in the order of the file."""

    system: str
    prompts: tuple[str, ...]
    references: tuple[str, ...]


def read_heldout(path: Path) -> HeldOut:
    """Read a held-out file that `build_tasks` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return HeldOut(
        rows[0]["system"], tuple(row["prompt"] for row in rows), tuple(row["completion"] for row in rows)
    )


def answer(
    deployment: Deployment,
    name: str | None,
    heldout: HeldOut,
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """The greedy answer of a task, or of the base for None, to each prompt: one line, of at most
    `max_new_tokens` tokens."""
    text = deployment.text
    answers = []
    for done, prompt in enumerate(heldout.prompts, 1):
        ids = text.encode_prompt(prompt, system=heldout.system)
        decoder = deployment.decoder(name, len(ids) + max_new_tokens)
        tokens = [token for token, _ in greedy(decoder, ids, max_new_tokens, text.stop)]
        answers.append(" ".join(text.decode(tokens).split()))
        if progress is not None:
            progress(done, len(heldout.prompts))
    return tuple(answers)
