"""The charts of the page.

Their classes beside those of `loracle.export.svg`: ``dot``, ``beside``, ``band``, ``stem``, ``level``,
``cell``, ``chosen`` and ``value``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    axis,
    caption,
    frame,
    log_axis,
    polyline,
    svg,
    text,
    vertical_grid,
)

_LABELS = 120
_LABEL_LETTERS = 20
_STEP = 26
_LINE = 12
_LEVEL_NAMES = 105
_CELL_WIDTH, _CELL_HEIGHT = 52, 30
_ROW_LABELS = 56
_ROW_LETTERS = 9
_STRONGEST = 0.5
"""Of a cell's colour, so that what is written in it can be read."""


@dataclass(frozen=True)
class Measured:
    """A value with its interval, and the paper's where it has one."""

    name: str
    value: float
    interval: tuple[float, float]
    paper: float | None = None


def ratio_chart(rows: Sequence[Measured], control: tuple[float, float], label: str) -> Markup:
    """Return ratios and their intervals, one a line, over the band of the control; the paper's are rings.

    Args:
        rows: at least one.
        control: the interval of what compares equal with equal.
        label: of the axis.
    """
    shown = [*control, 1.0]
    for row in rows:
        shown += [*row.interval, row.value] + ([] if row.paper is None else [row.paper])
    bottom = TOP + _STEP * len(rows)
    x = axis(min(shown), max(shown), _LABELS, WIDTH - RIGHT, most_ticks=4)
    low, high = (x(end) for end in control)
    body = [
        f'<rect class="band" x="{low:.1f}" y="{TOP}" width="{max(high - low, 1):.1f}" '
        f'height="{bottom - TOP}"/>',
        *vertical_grid(x, TOP, bottom),
        *caption(x, bottom + BOTTOM, label),
        f'<line class="axis" x1="{x(1):.1f}" y1="{TOP}" x2="{x(1):.1f}" y2="{bottom}"/>',
    ]
    for place, row in enumerate(rows):
        y = TOP + _STEP * (place + 0.5)
        start, stop = (x(end) for end in row.interval)
        body += [
            text(_LABELS - 8, y + 4, _cut(row.name, _LABEL_LETTERS), anchor="end"),
            f'<line class="line" x1="{start:.1f}" y1="{y}" x2="{stop:.1f}" y2="{y}"/>',
            f'<circle class="dot" cx="{x(row.value):.1f}" cy="{y}" r="4"/>',
        ]
        if row.paper is not None:
            body.append(f'<circle class="beside" cx="{x(row.paper):.1f}" cy="{y}" r="5"/>')
    said = "; ".join(
        f"{row.name} {row.value:.3f} [{row.interval[0]:.3f}, {row.interval[1]:.3f}]"
        + ("" if row.paper is None else f", the paper’s {row.paper:.3f}")
        for row in rows
    )
    return svg(body, f"{label}: {said}", height=bottom + BOTTOM)


def size_chart(rows: Sequence[tuple[str, int, str]], label: str) -> Markup:
    """Return sizes as dots on a logarithmic scale, one a line.

    Args:
        rows: (name, number of at least 1, the number in words), at least one.
        label: of the axis.
    """
    bottom = TOP + _STEP * len(rows)
    numbers = [number for _, number, _ in rows]
    # What is written beside the largest dot needs room.
    x = log_axis(min(numbers), max(numbers), _LABELS, WIDTH - 58, most_ticks=4)
    body = [*vertical_grid(x, TOP, bottom), *caption(x, bottom + BOTTOM, label)]
    for place, (name, number, words) in enumerate(rows):
        y = TOP + _STEP * (place + 0.5)
        body += [
            text(_LABELS - 8, y + 4, _cut(name, _LABEL_LETTERS), anchor="end"),
            f'<line class="stem" x1="{x.start}" y1="{y}" x2="{x(number):.1f}" y2="{y}"/>',
            f'<circle class="dot" cx="{x(number):.1f}" cy="{y}" r="4"/>',
            text(x(number) + 8, y + 4, words, anchor="start", kind="value"),
        ]
    said = "; ".join(f"{name} {words}" for name, _, words in rows)
    return svg(body, f"{label}, on a logarithmic scale: {said}", height=bottom + BOTTOM)


def heat_map(
    columns: Sequence[int],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    lower_is_better: bool,
    chosen: frozenset[tuple[str, int]] = frozenset(),
    title: str,
) -> Markup:
    """Return scores by rank and target set, the better the stronger in colour.

    Args:
        columns: ranks, at least one.
        rows: (target set, its scores), at least one; None where nothing trained.
        lower_is_better: whether the metric is one of loss.
        chosen: (target set, rank) of cells that get a border.
        title: what it is.
    """
    known = [value for _, values in rows for value in values if value is not None]
    worst, best = min(known, default=0.0), max(known, default=0.0)
    span = best - worst
    width, height = _ROW_LABELS + _CELL_WIDTH * len(columns), 22 + _CELL_HEIGHT * len(rows) + 4
    body = [text(_ROW_LABELS - 8, 14, "rank", anchor="end")]
    body += [
        text(_ROW_LABELS + _CELL_WIDTH * (place + 0.5), 14, str(rank)) for place, rank in enumerate(columns)
    ]
    said = []
    for line, (name, values) in enumerate(rows):
        y = 22 + _CELL_HEIGHT * line
        body.append(text(_ROW_LABELS - 8, y + 19, _cut(name, _ROW_LETTERS), anchor="end"))
        for place, (rank, value) in enumerate(zip(columns, values, strict=True)):
            x = _ROW_LABELS + _CELL_WIDTH * place
            strength = 0.0
            if value is not None:
                strength = 1.0 if not span else (best - value if lower_is_better else value - worst) / span
            body.append(
                f'<rect class="cell{" chosen" if (name, rank) in chosen else ""}" x="{x + 2}" y="{y + 2}" '
                f'width="{_CELL_WIDTH - 4}" height="{_CELL_HEIGHT - 4}" rx="2" '
                f'fill-opacity="{0.04 + (_STRONGEST - 0.04) * strength:.3f}"/>'
            )
            words = "–" if value is None else f"{value:.4g}".replace("-", "−")
            body.append(text(x + _CELL_WIDTH / 2, y + 19, words, kind="value"))
            said.append(f"{name} at rank {rank}: {words}")
    return svg(body, f"{title}: {'; '.join(said)}", width=width, height=height)


def curve_chart(
    points: Sequence[tuple[int, float, float, float]],
    lines: Sequence[tuple[str, float]],
    chosen: int | None,
    labels: tuple[str, str],
) -> Markup:
    """Return scores against a number on a logarithmic scale, with levels beside them.

    Args:
        points: (number of at least 1, score, lowest, highest), at least one.
        lines: (name, level).
        chosen: the number that is marked.
        labels: of both axes.
    """
    levels = [level for _, level in lines]
    shown = [*levels, *(own for point in points for own in point[1:])]
    x = log_axis(
        min(point[0] for point in points), max(point[0] for point in points), LEFT, WIDTH - _LEVEL_NAMES
    )
    y = axis(min(shown), max(shown), HEIGHT - BOTTOM, TOP)
    body = frame(x, y, *labels)
    free = math.inf
    for name, level in sorted(lines, key=lambda line: line[1]):
        # From the lowest up, so that no name is written over another; each line is bent to its own.
        free = min(y(level), free - _LINE)
        bent = f"{x.start},{y(level):.1f} {x.stop},{y(level):.1f} {x.stop + 12},{free:.1f}"
        body += [
            f'<polyline class="level" fill="none" points="{bent}"/>',
            text(x.stop + 15, free + 4, name, anchor="start", kind="label"),
        ]
    body.append(polyline([point[0] for point in points], [point[1] for point in points], x, y))
    for number, value, low, high in points:
        at = f"{x(number):.1f}"
        body += [
            f'<line class="line" x1="{at}" y1="{y(low):.1f}" x2="{at}" y2="{y(high):.1f}"/>',
            f'<circle class="dot" cx="{at}" cy="{y(value):.1f}" r="4"/>',
        ]
        if number == chosen:
            body.append(f'<circle class="beside" cx="{at}" cy="{y(value):.1f}" r="8"/>')
    said = "; ".join(f"{number:,}: {value:.4g}" for number, value, _, _ in points)
    beside = "; ".join(f"{name} {level:.4g}" for name, level in lines)
    return svg(body, f"{labels[1]} by {labels[0]}: {said}. Levels: {beside}")


def _cut(name: str, letters: int) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"
