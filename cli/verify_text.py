"""What `loracle verify` prints in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loracle.export.verification.printable import printable
from loracle.export.verification.statement import statement
from loracle.export.verification.weights_check import counted, worst_first

if TYPE_CHECKING:
    from loracle.export.verification.report import Check, VerifyReport

_WORST = 8


def print_report(report: VerifyReport) -> None:
    """Print the checks, what fails, the counts by verdict, and the verdict; names from files without what
    moves a cursor. Where all weights pass, those are named of which most entries are rounded otherwise."""
    table = Table("check", "", "figure", title=escape(printable(report.candidate)), title_justify="left")
    for check in report.checks:
        table.add_row(escape(printable(check.name)), _mark(check), escape(printable(check.figure)))
    Console().print(table)
    for line in _lines(report):
        typer.echo(printable(line))


def _mark(check: Check) -> str:
    if not check.asked:
        return "[yellow]skip[/yellow]"
    return "[green]pass[/green]" if check.passed else "[red]FAIL[/red]"


def _lines(report: VerifyReport) -> Iterator[str]:
    if report.quality is not None:
        yield f"quality: {report.quality}"
    if report.metric is not None:
        yield f"{report.metric.data}: {report.metric}"
    for check in report.checks:
        for failure in check.failures:
            yield f"FAIL {check.name}: {failure}"
    if report.weights:
        counts = (f"{number:,} {verdict}" for verdict, number in counted(report.weights).items())
        yield f"weights: {', '.join(counts)}"
    worst = worst_first(report.weights)
    rounded = worst if all(own.passed for own in worst) else []
    for own in rounded[:_WORST]:
        yield f"note {own}"
    if len(rounded) > _WORST:
        yield f"note and {len(rounded) - _WORST:,} more weights"
    yield statement(report)
