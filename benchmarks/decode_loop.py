"""The loop of `loracle run`, timed to its first token and from there."""

from __future__ import annotations

import time
from collections.abc import Sequence

from loracle.export import DecoderSession, generate

from .answer import Answer


def timed_loop(session: DecoderSession, prompt: Sequence[int], new_tokens: int) -> Answer:
    """Answer greedily; no token ends an answer."""
    start = time.perf_counter()
    steps = generate(session, [prompt], new_tokens)
    tokens = [next(steps)[1]]
    first = time.perf_counter()
    tokens += [token for _, token in steps]
    return Answer(tuple(tokens), first - start, time.perf_counter() - first)
