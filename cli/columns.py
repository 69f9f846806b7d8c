"""Tables as lines of text, as wide as they need to be: a name is never broken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def columns(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the table, its first column to the left and the others to the right, without a line's end."""
    table = [list(titles), *(list(row) for row in rows)]
    widths = [max(len(row[place]) for row in table) for place in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
