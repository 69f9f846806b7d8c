"""Which clauses of the numeric contract, docs/numerics.md, a verification has applied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .report import VerifyReport
from .verdict import Verdict

_BY_BOUND = (Verdict.ROUNDED_TWICE, Verdict.WITHIN_ULPS, Verdict.DRIFTED, Verdict.DAMAGED)
"""Verdicts that rest on how far a merge's roundings may lead."""


@dataclass(frozen=True)
class Clause:
    """A clause, by its number and title there, and what it was applied to."""

    number: str
    title: str
    applied: str

    def to_json(self) -> dict[str, str]:
        """The fields."""
        return {"number": self.number, "title": self.title, "applied": self.applied}


def clauses_of(report: VerifyReport) -> tuple[Clause, ...]:
    """The clauses that a verification has applied, in their order."""
    return tuple(_clauses(report))


def _clauses(report: VerifyReport) -> Iterator[Clause]:
    lora = report.lora
    if lora is not None:
        law = "alpha / sqrt(r)" if lora.use_rslora else "alpha / r"
        yield Clause("1", "Scaling", f"The scaling is {law}, in float64, and taken as exact.")
        yield Clause(
            "2",
            "Merge is correctly rounded",
            "An entry of a merged weight should be the exact W0 + scaling * B A, rounded once, ties to even.",
        )
        kinds = [kind for kind in lora.kinds if kind != "linear"]
        kinds += ["weights stored (in, out)"] if lora.fan_in_fan_out else []
        if kinds:
            yield Clause("2.2", "Every kind of layer", f"The same holds for: {', '.join(kinds)}.")
        if lora.use_dora:
            yield Clause(
                "2.3",
                "DoRA",
                "Rows have the length of DoRA's magnitude; the quotient is rounded once as well.",
            )
    if any(own.merged and own.verdict in _BY_BOUND for own in report.weights):
        yield Clause(
            "4.2",
            "Merges of others, and merged against unmerged",
            "What a merge that rounds after every operation may be off by is the bound of what is rounding.",
        )
    if report.error is not None:
        yield Clause(
            "7",
            "Whole models: the derived bound on logits",
            "Outputs lie inside the bound around the unmerged model in float64, which is sampled with noise.",
        )
    if report.quality is not None:
        yield Clause(
            "7.1",
            "Quantised weights: codes are proven, the loss is measured",
            "No bound covers codes: the outputs' distance from the unmerged model in float64 is measured.",
        )
    if report.metric is not None and report.metric.bound is not None:
        yield Clause(
            "7.3",
            "Perplexity and losses",
            "The candidate's mean loss on the data is held to twice the bound of its logits.",
        )
