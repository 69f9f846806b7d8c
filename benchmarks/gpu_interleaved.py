"""Calls on a device, timed in turn with a yardstick, so that a machine that drifts slows both."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

from .gpu_ceilings import seconds_of
from .train_step import chain

Numbers = dict[str, list[float]]


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int, device: str) -> tuple[Numbers, Numbers]:
    """Run F X X F Y Y F ... in each round, every second one backwards, on the device's own clock.

    Args:
        calls: by name; F is the first.

    Returns:
        each call's seconds, and of all but F the rounds' (X + X) / (F + F), of F's calls beside it.
    """
    seconds: Numbers = {name: [] for name in calls}

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            seconds[name].append(seconds_of(calls[name], device))
            return seconds[name][-1]

        return run

    floor, *ways = calls
    ratios: Numbers = {name: [] for name in ways}
    gc.collect()
    for round_ in range(rounds):
        turn = ways[:: 1 if round_ % 2 == 0 else -1]
        for name, ratio in zip(turn, chain(timed(floor), [timed(name) for name in turn]), strict=True):
            ratios[name].append(ratio)
    return seconds, ratios
