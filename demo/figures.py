"""Numbers as people read them; the page and the terminal show the same."""


def count(number: int) -> str:
    """Return an integer with commas between thousands."""
    return f"{number:,}"


def size(number: int) -> str:
    """Return bytes in decimal units with three significant digits: ``1.85 MB``."""
    if number < 1000:
        return f"{number} B"
    value, units = number / 1000, ["kB", "MB", "GB", "TB"]
    # 999.5 would be shown as 1000
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f} {units[0]}"


def share(part: int, whole: int) -> str:
    """Return ``part`` of ``whole`` in percent, with two decimals."""
    return f"{100 * part / whole:.2f}%"


def score(value: float) -> str:
    """Return a score in percent with one decimal."""
    return f"{value:.1f}"


def change(before: float, after: float) -> str:
    """Return the difference of two scores with its sign."""
    return f"{after - before:+.1f}".replace("-", "−")


def interval(low: float, high: float, digits: int) -> str:
    """Return an interval in brackets."""
    return f"[{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def p_value(value: float) -> str:
    """Return ``p = 0.012``, or ``p < 0.001`` where it is smaller."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.0995 else f"p = {value:.2f}"


def duration(seconds: float) -> str:
    """Return whole seconds as ``48 s`` or ``2 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def milliseconds(seconds: float) -> str:
    """Return milliseconds with two significant digits: ``0.52 ms``."""
    return f"{1000 * seconds:.2g} ms"
