"""Factors whose merge is the tuned weight bit for bit, where its difference is of rank r but for roundings.

The singular vectors of the difference see the tuned weight's roundings as noise. What they give is nearer to
the true update than the difference is, but not near enough: some entries of its merge round to a neighbour.
The true update, and those next to it, merge to the tuned weight: every entry lies in the interval of numbers
that round to the tuned one. Such an update is looked for, by an interior-point method.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from loracle.files.lora_pair import FLOATS

from .decomposition import Decomposition
from .interior import find_inside
from .intervals import rounding_intervals
from .pairing import row_slices
from .weighted_fit import WeightedFit

MOST_ENTRIES = 1 << 24
"""The most entries of a weight that is refined, which takes a dozen float64 arrays of its size."""

_EXPLAINED = 0.5  # the share of entries off their intervals above which something else than roundings is off
_NEARLY = 0.05  # the share of entries outside up to which systems are solved once more, to
_NARROW = 1e-5
_NOISE = 2.0  # times the largest singular value that the roundings are expected to have
_LEAST_WIDTH = 2.0**-48  # of an interval, relative to its centre, that float64 factors can aim at
_ROUNDING_DTYPES = tuple(FLOATS[:3])


@dataclass(frozen=True, eq=False)
class Refined:
    """Factors in float64: A (r, in), B (out, r). ``steps`` is how many systems were solved for them."""

    A: Tensor
    B: Tensor
    steps: int


def roundings_explain(before: NDArray[Any], after: NDArray[Any], A: Tensor, B: Tensor) -> bool:
    """Tell whether the roundings of ``after`` are all that keeps it from being ``before + B @ A``.

    It is so where at least half of the entries of ``B @ A`` are in their intervals. Not asked of float64, of
    weights of two dtypes, and of more than `MOST_ENTRIES` entries.

    Args:
        before, after: (out, in). A: (r, in), B: (out, r), float64.
    """
    if after.dtype not in _ROUNDING_DTYPES or before.dtype != after.dtype or before.size > MOST_ENTRIES:
        return False
    off = 0
    for rows in row_slices(before.shape):
        centre, width = rounding_intervals(before[rows], after[rows])
        off += int(((B[rows] @ A - centre).abs() > width).sum())
    return off <= _EXPLAINED * before.size


def refine(
    before: NDArray[Any], after: NDArray[Any], found: Decomposition, r: int, scaling: float
) -> Refined:
    """Return factors such that ``before + scaling * B @ A`` rounds to ``after`` in as many entries as it can.

    Args:
        before, after: (out, in), of which `roundings_explain` is true.
        found: the decomposition of their difference.
        r: the rank. Where the difference has less, rows of A and columns of B are zeros.
        scaling: not 0.
    """
    # rows and columns that the update leaves alone are exactly zero
    rows, columns = (torch.from_numpy((before != after).any(axis=axis)) for axis in (1, 0))
    A, B = torch.zeros(r, len(columns), dtype=torch.float64), torch.zeros(len(rows), r, dtype=torch.float64)
    if not rows.any():
        return Refined(A, B, 0)
    centre, width = rounding_intervals(before, after)
    centre, width = centre[rows][:, columns], width[rows][:, columns]
    k = _rank(found.s[:r], width)
    if k == 0:
        return Refined(A, B, 0)
    U, V, root = found.U[rows, :k], found.Vh[:k, columns].T, found.s[:k].sqrt()
    width[width < _LEAST_WIDTH * centre.abs()] = torch.inf
    fit, off = WeightedFit(U, V), (U * found.s[:k]) @ V.T - centre
    inside = find_inside(fit, off, width)
    steps = inside.steps
    if 0 < inside.outside <= _NEARLY * off.numel():
        again = find_inside(fit, off, width, _NARROW)
        steps += again.steps
        inside = min(inside, again, key=lambda own: own.outside)
    share = math.sqrt(abs(scaling))
    B[rows, :k] = (U * root + inside.X / root) * math.copysign(1 / share, scaling)
    A[:k, columns] = (V * root + inside.Y / root).T / share
    return Refined(A, B, steps)


def _rank(s: Tensor, width: Tensor) -> int:
    """Return how many singular values are above those of the roundings, which are within the widths."""
    m, n = width.shape
    deviation = float(width.square().mean().sqrt()) / math.sqrt(3)
    return int((s > _NOISE * deviation * (math.sqrt(m) + math.sqrt(n))).sum())
