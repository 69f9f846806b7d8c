"""Axes hold what they must show; texts are escaped."""

from __future__ import annotations

import math

import pytest

from loracle.export.svg import axis, log_axis, svg, text, tick


@pytest.mark.parametrize("low", [1.0, 1e15, -3e-7])
def test_ends_that_are_nearly_equal_are_widened(low: float) -> None:
    found = axis(low, math.nextafter(low, math.inf), 0, 100)
    assert found.low < low < found.high
    assert 0 < found(low) < 100
    assert len(set(found.ticks)) == len(found.ticks) > 1


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1, 1, (1, 10)), (30, 4000, (10, 100, 1000, 10_000)), (1, 1e10, (1, 100, 1e4, 1e6, 1e8, 1e10))],
)
def test_a_logarithmic_axis_has_powers_of_ten(low: float, high: float, ticks: tuple[float, ...]) -> None:
    found = log_axis(low, high, 0, 100)
    assert found.ticks == ticks
    assert (found(found.low), found(found.high)) == (0, 100)
    assert found(math.sqrt(found.low * found.high)) == pytest.approx(50)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "0.5"), (-2, "−2"), (1000, "1000"), (2e4, "20k"), (1e6, "1M"), (1e9, "1G")]
)
def test_ticks_are_short(value: float, shown: str) -> None:
    assert tick(value) == shown


def test_texts_are_escaped() -> None:
    assert "<b>" not in svg([text(0, 0, "<b>")], "<b>")
