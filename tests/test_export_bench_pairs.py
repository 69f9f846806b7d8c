"""Two sessions are measured in turn, so that a drift cancels; both are repeated as often."""

from __future__ import annotations

import gc

import pytest

from loracle.export.bench import pairs
from loracle.export.bench.pairs import Block, abba, blocks_of


class Clock:
    """Time that only calls move, each by its own seconds, and all by what drifts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, drift: float = 0.0) -> None:
        self.now, self.drift, self.called = 0.0, drift, ""
        monkeypatch.setattr(pairs.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.now += seconds + self.drift * len(self.called)
            self.called += name

        return run


@pytest.mark.parametrize(("flipped", "order"), [(False, "ABBA"), (True, "BAAB")])
def test_a_drift_that_is_even_cancels_out(flipped: bool, order: str) -> None:
    called = ""
    seconds = iter((10.0, 11.0, 12.0, 13.0))

    def timed(name: str):
        def run() -> float:
            nonlocal called
            called += name
            return next(seconds)

        return run

    block = abba(timed("A"), timed("B"), flipped=flipped)
    assert called == order
    assert block == Block(11.5, 11.5)
    assert block.ratio == 1.0


def test_the_ratio_is_the_method_s_over_the_base_s() -> None:
    assert abba(lambda: 2.0, lambda: 3.0, flipped=False).ratio == 1.5
    assert abba(lambda: 2.0, lambda: 3.0, flipped=True).ratio == 1.5


@pytest.mark.parametrize("flipped", [False, True])
def test_every_second_block_is_flipped_and_each_measurement_has_a_run_before_it(
    monkeypatch: pytest.MonkeyPatch, flipped: bool
) -> None:
    clock = Clock(monkeypatch)
    blocks = blocks_of(clock.call("a", 0.25), clock.call("b", 0.125), 2, 0.1, flipped=flipped)
    blocks_in_order = ["aabbbbaa", "bbaaaabb"]
    assert clock.called == "ab" + "ab" + "".join(blocks_in_order[:: -1 if flipped else 1])
    assert blocks == (Block(0.25, 0.125),) * 2


def test_short_calls_are_repeated_both_as_often_and_long_ones_are_not_warmed_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    (block,) = blocks_of(clock.call("a", 0.25), clock.call("b", 0.5), 1, 0.75)
    assert clock.called == "abab" + "a" * 4 + "b" * 8 + "a" * 4  # one that is not timed, three that are
    assert block == Block(0.25, 0.5)
    clock = Clock(monkeypatch)
    blocks_of(clock.call("a", 2.0), clock.call("b", 1.5), 1, 0.1)
    assert clock.called == "abab" + "abba"


def test_garbage_is_not_collected_while_something_is_timed() -> None:
    collecting = []
    blocks_of(lambda: None, lambda: collecting.append(gc.isenabled()), 1, 0.0)
    assert not any(collecting[2:])
    assert gc.isenabled()


def test_ratios_keep_their_rounds() -> None:
    blocks = [(Block(1.0, 2.0), Block(2.0, 2.0)), (Block(4.0, 2.0), Block(1.0, 3.0))]
    assert pairs.ratios(blocks) == [[2.0, 1.0], [0.5, 3.0]]
