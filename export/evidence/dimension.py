"""Is the intrinsic dimension low?"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from . import numbers
from .charts import curve_chart
from .finding import Chart, Finding, Verdict, table
from .intrinsic import Intrinsic

_LOW = 0.01
"""Of a model's parameters, a dimension that is called low. The paper's is far below."""


def findings(documents: Sequence[Intrinsic]) -> tuple[Finding, ...]:
    """Return a finding for each sweep over d."""
    return tuple(map(_finding, documents))


def _finding(own: Intrinsic) -> Finding:
    verdict, sentence = _judged(own)
    metric = own.metric.replace("_", " ")
    lines = [
        ("all parameters", own.full),
        ("90% of full", own.threshold),
        ("90% of the gain", own.threshold_above_start),
        ("untrained", own.start),
    ]
    points = [(one.d, one.score, one.low, one.high) for one in own.points]
    charts: tuple[Chart, ...] = ()
    if points:
        drawn = curve_chart(points, lines, own.d90, ("d, numbers that are trained", metric))
        charts = (Chart("Score by the numbers trained; ringed: d90", drawn),)
    dims = ",".join(str(one.d) for one in own.points)
    words = ["loracle", "intrinsic", "--model", own.model, "--data", own.data, "--dims", dims]
    return Finding(
        own.file,
        f"{own.model} on {own.data}; held-out {metric}, "
        + ("one seed" if own.seeds == 1 else f"{own.seeds} seeds"),
        _figure(own),
        verdict,
        sentence,
        own.machine,
        shlex.join([*words, "--projection", own.projection, "--metric", own.metric, "--out", "DIR"]),
        charts,
        (
            table(
                "Score by d; in brackets the worst and the best seed",
                ("d", metric, "Of the full score"),
                (
                    *(
                        (
                            numbers.count(one.d),
                            numbers.seeds(one.score, one.low, one.high),
                            _of_full(one.score, own.full),
                        )
                        for one in own.points
                    ),
                    (f"{numbers.count(own.parameters)} (all)", numbers.score(own.full), "100%"),
                    ("0 (untrained)", numbers.score(own.start), _of_full(own.start, own.full)),
                ),
            ),
        ),
    )


def _figure(own: Intrinsic) -> str:
    if own.d90 is None:
        return f"d90 is above every d measured, of {numbers.count(own.parameters)} parameters"
    part = numbers.share(own.d90, own.parameters)
    above = "above every d measured" if own.d90_above_start is None else numbers.count(own.d90_above_start)
    return (
        f"d90 = {numbers.count(own.d90)} of {numbers.count(own.parameters)} parameters ({part}); for 90% of "
        f"the gain over the untrained model: {above}"
    )


def _judged(own: Intrinsic) -> tuple[Verdict, str]:
    if own.d90 is None:
        return Verdict.DISAGREES, (
            "No subspace that was measured reaches 90% of the full score, so the dimension is not shown to "
            "be low here."
        )
    if max(own.majority, own.start) >= own.threshold:
        return Verdict.UNDECIDED, (
            "A model that has learned nothing, or a guess, reaches 90% of the full score already, so this "
            "task and measure decide nothing."
        )
    part = numbers.share(own.d90, own.parameters)
    if own.d90 > _LOW * own.parameters:
        return (
            Verdict.DISAGREES,
            f"{part} of the parameters are needed for 90% of the full score, which is not low.",
        )
    said = f"{part} of the parameters, projected at random, reach 90% of the full score"
    if own.d90_above_start is None or own.d90_above_start > _LOW * own.parameters:
        return Verdict.PARTLY, (
            f"{said}, as the paper counts; 90% of what training gains over the untrained model took more "
            "than was measured, or than 1% of the parameters."
        )
    return Verdict.AGREES, f"{said}, and no more than 1% are needed for 90% of what training gains."


def _of_full(score: float, full: float) -> str:
    return f"{100 * score / full:.1f}%" if full > 0 else "–"
