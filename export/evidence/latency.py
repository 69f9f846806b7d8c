"""Do adapters cost latency, and merged LoRA none?"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..bench.methods import ADAPTER_H, ADAPTER_L, CONTROL, LABELS, MERGED, UNMERGED
from ..bench.settings import Effort
from . import numbers
from .bench import Bench, Row
from .charts import Measured, ratio_chart
from .finding import Chart, Finding, Table, Verdict, table

_MAIN = (MERGED, UNMERGED, ADAPTER_H, ADAPTER_L)
_QUICK_WINDOW = 0.01
_MOST_CHARTS = 12


def findings(documents: Sequence[Bench]) -> tuple[Finding, ...]:
    """Return a finding for each latency table."""
    return tuple(map(_finding, documents))


def command_of(own: Bench) -> str:
    """Return the command, but for the adapters' parameters, which a file holds as what came of them."""
    settings = dict.fromkeys(f"{row.batch}x{row.length}" for row in own.rows)
    words = ["loracle", "bench", "--model", own.model, "--settings", ",".join(settings)]
    if own.layers != own.full_layers:
        words += ["--layers", str(own.layers)]
    if own.blocks == 1 and own.window == _QUICK_WINDOW:
        words.append("--quick")
    elif own.blocks != Effort().blocks:
        words += ["--blocks", str(own.blocks)]
    words += ["--provider", own.provider, "--dtype", own.dtype, "--rounds", str(own.rounds)]
    return shlex.join([*words, "--threads", str(own.threads)])


def subject_of(own: Bench) -> str:
    """Return the model and where it ran."""
    layers = "" if own.layers == own.full_layers else f", {own.layers} of its {own.full_layers} layers"
    weights = ", random weights" if own.random else ""
    where = "CUDA" if own.provider == "cuda" else f"{own.provider}, {own.threads} threads"
    return f"{own.model}{layers}{weights}; onnxruntime, {own.dtype}, {where}"


def _finding(own: Bench) -> Finding:
    merged = [one.holds for one in own.findings if one.method == MERGED]
    others = [one.holds for one in own.findings if one.method != MERGED]
    return Finding(
        own.file,
        subject_of(own),
        _figure(own),
        _verdict(merged, others),
        _sentence(own, merged, others),
        own.machine,
        command_of(own),
        _charts(own),
        (_table(own),),
    )


def _verdict(merged: Sequence[bool], others: Sequence[bool]) -> Verdict:
    if not merged or not others:
        return Verdict.UNDECIDED
    if all(merged) and all(others):
        return Verdict.AGREES
    return Verdict.PARTLY if any(merged) and any(others) else Verdict.DISAGREES


def _sentence(own: Bench, merged: Sequence[bool], others: Sequence[bool]) -> str:
    parts = []
    if merged:
        parts.append(
            f"Merged LoRA took as long as full fine-tuning, within the control’s interval, in {sum(merged)} "
            f"of {len(merged)} measurements"
        )
    if others:
        parts.append(
            f"what stays unmerged, and adapters, took measurably longer in {sum(others)} of {len(others)}"
        )
    if not parts:
        return "Neither merged LoRA nor adapters were measured, so the claim is not decided by this."
    said = "; ".join(parts) + "."
    said = said[0].upper() + said[1:]
    if not merged or not others:
        return f"{said} The claim compares both, so it is not decided by this."
    wide = any(one.control[1] / one.control[0] > 1.1 for one in own.findings)
    if wide and not all((*merged, *others)):
        said += " Equal beside equal differed by more than 10% here, so small costs could not be seen."
    return said


def _figure(own: Bench) -> str:
    """The first setting's and phase's ratios."""
    place = own.rows[0].place
    rows = [row for row in own.rows if row.place == place and row.method != CONTROL]
    shown = [row for row in rows if row.method in _MAIN] or rows
    said = "; ".join(f"{_label(row)} {numbers.ratio(row.ratio, row.interval)}" for row in shown)
    return f"Time over full fine-tuning, {_place(place)}: {said or 'the control alone'}"


def _charts(own: Bench) -> tuple[Chart, ...]:
    charts = []
    for place in list(dict.fromkeys(row.place for row in own.rows))[:_MOST_CHARTS]:
        rows = [row for row in own.rows if row.place == place]
        control = next((row.interval for row in rows if row.method == CONTROL), (1.0, 1.0))
        shown = [Measured(_label(row), row.ratio, row.interval, row.paper) for row in rows]
        drawn = ratio_chart(shown, control, "time over full fine-tuning")
        charts.append(Chart(_place(place), drawn))
    return tuple(charts)


def _table(own: Bench) -> Table:
    return table(
        "Time over full fine-tuning: median of paired ratios, 95% bootstrap interval",
        ("Method", "Setting", "Here", "Paper", "Milliseconds", "Full fine-tuning's beside it"),
        (
            (
                _label(row),
                _place(row.place),
                numbers.ratio(row.ratio, row.interval),
                "–" if row.paper is None else f"{row.paper:.3f}",
                f"{1000 * row.seconds:.4g}",
                f"{1000 * row.base_seconds:.4g}",
            )
            for row in own.rows
        ),
    )


def _label(row: Row) -> str:
    return LABELS.get(row.method, row.label)


def _place(place: tuple[int, int, str]) -> str:
    batch, length, phase = place
    return f"{phase}, {batch} × {length}"
