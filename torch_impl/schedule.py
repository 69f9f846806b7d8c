"""How the learning rate moves over a run: a pure function of the step."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine", "constant")


def warmup_steps(share: float, steps: int) -> int:
    """Return how many of ``steps`` the warmup takes: ``share`` of them, rounded up."""
    return math.ceil(share * steps)


def rate_factor(schedule: Schedule, step: int, steps: int, warmup: int) -> float:
    """Return what the learning rate is multiplied by in the update after ``step`` others, in [0, 1].

    It rises as ``step / warmup`` while ``step < warmup``. Then, with t = (step - warmup) / (steps - warmup):
    linear ``1 - t``, cosine ``(1 + cos(pi t)) / 2``, constant 1. So the first update of a run with a warmup
    moves nothing, and the last has not quite reached zero.

    Args:
        schedule: one of `SCHEDULES`.
        step: updates made before, in [0, steps).
        steps: updates in all.
        warmup: updates in which it rises, below ``steps`` or 0; see `warmup_steps`.

    Source: ``transformers.get_scheduler``, whose numbers these are.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    rest = max(1, steps - warmup)
    if schedule == "linear":
        return (steps - step) / rest
    return 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / rest)))
