"""The figures of `benchmarks.gpu_train_step`, judged and printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .intervals import ratio_text
from .tables import plain_table
from .train_step_subjects import FLOOR, OURS, PEFT

FLOOR_LIMIT = 1.10
PEFT_LEAST = 1.3
Row = dict[str, Any]


def checks(rows: Sequence[Row]) -> list[Row]:
    """What the project aims at for a model of 7B with all linear layers adapted: value, limit, whether it
    holds."""
    by_key = {(_key(row), row["way"]): row for row in rows}
    found = []
    for (key, way), row in by_key.items():
        if way != OURS or row["size"] != "7b" or row["targets"] != "all-linear":
            continue
        faster = by_key[key, PEFT]["ratio"] / row["ratio"]
        for what, value, limit, holds in (
            ("step, over the floor", row["ratio"], FLOOR_LIMIT, row["ratio"] <= FLOOR_LIMIT),
            ("PEFT's step over ours", faster, PEFT_LEAST, faster >= PEFT_LEAST),
        ):
            found.append(
                {"length": row["length"], "check": what, "value": value, "limit": limit, "holds": holds}
            )
    return found


def rows_table(rows: Sequence[Row]) -> Table:
    """The rows as a person reads them."""
    table = plain_table(
        "training step",
        ("model", "texts", "adapted", "way", "ms", "over the floor", "peak GB", "utilisation", "bound by"),
    )
    for at, row in enumerate(rows):
        table.add_row(
            row["size"],
            f"{row['batch']} x {row['length']}",
            f"{row['targets']}, r={row['r']}",
            row["way"],
            f"{1e3 * row['seconds']:.2f}",
            "1" if row["way"] == FLOOR else ratio_text(row["ratio"], row["interval"]),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['utilisation']:.3f}",
            row["bound_by"],
            end_section=at + 1 == len(rows) or _key(rows[at + 1]) != _key(row),
        )
    return table


def checks_table(found: Sequence[Row]) -> Table:
    """What `checks` found."""
    table = plain_table("aims", ("tokens", "check", "value", "limit", "holds"))
    for row in found:
        figures = (f"{row['value']:.3f}", f"{row['limit']:.2f}", "yes" if row["holds"] else "NO")
        table.add_row(str(row["length"]), row["check"], *figures)
    return table


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["size"], row["length"], row["targets"], row["r"]
