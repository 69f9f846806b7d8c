"""Numbers as the page shows them."""

from __future__ import annotations

_UNITS = ("B", "kB", "MB", "GB", "TB")


def count(number: int) -> str:
    """Return an integer with commas between thousands."""
    return f"{number:,}"


def size(number: int) -> str:
    """Return bytes in decimal units with three significant digits."""
    value, unit = float(number), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{number} B" if unit == 0 else f"{value:.3g} {_UNITS[unit]}"


def share(part: float, whole: float) -> str:
    """Return a part of something in percent, with two significant digits where it is below 1%."""
    percent = 100 * part / whole
    return f"{percent:.1f}%" if percent >= 1 else f"{percent:.2g}%"


def times(ratio: float) -> str:
    """Return how many times something is something else."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def ratio(value: float, interval: tuple[float, float]) -> str:
    """Return a ratio and its interval."""
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def score(value: float | None) -> str:
    """Return a score, of a metric of any size."""
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def seeds(value: float | None, low: float | None, high: float | None) -> str:
    """Return a score, and the lowest and the highest seed's where there are several."""
    if low is None or high is None or low == high:
        return score(value)
    return f"{score(value)} [{score(low)}, {score(high)}]"
