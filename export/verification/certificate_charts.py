"""The charts of a certificate's page, as inline SVG that takes the page's colours, light or dark.

Every number comes from counts; every text is escaped. The page's style sheet says what the classes look like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 320, 112
_LEFT, _RIGHT, _TOP, _BOTTOM = 4, 4, 16, 20
_MOST_LABELS = 9
_GAP = 0.18
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_LEAST = 2.0
"""Of a bar that stands for one entry, in the picture's units."""


def ulp_chart(ulps: Sequence[tuple[int, int]]) -> Markup:
    """Return the histogram of `WeightVerdict.ulps`: a bar for each power of two, logarithmic in its entries.

    Args:
        ulps: (k, entries), at least one.
    """
    counts = {_bucket(most): entries for most, entries in ulps}
    bars = max(counts) + 1
    step = (_WIDTH - _LEFT - _RIGHT) / max(bars, 6)
    tallest = math.log10(max(counts.values())) + 1
    floor = _HEIGHT - _BOTTOM
    every = math.ceil(bars / _MOST_LABELS)
    body = [f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{_WIDTH - _RIGHT}" y2="{floor}"/>']
    for place in range(bars):
        middle = _LEFT + (place + 0.5) * step
        if place % every == 0:
            body.append(_text(middle, _HEIGHT - 6, _power(place)))
        entries = counts.get(place)
        if not entries:
            continue
        height = max(_LEAST, (math.log10(entries) + 1) / tallest * (floor - _TOP))
        kind = "right" if place == 0 else "off"
        body.append(
            f'<rect class="{kind}" x="{middle - step * (0.5 - _GAP / 2):.1f}" y="{floor - height:.1f}" '
            f'width="{step * (1 - _GAP):.1f}" height="{height:.1f}">'
            f"<title>{escape(_words(place, entries))}</title></rect>"
        )
        if bars <= _MOST_LABELS:
            body.append(_text(middle, floor - height - 4, _short(entries)))
    said = "; ".join(_words(place, counts[place]) for place in sorted(counts))
    return _svg(body, f"Distance from the correctly rounded merge: {said}", _HEIGHT)


def share_bar(parts: Sequence[tuple[str, int]]) -> Markup:
    """Return one bar in parts.

    Args:
        parts: (class, number), at least one of them above 0.
    """
    total = sum(number for _, number in parts)
    body, start = [], 0.0
    for kind, number in parts:
        width = number / total * _WIDTH
        # What is there is seen, however few.
        body.append(
            f'<rect class="{escape(kind)}" x="{start:.2f}" y="0" width="{max(width, 1):.2f}" height="8"/>'
        )
        start += width
    return _svg(body, ", ".join(f"{number} {kind}" for kind, number in parts), 8, stretched=True)


def bound_bar(error: float, tolerance: float) -> Markup:
    """Return an error as a bar, beside the mark of its tolerance; both finite and at least 0."""
    scale = (_WIDTH - 8) / (max(error, tolerance) or 1.0)
    inside = error <= tolerance
    body = [
        f'<rect class="ground" x="0" y="6" width="{_WIDTH}" height="8" rx="1"/>',
        f'<rect class="{"right" if inside else "off"}" x="0" y="6" width="{max(error * scale, 1):.1f}" '
        'height="8" rx="1"/>',
        f'<line class="mark" x1="{tolerance * scale:.1f}" y1="0" x2="{tolerance * scale:.1f}" y2="20"/>',
    ]
    return _svg(body, f"error {error:.3g}, tolerance {tolerance:.3g}", 20, stretched=True)


def _bucket(most: int) -> int:
    """The place of a bucket: 0, 1, 2, 4, 8, ... are 0, 1, 2, 3, 4, ..."""
    return most.bit_length()


def _power(place: int) -> str:
    if place < 5:
        return str(0 if place == 0 else 2 ** (place - 1))
    return f"2{str(place - 1).translate(_SUPERSCRIPTS)}"


def _words(place: int, entries: int) -> str:
    most = 0 if place == 0 else 2 ** (place - 1)
    least = most // 2 + 1
    where = f"{most:,}" if least >= most else f"{least:,} to {most:,}"
    return f"{entries:,} {'entry' if entries == 1 else 'entries'} at {where} ulp"


def _short(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= max(size, 10**4):
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def _text(x: float, y: float, text: str) -> str:
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _svg(body: Sequence[str], title: str, height: float, *, stretched: bool = False) -> Markup:
    # Texts were escaped, and numbers formatted, where they were put in.
    ratio = ' preserveAspectRatio="none"' if stretched else ""
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img"{ratio}>'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )
