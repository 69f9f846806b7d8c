"""What the clients of `benchmarks.serve_load` ask, and what the answers must be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from loracle.export import Deployment
from loracle.export.text import TextModel

# How long each answer may be, beside the question that it answers.
QUESTIONS = (
    ("The capital of France is", 12),
    ("Write a short poem about the sea.", 40),
    ("What is two and three?", 20),
    ("Translate into French: good morning, my friends", 24),
    ("Name the largest planet of the solar system, and say why it has so many moons.", 32),
    ("Once upon a time", 48),
)


@dataclass(frozen=True)
class Case:
    """One request, always greedy."""

    task: str
    question: str
    max_tokens: int
    chat: bool

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, **fields: Any) -> dict[str, Any]:
        """The request's object."""
        asked: dict[str, Any] = {"prompt": self.question}
        if self.chat:
            asked = {"messages": [{"role": "user", "content": self.question}]}
        limits = {"temperature": 0, "max_tokens": self.max_tokens}
        return {"model": self.task, **asked, **limits, **fields}


@dataclass(frozen=True)
class Expected:
    """A task's answer alone: its text, its tokens and the prompt's."""

    text: str
    tokens: tuple[int, ...]
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class NearTie:
    """Why an answer in a batch may be another: at one place two tokens are as likely but for rounding.

    Attributes:
        place: of the token.
        margin: between their logits in float64.
        limit: what rounding explains.
    """

    place: int
    margin: float
    limit: float


def cases_of(tasks: Sequence[str], *, chat: bool) -> list[Case]:
    """Every question for every task; as a text to continue, and where `chat` as a turn of a chat too."""
    kinds = (False, True) if chat else (False,)
    return [
        Case(task, question, most, kind) for task in tasks for question, most in QUESTIONS for kind in kinds
    ]


def expect(folder: Path, cases: Iterable[Case], threads: int) -> dict[Case, Expected]:
    """The answers of tasks that answer alone.

    Raises SystemExit where two tasks answer all questions alike: a wrong task's answer would not be seen.
    """
    deployment = Deployment(folder, threads=threads)
    found = {}
    for case in cases:
        raw = not case.chat
        (answer,) = deployment.generate(case.task, [case.question], max_new_tokens=case.max_tokens, raw=raw)
        prompt = tuple(deployment.text.encode_prompt(case.question, raw=raw))
        found[case] = Expected(answer.text, answer.tokens, prompt)
    whole: dict[str, list[str]] = {}
    for case, expected in found.items():
        whole.setdefault(case.task, []).append(expected.text)
    if len({tuple(texts) for texts in whole.values()}) < len(whole):
        raise SystemExit("two tasks answer every question alike; take larger adapters")
    return found


def distinct_share(expected: Mapping[Case, Expected]) -> float:
    """The share of questions that no two tasks answer alike."""
    answers: dict[tuple[str, bool], list[str]] = {}
    for case, own in expected.items():
        answers.setdefault((case.question, case.chat), []).append(own.text)
    return sum(len(set(texts)) == len(texts) for texts in answers.values()) / len(answers)


def explain(base: Path, adapter: Path, folder: Path, expected: Expected, text: str) -> NearTie | None:
    """The near-tie that makes a task answer `text`; None where there is none.

    It is looked for along the answer that the task gives alone, in the unmerged model in float64: a token
    that is as likely as the one chosen but for rounding (numerics, clause 7), and with which the text begins
    as `text` does.
    """
    from loracle.export.verification.truth import Float64Model
    from loracle.files import read_adapter

    truth = Float64Model(base, read_adapter(adapter))
    (right,) = truth.evaluate([(*expected.prompt, *expected.tokens[:-1])], np.dtype(np.float32))
    limit = 2 * right.tolerance
    tokenizer = TextModel(folder).tokenizer
    for place, token in enumerate(expected.tokens):
        if not text.startswith(_whole(tokenizer, expected.tokens[:place])):
            return None
        row = right.logits[len(expected.prompt) - 1 + place]
        margins = row.max() - np.minimum(row, row[token])
        for other in np.flatnonzero(margins <= limit):
            begun = _whole(tokenizer, (*expected.tokens[:place], int(other)))
            if other != token and text.startswith(begun):
                return NearTie(place, float(margins[other]), limit)
    return None


def _whole(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens, without half characters at its end."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.rstrip("\ufffd")
