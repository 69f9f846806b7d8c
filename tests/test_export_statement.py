"""The verdict on a candidate is a sentence that is true of it."""

from __future__ import annotations

from typing import Any

import pytest
from certificate_fixtures import report, weight

from loracle.export.verification.report import Check
from loracle.export.verification.statement import statement
from loracle.export.verification.verdict import Verdict

BASE, MERGE = "This is the base model: ", "This is the base model with the adapter merged: "
NOT = "This is not the base model with the adapter merged: "
RIGHT = weight(Verdict.EXACT)
ROUNDED = weight(Verdict.WITHIN_ULPS, unequal=3)
MISSING, TWICE = weight(Verdict.MISSING, passed=False), weight(Verdict.TWICE, passed=False)
FAILED = Check("greedy tokens agree", False, "")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (report(RIGHT, RIGHT), f"{MERGE}all 2 weights are correctly rounded, bit for bit."),
        (report(RIGHT, RIGHT, adapter=None), f"{BASE}all 2 weights are its own, bit for bit."),
        (
            report(RIGHT, ROUNDED),
            f"{MERGE}all 2 weights are inside the rounding of one merge, 1 not correctly rounded.",
        ),
        (
            report(RIGHT, weight(Verdict.QUANTIZED)),
            f"{MERGE}1 of 2 weights are in codes, and the answers were measured.",
        ),
        (
            report(RIGHT, RIGHT, error=0.5, tolerance=1.0),
            f"{MERGE}all 2 weights are correctly rounded, bit for bit, and its answers lie inside the "
            "derived bound.",
        ),
        (
            report(RIGHT, RIGHT, checks=[Check("outputs are right", True, "no memory", asked=False)]),
            f"{MERGE}all 2 weights are correctly rounded, bit for bit; not asked: outputs are right.",
        ),
        (report(RIGHT, MISSING), f"{NOT}1 of 2 weights is “delta missing”."),
        (report(TWICE, TWICE), f"{NOT}2 of 2 weights are “delta twice”."),
        (report(TWICE, MISSING), f"{NOT}2 of 2 weights are wrong in 2 ways."),
        (report(RIGHT, checks=[FAILED]), f"{NOT}it fails the check “greedy tokens agree”."),
        (
            report(RIGHT, RIGHT, checks=[Check(name, True, "", asked=False) for name in ("a", "b")]),
            f"{MERGE}all 2 weights are correctly rounded, bit for bit; not asked: a, b.",
        ),
        (
            report(RIGHT, checks=[FAILED, FAILED]),
            f"{NOT}it fails the check “greedy tokens agree”, and 1 other check.",
        ),
        (
            report(*[MISSING] * 1234),
            f"{NOT}1,234 of 1,234 weights are “delta missing”.",
        ),
        (
            report(RIGHT, checks=[FAILED, FAILED, FAILED]),
            f"{NOT}it fails the check “greedy tokens agree”, and 2 other checks.",
        ),
    ],
)
def test_the_verdict_in_a_sentence(found: Any, said: str) -> None:
    assert statement(found) == said
