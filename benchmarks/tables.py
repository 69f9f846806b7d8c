"""Tables whose cells stay whole."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def plain_table(title: str, names: Sequence[str]) -> Table:
    """A table with these columns, none of them wrapped."""
    table = Table(title=title)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table
