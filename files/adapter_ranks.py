"""A configuration that gives each module the rank and the scaling that its pair has."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from .config import LoraConfig

T = TypeVar("T", int, float)


def with_ranks(
    config: LoraConfig,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    unnamed: str | None = None,
) -> LoraConfig:
    """Return the configuration with other ranks, in ``r`` and ``rank_pattern``, and alphas for the scalings.

    The rank that most modules have is ``r``; the others have a key each, their escaped path. Scalings are
    alpha / r, whatever they were before; alpha is ``scaling * r``, so that alpha / r is the scaling, or its
    neighbour where no float64 gives it exactly.

    Args:
        config: all else of it is kept.
        ranks: path to rank, at least one.
        scalings: path to scaling, of the same paths.
        unnamed: one of the paths, of a pair that no pattern can name; its rank is ``r``.
    """
    alphas = {path: alpha_for(scalings[path], r) for path, r in ranks.items()}
    r = _most_common(ranks) if unnamed is None else ranks[unnamed]
    alpha = _most_common(alphas) if unnamed is None else alphas[unnamed]
    return replace(
        config,
        r=r,
        lora_alpha=alpha,
        rank_pattern=_pattern(ranks, r),
        alpha_pattern=_pattern(alphas, alpha),
        use_rslora=False,
    )


def alpha_for(scaling: float, r: int) -> float:
    """Return alpha with alpha / r the scaling, as nearly as float64 has it."""
    alpha = scaling * r
    candidates = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in candidates if value / r == scaling), alpha)


def _most_common(values: Mapping[str, T]) -> T:
    """Return the value that most have; of several the one that comes first."""
    return Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, T], common: T) -> dict[str, T]:
    """Return a key for each path with another value, and for what such a key would match besides."""
    ends = tuple(f".{path}" for path, value in values.items() if value != common)
    named = [path for path, value in values.items() if value != common or path.endswith(ends)]
    # the first match counts, and a path may be the end of a longer one
    return {re.escape(path): values[path] for path in sorted(named, key=len, reverse=True)}
