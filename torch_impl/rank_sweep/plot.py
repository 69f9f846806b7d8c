"""The table of a sweep as a heat map."""

from collections.abc import Sequence
from pathlib import Path

from .table import Entry, best_of


def rank_plot(
    entries: Sequence[Entry], path: Path, *, metric: str, lower_is_better: bool, title: str
) -> None:
    """Write a PNG with a square for each entry: the darker the better, its score, spread, and parameters.

    The best is framed. The same numbers give the same bytes with the same matplotlib.

    Args:
        entries: every target set at every rank.
        path: of the file.
        metric: the score's name.
        lower_is_better: whether the darkest is the lowest.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = list(dict.fromkeys(entry.targets for entry in entries))
    columns = sorted({entry.rank for entry in entries})
    scores = [entry.score for entry in entries if entry.score is not None]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    figure = Figure(
        figsize=(2.4 + 1.35 * max(3, len(columns)), 1.5 + 0.95 * len(rows)), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("gain", ["#f3f7fb", "#1f4e79"])
    best = best_of(entries, lower_is_better)
    for entry in entries:
        x, y = columns.index(entry.rank), rows.index(entry.targets)
        shade = 0.0
        if entry.score is not None and high > low:
            shade = (entry.score - low) / (high - low)
            shade = 1.0 - shade if lower_is_better else shade
        face = "#dddddd" if entry.score is None else colours(shade)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="white", linewidth=2))
        axes.text(
            x,
            y,
            _text(entry),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if shade > 0.55 else "black",
            linespacing=1.4,
        )
    if best is not None:
        corner = (columns.index(best.rank) - 0.46, rows.index(best.targets) - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#c0504d", linewidth=2))
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [f"r = {rank}" for rank in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    better = "lower" if lower_is_better else "higher"
    axes.set_xlabel(f"{metric.replace('_', ' ')} on held-out data, {better} is better; darker is better")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, format="png", metadata={"Software": None})


def _text(entry: Entry) -> str:
    if entry.score is None or entry.low is None or entry.high is None:
        lines = ["diverged"]
    else:
        lines = [f"{entry.score:.3f}"]
        if entry.high > entry.low:
            lines.append(f"{entry.low:.3f} to {entry.high:.3f}")
    trained = "" if entry.r == entry.rank else f"r = {entry.r}, "
    return "\n".join([*lines, f"{trained}{short_count(entry.parameters)}"])


def short_count(count: int) -> str:
    """Return a number of parameters in three digits, as 1.84M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
