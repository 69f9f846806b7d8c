"""Rounds open both sessions of each pair anew, in an order that turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loracle.export.bench import measure
from loracle.export.bench.graphs import MethodGraph
from loracle.export.bench.pairs import Block
from loracle.export.bench.settings import Effort, Setting

SETTING = Setting(1, 4, 100.0)
BASE = MethodGraph("full", Path("base"), 0, 1, 1)
METHODS = {name: MethodGraph(name, Path(name), 0, 1, 1) for name in ("control", "adapter-h", "prefix")}


def test_orders_turn_from_round_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    measured: list[tuple[str, str, bool]] = []
    shared: list[int] = []

    class Runner:
        def __init__(self, graph: MethodGraph, session: str, *rest: Any) -> None:
            assert session == f"session of {graph.method}"
            shared.append(id(rest[-1]))
            self.name = graph.method

        def call(self, phase: str) -> str:
            return f"{self.name} {phase}"

    def open_method(graph: MethodGraph, provider: str, threads: int) -> str:
        assert (provider, threads) == ("cpu", 2)
        opened.append(graph.method)
        return f"session of {graph.method}"

    def blocks_of(base: Any, method: Any, count: int, window: float, *, flipped: bool) -> Any:
        assert (count, window) == (3, 0.5)
        measured.append((base, method, flipped))
        return (Block(1.0, float(len(measured))),) * count

    monkeypatch.setattr(measure, "Runner", Runner)
    monkeypatch.setattr(measure, "open_method", open_method)
    monkeypatch.setattr(measure, "blocks_of", blocks_of)
    steps: list[tuple[int, int]] = []
    found = measure.measure(
        SETTING,
        BASE,
        METHODS,
        ("prefill", "decode"),
        Effort(2, 3, 0.5, 2),
        10,
        "cpu",
        lambda done, total: steps.append((done, total)),
    )
    assert opened == [
        *("full", "control", "full", "adapter-h", "full", "prefix"),
        *("prefix", "full", "adapter-h", "full", "control", "full"),
    ]
    assert [own for own in measured if own[1].startswith("control")] == [
        ("full prefill", "control prefill", False),
        ("full decode", "control decode", False),
        ("full prefill", "control prefill", True),
        ("full decode", "control decode", True),
    ]
    # Both sessions of a pair write into the same buffers.
    assert all(one == other for one, other in zip(shared[::2], shared[1::2], strict=True))
    assert steps == [(number, 6) for number in range(1, 7)]
    assert list(found) == [(name, phase) for name in METHODS for phase in ("prefill", "decode")]
    assert [block.method for own in found["prefix", "decode"].rounds for block in own] == [6.0] * 3 + [
        8.0
    ] * 3
