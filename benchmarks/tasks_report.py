"""The figures of `benchmarks.tasks`, summarised, judged and printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from .interleaved import Times
from .intervals import median_interval, ratio_text
from .tables import plain_table
from .tasks_ways import BAKED, SWAPPABLE

Row = dict[str, Any]

STAY = "one task"
TURNS = "in turn"
MODES = (STAY, TURNS)
"""Whether an answer follows one of the same task, or of another."""

MEMORY_SHARE = 0.1
SWITCH_SECONDS = 1e-3
DECODE_SHARE = 0.95
_MB = 1e6


@dataclass(frozen=True)
class Held:
    """What was measured of a way in a process with some tasks.

    Attributes:
        before: proportional set size with all packages imported and no model opened.
        after, resident: proportional set size and resident set once each task has answered.
        open_seconds: of what is opened before the first task.
        load_seconds: of each task, the first time.
        first_seconds: of each task's first answer, to its first token.
        switch_seconds: from one task's answer until the next is ready, every task in memory.
        texts: the tokens of each task's answer.
    """

    before: int
    after: int
    resident: int
    open_seconds: float
    load_seconds: list[float]
    first_seconds: list[float]
    switch_seconds: list[float]
    texts: list[tuple[int, ...]] = field(repr=False)


def held_row(way: str, tasks: int, held: Held, disk: int, floor: int) -> Row:
    """What so many tasks take; ``floor_bytes`` is one base and what the tasks change in it."""
    low, high, coverage = median_interval(held.switch_seconds)
    return {
        "way": way,
        "tasks": tasks,
        "disk_bytes": disk,
        "floor_bytes": floor,
        "memory_bytes": held.after - held.before,
        "memory_before_bytes": held.before,
        "memory_after_bytes": held.after,
        "resident_after_bytes": held.resident,
        "open_seconds": held.open_seconds,
        "load_seconds": statistics.median(held.load_seconds),
        "load_all_seconds": held.load_seconds,
        "first_answer_all_seconds": held.first_seconds,
        "switch_seconds": statistics.median(held.switch_seconds),
        "switch_interval": (low, high, coverage),
    }


def speed_row(
    way: str,
    tasks: int,
    mode: str,
    times: Times,
    lengths: tuple[int, int],
    weight_bytes: int,
    bandwidths: Sequence[float],
) -> Row:
    """Medians over the rounds; a ratio above 1 says that the way is faster than baked.

    ``share`` is of the speed that memory allows: the weights' bytes times tokens a second, over the bandwidth
    measured in the same round.

    Args:
        times: seconds of an answer, and their ratios to baked's.
        lengths: tokens of the prompt, and of the answer.
    """
    prompt, steps = lengths[0], lengths[1] - 1
    row: Row = {
        "way": way,
        "tasks": tasks,
        "mode": mode,
        "decode_tokens_per_second": steps / statistics.median(times.decode),
        "prefill_tokens_per_second": prompt / statistics.median(times.prefill),
        "share": statistics.median(
            weight_bytes * steps / seconds / bandwidth
            for seconds, bandwidth in zip(times.decode, bandwidths, strict=True)
        ),
        "prefill_all_seconds": times.prefill,
        "decode_all_seconds": times.decode,
    }
    for phase, ratios in (("prefill", times.prefill_ratios), ("decode", times.decode_ratios)):
        speeds = [1 / ratio for ratio in ratios]
        row[f"{phase}_ratio"] = statistics.median(speeds) if speeds else None
        row[f"{phase}_interval"] = median_interval(speeds) if speeds else None
        row[f"{phase}_ratios"] = speeds
    return row


def checks(held: Sequence[Row], speeds: Sequence[Row], base_bytes: int) -> list[Row]:
    """What the project aims at with swappable tasks: little more memory than one base and what the tasks
    change, a switch that costs nothing, and the speed of a model that was exported for one task alone."""
    found = []
    for row in (row for row in held if row["way"] == SWAPPABLE):
        limit = row["floor_bytes"] + MEMORY_SHARE * base_bytes
        found.append(_at_most(row["tasks"], "memory, MB", row["memory_bytes"] / _MB, limit / _MB))
    for row in (row for row in held if row["way"] == SWAPPABLE):
        found.append(_at_most(row["tasks"], "switch, ms", 1e3 * row["switch_seconds"], 1e3 * SWITCH_SECONDS))
    for row in (row for row in speeds if row["way"] == SWAPPABLE):
        value = row["decode_ratio"]
        found.append(
            {
                "tasks": row["tasks"],
                "check": f"decode over baked, {row['mode']}",
                "value": value,
                "least": True,
                "limit": DECODE_SHARE,
                "holds": value >= DECODE_SHARE,
            }
        )
    return found


def _at_most(tasks: int, check: str, value: float, limit: float) -> Row:
    return {
        "tasks": tasks,
        "check": check,
        "value": value,
        "least": False,
        "limit": limit,
        "holds": value <= limit,
    }


def held_table(rows: Sequence[Row]) -> Table:
    """What tasks take, as a person reads it."""
    table = plain_table(
        "tasks of one base, float32; floor: one base and what the tasks change",
        ("tasks", "way", "disk MB", "/ floor", "memory MB", "/ floor", "process MB", "load ms", "switch ms"),
    )
    for at, row in enumerate(rows):
        first = at == 0 or rows[at - 1]["tasks"] != row["tasks"]
        table.add_row(
            str(row["tasks"]) if first else "",
            row["way"],
            f"{row['disk_bytes'] / _MB:.0f}",
            f"{row['disk_bytes'] / row['floor_bytes']:.2f}",
            f"{row['memory_bytes'] / _MB:.0f}",
            f"{row['memory_bytes'] / row['floor_bytes']:.2f}",
            f"{row['memory_after_bytes'] / _MB:.0f}",
            f"{1e3 * row['load_seconds']:.1f}",
            f"{1e3 * row['switch_seconds']:.3f}",
            end_section=at + 1 == len(rows) or rows[at + 1]["tasks"] != row["tasks"],
        )
    return table


def speed_table(rows: Sequence[Row]) -> Table:
    """The speeds, as a person reads them."""
    table = plain_table(
        "speed, float32",
        ("tasks", "answers", "way", "decode tok/s", "/ baked", "of the bound", "prefill tok/s", "/ baked"),
    )
    for at, row in enumerate(rows):
        first = row["way"] == BAKED
        table.add_row(
            str(row["tasks"]) if first else "",
            row["mode"] if first else "",
            row["way"],
            f"{row['decode_tokens_per_second']:.1f}",
            ratio_text(row["decode_ratio"], row["decode_interval"]),
            f"{row['share']:.0%}",
            f"{row['prefill_tokens_per_second']:.0f}",
            ratio_text(row["prefill_ratio"], row["prefill_interval"]),
            end_section=at + 1 == len(rows) or rows[at + 1]["way"] == BAKED,
        )
    return table


def checks_table(found: Sequence[Row]) -> Table:
    """What `checks` found."""
    table = plain_table("aims: swappable tasks", ("tasks", "check", "value", "limit", "met"))
    for row in found:
        limit = f"at {'least' if row['least'] else 'most'} {row['limit']:.3f}"
        met = "yes" if row["holds"] else "NO"
        table.add_row(str(row["tasks"]), row["check"], f"{row['value']:.3f}", limit, met)
    return table


def differences_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Where texts differ, and that rounding explains it."""
    table = plain_table(
        "first token that is not baked's", ("tasks", "way", "task", "token", "margin", "explained")
    )
    for row in found:
        figures = (str(row["place"]), f"{row['margin']:.1e}", f"{row['limit']:.1e}")
        table.add_row(str(row["tasks"]), row["way"], row["task"], *figures)
    return table
