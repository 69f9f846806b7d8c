"""Tasks as a user meets them: added, verified, run, listed, exchanged, renamed and removed, in each form."""

from __future__ import annotations

import importlib.resources
import json
import os
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from deployments import MERGED, SUFFIXES, content, make_models
from task_fixtures import tiny_bert, write_words_model
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.files import Adapter, LoraConfig, LoraPair, write_adapter

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("tasks"))


def call(*arguments: object) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def export(made: Path, out: Path, name: str, form: str, adapter: str, *options: str) -> tuple[int, str, str]:
    return call(
        *("export", "--model", made / "base", "--adapter", made / adapter, "--out", out),
        *("--form", form, "--name", name, *options),
    )


def add(made: Path, out: Path, name: str, form: str, adapter: str, *options: str) -> tuple[int, str, str]:
    return call(
        *("tasks", "add", out, name, "--model", made / "base", "--adapter", made / adapter),
        *("--form", form, *options),
    )


def tokens(*arguments: object) -> list[int]:
    drawn = ("--temperature", 1, "--max-new-tokens", 6)
    code, out, _ = call("run", *arguments, "--prompt", "hello", *drawn, "--json")
    assert code == 0
    found: list[int] = json.loads(out)["answers"][0]["tokens"]
    return found


def passes(made: Path, deployment: Path, name: str, adapter: str, *options: str) -> bool:
    code, out, _ = call(
        *("verify", deployment, "--name", name, "--model", made / "base", "--adapter", made / adapter),
        *("--json", *options),
    )
    assert code == (0 if json.loads(out)["passed"] else 1)
    return bool(json.loads(out)["passed"])


def rows(deployment: Path) -> list[list[str]]:
    """The cells of the table that is printed, without what did not fit into a line."""
    code, out, _ = call("tasks", deployment)
    assert code == 0
    lines = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    return [[cell.strip() for cell in cells] for cells in lines if cells[0].strip()]


@pytest.mark.parametrize("form", MERGED)
def test_a_task_is_added_verified_run_exchanged_renamed_and_removed(
    made: Path, tmp_path: Path, form: str
) -> None:
    deployment = tmp_path / "deployment"
    file = deployment / f"french{SUFFIXES[form]}"
    assert export(made, deployment, "french", form, "attention")[0] == 0
    assert passes(made, deployment, "french", "attention")
    assert not passes(made, deployment, "french", "mlp")
    base, first = tokens(deployment), tokens(deployment, "--name", "french")
    assert first != base
    code, _, err = add(made, deployment, "french", form, "mlp")
    assert (code, err) == (
        2,
        f"error: {file}: the deployment has this task; choose another name or remove it\n",
    )
    assert add(made, deployment, "french", form, "mlp", "--replace")[0] == 0
    assert passes(made, deployment, "french", "mlp")
    assert add(made, deployment, "german", form, "attention")[0] == 0
    assert tokens(deployment, "--name", "german") == first
    assert call("tasks", "rename", deployment, "german", "dutch") == (0, "", "")
    assert tokens(deployment, "--name", "dutch") == first
    assert [(row[0], row[1]) for row in rows(deployment)] == [("dutch", form), ("french", form)]
    assert call("tasks", "remove", deployment, "french") == (0, "", "")
    assert not list(deployment.glob("french*"))
    assert call("tasks", "remove", deployment, "dutch") == (0, "", "")
    assert call("tasks", deployment) == (0, "no tasks\n", "")
    assert tokens(deployment) == base


def test_the_list_tells_what_a_task_is_of_and_whether_it_was_verified(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(made, out, "french", "linked", "attention")
    add(made, out, "german", "swappable", "mlp")
    found = json.loads(call("tasks", out, "--json")[1])
    hashes = {task["name"]: task["sha256"][:12] for task in found["tasks"]}
    sizes = {
        task["name"]: f"{sum(file['bytes'] for file in task['files']) / 1e6:.1f}" for task in found["tasks"]
    }
    unverified = [
        ["french", "linked", "4", "q_proj, v_proj", sizes["french"], hashes["french"], "no"],
        ["german", "swappable", "2", "gate_proj", sizes["german"], hashes["german"], "no"],
    ]
    assert rows(out) == unverified
    assert passes(made, out, "german", "mlp")
    assert rows(out) == unverified
    assert passes(made, out, "german", "mlp", "--record")
    german = rows(out)[1]
    assert german[:-1] == unverified[1][:-1]
    assert german[-1].startswith("20")
    assert not passes(made, out, "german", "attention", "--record")
    assert rows(out) == unverified


def test_json_is_what_the_printed_schema_says(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(made, out, "french", "swappable", "attention")
    passes(made, out, "french", "attention", "--record")
    code, schema, _ = call("tasks", "schema")
    assert code == 0
    kept = importlib.resources.files("loracle.export") / "schemas" / "deployment.schema.json"
    assert schema == kept.read_text("utf-8")
    manifest = json.loads(call("tasks", out, "--json")[1])
    jsonschema.Draft202012Validator(json.loads(schema)).validate(manifest)
    assert manifest["tasks"][0]["verified"]["sha256"] == manifest["tasks"][0]["sha256"]


def test_options_may_stand_before_the_folder(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "out", "french", "linked", "attention")
    expected = call("tasks", tmp_path / "out", "--json")
    assert expected[0] == 0
    assert call("tasks", "--json", tmp_path / "out") == expected
    assert call("tasks", "list", tmp_path / "out", "--json") == expected


def test_a_folder_that_is_called_like_a_command_is_reached_by_its_path(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(made, tmp_path / "add", "french", "linked", "attention")
    monkeypatch.chdir(tmp_path)
    assert call("tasks", "add", "--json")[0] == 2
    assert json.loads(call("tasks", f".{os.sep}add", "--json")[1])["tasks"][0]["name"] == "french"


def test_help_names_the_commands() -> None:
    for arguments in (("tasks", "--help"), ("tasks",)):
        out = call(*arguments)[1]
        assert all(command in out for command in ("FOLDER", "list", "add", "remove", "rename", "schema"))


def test_the_form_of_adapters_as_inputs_is_added_and_run_too(made: Path, tmp_path: Path) -> None:
    for form in ("linked", "adapter-inputs"):
        assert export(made, tmp_path / form, "french", form, "attention")[0] == 0
        assert add(made, tmp_path / form, "german", form, "mlp")[0] == 0
    for name in ("french", "german"):
        expected = tokens(tmp_path / "linked", "--name", name)
        assert tokens(tmp_path / "adapter-inputs", "--name", name) == expected
    assert [row[1] for row in rows(tmp_path / "adapter-inputs")] == ["adapter-inputs"] * 2


def test_a_classifiers_task_is_run_in_each_form(tmp_path: Path) -> None:
    base = write_words_model(tmp_path / "base", tiny_bert("BertForSequenceClassification", num_labels=3))
    rng = np.random.default_rng(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=("query",), task_type=None)
    factors = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 16), (16, 2)) * 2)
    pairs = {
        f"bert.encoder.layer.{layer}.attention.self.query": LoraPair(next(factors), next(factors), 2.0)
        for layer in range(2)
    }
    write_adapter(tmp_path / "attention", Adapter(config, pairs))
    answers = {}
    for form in MERGED:
        assert export(tmp_path, tmp_path / form, "french", form, "attention")[0] == 0
        run = ("run", tmp_path / form, "--prompt", "cab", "--prompt", "a bad cab", "--json")
        code, answers[form], _ = call(*run, "--name", "french")
        assert code == 0
        assert call(*run)[1] != answers[form]
    first, other = (
        [[(one["label"], one["score"]) for one in answer] for answer in json.loads(out)["answers"]]
        for out in answers.values()
    )
    assert len(first) == 2
    assert [[label for label, _ in answer] for answer in first] == [
        [label for label, _ in answer] for answer in other
    ]
    scores = [np.array([score for answer in found for _, score in answer]) for found in (first, other)]
    # inputs are not laid out ahead, so that onnxruntime sums in another order
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    assert base.is_dir()


def test_wrong_input_is_one_line_and_exit_code_2(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(made, out, "french", "linked", "attention")[0] == 0
    before = content(out)
    run = ("run", out, "--prompt", "hello")
    verify = ("verify", "--model", made / "base", "--adapter", made / "attention")
    none = f"{made / 'model.onnx'}: expected a deployment's base, found none; make one with `loracle export`"
    unknown = f"{out}: expected one of its tasks (french), got german"
    impossible = (
        "name: expected letters, digits, '.', '_' and '-' for a task, and not 'model' or 'swappable', "
        "got '../french'"
    )
    for arguments, message in (
        (("tasks", made), none),
        (("tasks", made, "--json"), none),
        (
            ("tasks", "add", made, "french", "--model", made / "base", "--adapter", made / "attention"),
            none,
        ),
        (
            (
                *("tasks", "add", out, "german", "--model", made / "base", "--adapter", made / "attention"),
                *("--form", "frozen"),
            ),
            "form: expected one of baked, linked, swappable, adapter-inputs, got 'frozen'",
        ),
        (("tasks", "remove", out, "german"), unknown),
        (("tasks", "rename", out, "german", "dutch"), unknown),
        (("tasks", "rename", out, "french", "../french"), impossible),
        ((*run, "--name", "german"), unknown),
        ((*run, "--name", "../french"), impossible),
        ((*verify, out, "--name", "german"), unknown),
        ((*verify, out, "--name", "../french"), impossible),
        (
            (*verify, out, "--record"),
            "--record: expected a task of a deployment, got none; give its --name",
        ),
        (
            ("export", "--model", made / "base", "--out", tmp_path / "new", "--replace"),
            "replace: expected a task to exchange, got the form baked; choose another --form",
        ),
    ):
        assert call(*arguments) == (2, "", f"error: {message}\n")
    assert content(out) == before
