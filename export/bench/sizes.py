"""How many parameters each method trains: the formulas of arXiv 2106.09685, section 5.1."""

from __future__ import annotations

from collections.abc import Callable


def adapter_h_parameters(layers: int, hidden: int, rank: int) -> int:
    """AdapterH: two bottlenecks a block, `2 d r + r + d` numbers each."""
    return 2 * layers * _bottleneck(hidden, rank)


def adapter_l_parameters(layers: int, hidden: int, rank: int) -> int:
    """AdapterL: one bottleneck a block, and a layer norm, `2 d`, before it."""
    return layers * (_bottleneck(hidden, rank) + 2 * hidden)


def prefix_parameters(layers: int, width: int, positions: int) -> int:
    """Prefix tuning: a key and a value, `width` numbers each, for each layer and position."""
    return 2 * layers * width * positions


def prompt_parameters(hidden: int, positions: int) -> int:
    """Prompt tuning: an embedding for each position."""
    return hidden * positions


def nearest_rank(parameters: Callable[[int], int], budget: float) -> int:
    """The rank, at least 1, whose number of parameters, linear in the rank, is nearest to `budget`."""
    none, one = parameters(0), parameters(1)
    return max(1, round((budget - none) / (one - none)))


def _bottleneck(hidden: int, rank: int) -> int:
    return 2 * hidden * rank + rank + hidden
