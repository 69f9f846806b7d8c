"""Rows say what was measured, findings what it shows; and both are drawn and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loracle.export.bench.document import document_bytes, document_of
from loracle.export.bench.graphs import MethodGraph
from loracle.export.bench.measure import Measured
from loracle.export.bench.models import BenchModel
from loracle.export.bench.output import JSON_FILE, PICTURE_FILE, title_of, write_results
from loracle.export.bench.pairs import Block
from loracle.export.bench.picture import picture
from loracle.export.bench.report import findings, row_of
from loracle.export.bench.settings import Effort, Setting
from loracle.export.tasks import TASKS
from loracle.reference import FileError

MODEL = BenchModel("gpt2-medium", Path("x"), TASKS[0], 24, 24, 354_823_168, True)
SETTING = Setting(1, 128, 11e6)


def measured(method: str, *rounds: tuple[float, float]) -> Measured:
    graph = MethodGraph(method, Path("model.onnx"), 112, 1000, 5000)
    return Measured(graph, [tuple(Block(1.0, ratio) for ratio in own) for own in rounds])


def a_row(method: str, low: float, high: float, phase: str = "prefill") -> dict[str, Any]:
    row = row_of(MODEL, SETTING, method, phase, measured(method, (low, high), (low, high)))
    return {**row, "ratio": (low + high) / 2, "interval": [low, high]}


def test_a_row_has_the_median_its_interval_and_the_paper_s_figure() -> None:
    row = row_of(MODEL, SETTING, "adapter-h", "prefill", measured("adapter-h", (1.1, 1.2), (1.3, 1.4)))
    assert row["ratio"] == 1.25
    assert 1.1 <= row["interval"][0] < 1.25 < row["interval"][1] <= 1.4
    assert row["ratios"] == [[1.1, 1.2], [1.3, 1.4]]
    assert (row["seconds"], row["base_seconds"]) == (1.25, 1.0)
    assert row["parameter_bytes"] == 4000
    half = row_of(MODEL, SETTING, "adapter-h", "prefill", measured("adapter-h", (1.1, 1.2), (1.3, 1.4)), 2)
    assert half["parameter_bytes"] == 2000
    assert row["paper"] == 25.8 / 19.8


def test_the_paper_has_no_figure_for_decoding_or_another_model() -> None:
    own = measured("adapter-h", (1.1, 1.2), (1.3, 1.4))
    assert row_of(MODEL, SETTING, "adapter-h", "decode", own)["paper"] is None
    other = BenchModel("gpt2", Path("x"), TASKS[0], 12, 12, 124_000_000, True)
    fewer = BenchModel("gpt2-medium", Path("x"), TASKS[0], 12, 24, 354_823_168, True)
    for model in (other, fewer):
        assert row_of(model, SETTING, "adapter-h", "prefill", own)["paper"] is None


@pytest.mark.parametrize(
    ("method", "low", "high", "holds"),
    [
        ("lora-merged", 0.995, 1.005, True),
        ("lora-merged", 1.01, 1.03, True),
        ("lora-merged", 1.011, 1.03, False),
        ("lora-merged", 0.90, 0.989, False),
        ("adapter-h", 1.011, 1.03, True),
        ("adapter-h", 1.01, 1.03, False),
        ("adapter-l", 0.9, 1.2, False),
        ("lora-unmerged", 1.1, 1.2, True),
        ("lora-inputs", 1.1, 1.2, True),
    ],
)
def test_a_finding_holds_against_the_control_s_interval(
    method: str, low: float, high: float, holds: bool
) -> None:
    (found,) = findings([a_row("control", 0.99, 1.01), a_row(method, low, high)])
    assert found["holds"] is holds
    assert found["control"] == [0.99, 1.01]
    assert found["claim"] == ("costs nothing" if method == "lora-merged" else "costs time")


def test_a_control_that_another_program_has_slowed_shows_nothing() -> None:
    rows = [a_row("control", 0.5, 0.8), a_row("adapter-h", 0.9, 1.6), a_row("lora-merged", 0.9, 1.2)]
    found = {own["method"]: own for own in findings(rows)}
    assert found["adapter-h"]["control"] == [0.5, 1.0]
    assert not found["adapter-h"]["holds"]
    assert found["lora-merged"]["holds"]


def test_each_phase_has_its_own_control_and_prefixes_have_no_claim() -> None:
    rows = [
        a_row("control", 0.99, 1.01),
        a_row("adapter-h", 1.05, 1.06),
        a_row("prefix", 1.05, 1.06),
        a_row("control", 0.9, 1.1, "decode"),
        a_row("adapter-h", 1.05, 1.06, "decode"),
    ]
    found = findings(rows)
    assert [(own["phase"], own["holds"]) for own in found] == [("prefill", True), ("decode", False)]


def a_document() -> dict[str, Any]:
    rows = [a_row("control", 0.99, 1.01), a_row("adapter-h", 1.2, 1.3), a_row("prefix", 1.0, 1.01)]
    return document_of(MODEL, "cpu", "fp32", Effort(threads=2), rows, {"prompt": "no table"})


def test_the_document_is_versioned_and_names_the_machine_but_no_path() -> None:
    document = json.loads(document_bytes(a_document()))
    assert (document["kind"], document["version"]) == ("loracle bench", 1)
    assert {"processor", "cores", "memory", "system", "python", "versions"} <= document["machine"].keys()
    assert document["machine"]["versions"]["onnxruntime"]
    assert document["left_out"] == {"prompt": "no table"}
    assert document["effort"]["threads"] == 2
    assert "/" not in json.dumps([document["machine"]["system"], document["model"]])


def test_a_number_that_is_none_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        document_bytes({"ratio": float("nan")})


def test_the_picture_is_a_png_and_the_same_each_time() -> None:
    rows = a_document()["rows"]
    drawn = picture(rows, "title")
    assert drawn.startswith(b"\x89PNG")
    assert picture(rows, "title") == drawn
    assert picture(rows[:2], "title") != drawn


def test_results_are_written_into_a_folder_that_may_hold_others(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/intrinsic.json").write_text("{}")
    for _ in range(2):
        write_results(tmp_path / "out", a_document())
    assert json.loads((tmp_path / "out" / JSON_FILE).read_text())["kind"] == "loracle bench"
    assert (tmp_path / "out" / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {JSON_FILE, PICTURE_FILE, "intrinsic.json"}


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "missing/out"):
        with pytest.raises(FileError, match=r"choose another --out|create it"):
            write_results(path, a_document())


def test_the_title_says_what_is_not_the_whole_model() -> None:
    document = a_document()
    assert title_of(document) == "gpt2-medium: onnxruntime, fp32, 2 threads"
    document["model"]["layers"] = 2
    document["effort"]["threads"] = 1
    assert title_of(document) == "gpt2-medium, 2 layers: onnxruntime, fp32, 1 thread"
    document["provider"] = "cuda"
    assert title_of(document).endswith("onnxruntime, fp32, CUDA")
