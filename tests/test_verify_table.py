"""`verify` says what each candidate is, of all tools and all mistakes: no false alarm, no miss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from candidates.oracle import disagreements
from candidates.real import REAL
from candidates.runs import RUNS, Run, Workshop, counted, mistakes, said
from verify_page import rows

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
    assert counted(page, run.case) == counted(said(report), run.case)
    assert page.partition("; fails")[1:] == said(report).partition("; fails")[1:]


def test_the_page_has_every_candidate_once() -> None:
    assert list(rows()) == [run.key for run in RUNS]
