"""What a weight may be instead of the merge: the mistakes made with adapters, each as a merge of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from loracle.files import LoraPair
from loracle.files.experts import OwnUpdates
from loracle.files.updates import Bias, Convolution, Dora, Linear, Stacked, Update

from .one_weight import OneWeight
from .verdict import Verdict

_ALIKE = 1e-6
"""Two scalings that are this close are one."""


@dataclass(frozen=True, eq=False)
class Alternative:
    """A weight as a mistake makes it."""

    verdict: Verdict
    words: str
    weight: OneWeight


def with_pair(update: Update, change: Callable[[LoraPair], LoraPair]) -> Update | None:
    """The update with its pairs changed; None where it has none."""
    if isinstance(update, OwnUpdates):
        own = {place: with_pair(one, change) for place, one in update.updates.items()}
        return replace(update, updates={place: one for place, one in own.items() if one is not None})
    if isinstance(update, Linear | Convolution | Dora | Stacked | Bias):
        return replace(update, pair=change(update.pair))
    return None


def first_pair(update: Update) -> LoraPair | None:
    """A pair of the update, for its rank and scaling; None where it has none."""
    if isinstance(update, OwnUpdates):
        return next(filter(None, map(first_pair, update.updates.values())), None)
    return update.pair if isinstance(update, Linear | Convolution | Dora | Stacked | Bias) else None


def alternatives(
    weight: OneWeight, *, use_rslora: bool, others: Mapping[str, Update]
) -> Iterator[Alternative]:
    """The mistakes that a weight with an update may show, likely ones first.

    Args:
        use_rslora: whether the adapter's scaling is alpha / sqrt(r).
        others: the updates of the adapter's other weights, by name.
    """
    if weight.base is not None:
        base = replace(weight, start=weight.base, update=None)
        yield Alternative(Verdict.MISSING, "it is the base's", base)
    update = weight.update
    pair = None if update is None else first_pair(update)
    if update is None or pair is None:
        return
    for verdict, words, factor in _factors(pair, use_rslora):
        yield scaled(weight, factor, verdict, words)
    if isinstance(update, Linear) and len(set(weight.start.shape)) == 1:
        turned = with_pair(update, lambda own: replace(own, A=own.B.T, B=own.A.T))
        yield Alternative(Verdict.TRANSPOSED, "B A is added transposed", replace(weight, update=turned))
    if isinstance(update, Dora):
        kind = Linear if weight.start.ndim == 2 else Convolution
        plain = kind(replace(update.pair, magnitude=None))
        yield Alternative(Verdict.OTHER_ADAPTER, "it lacks DoRA's magnitude", replace(weight, update=plain))
    for name, other in others.items():
        own = first_pair(other)
        if (
            name != weight.name
            and type(other) is type(update)
            and own is not None
            and own.shape == pair.shape
            and not isinstance(other, Dora | OwnUpdates)
        ):
            words = f"it is the update of {name}"
            yield Alternative(Verdict.OTHER_ADAPTER, words, replace(weight, update=other))


def scaled(weight: OneWeight, factor: float, verdict: Verdict, words: str) -> Alternative:
    """The weight with `factor` times its scaling."""
    assert weight.update is not None
    update = with_pair(weight.update, lambda own: replace(own, scaling=own.scaling * factor))
    return Alternative(verdict, words, replace(weight, update=update))


def _factors(pair: LoraPair, use_rslora: bool) -> Iterator[tuple[Verdict, str, float]]:
    """Mistakes that multiply the update by a factor; those of one factor cannot be told apart."""
    r, scaling = pair.r, pair.scaling
    alpha = scaling * (math.sqrt(r) if use_rslora else r)
    named = [
        (Verdict.TWICE, "the update is there twice", 2.0),
        (Verdict.OTHER_SCALING, "the update is subtracted", -1.0),
    ]
    if scaling:
        other = ("alpha / r", alpha / r) if use_rslora else ("alpha / sqrt(r)", alpha / math.sqrt(r))
        named += [
            (Verdict.OTHER_SCALING, f"{words} ({value:.6g} for {scaling:.6g})", value / scaling)
            for words, value in (
                (f"the scaling is {other[0]}", other[1]),
                ("the scaling is 1, as of alpha = r", 1.0),
                ("the scaling is alpha, not divided by r", alpha),
                ("the scaling is 1 / r, as of alpha = 1", 1 / r),
                ("the scaling is applied twice", scaling * scaling),
            )
        ]
    left = [entry for entry in named if not math.isclose(entry[2], 1.0, rel_tol=_ALIKE)]
    while left:
        verdict, _, factor = left[0]
        alike = [entry for entry in left if math.isclose(entry[2], factor, rel_tol=_ALIKE)]
        left = [entry for entry in left if entry not in alike]
        yield verdict, ", or ".join(words for _, words, _ in alike), factor
