"""What a way of decoding answers, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """The tokens that followed a prompt; seconds until the first was there, and for all others."""

    tokens: tuple[int, ...]
    first: float
    rest: float
