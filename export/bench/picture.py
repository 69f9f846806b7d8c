"""The result as a picture: each method's time over full fine-tuning's, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from .methods import CONTROL, LABELS

Row = Mapping[str, Any]

_INK, _PAPER, _BAND = "#1f4e79", "#c0504d", "#9db4c8"


def picture(rows: Sequence[Row], title: str) -> bytes:
    """A PNG: a panel for each setting and phase, a line for each method, the paper's figure beside it.

    The band is the interval of the control: full fine-tuning against itself. The same rows give the same
    bytes with the same matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    methods = [name for name in LABELS if any(row["method"] == name for row in rows)]
    size = (2.2 + 3.0 * len(settings), 1.0 + (0.6 + 0.32 * len(methods)) * len(phases))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(phases), len(settings), squeeze=False, sharey=True)
    for line, phase in enumerate(phases):
        for column, (batch, length) in enumerate(settings):
            own = {row["method"]: row for row in rows if _place(row) == (batch, length, phase)}
            axes = grid[line][column]
            _panel(axes, own, methods)
            axes.set_title(f"{batch} x {length}, {phase}", fontsize=9)
            if line + 1 == len(phases):
                axes.set_xlabel("time over full fine-tuning", fontsize=8)
    handles, names = _legend(grid[0])
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _panel(axes: Any, own: Mapping[str, Row], methods: Sequence[str]) -> None:
    low, high = own[CONTROL]["interval"]
    axes.axvspan(low, high, color=_BAND, alpha=0.5, linewidth=0, label="interval of the control")
    axes.axvline(1.0, color="0.4", linewidth=0.8)
    heights = {name: len(methods) - number for number, name in enumerate(methods)}
    measured = [name for name in methods if name in own]
    axes.hlines(
        [heights[name] for name in measured],
        [own[name]["interval"][0] for name in measured],
        [own[name]["interval"][1] for name in measured],
        color=_INK,
        linewidth=2,
    )
    axes.plot(
        [own[name]["ratio"] for name in measured],
        [heights[name] for name in measured],
        linestyle="none",
        marker="o",
        markersize=5,
        color=_INK,
        label="measured here, 95% interval",
    )
    told = [name for name in measured if own[name]["paper"] is not None]
    if told:
        axes.plot(
            [own[name]["paper"] for name in told],
            [heights[name] for name in told],
            linestyle="none",
            marker="D",
            markersize=6,
            markerfacecolor="none",
            color=_PAPER,
            label="the paper, RTX 8000",
        )
    axes.set_yticks(list(heights.values()), [LABELS[name] for name in heights])
    axes.tick_params(labelsize=8)
    axes.set_ylim(0.4, len(methods) + 0.6)
    axes.margins(x=0.08)
    axes.grid(visible=True, axis="x", alpha=0.3)


def _legend(panels: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Each label of the panels once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _place(row: Row) -> tuple[int, int, str]:
    return row["batch"], row["length"], row["phase"]
