"""The picture has the curves that it is given, and its bytes repeat."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from loracle.torch_impl.plot import loss_plot


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path, **options: Any) -> dict[str, tuple[list[float], ...]]:
    """Return the lines by label."""
    lines: dict[str, tuple[list[float], ...]] = {}
    plot = Axes.plot

    def record(axes: Axes, x: Any, y: Any, **style: Any) -> Any:
        lines[style["label"]] = (list(x), list(y))
        return plot(axes, x, y, **style)

    monkeypatch.setattr(Axes, "plot", record)
    loss_plot([4.0, 2.0, 3.0, 1.0], path, **options)
    return lines


def test_the_held_out_curve_is_beside_the_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = drawn(monkeypatch, tmp_path / "a.png", held_out=[(0, 5.0), (2, 3.0), (4, 3.5)])
    assert lines["each step"] == ([1, 2, 3, 4], [4.0, 2.0, 3.0, 1.0])
    assert lines["held out"] == ([0, 2, 4], [5.0, 3.0, 3.5])
    assert "held out" not in drawn(monkeypatch, tmp_path / "b.png")


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for name, best in (("one", 2), ("same", 2), ("other", None)):
        loss_plot([4.0, 2.0, 3.0], tmp_path / name, held_out=[(2, 3.0)], best=best)
    one, same, other = ((tmp_path / name).read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
