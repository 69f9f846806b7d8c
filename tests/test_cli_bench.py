"""`loracle bench`, called in this process: what it writes and prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from architectures import make
from typer.testing import CliRunner

from loracle.cli.commands import bench

app = typer.Typer()
app.command()(bench.command)


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bench") / "tiny", "gpt2")


def test_it_writes_a_document_and_a_picture_and_prints_tables(model: Path, tmp_path: Path) -> None:
    code, out, err = call(
        "--model", model, "--quick", "--settings", "1x4:3k,2x3", "--methods", "adapter-h,prefix",
        "--out", tmp_path / "out", "--threads", 1, "--blocks", 2,
    )  # fmt: skip
    assert (code, err) == (0, "")
    document = json.loads((tmp_path / "out/bench.json").read_text())
    assert (tmp_path / "out/bench.png").read_bytes().startswith(b"\x89PNG")
    places = [(row["batch"], row["length"], row["phase"], row["method"]) for row in document["rows"]]
    assert places == [
        (batch, length, phase, method)
        for batch, length in ((1, 4), (2, 3))
        for phase in ("prefill", "decode")
        for method in ("control", "adapter-h", "prefix")
    ]
    assert document["model"]["name"] == "tiny"
    assert not document["model"]["random_weights"]
    assert all([len(own) for own in row["ratios"]] == [2, 2, 2] for row in document["rows"])
    assert all(row["seconds"] > 0 for row in document["rows"])
    by_method = {row["method"]: row for row in document["rows"] if row["length"] == 4}
    assert abs(by_method["adapter-h"]["parameters"] - 3000) < 2 * 2 * 129  # half a rank
    assert by_method["control"]["parameters"] > 100_000
    assert "prefill, 1 x 4" in out
    assert "A/A control" in out
    assert str(tmp_path) not in (tmp_path / "out/bench.json").read_text()


@pytest.mark.slow
def test_quick_measures_every_method_of_a_model_without_a_download(tmp_path: Path) -> None:
    code, out, _ = call("--quick", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["model"] == {
        "name": "gpt2",
        "layers": 2,
        "full_layers": 12,
        "full_parameters": 124_439_808,
        "random_weights": True,
    }
    assert document["left_out"] == {}
    methods = {row["method"] for row in document["rows"]}
    assert len(methods) == 8
    merged = [row for row in document["rows"] if row["method"] == "lora-merged"]
    assert all(row["graph_is_the_base_s"] for row in merged)


@pytest.mark.slow
def test_methods_without_a_place_are_left_out_unless_they_were_asked_for(tmp_path: Path) -> None:
    folder = make(tmp_path / "neox", "gpt_neox")
    code, out, _ = call("--model", folder, "--quick", "--settings", "1x4", "--json")
    assert code == 0
    assert set(json.loads(out)["left_out"]) == {"adapter-h", "adapter-l"}
    code, _, err = call("--model", folder, "--quick", "--settings", "1x4", "--methods", "adapter-l")
    assert code == 2
    assert err.startswith("error: layers: expected attention and MLP in turn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--settings", "1by2"), "settings: expected BATCHxLENGTH"),
        (("--methods", "lora"), "methods: expected some of"),
        (("--provider", "tpu"), "provider: expected one of cpu, cuda, got 'tpu'"),
        (("--model", "no-such-model"), "no-such-model: expected a model folder or one of gpt2"),
        (("--out", "missing/out"), "does not exist; create it"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_text_longer_than_the_model_is_refused(model: Path) -> None:
    code, _, err = call("--model", model, "--quick", "--settings", "1x120", "--methods", "prefix")
    assert code == 2
    assert "settings: 1x120: expected a length of at most 117" in err


def test_cuda_is_refused_where_it_is_not(model: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has CUDA")
    code, _, err = call("--model", model, "--provider", "cuda")
    assert code == 2
    assert "provider: expected an onnxruntime with CUDAExecutionProvider" in err
