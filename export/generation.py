"""Generation from an exported decoder: one sequence greedily, or a batch with any sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from loracle.reference import ConfigError

from .sampling import Sampler, Sampling

_GREEDY = Sampling()


class BatchSession(Protocol):
    """Rows that are answered in step: `DecoderSession`, or `Seq2SeqSession`, whose prompts are sources."""

    def require_room(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Raise ShapeError where there is none for the prompts and as many tokens after each."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
        """Begin each row with a prompt; return the logits (rows, vocabulary) of the first token."""

    def decode(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        """Append a token to each row; return the logits (rows, vocabulary) of the next."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""


class OneText(Protocol):
    """One text that tokens are appended to: `DecoderSession` of one row."""

    def reset(self) -> None:
        """Forget the text."""

    def step(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Append tokens; return the logits (n, vocabulary) of each."""


def greedy(
    session: OneText, prompt: Sequence[int], max_new_tokens: int, stop: frozenset[int] = frozenset()
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """The most likely token after `prompt`, then after that, and so on.

    Yields:
        (token, logits): the token and the rows of logits (n, vocabulary) of the step that chose it: the
        whole prompt's at first, one row afterwards. Ends after `max_new_tokens` tokens, or after a token of
        `stop`, which is yielded too. Ties go to the smaller token id.
    """
    session.reset()
    ids = np.asarray(prompt, np.int64)
    for _ in range(max_new_tokens):
        logits = session.step(ids)
        token = int(logits[-1].argmax())
        yield token, logits
        if token in stop:
            return
        ids = np.array([token], np.int64)


def generate(
    session: BatchSession,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | Sequence[Sampling] = _GREEDY,
    stop: frozenset[int] = frozenset(),
    finished: Callable[[int], bool] | None = None,
) -> Iterator[tuple[int, int]]:
    """Answer a batch of prompts, all rows in step.

    Args:
        session: with as many rows as prompts, and room for them and their answers.
        prompts: tokens of each.
        max_new_tokens: most tokens of an answer.
        sampling: how a token is chosen; or for each row its own, and its answer is the one it gets alone.
        stop: tokens that end an answer; they are yielded too.
        finished: asked about a row after each of its tokens was yielded: whether its answer ends there.

    Yields:
        (row, token), in each step the rows in order. Once half of the rows have ended the others go on alone.

    Raises:
        ConfigError: no token is to be generated.
        ShapeError: the session has other rows, or too little capacity; not one sampling a row.
        NonFiniteError: a row's logits are not numbers.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    session.require_room(prompts, max_new_tokens)
    return _generate(session, prompts, max_new_tokens, Sampler(sampling, prompts), stop, finished)


def _generate(
    session: BatchSession,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    stop: frozenset[int],
    finished: Callable[[int], bool] | None,
) -> Iterator[tuple[int, int]]:
    logits = session.prefill(prompts)
    rows = list(range(len(prompts)))  # those in the session; an ended one may be among them
    live = set(rows)
    for left in range(max_new_tokens - 1, -1, -1):
        tokens = sampler.choose(logits, rows)
        ended = False
        for row, token in zip(rows, tokens, strict=True):
            if row in live:
                yield row, token
                if token in stop or (finished is not None and finished(row)):
                    live.remove(row)
                    ended = True
        if not left or not live:
            return
        if ended and 2 * len(live) <= len(rows):
            places = [place for place, row in enumerate(rows) if row in live]
            session.keep(places)
            rows, tokens = [rows[place] for place in places], [tokens[place] for place in places]
        logits = session.decode(tokens)
