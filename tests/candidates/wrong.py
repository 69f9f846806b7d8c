"""Checkpoints that are wrong, each in one way."""

from __future__ import annotations

import math
from functools import partial

import torch

from loracle.export.verification.verdict import Verdict

from . import merges, sabotage
from .case import Case, Maker
from .honest import DTYPES
from .sabotage import ADDED, EMBEDDING, HEAD, K0, NORM, Q0, Q1, UP0, V0, V1, Fault

FLOAT32 = ("float32",)
EXACT = (Verdict.EXACT,)
MERGE_AGAIN = "merge the base again, with `loracle merge`"
ONCE = "merge into the base, once"
SCALE = "set `r`, `lora_alpha` and `use_rslora` as in training, and merge again"
WHICH = "find out which adapter was merged; merge this one"
RESTORE = "take the tensor from the base"


def with_fault(fault: Fault) -> Maker:
    """A checkpoint with a fault."""
    return partial(sabotage.sabotaged, fault=fault)


def wrong(
    name: str,
    maker: Fault | Maker,
    merged: Verdict | None = None,
    *,
    subjects: tuple[str, ...] = DTYPES,
    named: dict[str, Verdict] | None = None,
    others: Verdict = Verdict.UNTOUCHED,
    passes: bool = False,
    advice: str = MERGE_AGAIN,
    quick: bool = False,
    whole: bool = False,
) -> Case:
    """A case of a checkpoint; `whole` where `maker` makes the folder and not only what changes."""
    return Case(
        name,
        "by hand",
        subjects,
        maker if whole else with_fault(maker),
        EXACT if merged is None else (merged,),
        passes,
        advice,
        (others,),
        {weight: (verdict,) for weight, verdict in (named or {}).items()},
        quick=quick,
    )


def _through_bfloat16(dtype: torch.dtype) -> Maker:
    """All weights in a dtype, by way of bfloat16."""
    return lambda subject, out: merges.cast(
        subject.base, subject.adapter, out, through=torch.bfloat16, to=dtype
    )


def root_of_rank(parts: sabotage.Parts) -> float:
    return math.sqrt(parts.r)


CHECKPOINTS = [
    wrong(
        "delta missing in one layer",
        sabotage.missing_in_one_layer,
        named={V1: Verdict.MISSING},
        quick=True,
    ),
    wrong(
        "the base, under another name",
        sabotage.missing_everywhere,
        Verdict.MISSING,
        advice="merge; the folder was saved without the adapter",
        quick=True,
    ),
    wrong("delta twice", sabotage.merged_twice, Verdict.TWICE, advice=ONCE, quick=True, whole=True),
    wrong("delta subtracted", lambda parts: parts.times(-1), Verdict.OTHER_SCALING),
    wrong(
        "scaling alpha / sqrt(r) for alpha / r",
        partial(sabotage.scaled, by=root_of_rank),
        Verdict.OTHER_SCALING,
        advice=SCALE,
        quick=True,
    ),
    wrong(
        "scaling 1 (alpha = r)",
        partial(sabotage.scaled, by=lambda parts: 1 / parts.scaling),
        Verdict.OTHER_SCALING,
        advice=SCALE,
    ),
    wrong(
        "alpha forgotten (scaling 1 / r)",
        partial(sabotage.with_alpha, alpha=1),
        Verdict.OTHER_SCALING,
        advice=SCALE,
        whole=True,
    ),
    wrong(
        "r forgotten (scaling alpha)",
        partial(sabotage.scaled, by=lambda parts: parts.r),
        Verdict.OTHER_SCALING,
        advice=SCALE,
    ),
    wrong("scaling 5% too large", lambda parts: parts.times(1.05), Verdict.OTHER_SCALING, advice=SCALE),
    wrong("another adapter", sabotage.another_adapter, Verdict.OTHER_ADAPTER, advice=WHICH, quick=True),
    wrong("this adapter, and another on top", sabotage.another_on_top, Verdict.OTHER_ADAPTER, advice=WHICH),
    wrong(
        "one layer's delta in the next layer's weight",
        sabotage.of_the_layer_before,
        named={Q1: Verdict.OTHER_ADAPTER},
    ),
    wrong(
        "delta transposed", sabotage.transposed, named=dict.fromkeys((Q0, Q1), Verdict.TRANSPOSED), quick=True
    ),
    wrong(
        "two layers' weights exchanged",
        sabotage.layers_exchanged,
        named=dict.fromkeys((Q0, Q1), Verdict.UNEXPLAINED),
    ),
    wrong(
        "key and value exchanged",
        sabotage.key_and_value_exchanged,
        named={K0: Verdict.CHANGED, V0: Verdict.UNEXPLAINED},
    ),
    wrong(
        "an untouched weight one ulp off in one entry",
        partial(sabotage.last_bit_flipped, name=UP0),
        named={UP0: Verdict.CHANGED},
        advice=RESTORE,
        quick=True,
    ),
    wrong(
        "noise in an untouched weight",
        sabotage.noise_in_an_untouched,
        named={UP0: Verdict.CHANGED},
        advice=RESTORE,
    ),
    wrong("noise in a merged weight", sabotage.noise_in_a_merged, named={V1: Verdict.DRIFTED}),
    wrong("a merged weight that is all noise", sabotage.nothing_but_noise, named={V1: Verdict.UNEXPLAINED}),
    wrong(
        "an untouched weight cast through bfloat16",
        sabotage.untouched_through_bfloat16,
        subjects=("float32", "float16"),
        named={UP0: Verdict.ROUNDED_TWICE},
        advice=RESTORE,
    ),
    wrong(
        "a merged weight cast through bfloat16",
        sabotage.merged_through_bfloat16,
        subjects=("float32", "float16"),
        named={V1: Verdict.ROUNDED_TWICE},
    ),
    wrong(
        "all weights cast through bfloat16",
        _through_bfloat16(torch.float32),
        Verdict.ROUNDED_TWICE,
        subjects=FLOAT32,
        others=Verdict.ROUNDED_TWICE,
        whole=True,
        quick=True,
    ),
    wrong(
        "all weights in float16, through bfloat16",
        _through_bfloat16(torch.float16),
        Verdict.ROUNDED_TWICE,
        subjects=FLOAT32,
        others=Verdict.ROUNDED_TWICE,
        whole=True,
    ),
    wrong(
        "tied pair broken",
        sabotage.tied_pair_broken,
        named={HEAD: Verdict.TIE_BROKEN},
        advice="leave the output layer out: it is the embedding",
        quick=True,
    ),
    wrong(
        "tied pair stored twice, with equal bits",
        sabotage.tied_pair_stored_twice,
        named={HEAD: Verdict.UNTOUCHED},
        passes=True,
        advice="use it",
    ),
    wrong("a norm replaced", sabotage.norm_of_ones, named={NORM: Verdict.CHANGED}, advice=RESTORE),
    wrong(
        "the row of one token changed",
        sabotage.one_token_trained,
        named={EMBEDDING: Verdict.CHANGED},
        advice=RESTORE,
    ),
    wrong("NaN in a merged weight", partial(sabotage.not_a_number, name=V1), named={V1: Verdict.NOT_FINITE}),
    wrong(
        "NaN in an untouched weight",
        partial(sabotage.not_a_number, name=UP0),
        named={UP0: Verdict.NOT_FINITE},
    ),
    wrong("infinity in a merged weight", sabotage.infinite, named={V1: Verdict.NOT_FINITE}),
    wrong(
        "last bit of one entry of a merged weight flipped",
        partial(sabotage.last_bit_flipped, name=V1),
        named={V1: Verdict.WITHIN_ULPS},
        passes=True,
        advice="`--exact` rejects it",
    ),
    wrong(
        "first bit of one entry's fraction flipped, in a merged weight",
        sabotage.high_bit_flipped,
        named={V1: Verdict.DAMAGED},
    ),
    wrong("a merged weight absent", partial(sabotage.absent, name=V1), named={V1: Verdict.ABSENT}),
    wrong("a norm absent", partial(sabotage.absent, name=NORM), named={NORM: Verdict.ABSENT}),
    wrong("a bias added", sabotage.added, named={ADDED: Verdict.ADDED}),
    wrong("eight tokens more", sabotage.more_tokens, named={EMBEDDING: Verdict.WRONG_SHAPE}),
    wrong("a weight transposed", sabotage.transposed_weight, named={V1: Verdict.WRONG_SHAPE}),
    wrong("a weight as a vector", sabotage.shape_of_a_vector, named={V1: Verdict.WRONG_SHAPE}),
    Case(
        "with r=4, scaling alpha / sqrt(r), which is twice alpha / r",
        "by hand",
        ("float32, r=4",),
        with_fault(partial(sabotage.scaled, by=root_of_rank)),
        (Verdict.TWICE, Verdict.OTHER_SCALING),
        False,
        SCALE,
    ),
]
