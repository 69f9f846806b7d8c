"""What charts as inline SVG are put together from: axes, frames, lines; colours and fonts are the page's.

A chart uses the classes ``axis``, ``grid``, ``line`` and ``label``; the page's style sheet says what they
look like. Every text is escaped here, every number formatted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 320, 240
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 12, 40
_NARROWEST = 1e-9
"""Of an axis, as a share of the numbers on it: float64 still tells its ticks apart."""


@dataclass(frozen=True)
class Axis:
    """A map from [low, high] to [start, stop] in the picture, linear or logarithmic, with its ticks."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def axis(low: float, high: float, start: float, stop: float, most_ticks: int = 6) -> Axis:
    """Return an axis whose ticks are 1, 2 or 5 times a power of ten apart and whose ends are ticks.

    Args:
        low, high: what it must show, ``low <= high``, both finite; (nearly) equal ends are widened.
        start, stop: where the ends lie in the picture.
        most_ticks: at least 2.
    """
    if high - low <= _NARROWEST * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    step = 10.0 ** math.floor(math.log10((high - low) / most_ticks))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.floor(low / (step * factor)), math.ceil(high / (step * factor))
        if last - first < most_ticks:
            break
    ticks = tuple(round(i * step * factor, 12) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], start, stop, ticks)


def log_axis(low: float, high: float, start: float, stop: float, most_ticks: int = 6) -> Axis:
    """Return a logarithmic axis whose ends are powers of ten, and so are its ticks.

    Args:
        low, high: what it must show, ``0 < low <= high``, both finite.
        start, stop: where the ends lie in the picture.
        most_ticks: at least 2.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = math.ceil((last - first + 1) / most_ticks)
    ticks = tuple(10.0**power for power in range(first, last + 1, every))
    return Axis(10.0**first, 10.0**last, start, stop, ticks, logarithmic=True)


def frame(x: Axis, y: Axis, x_label: str, y_label: str, *, height: float = HEIGHT) -> list[str]:
    """Return the grid of `y`, both axes' ticks, and what they are called."""
    lines = [
        f'<line class="grid" x1="{x.start}" y1="{y(t):.1f}" x2="{x.stop}" y2="{y(t):.1f}"/>' for t in y.ticks
    ]
    labels = [
        f'<text class="label" x="{x.start - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{tick(t)}</text>'
        for t in y.ticks
    ]
    middle = (y.start + y.stop) / 2
    name = (
        f'<text class="label" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    axis_line = f'<line class="axis" x1="{x.start}" y1="{y.start}" x2="{x.stop}" y2="{y.start}"/>'
    return [*lines, *labels, name, axis_line, *caption(x, height, x_label)]


def vertical_grid(x: Axis, top: float, bottom: float) -> list[str]:
    """Return the lines of the ticks of `x`."""
    return [f'<line class="grid" x1="{x(t):.1f}" y1="{top}" x2="{x(t):.1f}" y2="{bottom}"/>' for t in x.ticks]


def caption(x: Axis, height: float, label: str) -> list[str]:
    """Return the ticks of `x` below a picture of this height, and what it is called."""
    ticks = [
        f'<text class="label" x="{x(t):.1f}" y="{height - 24}" text-anchor="middle">{tick(t)}</text>'
        for t in x.ticks
    ]
    middle = (x.start + x.stop) / 2
    name = f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(label)}</text>'
    return [*ticks, name]


def polyline(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Callable[[float], float]) -> str:
    """Return a line through points."""
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
    return f'<polyline class="line" points="{points}"/>'


def text(x: float, y: float, words: str, *, anchor: str = "middle", kind: str = "label") -> str:
    """Return a text; `anchor` is start, middle or end."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def tick(value: float) -> str:
    """Return a number beside an axis, from ten thousand on as 10k, 1M, 1G."""
    for least, size, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:g}{unit}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def svg(body: Sequence[str], title: str, *, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """Return the picture; `body` is markup whose texts were escaped where they were put in."""
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )
