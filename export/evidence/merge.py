"""Is the merged model the base with the adapter merged?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..verification.certificate_charts import bound_bar
from . import numbers
from .certificate import COMMAND, Certified
from .charts import size_chart
from .finding import Chart, Finding, Verdict, table


def findings(documents: Sequence[Certified]) -> tuple[Finding, ...]:
    """Return a finding for each certificate."""
    return tuple(map(_finding, documents))


def _finding(own: Certified) -> Finding:
    beside = "" if own.adapter is None else f", adapter {own.adapter.name}"
    return Finding(
        own.file,
        f"{own.candidate.name}; base {own.base.name}{beside}; verified {own.time[:10]}",
        f"{numbers.count(own.weights)} weights, {numbers.count(own.merged)} of them merged; "
        f"{numbers.count(own.entries - own.unequal)} of {numbers.count(own.entries)} entries are the "
        "correctly rounded merge",
        _verdict(own),
        own.statement,
        own.versions,
        COMMAND,
        _charts(own),
        (
            table(
                "Checks",
                ("Check", "Result", "Figure"),
                ((one.name, _result(one.passed, one.asked), one.figure) for one in own.checks),
            ),
        ),
    )


def _verdict(own: Certified) -> Verdict:
    if not own.passed:
        return Verdict.DISAGREES
    return Verdict.AGREES if own.merged else Verdict.UNDECIDED


def _charts(own: Certified) -> tuple[Chart, ...]:
    charts = []
    right = own.entries - own.unequal
    if own.entries:
        lines = [
            ("correctly rounded", right),
            ("within other bounds" if own.passed else "others", own.unequal),
        ]
        shown = [(name, number, numbers.count(number)) for name, number in lines if number > 0]
        charts.append(Chart("Entries of all weights", size_chart(shown, "entries")))
    if own.error is not None and own.tolerance is not None and math.isfinite(own.error + own.tolerance):
        drawn = bound_bar(max(own.error, 0.0), max(own.tolerance, 0.0))
        title = f"Largest error of an output, {own.error:.3g}, and the mark of its bound, {own.tolerance:.3g}"
        charts.append(Chart(title, drawn))
    return tuple(charts)


def _result(passed: bool, asked: bool) -> str:
    return "failed" if not passed else "passed" if asked else "not asked"
