"""Candidates made and verified, and what is said of them in a line of the table."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loracle.export.verification.report import VerifyReport
from loracle.export.verification.verdict import Verdict
from loracle.export.verification.verify import verify

from . import honest, wrong, wrong_graphs
from .case import Case
from .honest import OUTPUTS, ROUNDED
from .real import CASES as REAL_CASES
from .real import REAL
from .subjects import SUBJECTS, Subject, real

SECTIONS = {
    "Checkpoints": honest.CHECKPOINTS,
    "ONNX models": honest.GRAPHS,
    "Checkpoints that are wrong": wrong.CHECKPOINTS,
    "ONNX models that are wrong": wrong_graphs.GRAPHS,
    "A real model": REAL_CASES,
}

RIGHT = (Verdict.EXACT, Verdict.UNTOUCHED)
_TOLD = (Verdict.TWICE, Verdict.OTHER_SCALING, Verdict.OTHER_ADAPTER)
WEIGHTS_CHECK = "merge"
"""A part of the name of the check that fails where a weight's verdict does."""


@dataclass(frozen=True)
class Run:
    """A case with one of its subjects."""

    section: str
    case: Case
    subject: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The first cells of its line, and the section: no other run has them."""
        return self.section, self.case.name, self.case.tool, self.subject


RUNS = [
    Run(section, case, subject)
    for section, cases in SECTIONS.items()
    for case in cases
    for subject in case.subjects
]


@dataclass(frozen=True)
class Workshop:
    """Makes subjects and candidates in a folder; a subject once.

    Attributes:
        model: the real model's folder; None where no real one is asked for.
    """

    root: Path
    model: Path | None = None
    made: dict[str, Subject] = field(default_factory=dict)

    def subject(self, name: str) -> Subject:
        """One of `SUBJECTS`, or the real one."""
        if name not in self.made:
            folder = self.root / name
            folder.mkdir()
            if name == REAL:
                assert self.model is not None
                self.made[name] = real(self.model, folder)
            else:
                self.made[name] = SUBJECTS[name](folder)
        return self.made[name]

    def report(self, run: Run) -> tuple[VerifyReport, Path]:
        """What is said of a run's candidate, and where that lies, until the next run."""
        subject = self.subject(run.subject)
        work = self.root / "candidate"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        candidate = run.case.make(subject, work / "out")
        return verify(candidate, subject.base, subject.adapter, new_tokens=4), candidate


def said(report: VerifyReport) -> str:
    """The verdicts and how many weights have each, and the checks that fail besides. Weights are named where
    one or two have a verdict that does not pass; what was found of a scaling or another update is told of
    the first, in italics."""
    counts = Counter(weight.verdict for weight in report.weights)
    words = []
    for verdict in (verdict for verdict in Verdict if counts[verdict]):
        word = f"{counts[verdict]} {verdict}"
        those = [weight for weight in report.weights if weight.verdict is verdict and not weight.passed]
        if 0 < len(those) <= 2:
            word += f" ({', '.join(f'`{_short(weight.name)}`' for weight in those)})"
        if those and verdict in _TOLD:
            word += f": *{those[0].detail.partition(';')[0].replace('*', '')}*"
        words.append(word)
    failed = [c.name for c in report.checks if not c.passed and WEIGHTS_CHECK not in c.name]
    return "; ".join(words) + (f"; fails: {', '.join(failed)}" if failed else "")


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def untold(cell: str) -> str:
    """What `said` says, without what is in italics: its figures are those of one base and machine."""
    return re.sub(r": \*[^*]*\*", "", cell)


@dataclass(frozen=True)
class Said:
    """What a cell of the page says, as far as it is the same on every machine and for every base.

    Where a case allows a merge that is rounded otherwise, which of the verdicts that pass it is may differ,
    and they count as one.
    """

    counts: Mapping[str, int]
    named: frozenset[str]
    failed: str

    @classmethod
    def parse(cls, cell: str, case: Case) -> Said:
        verdicts, _, failed = untold(cell).partition("; fails: ")
        one = set(map(str, ROUNDED)) if set(case.merged) == set(ROUNDED) else set()
        counts: Counter[str] = Counter()
        for part in verdicts.split("; "):
            number, _, word = re.sub(r" \(`.*", "", part).partition(" ")
            counts["rounded" if word in one else word] += int(number)
        return cls(counts, frozenset(re.findall("`([^`]*)`", verdicts)), failed)


def mistakes(case: Case, report: VerifyReport, merged: Collection[str], names: Collection[str]) -> list[str]:
    """What is wrong about a report, in words: a weight with a verdict that it may not have, one that nothing
    is said of, a check that should have failed or passed.

    Args:
        merged: the weights that the adapter changes, `names` all of the base's.
    """
    found = []
    held = {weight.name: weight for weight in report.weights}
    for name in sorted({*names, *case.named, *held}):
        usual = case.merged if name in merged else case.others if name in names else ()
        allowed = case.named.get(name, usual)
        if name not in held:
            found.append(f"{name}: nothing is said of it, expected {_words(allowed)}")
        elif held[name].verdict not in allowed:
            found.append(f"expected {_words(allowed)}, got {held[name]}")
        elif held[name].merged != (name in merged):
            found.append(f"{name}: merged is {held[name].merged}")
        elif held[name].passed != (case.passes or held[name].verdict in RIGHT):
            found.append(f"passed is {held[name].passed}: {held[name]}")
    failed = [check for check in report.checks if not check.passed and WEIGHTS_CHECK not in check.name]
    # Other outputs may have the same largest one.
    may = (*case.failing, "agree") if OUTPUTS in case.failing else case.failing
    for check in failed:
        if not any(part in check.name for part in may):
            found.append(f"expected to pass: {check.name}: {check.figure} {check.failures[:2]}")
    for part in case.failing:
        if not any(part in check.name for check in failed):
            found.append(f"expected to fail: a check with {part!r} in its name")
    if report.passed != case.passes:
        found.append(f"passed is {report.passed}")
    return found


def _words(verdicts: Collection[Verdict]) -> str:
    return " or ".join(verdicts) or "no such weight"
