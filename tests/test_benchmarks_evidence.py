"""All of the evidence: which measurements there are, and that what has ended is not made again."""

from __future__ import annotations

import importlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import evidence, evidence_task
from benchmarks.evidence import STAGES, command_of
from loracle.cli.app import app


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_stages_are_modules_that_take_their_arguments(stage: evidence.Stage, quick: bool) -> None:
    python, _, name, *arguments = command_of(stage, Path("work"), Path("out"), quick=quick)
    assert python == sys.executable
    assert ("--quick" in arguments) is quick
    module = importlib.import_module(name)
    if hasattr(module, "parse"):
        parsed = module.parse(arguments)
        assert (parsed.work, parsed.out, parsed.quick) == (Path("work"), Path("out"), quick)
        assert getattr(parsed, "seeds", (0,)) == (0,) or not quick
        assert getattr(parsed, "steps", None) == (
            50 if stage.name == "rank-summarize" and not quick else None
        )
    else:
        assert arguments == [*(["--quick"] if quick else []), "--out", "out"]


def test_names_are_different() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)


def test_what_has_ended_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    failing = "--projection"

    def run(command: list[str], *, check: bool) -> None:
        assert check
        if failing in command:
            raise subprocess.CalledProcessError(1, command)
        ran.append(command)

    monkeypatch.setattr(evidence.subprocess, "run", run)
    where = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    with pytest.raises(subprocess.CalledProcessError):
        evidence.main(where)
    assert len(ran) == len(STAGES) - 1
    failing = "nothing"
    evidence.main(where)
    last, report = ran[len(STAGES) - 1 :]
    assert last == command_of(STAGES[-1], tmp_path / "work", tmp_path / "out", quick=False)
    assert report[3:] == ["report", str(tmp_path / "out"), "--out", str(tmp_path / "out/evidence.html")]
    evidence.main([*where, "--again"])
    assert len(ran) == len(STAGES) + 1 + len(STAGES) + 1


@pytest.mark.parametrize("quick", [False, True])
def test_the_commands_of_the_task_are_commands(quick: bool) -> None:
    commands = evidence_task.commands(Path("/data"), quick=quick)
    made = {"SmolLM2-135M-Instruct"}
    for words, _ in commands:
        help_of = words[:2] if words[0] == "rank" else words[:1]
        shown = CliRunner().invoke(app, [*help_of, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
        assert [word for word in words if word.startswith("--") and word not in shown] == []
        given: dict[str, Any] = dict(pairwise(words))
        assert {
            given[option] for option in ("--model", "--base", "--adapter", "--tuned") if option in given
        } <= made
        made |= {given["--out"]} if "--out" in given else set()
    written = {result for _, result in commands} - {None}
    (verify,) = (words for words, _ in commands if "verify" in words)
    certificate = verify[verify.index("--certificate") + 1]  # what verify prints is for people
    assert written | {certificate} == set(evidence_task.RESULTS)
