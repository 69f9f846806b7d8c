"""`loracle extract` as a user meets it: extracted, merged, verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from files_fixtures import Q0, V0, random_array, small_adapter, small_tensors, write_model
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.files import write_adapter

RUNNER = CliRunner()


def call(*arguments: object) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def extract(made: Path, out: str, *options: object) -> tuple[int, str, str]:
    return call("extract", "--base", made / "base", "--tuned", made / "tuned", "--out", made / out, *options)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "given", small_adapter())
    return tmp_path


def merged(made: Path, adapter: str, out: str) -> bytes:
    assert call("merge", "--model", made / "base", "--adapter", made / adapter, "--out", made / out)[0] == 0
    return (made / out / "model.safetensors").read_bytes()


def test_extracted_and_merged(made: Path) -> None:
    tuned = merged(made, "given", "tuned")
    code, out, err = extract(made, "out", "--rank", 2)
    assert (code, err) == (0, "")
    title, first, second, last = out.splitlines()
    assert title.split() == ["weight", "rank", "norm", "left", "out", "spectral", "unequal"]
    assert first.split()[:2] == [f"{Q0}.weight", "2"]
    assert second.endswith(" 0 of 24")
    assert last.startswith(f"{made / 'out'}: 2 weights, 48 parameters, ")
    assert last.endswith("; its merge is the tuned checkpoint, bit for bit")
    assert merged(made, "out", "again") == tuned
    code, _, _ = call(
        "verify", made / "tuned", "--model", made / "base", "--adapter", made / "out", "--exact"
    )
    assert code == 0


def test_the_json(made: Path) -> None:
    merged(made, "given", "tuned")
    code, out, _ = extract(made, "out", "--rank", 1, "--scaling", 2, "--json")
    content = json.loads(out)
    assert (code, content["kind"], content["version"]) == (0, "loracle extract", 1)
    assert (content["complete"], content["exact"], content["same"]) == (True, False, 4)
    assert content["options"]["scaling"] == 2
    tensor = content["tensors"][0]
    assert (tensor["name"], tensor["r"], tensor["entries"]) == (f"{Q0}.weight", 1, 48)
    assert 0 < tensor["spectral_residual"] <= tensor["frobenius_residual"] < tensor["frobenius"]
    assert tensor["unequal"] > 40
    assert {"processor", "versions"} <= content["machine"].keys()


def test_what_is_not_covered_is_exit_code_one(made: Path) -> None:
    changes = {f"{V0}.weight": random_array((4, 6), 9), "model.norm.weight": random_array((6,), 8)}
    write_model(made / "tuned", [{**small_tensors(), **changes}])
    code, out, _ = extract(made, "out", "--energy", 0.9)
    assert code == 1
    assert "model.norm.weight: not in the adapter (1 axes; --rest saves it)" in out
    assert (made / "out/adapter_config.json").exists()
    code, out, _ = extract(made, "whole", "--energy", 0.9, "--rest")
    assert code == 0
    assert "model.norm.weight: saved whole (1 axes)" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "error: expected one of rank, energy and bytes; give one"),
        (("--rank", 5), f"error: {V0}.weight: expected a rank from 1 to 4"),
        (("--bytes", "much"), "error: bytes: expected a size such as 10MB, 512KiB or 4096, got 'much'"),
        (("--bytes", "10"), "error: bytes: expected enough for a rank of one weight"),
        (("--energy", 0), "error: energy: expected a number above 0 and at most 1, got 0.0"),
        (("--rank", 1, "--scaling", 0), "error: scaling: expected a finite number other than 0, got 0.0"),
    ],
)
def test_wrong_options_are_one_line(made: Path, options: tuple[object, ...], message: str) -> None:
    merged(made, "given", "tuned")
    code, out, err = extract(made, "out", *options)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not (made / "out").exists()


def test_the_base_itself_is_no_fine_tune(made: Path) -> None:
    write_model(made / "tuned")
    code, _, err = extract(made, "out", "--rank", 1)
    assert code == 2
    assert "got the same in all tensors; is it the fine-tuned model?" in err
