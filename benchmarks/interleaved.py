"""Ways of answering, timed in turn with a yardstick, so that a machine that drifts slows both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from .answer import Answer

WARM_TOKENS = 4

Seconds = tuple[float, float]
"""Of an answer: to its first token, and from there."""

Opened = Callable[[Sequence[int], int], Answer]
"""Called with the tokens of a prompt and how many to append."""


@dataclass(frozen=True)
class Times:
    """What was measured of one way, a number for each round.

    Attributes:
        prefill, decode: seconds of one answer to its first token, and from there.
        prefill_ratios, decode_ratios: these over those of the yardstick; empty for the yardstick.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    prefill_ratios: list[float] = field(default_factory=list)
    decode_ratios: list[float] = field(default_factory=list)


def chain(own: Callable[[], Seconds], ways: Sequence[Callable[[], Seconds]]) -> Iterator[Seconds]:
    """Call O X X O Y Y O ... and yield each way's (X + X) / (O + O), of the calls of ours beside it."""
    before = own()
    for way in ways:
        first, second = way(), way()
        after = own()
        prefill, decode = (
            (first[phase] + second[phase]) / (before[phase] + after[phase]) for phase in range(2)
        )
        yield prefill, decode
        before = after


def timed(
    answer: Opened, text: Sequence[int], new_tokens: int, seconds: list[Seconds]
) -> Callable[[], Seconds]:
    """A call that answers, and keeps and returns its seconds.

    A short answer goes before it: threads of the way before still spin for a while, and would slow a prefill.
    """

    def run() -> Seconds:
        answer(text, WARM_TOKENS)
        found = answer(text, new_tokens)
        seconds.append((found.first, found.rest))
        return seconds[-1]

    return run
