"""Which of the prompts that wait are answered next, together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rows import Row

# onnxruntime plans its memory anew for every new shape, so caches have one of few sizes.
_STEP = 128


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be.

    Attributes:
        rows: most prompts.
        tokens: most tokens, with the padding; one prompt is always taken.
        context: most tokens of a row; those of each prompt and its answer are no more.
    """

    rows: int
    tokens: int
    context: int


def choose(waiting: Sequence[Row], limits: BatchLimits) -> list[Row]:
    """The prompt that has waited longest, and those behind it that are the same task's and fit beside it.

    Args:
        waiting: in the order in which they came; at least one.
    """
    first = waiting[0]
    chosen = [first]
    for row in waiting[1:]:
        if len(chosen) == limits.rows:
            break
        if row.task == first.task and _fit([*chosen, row], limits):
            chosen.append(row)
    return chosen


def capacity(rows: Sequence[Row], limits: BatchLimits) -> int:
    """Tokens for which a batch's cache has room, a row."""
    return min(-(-_longest(rows) // _STEP) * _STEP, limits.context)


def _fit(rows: Sequence[Row], limits: BatchLimits) -> bool:
    return _longest(rows) <= limits.context and len(rows) * capacity(rows, limits) <= limits.tokens


def _longest(rows: Sequence[Row]) -> int:
    """A row's tokens where the longest prompt has the longest answer: rows have one length."""
    return max(len(row.prompt) for row in rows) + max(row.max_tokens for row in rows)
