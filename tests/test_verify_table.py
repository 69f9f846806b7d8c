"""`verify` says what each candidate is, of all tools and all mistakes: no false alarm, no miss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from candidates.case import Case
from candidates.honest import ROUNDED
from candidates.oracle import disagreements
from candidates.real import REAL
from candidates.runs import RUNS, Run, Said, Workshop, mistakes, said
from verify_page import rows

from loracle.export.verification.report import Check, VerifyReport
from loracle.export.verification.verdict import Verdict, WeightVerdict
from loracle.files import Checkpoint, MergedWeights, read_adapter


def _marked(run: Run) -> Any:
    marks = [] if run.case.quick and run.subject == run.case.subjects[0] else [pytest.mark.slow]
    if run.subject == REAL:
        marks.append(pytest.mark.model)
    return pytest.param(run, marks=marks, id=", ".join(run.key[1:]))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("candidates"))


@pytest.mark.parametrize("run", map(_marked, RUNS))
def test_each_weight_has_the_right_verdict_and_the_page_says_so(
    workshop: Workshop, request: pytest.FixtureRequest, run: Run
) -> None:
    if run.subject == REAL:
        workshop = replace(workshop, model=request.getfixturevalue("smollm2"))
    report, candidate = workshop.report(run)
    subject = workshop.subject(run.subject)
    with Checkpoint(subject.base) as base:
        weights = MergedWeights(base, read_adapter(subject.adapter))
    assert not mistakes(run.case, report, weights.merged_names, weights.names)
    if run.subject != REAL and any(candidate.glob("*.safetensors")):
        assert not disagreements(report, candidate, subject)
    page, passes, advice = rows()[run.key]
    assert (passes, advice) == ("yes" if run.case.passes else "no", run.case.advice)
    assert Said.parse(page, run.case) == Said.parse(said(report), run.case)


def test_the_page_has_every_candidate_once() -> None:
    assert sorted(rows()) == sorted(run.key for run in RUNS)


CASE = Case(
    "made",
    "by hand",
    ("float32",),
    lambda subject, out: out,
    (Verdict.EXACT,),
    False,
    named={"v": (Verdict.MISSING,)},
    failing=("logits",),
)
RIGHT = {"q": Verdict.EXACT, "v": Verdict.MISSING, "norm": Verdict.UNTOUCHED}


def _found(verdicts: dict[str, Verdict], *, logits: bool = False, passed: tuple[str, ...] = ()) -> list[str]:
    """The mistakes about a report of these verdicts, on a model whose q and v are merged."""
    weights = tuple(
        WeightVerdict(
            name, verdict, verdict in (Verdict.EXACT, Verdict.UNTOUCHED, *passed), merged=name in "qv"
        )
        for name, verdict in verdicts.items()
    )
    checks = (
        Check("weights are the merge", False, ""),
        Check("logits", logits, ""),
        Check("graph", True, ""),
    )
    report = VerifyReport("candidate", "base", "adapter", checks, weights=weights)
    return mistakes(CASE, report, ("q", "v"), ("q", "v", "norm"))


def test_the_table_notices_a_miss_and_a_false_alarm() -> None:
    assert not _found(RIGHT)
    missed, alarm = {**RIGHT, "v": Verdict.EXACT}, {**RIGHT, "norm": Verdict.CHANGED}
    silent, more = {"q": Verdict.EXACT, "norm": Verdict.UNTOUCHED}, {**RIGHT, "bias": Verdict.ADDED}
    for verdicts, name in ((missed, "v"), (alarm, "norm"), (silent, "v"), (more, "bias")):
        (mistake,) = _found(verdicts)
        assert name in mistake
    (passed,) = _found(RIGHT, passed=(Verdict.MISSING,))
    assert "passed is True: v" in passed
    (unnoticed,) = _found(RIGHT, logits=True)
    assert "expected to fail" in unnoticed


def test_a_line_of_the_page_is_compared_by_what_it_says() -> None:
    """Whatever the roundings are called where any may be, and whatever figures are told."""
    close = replace(CASE, merged=ROUNDED)
    cell = "2 correctly rounded; 3 untouched; 1 delta missing (`q`): *by 3*; fails: logits"
    other = "2 within k ulp; 3 untouched; 1 delta missing (`q`): *by 4*; fails: logits"
    assert Said.parse(cell, close) == Said.parse(other, close)
    assert Said.parse(cell, CASE) != Said.parse(other, CASE)
    for old, new in (
        ("3 untouched", "4 untouched"),
        ("`q`", "`v`"),
        ("missing", "twice"),
        ("logits", "graph"),
    ):
        assert Said.parse(cell, close) != Said.parse(cell.replace(old, new), close)
