"""`loracle rank analyse` and `truncate` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from files_fixtures import Q0, V0, small_adapter, write_model
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.files import Adapter, LoraConfig, read_adapter, write_adapter
from loracle.reference import delta_singular_values

RUNNER = CliRunner()


def call(*arguments: object) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, ["rank", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def made(tmp_path: Path) -> Path:
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "adapter", small_adapter())
    arrays = {
        Q0: (np.eye(2, 6, dtype=np.float32), np.diag([8, 0.01]).astype(np.float32).repeat(4, 0)),
        V0: (np.eye(2, 6, dtype=np.float32), np.diag([8, 4]).astype(np.float32).repeat(2, 0)),
    }
    config = LoraConfig(r=2, target_modules=("q_proj", "v_proj"))
    write_adapter(tmp_path / "other", Adapter.from_arrays(config, arrays))
    return tmp_path


def test_analyse_prints_a_line_for_each_layer_and_a_proposal(made: Path) -> None:
    code, out, err = call("analyse", made / "other", "--base", made / "base", "--with", made / "adapter")
    assert (code, err) == (0, "")
    title, first, second, says, proposal = out.splitlines()
    assert title.split() == [
        *("layer", "rank", "0.99", "effective", "stable", "norm", "amplified", "phi(1,", "1)", "phi(all)")
    ]
    assert first.split()[:3] == [Q0, "2", "1"]
    assert second.split()[:3] == [V0, "2", "2"]
    assert says == "0.99 of every update's squared norm: 34 of 48 parameters (71%), with"
    assert json.loads(proposal) == {"r": 1, "rank_pattern": {V0.replace(".", r"\."): 2}}


def test_the_json_of_analyse(made: Path) -> None:
    code, out, _ = call("analyse", made / "other", "--json", "--energy", 0.5)
    content = json.loads(out)
    assert (code, content["kind"], content["version"]) == (0, "loracle rank analyse", 1)
    assert {"processor", "cores"} <= content["machine"].keys()
    layers = {layer["name"]: layer for layer in content["layers"]}
    assert layers.keys() == {Q0, V0}
    pair = read_adapter(made / "other").pairs[Q0]
    assert layers[Q0]["singular_values"] == delta_singular_values(pair.A, pair.B, pair.scaling).tolist()
    assert layers[Q0]["shape"] == [8, 6]
    assert layers[Q0]["rank_for_energy"] == 1
    assert layers[Q0]["amplification"] is None
    assert layers[Q0]["similarity_A"] is None
    assert content["energy"] == 0.5
    compared = json.loads(call("analyse", made / "other", "--with", made / "other", "--json")[1])
    assert np.allclose(np.array(compared["layers"][0]["similarity_A"])[1, 1], 1)


def test_what_analyse_proposes_truncate_does(made: Path) -> None:
    (made / "analysis.json").write_text(call("analyse", made / "other", "--json")[1])
    code, out, err = call(
        "truncate", made / "other", "--out", made / "out", "--pattern", made / "analysis.json"
    )
    assert (code, err) == (0, "")
    title, first, second, last = out.splitlines()
    assert title.split() == ["layer", "rank", "to", "norm", "left", "out", "spectral"]
    assert first.split()[:3] == [Q0, "2", "1"]
    assert second.split()[:3] == [V0, "2", "2"]
    assert second.split()[4] == "0.00%"
    assert last == f"{made / 'out'}: 34 of 48 parameters"
    adapter = read_adapter(made / "out")
    assert {path: pair.r for path, pair in adapter.pairs.items()} == {Q0: 1, V0: 2}
    assert call("truncate", made / "other", "--out", made / "energy", "--energy", 0.99)[0] == 0
    name = "adapter_model.safetensors"
    assert (made / "energy" / name).read_bytes() == (made / "out" / name).read_bytes()


def test_the_json_of_truncate(made: Path) -> None:
    code, out, _ = call("truncate", made / "adapter", "--out", made / "out", "--rank", 1, "--json")
    content = json.loads(out)
    assert (code, content["kind"], content["version"]) == (0, "loracle rank truncate", 1)
    assert [(layer["r_before"], layer["r"]) for layer in content["layers"]] == [(2, 1), (2, 1)]
    assert all(0 < layer["relative_residual"] < 1 for layer in content["layers"])
    assert (content["parameters_before"], content["parameters"]) == (48, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rank", 2), "error: rank: expected 1 to 1, below the adapter's 2, got 2; choose another"),
        (("--rank", 1, "--energy", 0.9), "error: expected one of --rank, --energy and --pattern; give one"),
        ((), "error: expected one of --rank, --energy and --pattern; give one"),
        (("--energy", 0), "error: share: expected a number above 0 and at most 1, got 0.0; choose another"),
        (("--pattern", "no.json"), "error: no.json: "),
    ],
)
def test_wrong_options_are_one_line(made: Path, arguments: tuple[object, ...], message: str) -> None:
    code, out, err = call("truncate", made / "adapter", "--out", made / "out", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not (made / "out").exists()


def test_wrong_input_is_one_line(made: Path) -> None:
    for arguments in (
        ("analyse", made / "nowhere"),
        ("analyse", made / "adapter", "--energy", 2),
        ("analyse", made / "adapter", "--base", made / "adapter"),
        ("analyse", made / "adapter", "--with", made / "base"),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
