"""What is deployed is read from the tasks' files, and the manifest is what its schema says."""

from __future__ import annotations

import copy
import hashlib
import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
from deployments import MERGED, SUFFIXES, add, make_models, record
from export_fixtures import make_adapter
from refusal import refused
from safetensors.numpy import load_file, save_file

from loracle.export.deployed_tasks import deployed_task, deployed_tasks, manifest
from loracle.export.verified import record_file
from loracle.files.safetensors_file import SafetensorsFile
from loracle.reference import FileError

TASKS = {"french": "linked", "german": "swappable"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def made(models: Path) -> Path:
    """A linked task `french`, verified, and a swappable one `german`, of another adapter."""
    add(models, models / "deployment", "french", "linked")
    add(models, models / "deployment", "german", "swappable", "mlp")
    record(models / "deployment", "french")
    return models / "deployment"


@pytest.fixture
def deployment(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "deployment"))


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    path = importlib.resources.files("loracle.export") / "schemas" / "deployment.schema.json"
    content = json.loads(path.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


def test_each_task_is_what_it_was_made_of(models: Path, made: Path) -> None:
    french, german = deployed_tasks(made)
    assert [(task.name, task.form) for task in (french, german)] == list(TASKS.items())
    for task, adapter, r, targets in (
        (french, "attention", (4,), ("q_proj", "v_proj")),
        (german, "mlp", (2,), ("gate_proj",)),
    ):
        assert task.document is not None
        assert (task.document.r, task.document.target_modules) == (r, targets)
        data = (models / adapter / "adapter_model.safetensors").read_bytes()
        assert task.document.adapter_sha256 == hashlib.sha256(data).hexdigest()
        assert task.document.lora_alpha == 8
    assert french.verified is not None
    assert german.verified is None


def test_hash_bytes_and_number_are_of_the_data(made: Path) -> None:
    french, german = deployed_tasks(made)
    graph, data = french.files
    assert graph.name == "french.onnx"
    assert german.files == (made / "german.task.safetensors",)
    merged = (made / german.files[0]).read_bytes()
    merged = merged[8 + int.from_bytes(merged[:8], "little") :]
    for task, content, tensors in ((french, data.read_bytes(), 4), (german, merged, 2)):
        assert task.document is not None
        assert task.document.sha256 == hashlib.sha256(content).hexdigest()
        assert (task.document.bytes, task.document.tensors) == (len(content), tensors)
        assert task.nbytes == sum(path.stat().st_size for path in task.files)


def test_the_manifest_is_what_its_schema_says(made: Path, schema: jsonschema.Draft202012Validator) -> None:
    found = json.loads(json.dumps(manifest(made)))
    schema.validate(found)
    assert [(task["name"], task["form"]) for task in found["tasks"]] == list(TASKS.items())
    assert found["base"]["files"] == [
        {"name": name, "bytes": (made / name).stat().st_size} for name in ("model.onnx", "model.onnx_data")
    ]
    files = [file["name"] for task in found["tasks"] for file in task["files"]]
    assert all((made / name).is_file() for name in files)
    assert len(files) == 3
    assert found["tasks"][0]["verified"]["sha256"] == found["tasks"][0]["sha256"]


def test_a_manifest_without_tasks_is_one_too(
    models: Path, tmp_path: Path, schema: jsonschema.Draft202012Validator
) -> None:
    from loracle.export import export

    export(models / "base", tmp_path / "out", dtype="fp16")
    found = manifest(tmp_path / "out")
    schema.validate(json.loads(json.dumps(found)))
    assert (found["base"]["dtype"], found["tasks"]) == ("fp16", [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("base",), None),
        (("base", "dtype"), "float32"),
        (("base", "files"), []),
        (("base", "files", 0, "name"), "../model.onnx"),
        (("base", "files", 0, "bytes"), -1),
        (("tasks", 0, "name"), "a/b"),
        (("tasks", 0, "form"), "baked"),
        (("tasks", 0, "r"), []),
        (("tasks", 0, "r"), [0]),
        (("tasks", 0, "sha256"), "0123"),
        (("tasks", 0, "adapter_sha256"), 1),
        (("tasks", 0, "bytes"), 1.5),
        (("tasks", 0, "files"), []),
        (("tasks", 0, "other"), 1),
        (("tasks", 0, "verified", "sha256"), None),
        (("tasks", 0, "verified", "checks"), []),
        (("tasks", 0, "verified", "largest_error"), "small"),
    ],
)
def test_a_broken_manifest_is_refused_by_the_schema(
    made: Path, schema: jsonschema.Draft202012Validator, path: tuple[Any, ...], value: object
) -> None:
    broken = copy.deepcopy(manifest(made))
    place: Any = json.loads(json.dumps(broken))
    whole = place
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert not schema.is_valid(whole)


def test_every_field_is_required_by_the_schema(made: Path, schema: jsonschema.Draft202012Validator) -> None:
    whole = json.loads(json.dumps(manifest(made)))
    task = whole["tasks"][0]
    for place in (whole, whole["base"], whole["base"]["files"][0], task, task["verified"]):
        for name in list(place):
            value = place.pop(name)
            assert not schema.is_valid(whole), name
            place[name] = value
    schema.validate(whole)


def strip_document(deployment: Path, name: str, form: str) -> None:
    """Let a task be one that says nothing of itself."""
    path = deployment / f"{name}{SUFFIXES[form]}"
    if form == "linked":
        model = onnx.load(path, load_external_data=False)
        (entry,) = [entry for entry in model.metadata_props if entry.key == "loracle.task"]
        model.metadata_props.remove(entry)
        path.write_bytes(model.SerializeToString())
    else:
        save_file(load_file(path), path)


def test_tasks_without_documents_are_listed_with_nulls(
    deployment: Path, schema: jsonschema.Draft202012Validator
) -> None:
    for name, form in TASKS.items():
        strip_document(deployment, name, form)
    found = json.loads(json.dumps(manifest(deployment)))
    schema.validate(found)
    for task in found["tasks"]:
        assert (task["form"], task["sha256"], task["r"], task["verified"]) == (
            *(TASKS[task["name"]], None, None, None),
        )
    # the same data file, but what says so is gone
    assert record_file(deployment, "french").is_file()


@pytest.mark.parametrize(
    ("name", "adapter", "other"), [("french", "attention", "mlp"), ("german", "mlp", "attention")]
)
def test_a_record_of_other_bytes_is_none(
    models: Path, deployment: Path, name: str, adapter: str, other: str
) -> None:
    record(deployment, name)
    kept = record_file(deployment, name).read_bytes()
    add(models, deployment, name, TASKS[name], other, replace=True)
    assert not record_file(deployment, name).exists()
    record_file(deployment, name).write_bytes(kept)
    assert deployed_task(deployment, name).verified is None
    add(models, deployment, name, TASKS[name], adapter, replace=True)
    record_file(deployment, name).write_bytes(kept)
    assert deployed_task(deployment, name).verified is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("sha256", "0"),
        ("time", 1),
        ("checks", []),
        ("checks", [{"name": "a"}]),
        ("checks", [{"name": "a", "figure": 1}]),
        ("largest_error", "0"),
        ("tolerance", True),
        ("versions", []),
        ("other", 1),
    ],
)
def test_a_record_that_is_malformed_is_none(deployment: Path, field: str, value: object) -> None:
    path = record_file(deployment, "french")
    assert deployed_task(deployment, "french").verified is not None
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert deployed_task(deployment, "french").verified is None
    path.write_text("{")
    assert deployed_task(deployment, "french").verified is None


def test_a_document_of_another_form_is_refused(deployment: Path) -> None:
    path = deployment / "german.task.safetensors"
    text = SafetensorsFile(path).metadata["loracle.task"]
    other = text.replace('"swappable"', '"linked"')
    save_file(load_file(path), path, {"loracle.task": other})
    message = f"{path}: form: expected swappable, got linked; add the task again"
    refused(lambda: deployed_tasks(deployment), FileError, message)


def test_a_malformed_document_is_named_with_its_file(deployment: Path) -> None:
    path = deployment / "german.task.safetensors"
    save_file(load_file(path), path, {"loracle.task": "{}"})
    with pytest.raises(FileError, match=r"german\.task\.safetensors \(header\): version: expected 1"):
        manifest(deployment)
    graph = deployment / "french.onnx"
    model = onnx.load(graph, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == "loracle.task":
            entry.value = "[]"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(FileError, match=r"french\.onnx \(metadata\): expected a JSON object"):
        deployed_task(deployment, "french")


def test_a_folder_without_a_base_is_refused(models: Path) -> None:
    message = (
        f"{models / 'model.onnx'}: expected a deployment's base, found none; make one with `loracle export`"
    )
    for call in (deployed_tasks, manifest):
        refused(lambda call=call: call(models), FileError, message)


def test_two_tasks_of_one_name_are_refused(models: Path, deployment: Path) -> None:
    for form, name, held in (("swappable", "french", ".onnx"), ("linked", "german", ".task.safetensors")):
        for replace in (False, True):
            message = (
                f"{deployment / name}{held}: the deployment has this task; choose another name or remove it"
            )
            refused(
                lambda form=form, name=name, replace=replace: add(
                    models, deployment, name, form, replace=replace
                ),
                FileError,
                message,
            )
    shutil.copy(deployment / "german.task.safetensors", deployment / "french.task.safetensors")
    message = (
        f"{deployment}: french: expected one task of this name, found it linked and swappable; remove one of "
        "the files"
    )
    refused(lambda: deployed_tasks(deployment), FileError, message)


def test_adapters_as_inputs_are_listed_too(
    models: Path, tmp_path: Path, schema: jsonschema.Draft202012Validator
) -> None:
    make_adapter(tmp_path / "other", models / "base", r=3)
    add(models, tmp_path / "out", "french", "adapter-inputs")
    (task,) = deployed_tasks(tmp_path / "out")
    schema.validate(json.loads(json.dumps(manifest(tmp_path / "out"))))
    assert (task.form, task.files) == ("adapter-inputs", (tmp_path / "out" / "french.onnx_adapter",))
    assert task.document is not None
    assert (task.document.r, task.document.tensors) == ((4,), 8)


def test_the_forms_of_the_tests_are_the_forms_there_are() -> None:
    from loracle.export import task_names

    assert task_names.SUFFIXES == SUFFIXES
    assert set(MERGED) < set(SUFFIXES)
