"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path


def loss_plot(
    losses: Sequence[float],
    path: Path,
    *,
    held_out: Sequence[tuple[int, float]] = (),
    best: int | None = None,
    title: str = "Training loss",
) -> None:
    """Write a PNG of each step's loss, in nats a label, with its moving mean over a tenth of the steps.

    The same numbers give the same bytes with the same matplotlib.

    Args:
        losses: of steps 1, 2, ...
        path: of the file.
        held_out: (steps done, loss on held-out data), where there is such data.
        best: the step whose adapter was kept, when it is marked.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = range(1, len(losses) + 1)
    window = max(1, len(losses) // 10)
    means = [sum(losses[max(0, step - window) : step]) / min(step, window) for step in steps]
    # The object interface: pyplot would keep global state and choose a window system.
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db4c8", linewidth=1, label="each step")
    axes.plot(steps, means, color="#1f4e79", linewidth=2, label=f"mean of {window}")
    if held_out:
        at, measured = zip(*held_out, strict=True)
        axes.plot(at, measured, color="#c0504d", linewidth=1.5, marker="o", markersize=4, label="held out")
    if best is not None:
        axes.axvline(best, color="#c0504d", linewidth=1, linestyle=":", label=f"best, step {best}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per label)")
    axes.set_title(title)
    axes.set_xlim(0, len(losses) + 1)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})
