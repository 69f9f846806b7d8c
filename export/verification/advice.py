"""What each verdict means, and what to do about it, in a line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .verdict import Verdict


@dataclass(frozen=True)
class Advice:
    """What a verdict means; what to do, "" where nothing is to be done."""

    meaning: str
    remedy: str = ""


_BY_MERGE = "where that is too little, merge with one rounding, as `loracle merge` does"

ADVICE: Mapping[Verdict, Advice] = {
    Verdict.EXACT: Advice("each entry is the exact merge, rounded once"),
    Verdict.UNTOUCHED: Advice("the adapter leaves the weight alone, and it has the base's bits"),
    Verdict.ROUNDED_TWICE: Advice("the merge, rounded to another dtype, or by parts, on the way", _BY_MERGE),
    Verdict.WITHIN_ULPS: Advice("the merge, with other roundings inside the bound of one merge", _BY_MERGE),
    Verdict.DRIFTED: Advice(
        "the merge under more noise than one merge's roundings leave",
        "merge from the base again; do not merge and unmerge in place",
    ),
    Verdict.MISSING: Advice(
        "the update is not there", "merge, and save the model after that; do the adapter's names fit?"
    ),
    Verdict.TWICE: Advice(
        "the update was added twice",
        "start from the base; was a merged model, or a tied tensor, merged again?",
    ),
    Verdict.OTHER_SCALING: Advice(
        "the update was added with another factor",
        "compare lora_alpha, r and use_rslora in adapter_config.json with the training's",
    ),
    Verdict.OTHER_ADAPTER: Advice(
        "an update was added that is not this adapter's", "find out which adapters were merged"
    ),
    Verdict.TRANSPOSED: Advice(
        "the update was added transposed", "correct fan_in_fan_out, or the layout that the tool assumes"
    ),
    Verdict.CHANGED: Advice(
        "the adapter leaves the weight alone, but it is not the base's",
        "give the base that was trained on: its revision, its dtype; else restore the weight from it",
    ),
    Verdict.DAMAGED: Advice("the merge, but for single entries", "copy or download the candidate again"),
    Verdict.UNEXPLAINED: Advice("no update that was tried explains the weight", "merge from the base again"),
    Verdict.TIE_BROKEN: Advice(
        "config.json makes one tensor of two that differ",
        "merge into the one tensor, or save both with tie_word_embeddings false",
    ),
    Verdict.NOT_FINITE: Advice("NaN or infinity", "merge in a wider dtype; is the adapter sound?"),
    Verdict.WRONG_SHAPE: Advice("another shape or dtype", "give the base that was trained on"),
    Verdict.ABSENT: Advice("the weight is not there", "save the whole model"),
    Verdict.ADDED: Advice(
        "a tensor that the merged model has not", "leave it out; if it is an adapter's, merge it"
    ),
    Verdict.QUANTIZED: Advice(
        "the weight is in codes, and the answers are measured instead",
        "verify the merge before it is quantised",
    ),
}
