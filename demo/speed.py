"""Decode speed of models, interleaved in one process; and what a switch between tasks takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loracle.export import DecoderSession, Deployment
from loracle.export.bench.intervals import bootstrap_median


@dataclass(frozen=True)
class DecodeSpeed:
    """One model's decode speed and its ratio to the first model's.

    Attributes:
        tokens_per_second: median over the rounds.
        ratio: median over the rounds of (this speed / the first model's speed in the same round).
        low, high: 95% interval of that median (bootstrap over rounds).
    """

    tokens_per_second: float
    ratio: float
    low: float
    high: float


def decode_seconds(session: DecoderSession, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Seconds to decode `tokens`, one a step, after `prompt` (which is not timed)."""
    session.reset()
    session.step(np.asarray(prompt))
    steps = [np.array([token]) for token in tokens]
    start = time.perf_counter()
    for step in steps:
        session.step(step)
    return time.perf_counter() - start


def switch_seconds(deployment: Deployment, name: str, capacity: int, *, repeats: int = 51) -> float:
    """Median of the seconds from asking for a task that is in memory to being able to run it, in the place of
    one that changes the same tensors."""
    decoder = deployment.decoder(name, capacity)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        decoder = deployment.decoder(name, capacity, reuse=decoder)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def measure_decode(
    models: Mapping[str, Callable[[int], DecoderSession]],
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    rounds: int = 8,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, DecodeSpeed]:
    """Decode the same tokens with every model, in turn.

    Each round opens every session anew and times each `repeats` times, in turn, keeping the median: where a
    session's memory happens to lie makes it a few percent faster or slower for as long as it lives, so two
    sessions opened once would differ even over one model. The order rotates from round to round.

    Args:
        models: name to what opens a session of a capacity; the first is what ratios refer to.
        prompt: tokens before the timed ones.
        tokens: tokens decoded one a step.
        rounds: how often sessions are opened; the interval is over rounds.
        progress: called with (rounds done, rounds).
    """
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        sessions = {name: models[name](len(prompt) + len(tokens)) for name in order}
        for name in order:
            decode_seconds(sessions[name], prompt, tokens[:1])
        timed: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in order:
                timed[name].append(decode_seconds(sessions[name], prompt, tokens))
        for name in names:
            seconds[name].append(float(np.median(timed[name])))
        del sessions
        if progress is not None:
            progress(number + 1, rounds)
    first = np.asarray(seconds[names[0]])
    result = {}
    for name in names:
        times = np.asarray(seconds[name])
        ratio, low, high = bootstrap_median(first / times)
        result[name] = DecodeSpeed(len(tokens) / float(np.median(times)), ratio, low, high)
    return result
