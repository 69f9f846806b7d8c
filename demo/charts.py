"""Small charts as inline SVG, drawn by hand so that they take the page's fonts and colours, light or dark.

A chart uses the classes ``axis``, ``grid``, ``mark``, ``line``, ``faint`` and ``label``; the page's style
sheet says what they look like. Every text and number comes from this module or from a caller's numbers and
names, escaped.
"""

from collections.abc import Sequence

from markupsafe import Markup, escape

from loracle.export.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    axis,
    caption,
    frame,
    polyline,
    svg,
    vertical_grid,
)


def scatter_chart(before: Sequence[float], after: Sequence[float], metric: str) -> Markup:
    """Return a square scatter of paired scores, 0 to 100: above the diagonal, the second system is better.

    Args:
        before, after: the scores of each sentence, percent.
        metric: the score's name.
    """
    side = HEIGHT - TOP - BOTTOM
    x = axis(0, 100, LEFT, LEFT + side)
    y = axis(0, 100, HEIGHT - BOTTOM, TOP)
    dots = [
        f'<circle class="mark" cx="{x(b):.1f}" cy="{y(a):.1f}" r="2.6"/>'
        for b, a in zip(before, after, strict=True)
    ]
    diagonal = f'<line class="faint" x1="{x(0)}" y1="{y(0)}" x2="{x(100)}" y2="{y(100)}"/>'
    body = [*frame(x, y, f"{metric} before", f"{metric} after"), diagonal, *dots]
    better = sum(a > b for b, a in zip(before, after, strict=True))
    title = f"{metric} of each held-out text before and after; {better} of {len(before)} improved"
    return svg(body, title, width=LEFT + side + RIGHT)


def loss_chart(losses: Sequence[float]) -> Markup:
    """Return the training loss against the step: each point faint, a running mean of nine on top.

    Args:
        losses: each step's loss in nats per token, at least one.
    """
    steps = range(1, len(losses) + 1)
    x = axis(0, len(losses), LEFT, WIDTH - RIGHT)
    y = axis(0, max(losses), HEIGHT - BOTTOM, TOP)
    smooth = [_mean(losses[max(0, i - 4) : i + 5]) for i in range(len(losses))]
    body = [
        *frame(x, y, "step", "loss, nats per token"),
        *(
            f'<circle class="mark faint" cx="{x(s):.1f}" cy="{y(v):.1f}" r="1.6"/>'
            for s, v in zip(steps, losses, strict=True)
        ),
        polyline(steps, smooth, x, y),
    ]
    return svg(body, f"Training loss, from {smooth[0]:.2f} to {smooth[-1]:.2f} over {len(losses)} steps")


def ratio_chart(rows: Sequence[tuple[str, float, float, float]]) -> Markup:
    """Return ratios with their intervals, one a line, against the line of ratio one.

    Args:
        rows: (name, low, ratio, high), at least one.
    """
    low = min(1.0, *(row[1] for row in rows))
    high = max(1.0, *(row[3] for row in rows))
    left, bottom = 84, 40
    height = TOP + 44 * len(rows) + bottom
    x = axis(low, high, left, WIDTH - RIGHT, most_ticks=5)
    body = [*vertical_grid(x, TOP, height - bottom), *caption(x, height, "speed over base")]
    body.append(f'<line class="axis" x1="{x(1):.1f}" y1="{TOP}" x2="{x(1):.1f}" y2="{height - bottom}"/>')
    for number, (name, lower, ratio, upper) in enumerate(rows):
        y = TOP + 44 * number + 22
        body += [
            f'<text class="label" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>',
            f'<line class="line" x1="{x(lower):.1f}" y1="{y}" x2="{x(upper):.1f}" y2="{y}"/>',
            f'<circle class="mark" cx="{x(ratio):.1f}" cy="{y}" r="4"/>',
        ]
    title = "; ".join(f"{name} {ratio:.3f} [{lo:.3f}, {hi:.3f}]" for name, lo, ratio, hi in rows)
    return svg(body, f"Decode speed as a ratio to the base model: {title}", height=height)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
