"""Greedy generation from an exported decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .session import DecoderSession


def greedy(
    session: DecoderSession, prompt: Sequence[int], max_new_tokens: int, stop: frozenset[int] = frozenset()
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
