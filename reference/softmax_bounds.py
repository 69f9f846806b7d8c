"""By how much rounding can move probabilities: softmax on balls."""

import math
from dataclasses import replace

import numpy as np

from .balls import Ball
from .formats import Array
from .magnitudes import Bound
from .precision import gamma
from .softmax import softmax

EXP_ULPS = 4.0
"""The error assumed of an exponential: torch states 1 (2 on a GPU), NumPy 2.5 in float32."""

_LEAST_BLOCK = 16
# Of P, each: the reciprocal of the sum, the product with it, the result as stored.
_NORMALISING_STORES = 3
# Above this a score is not known at all, and exp of it would leave float64.
_KNOWN_SHIFT = 300.0


def softmax_ball(scores: Ball, counts: Array, exp_ulps: float) -> Ball:
    """Return the softmax of scores of which ``counts`` is where they count, (..., T).

    With each score within ``shift`` of the exact one, p grows at most by a factor
    ``exp(shift) / (p exp(shift) + sum of the others' p exp(-shift))``, and shrinks at most by that with the
    signs exchanged. An exponential that is off by a relative error is one of a score that is shifted; so is
    one of a rounded argument, which is
    ``score - max``, that times log2(e), or ``score - log sum exp``. What rounding the sum, its reciprocal,
    rescalings and the result does is a relative error of p on top.
    """
    keys = scores.shape[-1]
    precision, u = scores.precision, scores.precision.form.unit_roundoff
    rescalings = math.ceil(keys / _LEAST_BLOCK) - 1
    centre = softmax(scores.centre, counts)
    highest = np.max(scores.centre + 2 * scores.radius, axis=-1, keepdims=True, where=counts, initial=-np.inf)
    level = np.max(scores.reach, axis=-1, keepdims=True, where=counts, initial=0.0)
    gap = highest - scores.centre + 2 * scores.radius
    argument = 4 * gap + 2 * level + 6 * math.log(keys) + 1
    off = gamma(math.ceil(2 * exp_ulps), u) * (1 + rescalings) + u * argument
    shift = np.where(counts, scores.radius + off, 0.0)
    most = shift.max(axis=-1, keepdims=True)
    growth = precision.growth(keys + 2 * rescalings, _NORMALISING_STORES, 0, 1.0)
    # The centre is off by as much less as float64 is more precise.
    own = np.exp(6 * np.minimum(most, _KNOWN_SHIFT) * 2.0**-53 / precision.wide.unit_roundoff)
    relative = _relative_change(centre, np.minimum(shift, _KNOWN_SHIFT)) * own
    known = centre * own * (relative + growth * (1 + relative))
    at_all = (1 + growth) * np.exp(np.minimum(off, 2 * _KNOWN_SHIFT))
    radius = np.where(most > _KNOWN_SHIFT, at_all, np.minimum(known, at_all))
    lost = 2 * (2 + rescalings) * scores.unit
    return replace(scores, centre=centre, radius=np.where(counts, radius + lost, 0.0))


def _relative_change(p: Bound, shift: Bound) -> Bound:
    """Return by how much of itself a probability can change when each score does by its shift."""
    others = 1.0 - np.eye(p.shape[-1])
    up, down = np.expm1(shift), -np.expm1(-shift)
    # Not 1 - down, which is 0 from a shift of 38 on: with no other key that would be 0 / 0.
    more, less = p * np.exp(shift), p * np.exp(-shift)
    rest = p @ others
    rise = (rest * up + (p * down) @ others) / (more + less @ others)
    fall = (rest * down + (p * up) @ others) / (less + more @ others)
    change: Bound = np.maximum(rise, fall)
    return change
