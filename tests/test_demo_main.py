"""What the demo calls a success, and which folders it may replace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from export_fixtures import make_adapter, make_model

from loracle.demo.__main__ import _fresh, main, succeeded
from loracle.demo.answers import answer, read_heldout
from loracle.demo.report import TaskReport
from loracle.demo.scores import Comparison
from loracle.demo.settings import TRANSLATE
from loracle.export import Deployment, export
from loracle.export.verification.report import Check
from loracle.reference import FileError


def task_report(before: float, after: float, p_value: float, *passed: bool) -> TaskReport:
    return TaskReport(
        task=TRANSLATE,
        origin="",
        train_rows=1,
        heldout_rows=1,
        quality=Comparison(
            before=before, after=after, low=0.0, high=1.0, p_value=p_value, resamples=1, seed=0
        ),
        before=(before,),
        after=(after,),
        losses=(1.0,),
        training_seconds=1.0,
        trainable_parameters=1,
        total_parameters=2,
        adapter_bytes=1,
        model_bytes=2,
        task_bytes=1,
        switch_seconds=0.001,
        checks=tuple(Check("check", value, "") for value in passed),
        speeds={},
        examples=(),
    )


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (task_report(1.0, 2.0, 0.01, True, True), True),
        (task_report(1.0, 2.0, 0.05, True), False),
        (task_report(2.0, 1.0, 0.01, True), False),
        (task_report(1.0, 2.0, 0.01, True, False), False),
        (task_report(1.0, 2.0, 0.01), False),
    ],
)
def test_success_is_better_beyond_chance_and_verified(report: TaskReport, expected: bool) -> None:
    assert succeeded(report) is expected


def test_only_an_earlier_demos_folder_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _fresh(out)
    (out / "old").write_text("x")
    _fresh(out)
    assert not (out / "old").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(FileError, match="not an earlier demo's"):
        _fresh(mine)
    assert (mine / "thesis.txt").read_text() == "x"


def test_wrong_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_answers_are_one_line_each_and_no_longer_than_allowed(tmp_path: Path) -> None:
    export(make_model(tmp_path / "base"), tmp_path / "onnx")
    deployment = Deployment(tmp_path / "onnx")
    rows = [{"system": "s", "prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    heldout = read_heldout(tmp_path / "rows.jsonl")
    assert (heldout.system, heldout.prompts, heldout.references) == (
        "s",
        ("p0", "p1", "p2"),
        ("c0", "c1", "c2"),
    )
    seen: list[tuple[int, int]] = []
    short = answer(deployment, None, heldout, 2, lambda done, total: seen.append((done, total)))
    longer = answer(deployment, None, heldout, 6)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert all("\n" not in text for text in longer)
    assert all(len(text) <= 2 for text in short)  # a token of this tokenizer is a byte
    assert any(len(text) > 2 for text in longer)


def test_answers_are_those_of_the_task_that_is_named(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    export(base, tmp_path / "onnx", tmp_path / "adapter", form="swappable", name="french")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"system": "s", "prompt": "p", "completion": "c"}) + "\n")
    heldout = read_heldout(tmp_path / "rows.jsonl")
    deployment = Deployment(tmp_path / "onnx")
    (expected,) = deployment.generate("french", ["p"], max_new_tokens=8, system="s")
    found = answer(deployment, "french", heldout, 8)
    assert found == (" ".join(expected.text.split()),)
    assert found != answer(deployment, None, heldout, 8)
