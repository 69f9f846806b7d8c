"""The verdict on a whole candidate, in a sentence."""

from __future__ import annotations

from .report import VerifyReport
from .verdict import Verdict
from .weights_check import counted


def statement(report: VerifyReport) -> str:
    """Return one sentence that says whether the candidate is the merge, and how exactly or why not."""
    merge = "the base model" if report.adapter is None else "the base model with the adapter merged"
    if not report.passed:
        return f"This is not {merge}: {_reason(report)}."
    said = f"This is {merge}: {_exactness(report)}"
    if report.error is not None:
        said += ", and its answers lie inside the derived bound"
    skipped = [check.name for check in report.checks if not check.asked]
    return f"{said}; not asked: {', '.join(skipped)}." if skipped else f"{said}."


def _exactness(report: VerifyReport) -> str:
    weights = _number(len(report.weights), "weight")
    coded = sum(own.verdict is Verdict.QUANTIZED for own in report.weights)
    if coded:
        return f"{coded} of {weights} are in codes, and the answers were measured"
    rounded = sum(bool(own.unequal) for own in report.weights)
    if rounded:
        return f"all {weights} are inside the rounding of one merge, {rounded} not correctly rounded"
    if report.adapter is None:
        return f"all {weights} are its own, bit for bit"
    return f"all {weights} are correctly rounded, bit for bit"


def _reason(report: VerifyReport) -> str:
    wrong = [own for own in report.weights if not own.passed]
    if wrong:
        kinds = counted(wrong)
        verb = "is" if len(wrong) == 1 else "are"
        said = f"“{next(iter(kinds))}”" if len(kinds) == 1 else f"wrong in {len(kinds)} ways"
        return f"{len(wrong):,} of {_number(len(report.weights), 'weight')} {verb} {said}"
    failed = [check.name for check in report.checks if not check.passed]
    others = f", and {_number(len(failed) - 1, 'other check')}" if failed[1:] else ""
    return f"it fails the check “{failed[0]}”{others}"


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
