"""What was found of a claim: figures, charts, tables, and in a sentence whether they agree with the paper."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from markupsafe import Markup

from .paper import Statement


class Verdict(Enum):
    """How what was measured here stands to the claim."""

    AGREES = "agrees"
    PARTLY = "agrees in part"
    DISAGREES = "does not agree"
    UNDECIDED = "not decided by this"
    MISSING = "not measured here"


@dataclass(frozen=True)
class Chart:
    """A picture and what stands below it."""

    title: str
    drawn: Markup


@dataclass(frozen=True)
class Table:
    """The numbers of the charts.

    Attributes:
        title: what it is.
        columns: their names; the first is a row's.
        rows: of cells.
        more: how many rows were left out.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    more: int = 0


@dataclass(frozen=True)
class Finding:
    """What one result file says of a claim.

    Attributes:
        file: its name.
        subject: what was measured, in a few words.
        figure: what came out, with its interval.
        verdict: how it stands to the claim.
        sentence: the same in words.
        machine: that it was measured on.
        command: that measures it again, as far as the file tells.
        charts, tables: to look at, and to read.
    """

    file: str
    subject: str
    figure: str
    verdict: Verdict
    sentence: str
    machine: str
    command: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A claim and all that was found of it."""

    statement: Statement
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """How all findings together stand to it."""
        return combined(finding.verdict for finding in self.findings)


def combined(verdicts: Iterable[Verdict]) -> Verdict:
    """Return what several files say together: what decides nothing does not count beside what does."""
    found = set(verdicts)
    if not found:
        return Verdict.MISSING
    found = found - {Verdict.UNDECIDED} or found
    return found.pop() if len(found) == 1 else Verdict.PARTLY


MOST_ROWS = 200
"""Of a table: a page must stay one that can be opened."""


def table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    """Return a table, its rows cut at `MOST_ROWS`."""
    found = tuple(rows)
    return Table(title, columns, found[:MOST_ROWS], max(0, len(found) - MOST_ROWS))
