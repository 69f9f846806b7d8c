"""The result of `loracle bench` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_COLUMNS = ("method", "over full", "95% interval", "ms", "full's ms", "trained", "size", "paper")


def print_bench(document: Mapping[str, Any]) -> None:
    """Print a table for each setting and phase, then what they say of the paper's claim."""
    screen = Console(width=110)
    rows = document["rows"]
    for place in dict.fromkeys((row["batch"], row["length"], row["phase"]) for row in rows):
        batch, length, phase = place
        own = [row for row in rows if (row["batch"], row["length"], row["phase"]) == place]
        table = Table(title=f"{phase}, {batch} x {length}")
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        for row in own:
            table.add_row(
                row["label"],
                f"{row['ratio']:.3f}",
                _range(row["interval"]),
                f"{1e3 * row['seconds']:.2f}",
                f"{1e3 * row['base_seconds']:.2f}",
                _count(row["parameters"]) if row["method"] != "control" else "",
                f"{row['parameter_bytes'] / 1e6:.1f} MB" if row["method"] != "control" else "",
                "" if row["paper"] is None else f"{row['paper']:.3f}",
            )
        screen.print(table)
    _print_findings(screen, document["findings"])
    if any(row["row_by_row"] for row in rows):
        screen.print("prefix tuning: onnxruntime's attention prefills one row at a time behind a past")
    for method, reason in document["left_out"].items():
        screen.print(f"left out: {method}: {reason}", highlight=False, markup=False)


def _print_findings(screen: Console, findings: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="the paper's claim, against the control's interval")
    for name in ("", "method", "claim", "95% interval", "control", "here"):
        table.add_column(name, no_wrap=True)
    for found in findings:
        table.add_row(
            f"{found['phase']}, {found['batch']} x {found['length']}",
            found["method"],
            found["claim"],
            _range(found["interval"]),
            _range(found["control"]),
            "holds" if found["holds"] else "not shown",
        )
    if findings:
        screen.print(table)


def _range(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{low:.3f} .. {high:.3f}"


def _count(parameters: int) -> str:
    """A number of parameters as the paper writes it."""
    return f"{parameters / 1e6:.2f}M" if parameters >= 10_000 else str(parameters)
