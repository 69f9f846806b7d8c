"""The clauses of the numeric contract that a verification has applied, and no others, are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from certificate_fixtures import LORA, report, weight

from loracle.export.verification.clauses import clauses_of
from loracle.export.verification.quality import Quality
from loracle.export.verification.verdict import Verdict

CLAUSES = [
    ("1", "Scaling", "The scaling is alpha / r, in float64, and taken as exact."),
    (
        "2",
        "Merge is correctly rounded",
        "An entry of a merged weight should be the exact W0 + scaling * B A, rounded once, ties to even.",
    ),
    ("2.2", "Every kind of layer", "The same holds for: embedding, weights stored (in, out)."),
    ("2.3", "DoRA", "Rows have the length of DoRA's magnitude; the quotient is rounded once as well."),
    (
        "4.2",
        "Merges of others, and merged against unmerged",
        "What a merge that rounds after every operation may be off by is the bound of what is rounding.",
    ),
    (
        "7",
        "Whole models: the derived bound on logits",
        "Outputs lie inside the bound around the unmerged model in float64, which is sampled with noise.",
    ),
    (
        "7.1",
        "Quantised weights: codes are proven, the loss is measured",
        "No bound covers codes: the outputs' distance from the unmerged model in float64 is measured.",
    ),
    (
        "7.3",
        "Perplexity and losses",
        "The candidate's mean loss on the data is held to twice the bound of its logits.",
    ),
]


class Metric:
    """As much of a `TaskMetric` as clauses look at."""

    bound: float | None = 0.5


def test_every_clause_is_named_with_what_it_was_applied_to() -> None:
    lora = replace(LORA, kinds=("embedding", "linear"), use_dora=True, fan_in_fan_out=True)
    drifted = weight(Verdict.DRIFTED, passed=False, unequal=1)
    quality = Quality(1, 0.0, 0.0, None, None)
    found = report(drifted, error=0.1, quality=quality, lora=lora, metric=Metric())
    said = [clause.to_json() for clause in clauses_of(found)]
    assert said == [dict(zip(("number", "title", "applied"), own, strict=True)) for own in CLAUSES]


def test_clauses_that_were_not_applied_are_not_named() -> None:
    unbound = Metric()
    unbound.bound = None
    assert [own.number for own in clauses_of(report(weight(Verdict.TWICE), metric=unbound))] == ["1", "2"]
    assert clauses_of(report(lora=None)) == ()


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_bound_of_one_merge_is_named_where_it_decides(verdict: Verdict) -> None:
    numbers = [own.number for own in clauses_of(report(weight(verdict)))]
    by_bound = {Verdict.ROUNDED_TWICE, Verdict.WITHIN_ULPS, Verdict.DRIFTED, Verdict.DAMAGED}
    assert ("4.2" in numbers) == (verdict in by_bound)


def test_a_bound_of_a_weight_that_is_not_merged_is_none_of_a_merge() -> None:
    found = report(replace(weight(Verdict.ROUNDED_TWICE), merged=False))
    assert "4.2" not in [own.number for own in clauses_of(found)]


def test_rsloras_scaling_is_named() -> None:
    (first, _) = clauses_of(report(lora=replace(LORA, use_rslora=True)))
    assert first.applied == "The scaling is alpha / sqrt(r), in float64, and taken as exact."
