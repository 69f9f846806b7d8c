"""The figures of `benchmarks.export`, summarised, judged and printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .export_models import LARGE, MIDDLE, SMOL
from .export_ways import BUILDER, CACHED, FIRST, FLOOR
from .intervals import median_interval, ratio_text
from .process import Measured
from .tables import plain_table

Row = dict[str, Any]

BUILDER_RATIO = {FIRST: 1.0, CACHED: 0.4}
"""Seconds of SmolLM2-135M's export, over those of the builder's way."""

PEAK_GB = {(SMOL, FIRST): 0.75, (SMOL, CACHED): 0.4, (MIDDLE, CACHED): 1.0, (LARGE, CACHED): 2.0}
SECONDS = {(MIDDLE, CACHED): 10.0}
FLOOR_RATIO = {(LARGE, CACHED): 2.0}


def rows_of(
    model: str, runs: Mapping[str, Sequence[Measured]], errors: Mapping[str, float], tolerance: float | None
) -> list[Row]:
    """A row for each way of one model; the figures are medians over the rounds, the peak is the largest.

    A ratio is a way's seconds over those of the builder's way, or of the floor, in the same round.
    """
    rows = []
    for name, own in runs.items():
        row: Row = {
            "model": model,
            "way": name,
            "seconds": statistics.median(run.seconds for run in own),
            "peak_bytes": max(run.peak_bytes for run in own),
            "runs": [asdict(run) for run in own],
            "largest_logit_error": errors.get(name),
            "logit_tolerance": tolerance,
        }
        for field in ("read_bytes", "written_bytes", "dirtied_bytes"):
            counts = [count for run in own if (count := getattr(run, field)) is not None]
            row[field] = statistics.median(counts) if counts else None
        for field, other in (("builder", BUILDER), ("floor", FLOOR)):
            ratios = None
            if other in runs and name != other:
                ratios = [run.seconds / than.seconds for run, than in zip(own, runs[other], strict=True)]
            row[f"over_{field}"] = None if ratios is None else statistics.median(ratios)
            row[f"over_{field}_interval"] = None if ratios is None else median_interval(ratios)
        rows.append(row)
    return rows


def checks(rows: Sequence[Row]) -> list[Row]:
    """What the project aims at: value, limit, and whether it holds."""
    found = []
    for row in rows:
        key = row["model"], row["way"]
        limits: list[tuple[str, float, float]] = []
        if row["model"] == SMOL and row["way"] in BUILDER_RATIO and row["over_builder"] is not None:
            limits.append(("time, over the builder's way", row["over_builder"], BUILDER_RATIO[row["way"]]))
        if key in SECONDS:
            limits.append(("seconds", row["seconds"], SECONDS[key]))
        if key in FLOOR_RATIO and row["over_floor"] is not None:
            limits.append(("time, over the disk floor", row["over_floor"], FLOOR_RATIO[key]))
        if key in PEAK_GB:
            limits.append(("peak GB", row["peak_bytes"] / 1e9, PEAK_GB[key]))
        found += [
            {
                "model": row["model"],
                "way": row["way"],
                "check": what,
                "value": value,
                "limit": limit,
                "holds": value <= limit,
            }
            for what, value, limit in limits
        ]
    return found


def rows_table(rows: Sequence[Row]) -> Table:
    """The rows as a person reads them."""
    table = plain_table(
        "merge and export",
        (
            "model",
            "way",
            "seconds",
            "over the builder",
            "over the floor",
            "peak GB",
            "read GB",
            "written GB",
            "logits off by",
        ),
    )
    for at, row in enumerate(rows):
        first = at == 0 or rows[at - 1]["model"] != row["model"]
        error = row["largest_logit_error"]
        table.add_row(
            row["model"] if first else "",
            row["way"],
            f"{row['seconds']:.2f}",
            "1" if row["way"] == BUILDER else ratio_text(row["over_builder"], row["over_builder_interval"]),
            "1" if row["way"] == FLOOR else ratio_text(row["over_floor"], row["over_floor_interval"]),
            f"{row['peak_bytes'] / 1e9:.2f}",
            *("" if row[name] is None else f"{row[name] / 1e9:.2f}" for name in _COUNTED),
            "" if error is None else f"{error:.1e}",
            end_section=at + 1 == len(rows) or rows[at + 1]["model"] != row["model"],
        )
    return table


_COUNTED = ("read_bytes", "written_bytes")


def checks_table(found: Sequence[Row]) -> Table:
    """What `checks` found."""
    table = plain_table("aims", ("model", "way", "check", "value", "limit", "met"))
    for row in found:
        figures = (f"{row['value']:.2f}", f"{row['limit']:.2f}")
        table.add_row(row["model"], row["way"], row["check"], *figures, "yes" if row["holds"] else "NO")
    return table
