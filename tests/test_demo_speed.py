"""Decode speed is measured in turn, on the same tokens, and its interval is what bootstrap says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from export_fixtures import make_adapter, make_model

from loracle.demo import speed
from loracle.export import Deployment, export


def test_every_folder_is_timed_in_turn_and_the_first_is_the_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(make_model(tmp_path / "base"), tmp_path / "one")
    export(tmp_path / "base", tmp_path / "two")
    timed: list[tuple[int, int]] = []
    seconds = iter([9.0, 9.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 9.0, 9.0, 4.0, 1.0, 4.0, 1.0, 4.0, 1.0])

    def clock(session: speed.DecoderSession, prompt: list[int], tokens: list[int]) -> float:
        timed.append((id(session), len(tokens)))
        return next(seconds)

    monkeypatch.setattr(speed, "decode_seconds", clock)
    rounds: list[tuple[int, int]] = []
    result = speed.measure_decode(
        {name: partial(speed.DecoderSession, tmp_path / name) for name in ("one", "two")},
        [1, 2],
        [3, 4, 5, 6],
        rounds=2,
        progress=lambda done, total: rounds.append((done, total)),
    )
    assert [count for _, count in timed] == [1, 1, 4, 4, 4, 4, 4, 4] * 2
    assert timed[2][0] != timed[3][0]
    assert timed[2][0] == timed[4][0]
    assert rounds == [(1, 2), (2, 2)]
    # Round 1: one 1 s, two 2 s. Round 2 starts with two: two 4 s, one 1 s.
    assert result["one"] == speed.DecodeSpeed(4.0, 1.0, 1.0, 1.0)
    assert result["two"].tokens_per_second == 4 / 3
    assert result["two"].ratio == (1 / 2 + 1 / 4) / 2


def test_real_seconds_grow_with_the_tokens(tmp_path: Path) -> None:
    export(make_model(tmp_path / "base"), tmp_path / "one")
    session = speed.DecoderSession(tmp_path / "one", 128)
    few, many = (
        min(speed.decode_seconds(session, [1, 2], [5] * count) for _ in range(5)) for count in (1, 100)
    )
    assert 0 < few < many


def test_a_switch_is_the_median_of_opening_the_task_s_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    export(base, tmp_path / "onnx", tmp_path / "adapter", form="swappable", name="french")
    clock = iter([0.0, 1.0, 5.0, 8.0, 10.0, 12.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    opened = []
    deployment = Deployment(tmp_path / "onnx")

    def decoder(*what: object, reuse: object = None) -> int:
        opened.append((what, reuse))
        return len(opened)

    monkeypatch.setattr(deployment, "decoder", decoder)
    assert speed.switch_seconds(deployment, "french", 16, repeats=3) == 2.0
    assert opened == [(("french", 16), reused) for reused in (None, 1, 2, 3)]


def test_the_bootstrap_interval_encloses_the_median_and_narrows() -> None:
    rng = np.random.default_rng(0)
    wide = speed.bootstrap_median(rng.normal(1.0, 0.1, 10))
    narrow = speed.bootstrap_median(rng.normal(1.0, 0.1, 1000))
    for value, low, high in (wide, narrow):
        assert low <= value <= high
    assert narrow[2] - narrow[1] < wide[2] - wide[1]
    assert speed.bootstrap_median(np.array([2.0, 2.0, 2.0])) == (2.0, 2.0, 2.0)
