"""The settings that the evidence for ranks is measured with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evidence_rank import NAMES, RANKS, SETS, Subject, options_of, parse, shortened

SUBJECT = Subject("a", Path("m"), Path("t"), Path("h"), {"max_steps": 100, "batch_size": 16})


def test_the_settings_are_the_papers_and_a_quick_run_is_a_corner() -> None:
    full = options_of(SUBJECT, Path("o"), quick=False)
    assert (full.ranks, full.targets) == (RANKS, SETS) == ((1, 2, 4, 8, 64), ("q", "qv", "qkvo"))
    assert (full.max_steps, full.scaling, full.resume, full.eval_data) == (100, 2.0, True, Path("h"))
    quick = options_of(SUBJECT, Path("o"), quick=True)
    assert (quick.ranks, quick.targets, quick.max_steps) == ((1, 8), ("q", "qv"), 2)
    assert options_of(SUBJECT, Path("o"), quick=False, steps=7, seeds=(0, 1)).max_steps == 7
    constant = options_of(SUBJECT, Path("o"), quick=False, constant_parameters=True)
    assert (constant.constant_parameters, constant.ranks) == (True, (4, 8, 64))


@pytest.mark.parametrize("quick", [False, True])
def test_a_quick_run_writes_elsewhere(quick: bool) -> None:
    arguments = parse(["--quick"] if quick else [])
    assert arguments.out == (Path("build/evidence") if quick else Path("benchmarks/results"))
    assert (arguments.only, arguments.seeds) == (list(NAMES), (0,))
    assert parse(["--only", "library", "--seeds", "0,2"]).seeds == (0, 2)


def test_a_shortened_subject_has_the_first_rows(tmp_path: Path) -> None:
    for name in ("t", "h"):
        (tmp_path / name).write_text("1\n2\n3\n")
    own = Subject("a", Path("m"), tmp_path / "t", tmp_path / "h", {})
    short = shortened(own, tmp_path / "short", 2)
    assert (short.train.read_text(), short.held_out.read_text()) == ("1\n2\n", "1\n2\n")
    assert own.train.read_text() == "1\n2\n3\n"
