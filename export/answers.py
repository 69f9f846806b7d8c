"""Answers of a decoder to a batch of prompts, whole.

Needs onnxruntime, tokenizers and NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .generation import BatchSession, generate
from .sampling import Sampling
from .text import TextModel


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt.

    Attributes:
        text: without special tokens, and without the stop string that ended it.
        tokens: all of them, with the one that ended the answer.
        prompt_tokens: how many the prompt has.
        finish_reason: "stop", for an end token or a stop string; or "length".
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str


def answer_prompts(
    session: BatchSession,
    text: TextModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> list[Answer]:
    """The answers to a batch of prompts, all rows in step; see `generate`.

    Args:
        session: with as many rows as prompts, and room for them and their answers.
        text: the model's tokenizer and end tokens.
        prompts: tokens of each.
        stop: strings that end an answer.
    """
    ends, strings = text.stop_rules(stop)
    answers = [text.answer(strings) for _ in prompts]
    for row, token in generate(
        session,
        prompts,
        max_new_tokens,
        sampling=sampling,
        stop=ends,
        finished=lambda row: answers[row].stopped,
    ):
        answers[row].push(token)
    for answer in answers:
        answer.close()
    return [
        Answer(answer.text, tuple(answer.tokens), len(prompt), answer.finish_reason(ends))
        for answer, prompt in zip(answers, prompts, strict=True)
    ]
