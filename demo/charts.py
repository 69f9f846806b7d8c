"""Small charts as inline SVG, drawn by hand so that they take the page's fonts and colours, light or dark.

A chart uses the classes ``axis``, ``grid``, ``mark``, ``line``, ``faint`` and ``label``; the page's style
sheet says what they look like. Every text and number comes from this module or from a caller's numbers and
names, escaped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 320, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 12, 40


@dataclass(frozen=True)
class Axis:
    """A linear map from [low, high] to [start, stop] in the picture, with its ticks."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def axis(low: float, high: float, start: float, stop: float, most_ticks: int = 6) -> Axis:
    """Return an axis whose ticks are 1, 2 or 5 times a power of ten apart and whose ends are ticks.

    Args:
        low, high: what it must show, ``low <= high``, both finite; equal ends are widened.
        start, stop: where the ends lie in the picture.
        most_ticks: at least 2.
    """
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = 10.0 ** math.floor(math.log10((high - low) / most_ticks))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.floor(low / (step * factor)), math.ceil(high / (step * factor))
        if last - first < most_ticks:
            break
    ticks = tuple(round(i * step * factor, 12) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], start, stop, ticks)


def scatter_chart(before: Sequence[float], after: Sequence[float], metric: str) -> Markup:
    """Return a square scatter of paired scores, 0 to 100: above the diagonal, the second system is better.

    Args:
        before, after: the scores of each sentence, percent.
        metric: the score's name.
    """
    side = HEIGHT - _TOP - _BOTTOM
    x = axis(0, 100, _LEFT, _LEFT + side)
    y = axis(0, 100, HEIGHT - _BOTTOM, _TOP)
    dots = [
        f'<circle class="mark" cx="{x(b):.1f}" cy="{y(a):.1f}" r="2.6"/>'
        for b, a in zip(before, after, strict=True)
    ]
    diagonal = f'<line class="faint" x1="{x(0)}" y1="{y(0)}" x2="{x(100)}" y2="{y(100)}"/>'
    body = [*_frame(x, y, f"{metric} before", f"{metric} after"), diagonal, *dots]
    better = sum(a > b for b, a in zip(before, after, strict=True))
    title = f"{metric} of each held-out text before and after; {better} of {len(before)} improved"
    return _svg(body, title, width=_LEFT + side + _RIGHT)


def loss_chart(losses: Sequence[float]) -> Markup:
    """Return the training loss against the step: each point faint, a running mean of nine on top.

    Args:
        losses: each step's loss in nats per token, at least one.
    """
    steps = range(1, len(losses) + 1)
    x = axis(0, len(losses), _LEFT, WIDTH - _RIGHT)
    y = axis(0, max(losses), HEIGHT - _BOTTOM, _TOP)
    smooth = [_mean(losses[max(0, i - 4) : i + 5]) for i in range(len(losses))]
    body = [
        *_frame(x, y, "step", "loss, nats per token"),
        *(
            f'<circle class="mark faint" cx="{x(s):.1f}" cy="{y(v):.1f}" r="1.6"/>'
            for s, v in zip(steps, losses, strict=True)
        ),
        _polyline(steps, smooth, x, y),
    ]
    return _svg(body, f"Training loss, from {smooth[0]:.2f} to {smooth[-1]:.2f} over {len(losses)} steps")


def ratio_chart(rows: Sequence[tuple[str, float, float, float]]) -> Markup:
    """Return ratios with their intervals, one a line, against the line of ratio one.

    Args:
        rows: (name, low, ratio, high), at least one.
    """
    low = min(1.0, *(row[1] for row in rows))
    high = max(1.0, *(row[3] for row in rows))
    left, bottom = 84, 40
    height = _TOP + 44 * len(rows) + bottom
    x = axis(low, high, left, WIDTH - _RIGHT, most_ticks=5)
    body = [*_vertical_grid(x, _TOP, height - bottom), *_caption(x, height, "speed over base")]
    body.append(f'<line class="axis" x1="{x(1):.1f}" y1="{_TOP}" x2="{x(1):.1f}" y2="{height - bottom}"/>')
    for number, (name, lower, ratio, upper) in enumerate(rows):
        y = _TOP + 44 * number + 22
        body += [
            f'<text class="label" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>',
            f'<line class="line" x1="{x(lower):.1f}" y1="{y}" x2="{x(upper):.1f}" y2="{y}"/>',
            f'<circle class="mark" cx="{x(ratio):.1f}" cy="{y}" r="4"/>',
        ]
    title = "; ".join(f"{name} {ratio:.3f} [{lo:.3f}, {hi:.3f}]" for name, lo, ratio, hi in rows)
    return _svg(body, f"Decode speed as a ratio to the base model: {title}", height=height)


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    lines = [
        f'<line class="grid" x1="{x.start}" y1="{y(t):.1f}" x2="{x.stop}" y2="{y(t):.1f}"/>' for t in y.ticks
    ]
    labels = [
        f'<text class="label" x="{x.start - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{_tick(t)}</text>'
        for t in y.ticks
    ]
    middle = (y.start + y.stop) / 2
    name = (
        f'<text class="label" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    axis_line = f'<line class="axis" x1="{x.start}" y1="{y.start}" x2="{x.stop}" y2="{y.start}"/>'
    return [*lines, *labels, name, axis_line, *_caption(x, HEIGHT, x_label)]


def _vertical_grid(x: Axis, top: float, bottom: float) -> list[str]:
    return [f'<line class="grid" x1="{x(t):.1f}" y1="{top}" x2="{x(t):.1f}" y2="{bottom}"/>' for t in x.ticks]


def _caption(x: Axis, height: float, label: str) -> list[str]:
    ticks = [
        f'<text class="label" x="{x(t):.1f}" y="{height - 24}" text-anchor="middle">{_tick(t)}</text>'
        for t in x.ticks
    ]
    middle = (x.start + x.stop) / 2
    name = f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(label)}</text>'
    return [*ticks, name]


def _polyline(xs: Sequence[float], ys: Sequence[float], x: Axis, y: Callable[[float], float]) -> str:
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
    return f'<polyline class="line" points="{points}"/>'


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _svg(body: Sequence[str], title: str, *, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    # Names were escaped, and numbers formatted, where they were put in.
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )
