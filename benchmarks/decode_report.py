"""The figures of `benchmarks.decode`, summarised, judged and printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .decode_ways import BASE, CONTROL, GENAI, OPTIMUM, OURS, TRANSFORMERS
from .interleaved import Times
from .intervals import median_interval, ratio_text
from .tables import plain_table

Row = dict[str, Any]
PHASES = ("prefill", "decode")


def row_of(
    name: str, prompt: int, new_tokens: int, times: Times, weight_bytes: int, bandwidths: Sequence[float]
) -> Row:
    """Medians over the rounds; a ratio above 1 says that ours is faster.

    ``share`` is of the speed that memory allows: the weights' bytes times tokens a second, over the bandwidth
    measured in the same round.
    """
    steps = new_tokens - 1
    row: Row = {
        "way": name,
        "prompt": prompt,
        "decode_tokens_per_second": steps / statistics.median(times.decode),
        "prefill_seconds": statistics.median(times.prefill),
        "share": statistics.median(
            weight_bytes * steps / seconds / bandwidth
            for seconds, bandwidth in zip(times.decode, bandwidths, strict=True)
        ),
        "prefill_all_seconds": times.prefill,
        "decode_all_seconds": times.decode,
    }
    for phase, ratios in (("prefill", times.prefill_ratios), ("decode", times.decode_ratios)):
        row[f"{phase}_ratio"] = statistics.median(ratios) if ratios else None
        row[f"{phase}_interval"] = median_interval(ratios) if ratios else None
        row[f"{phase}_ratios"] = ratios
    return row


def checks(rows: Sequence[Row]) -> list[Row]:
    """What the project aims at: our seconds over those of a way, and the limit.

    The limit is 1, or the upper end of the A/A control's interval where that is more: merged weights cost
    what the base's do, and no peer is faster.
    """
    found = []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        own = {row["way"]: row for row in rows if row["prompt"] == prompt}
        for phase in PHASES:
            limit = max(1.0, own[CONTROL][f"{phase}_interval"][1] if CONTROL in own else 0.0)
            for name in (BASE, GENAI, TRANSFORMERS, OPTIMUM):
                if name in own:
                    value = 1 / own[name][f"{phase}_ratio"]
                    found.append(
                        {
                            "prompt": prompt,
                            "check": f"{phase}, over {name}",
                            "value": value,
                            "limit": limit,
                            "holds": value <= limit,
                        }
                    )
    return found


def rows_table(rows: Sequence[Row]) -> Table:
    """The rows as a person reads them."""
    table = plain_table(
        "decoding, float32",
        ("prompt", "way", "decode tok/s", "ours / way", "of the bound", "prefill ms", "ours / way"),
    )
    for at, row in enumerate(rows):
        table.add_row(
            str(row["prompt"]) if row["way"] == OURS else "",
            row["way"],
            f"{row['decode_tokens_per_second']:.1f}",
            ratio_text(row["decode_ratio"], row["decode_interval"]),
            f"{row['share']:.0%}",
            f"{1e3 * row['prefill_seconds']:.1f}",
            ratio_text(row["prefill_ratio"], row["prefill_interval"]),
            end_section=at + 1 == len(rows) or rows[at + 1]["way"] == OURS,
        )
    return table


def checks_table(found: Sequence[Row]) -> Table:
    """What `checks` found."""
    table = plain_table("aims: our seconds", ("prompt", "check", "value", "limit", "met"))
    for row in found:
        met = "yes" if row["holds"] else "NO"
        table.add_row(str(row["prompt"]), row["check"], f"{row['value']:.3f}", f"{row['limit']:.3f}", met)
    return table


def differences_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Where texts differ, and that rounding explains it."""
    table = plain_table(
        "first token that is not ours", ("prompt", "way", "token", "margin", "rounding explains")
    )
    for row in found:
        figures = (f"{row['margin']:.1e}", f"{row['limit']:.1e}")
        table.add_row(str(row["prompt"]), row["way"], str(row["place"]), *figures)
    return table
