"""The score against d, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from .dimension import Dimension, Point


def dimension_plot(
    points: Sequence[Point],
    full: Point,
    start: float,
    dimension: Dimension,
    path: Path,
    *,
    metric: str,
    title: str,
) -> None:
    """Write a PNG of the curve on a logarithmic axis of d, with the lines that d90 is read from.

    The same numbers give the same bytes with the same matplotlib.

    Args:
        points: of the subspaces.
        full: of the whole model.
        start: the untrained model's score.
        dimension: what was read from them.
        path: of the file.
        metric: the score's name.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blue, red, grey = "#1f4e79", "#c0504d", "#7f7f7f"
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(full.score, color="black", linewidth=1.2, label=f"all parameters, {full.score:.3f}")
    axes.axhline(
        dimension.threshold,
        color=red,
        linewidth=1.2,
        linestyle="--",
        label=f"90% of it, {dimension.threshold:.3f}",
    )
    axes.axhline(start, color=grey, linewidth=1, linestyle=":", label=f"before training, {start:.3f}")
    at = [point.d for point in points if point.d is not None]
    scores = [point.score for point in points]
    below = [point.score - point.low for point in points]
    above = [point.high - point.score for point in points]
    axes.errorbar(
        at, scores, yerr=(below, above), color=blue, linewidth=1.8, marker="o", markersize=4.5, capsize=3,
        label="d numbers",
    )  # fmt: skip
    if dimension.d90 is not None:
        axes.axvline(dimension.d90, color=red, linewidth=1, linestyle=":")
        axes.annotate(
            f"d90 = {dimension.d90:,}",
            (dimension.d90, 0.12),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=red,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.set_xscale("log")
    axes.set_xlabel("d, numbers that are trained")
    axes.set_ylabel(metric.replace("_", " "))
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path, format="png", metadata={"Software": None})
