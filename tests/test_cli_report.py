"""`loracle report`, called in this process: what it writes and prints, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from evidence_fixtures import certificate, everything, write
from typer.testing import CliRunner

from loracle.cli.commands import rank_analyse, report
from loracle.files import Adapter, LoraConfig, LoraPair, write_adapter

app = typer.Typer()
app.command("report")(report.command)
app.command("analyse")(rank_analyse.command)


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_it_writes_the_page_beside_the_results(tmp_path: Path) -> None:
    write(tmp_path, everything())
    code, out, err = call("report", tmp_path)
    assert (code, err) == (0, "")
    assert "6. The merge is right" in out
    assert f"{tmp_path / 'report.html'}: from 5 result files" in out
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!doctype html>")
    # What it has written is none of the results that it reads.
    assert call("report", tmp_path)[0] == 0


def test_json_and_another_place(tmp_path: Path) -> None:
    write(tmp_path / "results", {"c.json": certificate()})
    code, out, _ = call("report", tmp_path / "results", "--out", tmp_path / "page.html", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["kind"] == "loracle report"
    assert [own["verdict"] for own in document["claims"]] == [
        *["missing"] * 3,
        "agrees",
        "missing",
        "agrees",
    ]
    assert document["files"] == ["c.json"]
    assert (tmp_path / "page.html").exists()
    assert not (tmp_path / "results/report.html").exists()


def test_the_analysis_of_an_adapter_is_read_as_the_command_puts_it_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pair = LoraPair(
        rng.standard_normal((4, 8)).astype(np.float32), rng.standard_normal((8, 4)).astype(np.float32), 2.0
    )
    adapter, results = tmp_path / "adapter", tmp_path / "results"
    adapter.mkdir()
    results.mkdir()
    write_adapter(adapter, Adapter(LoraConfig(r=4, lora_alpha=8, target_modules=("q",)), {"a.q": pair}))
    (results / "analysis.json").write_text(call("analyse", adapter, "--json")[1])
    code, out, _ = call("report", results, "--json")
    (finding,) = json.loads(out)["claims"][1]["findings"]
    assert code == 0
    assert finding["figure"].endswith("of 64 numbers (100.0%) keep 99% of every update’s squared norm")
    assert finding["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing",), "expected a folder with result files, found none"),
        (("{}",), "expected results of loracle bench, rank, extract, intrinsic or verify"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = call("report", *(own.format(tmp_path) for own in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_page_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, {"c.json": certificate()})
    code, _, err = call("report", tmp_path, "--out", tmp_path / "missing/page.html")
    assert code == 2
    assert "does not exist; create it" in err


def test_an_input_is_not_replaced_by_the_page(tmp_path: Path) -> None:
    write(tmp_path, {"c.json": certificate()})
    before = (tmp_path / "c.json").read_bytes()
    code, _, err = call("report", tmp_path, "--out", tmp_path / "c.json")
    assert code == 2
    assert "is, or lies in, the input" in err
    assert (tmp_path / "c.json").read_bytes() == before


def test_it_needs_neither_torch_nor_onnx(tmp_path: Path) -> None:
    write(tmp_path, {"c.json": certificate()})
    program = (
        "import sys; from pathlib import Path; from loracle.export.evidence.folder import read_results; "
        "from loracle.export.evidence.page import render; render(read_results(Path(sys.argv[1]))); "
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
