"""An update of rank r within given distances of a matrix, entry by entry: an interior-point method.

The constraints ``|e + d| < h``, d the change of the update, have slacks and multipliers. Newton's method on
the conditions for the centre of what they allow starts where the constraints do not hold yet, and takes the
slacks along: where it can take a whole step, they hold.

Source: Boyd and Vandenberghe, "Convex Optimization", sections 10.3 and 11.7.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .weighted_fit import WeightedFit

MOST_STEPS = 60

_FIRST = 1e-2  # times the tolerance, for the fit to start from
_FIRST_SLACK = 0.05
_OF_THE_WAY = 0.95
_STALLED = 0.01  # a step this short is hindered by constraints that contradict one another
_MOST_STALLED = 4


@dataclass(frozen=True, eq=False)
class Found:
    """A change of the update, and how many entries it leaves outside, in float64's arithmetic.

    Attributes:
        X: (m, r), Y: (n, r): the change is ``X V^T + U Y^T``.
        steps: how many systems were solved.
        outside: how many entries are not within their distances.
    """

    X: Tensor
    Y: Tensor
    steps: int
    outside: int


def find_inside(
    fit: WeightedFit, e: Tensor, h: Tensor, tolerance: float = 1e-3, most_steps: int = MOST_STEPS
) -> Found:
    """Return a change d of the update such that ``|e + d| < h``, if one is found.

    Args:
        fit: the updates.
        e: (m, n), how far the update is off.
        h: (m, n), the distances allowed, above 0; infinite where any will do.
        tolerance: of the systems that are solved iteratively.
        most_steps: systems to solve at most; fewer where steps become very short.
    """
    X, Y = fit.solve(h**-2, e * h**-2, _FIRST * tolerance)
    e = e + fit.update(X, Y)
    ratio = e / h
    above, below = ((1 - ratio).clamp(min=_FIRST_SLACK), (1 + ratio).clamp(min=_FIRST_SLACK))
    pushed_down, pushed_up = 1 / above, 1 / below
    steps, stalled = 1, 0
    while steps < most_steps and stalled < _MOST_STALLED and bool((ratio.abs() >= 1).any()):
        missing_above, missing_below = above - (1 - ratio), below - (1 + ratio)
        stiff_above, stiff_below = pushed_down / above, pushed_up / below
        gradient = (1 / above - 1 / below + stiff_above * missing_above - stiff_below * missing_below) / h
        dX, dY = fit.solve((stiff_above + stiff_below) * h**-2, gradient, tolerance)
        change = fit.update(dX, dY)
        to_above, to_below = -missing_above - change / h, -missing_below + change / h
        to_down = 1 / above - pushed_down - stiff_above * to_above
        to_up = 1 / below - pushed_up - stiff_below * to_below
        share = min(_whole_or_less(above, to_above), _whole_or_less(below, to_below))
        dual_share = min(_whole_or_less(pushed_down, to_down), _whole_or_less(pushed_up, to_up))
        above, below = above + share * to_above, below + share * to_below
        pushed_down, pushed_up = pushed_down + dual_share * to_down, pushed_up + dual_share * to_up
        X, Y, e = X + share * dX, Y + share * dY, e + share * change
        ratio = e / h
        steps += 1
        stalled = stalled + 1 if share < _STALLED else 0
    return Found(X, Y, steps, int((ratio.abs() >= 1).sum()))


def _whole_or_less(values: Tensor, change: Tensor) -> float:
    """Return the share of a change, 1 at most, after which positive values are still positive."""
    ways = torch.where(change < 0, -values / change, torch.inf)
    return min(1.0, _OF_THE_WAY * float(ways.min()))
