"""Decode speed of exported folders, interleaved in one process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracle.export import DecoderSession, open_session

from .wheels import Progress


@dataclass(frozen=True)
class DecodeSpeed:
    """One folder's decode speed and its ratio to the first folder's.

    Attributes:
        tokens_per_second: median over the rounds.
        ratio: median over the rounds of (this speed / the first folder's speed in the same round).
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


def measure_decode(
    folders: Mapping[str, Path],
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    rounds: int = 15,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, DecodeSpeed]:
    """Decode the same tokens with every folder's model, in turn, `rounds` times.

    The order rotates from round to round; one round before the first is not counted. All sessions are open
    throughout and share the process, its threads and its memory.

    Args:
        folders: name to exported folder; the first is what ratios refer to.
        prompt: tokens before the timed ones.
        tokens: tokens decoded one a step.
    """
    names = list(folders)
    length = len(prompt) + len(tokens)
    sessions = {
        name: DecoderSession(open_session(folder, threads), length) for name, folder in folders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        if progress is not None and number:
            progress(f"decode speed, round {number} of {rounds}")
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = decode_seconds(sessions[name], prompt, tokens)
            if number:
                seconds[name].append(taken)
    first = np.asarray(seconds[names[0]])
    result = {}
    for name in names:
        times = np.asarray(seconds[name])
        ratio, low, high = median_interval(first / times)
        result[name] = DecodeSpeed(len(tokens) / float(np.median(times)), ratio, low, high)
    return result


def median_interval(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Median of `values` and the 95% interval of it, by bootstrap over the values."""
    draws = np.random.default_rng(seed).integers(0, values.size, (resamples, values.size))
    medians = np.median(values[draws], axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)
