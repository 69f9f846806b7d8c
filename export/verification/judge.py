"""The verdict on one weight of a candidate: is it the merge, and where not, which mistake explains it?

All entries are compared with the correctly rounded merge. Where some differ, a sample of rows is held against
ways of rounding more than once (`roundings`) and against mistakes (`alternatives`); a mistake explains the
weight if the candidate is nearer to what it gives, rounded, than to the merge. The mean of log2(1 + steps
between representable numbers) measures that, so a few entries far away count little. A mistake is then
confirmed, or counted, in all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loracle.files import MergedWeights
from loracle.files.lora_pair import FLOATS
from loracle.files.mapped_view import MappedView
from loracle.files.updates import Update

from .alternatives import Alternative, alternatives, scaled
from .comparison import FEW, Comparison, compare
from .comparisons import Comparisons, Held
from .one_weight import FLOAT64, OneWeight, coarser, row_blocks, weight_of
from .residue import low_rank_part
from .roundings import roundings
from .ulps import bits, ulp_distance
from .verdict import Verdict, WeightVerdict, Witness

Array = NDArray[Any]

_NOT_MERGED = "it is the base's, bit for bit: the adapter was not merged into it"

SAMPLE_ENTRIES = 1 << 18
_SAMPLE_BLOCKS = 4
_EXPLAINED = 0.9
"""A way of rounding explains a weight if it gives the bits of so many of the entries that differ."""
_NEAR, _FAR = 0.5, 4.0
"""In the mean of log2(1 + steps): 4 is an update of 15 steps."""
_NOISE_SHARE = 0.25
"""Noise that is larger than this share of the update is not what merging and unmerging leaves."""


@dataclass(frozen=True, eq=False)
class _Sample:
    """Blocks of rows of a candidate's tensor, beside the same rows of the weight that it should be."""

    weight: OneWeight
    blocks: tuple[tuple[int, int], ...]
    got: Array

    def rows(self, weight: OneWeight, dtype: np.dtype[Any]) -> Array:
        return np.concatenate([weight.rows(start, stop, dtype) for start, stop in self.blocks])

    @cached_property
    def right(self) -> Array:
        """The merge, in the candidate's dtype."""
        return self.rows(self.weight, self.got.dtype)

    @cached_property
    def exact(self) -> Array:
        """The merge in float64, off by a few of its roundings at most."""
        return np.concatenate([self.weight.wide(start, stop) for start, stop in self.blocks])

    @cached_property
    def base(self) -> Array:
        """The rows without the adapter in float64; zeros where the base has no such weight."""
        base = self.weight.base
        if base is None:
            return np.zeros(self.got.shape)
        return np.concatenate([base[start:stop] for start, stop in self.blocks]).astype(FLOAT64)

    @cached_property
    def wide(self) -> Array:
        """What the candidate holds, in float64."""
        return self.got.astype(FLOAT64)

    def distance(self, rows: Array) -> float:
        """How far the candidate is from others, in the mean."""
        return float(np.log2(1.0 + ulp_distance(self.got, rows).astype(FLOAT64)).mean())

    def distance_from(self, weight: OneWeight) -> float:
        return self.distance(self.rows(weight, self.got.dtype))


class Judge:
    """Gives verdicts on the weights of a candidate, one after another.

    Args:
        weights: the base with the adapter merged in.
        exact: whether only the correctly rounded merge passes.
        ahead: what compares some of them before they are judged.
    """

    def __init__(
        self, weights: MergedWeights, *, exact: bool = False, ahead: Comparisons | None = None
    ) -> None:
        self._weights = weights
        self._exact = exact
        self._ahead = ahead

    @cached_property
    def _updates(self) -> Mapping[str, Update]:
        pairs = ((name, self._weights.update(name)) for name in self._weights.merged_names)
        return {name: update for name, update in pairs if update is not None}

    def judge(self, name: str, held: Array, place: str = "", view: MappedView | None = None) -> WeightVerdict:
        """The verdict on the tensor that a candidate holds as the weight `name`, in the checkpoint's
        orientation and any floating-point dtype.

        Args:
            place: where it has it, in words.
            view: where it is mapped from.
        """
        weight = weight_of(self._weights, name)
        held = held.reshape(1) if held.ndim == 0 else held
        said = WeightVerdict(name, Verdict.EXACT, True, place, weight.merged, int(held.size))
        if held.shape != weight.start.shape:
            detail = f"expected shape {weight.start.shape}, got {held.shape}"
            return replace(said, verdict=Verdict.WRONG_SHAPE, passed=False, detail=detail)
        if weight.start.dtype not in FLOATS or held.dtype not in FLOATS:
            return _judge_others(weight, held, said)
        compared = None
        if self._ahead is not None and view is not None:
            compared = self._ahead.of(Held(name, view))
        if compared is None:
            compared = compare(weight, held)
        said = replace(said, unequal=compared.unequal, ulps=compared.ulps, witness=compared.witness)
        if not compared.unequal:
            if not weight.merged:
                return replace(said, verdict=Verdict.UNTOUCHED)
            vanished = "the update vanishes in the rounding: it is the base's, bit for bit"
            return replace(said, detail=vanished if compared.is_base else "")
        return self._explain(weight, held, said, compared)

    def _explain(
        self, weight: OneWeight, held: Array, said: WeightVerdict, compared: Comparison
    ) -> WeightVerdict:
        wrong = replace(said, passed=False)
        if compared.not_finite:
            detail = f"{compared.not_finite} entries are NaN or infinite"
            return replace(wrong, verdict=Verdict.NOT_FINITE, detail=detail)
        if compared.is_base and weight.merged:
            return replace(wrong, verdict=Verdict.MISSING, detail=_NOT_MERGED)
        sample = _sample(weight, held)
        twice = _rounded_twice(sample)
        if twice is not None:
            words, narrower = twice
            passed = compared.outside == 0 and weight.merged and not self._exact and not narrower
            return replace(said, verdict=Verdict.ROUNDED_TWICE, passed=passed, detail=words)
        if not weight.merged:
            return replace(wrong, verdict=Verdict.CHANGED, detail=self._change(sample, compared))
        if compared.outside == 0 and _is_plainly_right(sample):
            return self._within(said, compared)
        found = self._nearest(sample)
        if found is not None:
            return replace(wrong, verdict=found.verdict, detail=_confirmed(found, held))
        return self._right_but_for_noise(sample, said, compared)

    def _nearest(self, sample: _Sample) -> Alternative | None:
        """The mistake that the sample is nearest to; None where that is the merge itself."""
        config = None if self._weights.adapter is None else self._weights.adapter.config
        own = sample.distance(sample.right)
        nearest: tuple[float, Alternative] | None = None
        for alternative in alternatives(
            sample.weight, use_rslora=config is not None and config.use_rslora, others=self._updates
        ):
            distance = sample.distance_from(alternative.weight)
            if distance < own and (nearest is None or distance < nearest[0]):
                nearest = distance, alternative
        factor = _fitted(sample)
        if factor is not None:
            words = f"about {factor:.4g} times the scaling"
            free = scaled(sample.weight, factor, Verdict.OTHER_SCALING, words)
            distance = sample.distance_from(free.weight)
            if distance < own / 2 and (nearest is None or distance < nearest[0] / 2):
                nearest = distance, free
        if nearest is None:
            return None
        found = nearest[1]
        residue = sample.wide - sample.rows(found.weight, sample.got.dtype).astype(FLOAT64)
        part = low_rank_part(residue)
        if part is None:
            return found if _is_small(residue, sample) else None
        words = f"{found.words}, and besides an update of {part}"
        if found.verdict is Verdict.MISSING:
            words = f"it differs from the base's by an update of {part} that is not the adapter's"
        return replace(found, verdict=Verdict.OTHER_ADAPTER, words=words)

    def _right_but_for_noise(
        self, sample: _Sample, said: WeightVerdict, compared: Comparison
    ) -> WeightVerdict:
        wrong = replace(said, passed=False)
        residue = sample.wide - sample.right.astype(FLOAT64)
        many = compared.unequal > FEW * compared.entries
        part = low_rank_part(residue) if many else None
        if part is not None:
            words = f"the update is there, and besides another of {part}"
            return replace(wrong, verdict=Verdict.OTHER_ADAPTER, detail=words)
        most = compared.ulps[-1][0]
        if compared.outside == 0:
            return self._within(said, compared)
        if compared.outside <= max(1, FEW * compared.entries):
            words = f"the update is there, but {compared.outside} entries are further off than any rounding"
            return replace(wrong, verdict=Verdict.DAMAGED, detail=words)
        update = float(np.linalg.norm(sample.exact - sample.base))
        share = float(np.linalg.norm(residue)) / update if update else np.inf
        if share <= _NOISE_SHARE:
            words = (
                f"the update is there, but noise of {share:.2g} times its size, up to {most} ulp: more than "
                "one merge's roundings; merged and unmerged many times, or in a narrower dtype?"
            )
            return replace(wrong, verdict=Verdict.DRIFTED, detail=words)
        words = f"noise of {share:.2g} times the update's size lies over it"
        return replace(wrong, verdict=Verdict.UNEXPLAINED, detail=words)

    def _within(self, said: WeightVerdict, compared: Comparison) -> WeightVerdict:
        words = f"the update is there, rounded otherwise; at most {compared.ulps[-1][0]} ulp"
        return replace(said, verdict=Verdict.WITHIN_ULPS, passed=not self._exact, detail=words)

    def _change(self, sample: _Sample, compared: Comparison) -> str:
        """What was done to a weight that the adapter leaves alone."""
        other = self._same_as(sample)
        if other is not None:
            return f"it holds the base's {other}"
        residue = sample.wide - sample.right.astype(FLOAT64)
        part = low_rank_part(residue) if compared.unequal > FEW * compared.entries else None
        if part is not None:
            return f"by an update of {part}: was another adapter merged, or more of this one?"
        size = float(np.linalg.norm(sample.exact))
        share = float(np.linalg.norm(residue)) / size if size else np.inf
        return f"by {share:.2g} of its size, at most {compared.ulps[-1][0]} ulp"

    def _same_as(self, sample: _Sample) -> str | None:
        """Another weight of the model whose bits the sample has."""
        own = sample.weight.name
        for name in self._weights.names:
            if name == own or self._weights.shape(name) != self._weights.shape(own):
                continue
            other = weight_of(self._weights, name)
            if other.start.dtype in FLOATS and np.array_equal(
                bits(sample.got), bits(sample.rows(other, sample.got.dtype))
            ):
                return name
        return None


def _judge_others(weight: OneWeight, held: Array, said: WeightVerdict) -> WeightVerdict:
    """Of integers and the like: the same dtype and bits, or not."""
    if held.dtype != weight.start.dtype:
        detail = f"expected dtype {weight.start.dtype}, got {held.dtype}"
        return replace(said, verdict=Verdict.WRONG_SHAPE, passed=False, detail=detail)
    unequal = np.ascontiguousarray(held).reshape(-1) != weight.start.reshape(-1)
    count = int(np.count_nonzero(unequal))
    if not count:
        return replace(said, verdict=Verdict.UNTOUCHED)
    index = np.unravel_index(int(unequal.argmax()), held.shape)
    witness = Witness(tuple(map(int, index)), float(weight.start[index]), float(held[index]))
    return replace(said, verdict=Verdict.CHANGED, passed=False, unequal=count, witness=witness)


def _sample(weight: OneWeight, held: Array) -> _Sample:
    """A few blocks of rows, from the first to the last; all rows of a small tensor."""
    blocks: tuple[tuple[int, int], ...] = ((0, len(held)),)
    if held.size > SAMPLE_ENTRIES:
        every = list(row_blocks(held.shape, SAMPLE_ENTRIES // _SAMPLE_BLOCKS))
        chosen = np.unique(np.linspace(0, len(every) - 1, _SAMPLE_BLOCKS).round().astype(int))
        blocks = tuple(every[place] for place in chosen)
    return _Sample(weight, blocks, np.concatenate([held[start:stop] for start, stop in blocks]))


def _rounded_twice(sample: _Sample) -> tuple[str, bool] | None:
    """The way of rounding that gives nearly all of the sample's bits, where rounding once does not, and
    whether it is `Rounding.narrower`."""
    got = bits(sample.got)
    unequal = int(np.count_nonzero(got != bits(sample.right)))
    best: tuple[int, bool, str] | None = None
    ways = [roundings(sample.weight, start, stop, sample.got.dtype) for start, stop in sample.blocks]
    for parts in zip(*ways, strict=True):
        left = int(np.count_nonzero(got != np.concatenate([bits(part.rows) for part in parts])))
        if best is None or (left, parts[0].narrower) < best[:2]:
            best = left, parts[0].narrower, parts[0].words
    if best is None or not unequal or best[0] > (1 - _EXPLAINED) * unequal:
        return None
    given = f"the bits of {unequal - best[0]} of {unequal} entries looked at that differ"
    return f"{best[2]}; that gives {given}", best[1]


def _is_plainly_right(sample: _Sample) -> bool:
    """Whether most entries are the merge's or the next number, and the update is so much larger that nothing
    which is not a good part of it could explain better what differs."""
    W0 = sample.weight.base
    if W0 is None or W0.shape != sample.weight.start.shape:
        return False
    without = sample.rows(replace(sample.weight, start=W0, update=None), sample.got.dtype)
    update = float(np.log2(1.0 + ulp_distance(sample.right, without).astype(FLOAT64)).mean())
    own = sample.distance(sample.right)
    return own <= _NEAR and update >= own + _FAR


def _is_small(residue: Array, sample: _Sample) -> bool:
    """Whether what a mistake leaves is as small as two roundings are, or as drift beside the update."""
    epsilon = ml_dtypes.finfo(coarser(sample.weight.start.dtype, sample.got.dtype)).eps
    update = np.linalg.norm(sample.exact - sample.base)
    most = _NOISE_SHARE * update + 2 * float(epsilon) * np.linalg.norm(sample.exact)
    return bool(np.linalg.norm(residue) <= most)


def _fitted(sample: _Sample) -> float | None:
    """By how much the update would have to be scaled to be nearest to the sample, in least squares."""
    if sample.weight.update is None or sample.weight.base is None:
        return None
    update = sample.exact - sample.base
    energy = float(np.vdot(update, update))
    return float(np.vdot(update, sample.wide - sample.base)) / energy if energy else None


def _confirmed(found: Alternative, held: Array) -> str:
    """The words of a mistake, and how many entries of the whole tensor it does not explain."""
    compared = compare(found.weight, held)
    if not compared.outside:
        return found.words
    many = "many" if compared.outside > FEW * compared.entries else str(compared.outside)
    return f"{found.words}; {many} of {compared.entries} entries are further off than rounding"
