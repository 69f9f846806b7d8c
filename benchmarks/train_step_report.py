"""The figures of `benchmarks.train_step`, summarised, judged and printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .intervals import median_interval, ratio_text
from .train_step_subjects import CONTROL, FLOOR, OURS, OURS_CHUNKED, PEFT

ALL_LINEAR_LIMIT = 1.08
CHUNKED_LIMIT = {"float32": 0.85, "bfloat16": 0.70}
Row = dict[str, Any]


def summary(result: Mapping[str, Any] | None, peft_ratios: Sequence[float] | None) -> Row:
    """The measured fields of a row; None for what there is not."""
    ratios = None if result is None else result["ratios"]
    to_peft = None
    if ratios is not None and peft_ratios is not None:
        to_peft = [own / peft for own, peft in zip(ratios, peft_ratios, strict=True)]
    return {
        "seconds": None if result is None else statistics.median(result["all_seconds"]),
        "ratio": None if ratios is None else statistics.median(ratios),
        "interval": None if ratios is None else median_interval(ratios),
        "ratio_to_peft": None if to_peft is None else statistics.median(to_peft),
        "interval_to_peft": None if to_peft is None else median_interval(to_peft),
        "ratios": ratios,
    }


def checks(rows: Sequence[Row]) -> list[Row]:
    """What the project aims at, row by row: value, limit, and whether it holds.

    ``operations`` are those of a step over the floor's: no step can be expected below that ratio.
    """
    controls: dict[str, list[float]] = {}
    for row in rows:
        if row["way"] == CONTROL and row["ratios"] is not None:
            controls.setdefault(row["dtype"], []).extend(row["ratios"])
    peft = {_key(row): row for row in rows if row["way"] == PEFT}
    found = []
    for row in rows:
        if row["way"] not in (OURS, OURS_CHUNKED):
            continue
        peer = peft[_key(row)]
        limits: list[tuple[str, float, float]] = []
        if row["ratio"] is not None and row["way"] == OURS_CHUNKED:
            limits.append(("step, over PEFT's", row["ratio_to_peft"], CHUNKED_LIMIT[row["dtype"]]))
        elif row["ratio"] is not None and row["targets"] == "q+v":
            limits.append(
                ("step, in the A/A interval", row["ratio"], median_interval(controls[row["dtype"]])[1])
            )
        elif row["ratio"] is not None:
            limits.append(("step, over the floor", row["ratio"], ALL_LINEAR_LIMIT))
            limits.append(("overhead, half of PEFT's", row["ratio"] - 1, (peer["ratio"] - 1) / 2))
        if row["peak_bytes"] is not None:
            limits.append(("peak GB, PEFT's", row["peak_bytes"] / 1e9, peer["peak_bytes"] / 1e9))
        found += [
            {
                **{name: row[name] for name in ("dtype", "targets", "r", "dropout", "way")},
                "check": what,
                "value": value,
                "limit": limit,
                "operations": row["flop_ratio"],
                "holds": value <= limit,
            }
            for what, value, limit in limits
        ]
    return found


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["dtype"], row["targets"], row["r"], row["dropout"]


def rows_table(rows: Sequence[Row]) -> Table:
    """The rows as a person reads them."""
    names = (
        "dtype",
        "adapted",
        "way",
        "ms",
        "over the floor",
        "operations",
        "over PEFT",
        "peak GB",
        "- model",
    )
    table = _table("training step", *names)
    for at, row in enumerate(rows):
        last = at + 1 == len(rows) or _key(rows[at + 1]) != _key(row)
        table.add_row(
            row["dtype"],
            _adapted(row),
            row["way"],
            "" if row["seconds"] is None else f"{1e3 * row['seconds']:.0f}",
            ratio_text(row["ratio"], row["interval"]),
            "1" if row["way"] == FLOOR else f"{row['flop_ratio']:.3f}",
            "" if row["way"] == PEFT else ratio_text(row["ratio_to_peft"], row["interval_to_peft"]),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_above_model_bytes'] / 1e9:.2f}",
            end_section=last,
        )
    return table


def checks_table(found: Sequence[Row]) -> Table:
    """What `checks` found; the last column is the ratio that counted operations alone allow."""
    table = _table("aims", "dtype", "adapted", "way", "check", "value", "limit", "holds", "operations")
    for row in found:
        table.add_row(
            row["dtype"],
            _adapted(row),
            row["way"],
            row["check"],
            f"{row['value']:.3f}",
            f"{row['limit']:.3f}",
            "yes" if row["holds"] else "NO",
            f"{row['operations']:.3f}",
        )
    return table


def parity_table(rows: Sequence[Row]) -> Table:
    """What `train_step_parity` found."""
    table = _table("relative error against float64", "dtype", "adapted", "way", "loss", "lora_A", "lora_B")
    for row in rows:
        errors = (f"{row[name]:.1e}" for name in ("loss", "lora_A", "lora_B"))
        table.add_row(row["dtype"], f"{row['targets']}, r={row['r']}", row["way"], *errors)
    return table


def _table(title: str, *names: str) -> Table:
    table = Table(title=title)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _adapted(row: Mapping[str, Any]) -> str:
    if row["targets"] is None:
        return ""
    dropout = f", dropout {row['dropout']:g}" if row["dropout"] else ""
    return f"{row['targets']}, r={row['r']}{dropout}"
