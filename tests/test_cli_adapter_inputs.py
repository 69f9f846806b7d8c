"""An unmerged adapter as a user meets it: exported with its cost named, listed, run and removed."""

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
    make_adapter(root / "two", root / "base", ("gate_proj",), r=2, seed=2)
    return root


def call(*arguments: object) -> str:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


def add(made: Path, out: Path, name: str, adapter: str, *options: str) -> str:
    given = ("--model", made / "base", "--adapter", made / adapter, "--out", out)
    return call("export", *given, "--form", "adapter-inputs", "--name", name, *options)


def tokens(*arguments: object) -> list[int]:
    answers = json.loads(call("run", *arguments, "--prompt", "hello", "--max-new-tokens", 6, "--json"))
    found: list[int] = answers["answers"][0]["tokens"]
    return found


def test_the_cost_is_named_in_words_and_numbers(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = add(made, out, "french", "one").splitlines()
    nodes = int(lines[0].removeprefix(f"{out}: ").split()[0])
    assert ", 0 of them merged, " in lines[0]
    assert lines[1] == (
        "runs unmerged: two more products and a sum in each adapted layer; 12 nodes and 1536 multiply-adds "
        f"per token beside the base's {nodes} and 54144 (2.84%)"
    )
    told = json.loads(add(made, out, "german", "two", "--json"))["overhead"]
    assert told == {"nodes": 18, "multiply_adds": 512, "base_multiply_adds": 54144}


def test_a_merged_task_has_no_cost(made: Path, tmp_path: Path) -> None:
    given = ("--model", made / "base", "--adapter", made / "one", "--out", tmp_path / "out")
    told = json.loads(call("export", *given, "--form", "linked", "--name", "french", "--json"))
    assert told["overhead"] is None
    assert "unmerged" not in call(*("export", *given, "--form", "linked", "--name", "german"))


def test_a_task_is_listed_run_and_removed(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    add(made, out, "french", "one")
    add(made, out, "german", "two")
    for adapter, name in (("one", "french"), ("two", "german")):
        call("export", "--model", made / "base", "--adapter", made / adapter, "--out", tmp_path / adapter)
        assert tokens(out, "--name", name) == tokens(tmp_path / adapter)
    listed = json.loads(call("tasks", out, "--json"))["tasks"]
    assert [(task["name"], task["form"], task["r"]) for task in listed] == [
        ("french", "adapter-inputs", [4]),
        ("german", "adapter-inputs", [2]),
    ]
    call("tasks", "rename", out, "german", "polish")
    call("tasks", "remove", out, "french")
    assert [task["name"] for task in json.loads(call("tasks", out, "--json"))["tasks"]] == ["polish"]
    assert tokens(out, "--name", "polish") == tokens(tmp_path / "two")
