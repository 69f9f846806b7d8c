"""Two sessions timed in turn, A B B A, so that a machine that drifts slows both alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Call = Callable[[], None]
Timed = Callable[[], float]
"""A call that returns its seconds."""

_MOST_REPEATS = 1000
_LONG = 0.3
"""Seconds from which on what ran before no longer shows."""


@dataclass(frozen=True)
class Block:
    """Seconds of A and of B in one block, the means of two measurements each."""

    base: float
    method: float

    @property
    def ratio(self) -> float:
        """The method's over the base's."""
        return self.method / self.base


def abba(base: Timed, method: Timed, *, flipped: bool) -> Block:
    """Measure A B B A, or B A A B where `flipped`: a drift that is even in time cancels out."""
    if flipped:
        turned = abba(method, base, flipped=False)
        return Block(turned.method, turned.base)
    first = base()
    inner = method(), method()
    return Block((first + base()) / 2, sum(inner) / 2)


def blocks_of(
    base: Call, method: Call, count: int, window: float, *, flipped: bool = False
) -> tuple[Block, ...]:
    """Run both until they are warm, and measure `count` blocks, every second one flipped.

    Args:
        base, method: run once when called.
        window: seconds that one measurement takes at least: shorter calls are repeated, both as often.
        flipped: whether the first block is.
    """
    for call in (base, method):
        call()
    seconds = min(_seconds(call, 1) for call in (base, method))
    repeats = min(_MOST_REPEATS, max(1, math.ceil(window / max(seconds, 1e-9))))
    timed = [_timed(call, repeats, warm=seconds < _LONG) for call in (base, method)]
    with _without_collections():
        return tuple(abba(*timed, flipped=flipped is (number % 2 == 0)) for number in range(count))


def ratios(blocks: Sequence[Sequence[Block]]) -> list[list[float]]:
    """The ratios of each round's blocks."""
    return [[block.ratio for block in own] for own in blocks]


def _timed(call: Call, repeats: int, *, warm: bool) -> Timed:
    """A call of its mean seconds; one that is not timed goes before where it is `warm`: caches and threads
    are another session's."""

    def run() -> float:
        if warm:
            call()
        return _seconds(call, repeats)

    return run


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@contextmanager
def _without_collections() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
