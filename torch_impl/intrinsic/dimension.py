"""The intrinsic dimension as a function of scores: which learning rate counts, and which d is enough."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHARE = 0.9
"""Of the full score, in d90."""

_ROUNDING = 1e-12
"""What means and thresholds are rounded by: 0.72 reaches 0.9 * 0.8."""


@dataclass(frozen=True)
class Score:
    """What one run came to.

    Attributes:
        d: numbers that were trained; None for all of the model's.
        lr: its learning rate.
        seed: of its randomness.
        validation: the metric on the split that chooses; None where training diverged.
        test: the metric that counts; None where training diverged.
    """

    d: int | None
    lr: float
    seed: int
    validation: float | None
    test: float | None


@dataclass(frozen=True)
class Point:
    """All seeds of one d at the learning rate that was best on the validation split.

    Attributes:
        d: numbers that were trained; None for all of the model's.
        lr: the learning rate.
        score: mean over the seeds on the test split.
        low, high: the worst and the best seed.
        validation: mean over the seeds on the validation split.
    """

    d: int | None
    lr: float
    score: float
    low: float
    high: float
    validation: float


@dataclass(frozen=True)
class Dimension:
    """What d is enough, by two measures of enough.

    Attributes:
        threshold: ``0.9 * full``: 90% of the full score, as both papers have it.
        d90: the smallest d whose score reaches it; None where none does.
        threshold_above_start: ``start + 0.9 * (full - start)``: 90% of what training adds.
        d90_above_start: the smallest d whose score reaches that.
        d100: the smallest d whose score reaches the full one.
    """

    threshold: float
    d90: int | None
    threshold_above_start: float
    d90_above_start: int | None
    d100: int | None


def best_points(scores: Iterable[Score]) -> tuple[Point, ...]:
    """Return a point for each d, in their order, the full model's last.

    Of the learning rates with which no seed diverged that of the best mean on the validation split counts,
    the smallest of equals. A d with which all diverged has no point.
    """
    groups: dict[tuple[float, float], list[Score]] = {}
    for score in scores:
        groups.setdefault((math.inf if score.d is None else score.d, score.lr), []).append(score)
    points: dict[float, Point] = {}
    for (d, _), group in sorted(groups.items()):
        point = _point(group)
        if point is not None and (d not in points or point.validation > points[d].validation):
            points[d] = point
    return tuple(points.values())


def intrinsic_dimension(points: Sequence[Point], full: float, start: float) -> Dimension:
    """Return the smallest d that is enough, beside the full model's score and the untrained model's.

    Source: Li et al., arXiv 1804.08838, section 2 (d_int90, d_int100); Aghajanyan et al., arXiv 2012.13255,
    section 3: to reach 85% in full is to look for 0.9 * 85% = 76.5%.
    """
    above = start + SHARE * (full - start)
    return Dimension(
        SHARE * full,
        _smallest(points, SHARE * full),
        above,
        _smallest(points, above),
        _smallest(points, full),
    )


def _smallest(points: Sequence[Point], threshold: float) -> int | None:
    enough = (one.d for one in points if one.d is not None and one.score >= threshold - _ROUNDING)
    return min(enough, default=None)


def _point(group: Sequence[Score]) -> Point | None:
    tests = [score.test for score in group if score.test is not None]
    validations = [score.validation for score in group if score.validation is not None]
    if len(tests) < len(group) or len(validations) < len(group):
        return None
    first = group[0]
    return Point(first.d, first.lr, _mean(tests), min(tests), max(tests), _mean(validations))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
