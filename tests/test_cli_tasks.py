"""Linked tasks as a user meets them: added, exchanged, verified, run, listed and removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from export_fixtures import make_adapter, make_model
from typer.testing import CliRunner

from loracle.cli.app import app

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    make_model(root / "base")
    make_adapter(root / "one", root / "base")
    make_adapter(root / "two", root / "base", ("gate_proj",), seed=2)
    return root


def call(*arguments: object) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def add(made: Path, out: Path, name: str, adapter: str, *options: str) -> tuple[int, str, str]:
    return call(
        *("export", "--model", made / "base", "--adapter", made / adapter, "--out", out),
        *("--form", "linked", "--name", name, *options),
    )


def tokens(*arguments: object) -> list[int]:
    drawn = ("--temperature", 1, "--max-new-tokens", 6)
    code, out, _ = call("run", *arguments, "--prompt", "hello", *drawn, "--json")
    assert code == 0
    found: list[int] = json.loads(out)["answers"][0]["tokens"]
    return found


def passes(made: Path, candidate: Path, adapter: str) -> bool:
    code, out, _ = call(
        *("verify", candidate, "--model", made / "base", "--adapter", made / adapter, "--json")
    )
    assert code == (0 if json.loads(out)["passed"] else 1)
    return bool(json.loads(out)["passed"])


def test_a_task_is_added_verified_run_exchanged_and_removed(made: Path, tmp_path: Path) -> None:
    deployment = tmp_path / "deployment"
    graph = deployment / "french.onnx"
    assert call("tasks", deployment)[0] == 2
    assert add(made, deployment, "french", "one")[0] == 0
    assert passes(made, graph, "one")
    assert not passes(made, graph, "two")
    base, first = tokens(deployment), tokens(deployment, "--name", "french")
    assert tokens(graph) == first != base
    code, _, err = add(made, deployment, "french", "two")
    assert code == 2
    assert err == f"error: {graph}: the deployment has this task; choose another name or remove it\n"
    assert passes(made, graph, "one")
    assert add(made, deployment, "french", "two", "--replace")[0] == 0
    assert passes(made, graph, "two")
    assert add(made, deployment, "german", "one")[0] == 0
    assert tokens(deployment, "--name", "german") == first
    own = {
        name: sum(path.stat().st_size for path in deployment.glob(f"{name}.*"))
        for name in ("french", "german")
    }
    code, out, _ = call("tasks", deployment, "--json")
    assert json.loads(out) == {"tasks": [{"name": name, "bytes": size} for name, size in own.items()]}
    code, out, _ = call("tasks", deployment)
    assert out == "".join(f"{name}  {size / 1e6:.1f} MB\n" for name, size in own.items())
    assert call("tasks", deployment, "--remove", "french")[:2] == (
        0,
        f"german  {own['german'] / 1e6:.1f} MB\n",
    )
    assert not list(deployment.glob("french*"))
    assert call("tasks", deployment, "--remove", "german")[:2] == (0, "no tasks\n")
    assert tokens(deployment) == base


def test_wrong_input_is_one_line_and_exit_code_2(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert add(made, out, "french", "one")[0] == 0
    run = ("run", out, "--prompt", "hello")
    for arguments, message in (
        (
            ("tasks", made),
            f"{made / 'model.onnx'}: expected a deployment's base, found none; make one with "
            "`loracle export --form linked`",
        ),
        (
            ("tasks", out, "--remove", "german"),
            f"{out / 'german.onnx'}: expected one of the deployment's tasks (french), found none",
        ),
        (
            (*run, "--name", "german"),
            f"{out / 'german.onnx'}: expected one of the deployment's tasks (french), found none",
        ),
        (
            (*run, "--name", "../french"),
            "name: expected letters, digits, '.', '_' and '-' for a task, and not "
            "the base's 'model', got '../french'",
        ),
        (
            ("export", "--model", made / "base", "--out", tmp_path / "new", "--replace"),
            "replace: expected a task to exchange, got the form baked; choose --form linked",
        ),
    ):
        assert call(*arguments) == (2, "", f"error: {message}\n")
