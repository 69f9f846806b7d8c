"""Tasks are added, removed and renamed whole or not at all, and no other task's file changes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployments import MERGED, SUFFIXES, Content, add, content, make_models, record, without
from exports_at_once import add_beside_another
from refusal import refused

from loracle.export import Deployment, export, open_decoder
from loracle.export.deployed_tasks import deployed_task
from loracle.export.task_changes import add_task, remove_task, rename_task
from loracle.export.task_names import find_task, find_tasks
from loracle.export.verified import record_file
from loracle.files.lock import locked
from loracle.reference import ConfigError, FileError

FORMS = tuple(SUFFIXES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def made(models: Path) -> dict[str, Path]:
    """For each form a deployment with `french` and `german`, both verified."""
    folders = {}
    for form in FORMS:
        folders[form] = add(models, models / form, "french", form)
        add(models, folders[form], "german", form, "mlp")
        for name in ("french", "german"):
            record(folders[form], name)
    return folders


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def deployment(made: dict[str, Path], form: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[form], tmp_path / "deployment"))


def names(deployment: Path) -> list[str]:
    return [name for name, _ in find_tasks(deployment)]


def logits(deployment: Path, name: str) -> bytes:
    """A task's logits for a few tokens."""
    form, path = find_task(deployment, name)
    session = open_decoder(path, 8) if form == "linked" else Deployment(deployment).decoder(name, 8)
    found: np.ndarray[Any, Any] = session.prefill([[5, 6, 7]])
    return found.tobytes()


def test_a_task_is_renamed_with_its_record_and_nothing_else_changes(deployment: Path, form: str) -> None:
    before, expected = content(deployment), logits(deployment, "french")
    rename_task(deployment, "french", "dutch")
    suffix = SUFFIXES[form]
    moved = {"french.verified.json": "dutch.verified.json", f"french{suffix}": f"dutch{suffix}"}
    assert content(deployment) == {moved.get(name, name): data for name, data in before.items()}
    assert names(deployment) == ["dutch", "german"]
    assert logits(deployment, "dutch") == expected
    task = deployed_task(deployment, "dutch")
    assert task.verified is not None
    assert all(path.is_file() for path in task.files)


def test_a_renamed_task_and_a_new_one_of_its_old_name_and_content_are_two(
    models: Path, deployment: Path, form: str
) -> None:
    before = content(deployment)
    expected = logits(deployment, "french")
    rename_task(deployment, "french", "dutch")
    add(models, deployment, "french", form)
    remove_task(deployment, "dutch")
    assert content(deployment) == {name: before[name] for name in before if name != "french.verified.json"}
    assert logits(deployment, "french") == expected
    rename_task(deployment, "french", "dutch")
    add(models, deployment, "french", form)
    remove_task(deployment, "french")
    assert logits(deployment, "dutch") == expected


def test_what_is_removed_leaves_nothing_behind(models: Path, tmp_path: Path, form: str) -> None:
    add(models, tmp_path / "out", "first", form)
    before = content(tmp_path / "out")
    add(models, tmp_path / "out", "second", form, "mlp")
    record(tmp_path / "out", "second")
    graph = "model.onnx" if form == "adapter-inputs" else None  # whose inputs stay
    remove_task(tmp_path / "out", "second")
    after = content(tmp_path / "out")
    assert {name: data for name, data in after.items() if name != graph} == {
        name: data for name, data in before.items() if name != graph
    }
    remove_task(tmp_path / "out", "first")
    assert not find_tasks(tmp_path / "out")
    if form in MERGED:
        export(models / "base", tmp_path / "plain")
        assert content(tmp_path / "out").keys() == content(tmp_path / "plain").keys()


def test_inputs_that_another_task_needs_stay(models: Path, tmp_path: Path) -> None:
    for name, adapter in (("one", "mlp"), ("two", "attention"), ("three", "mlp")):
        add(models, tmp_path / "out", name, "swappable", adapter)
    both, expected = content(tmp_path / "out"), logits(tmp_path / "out", "three")
    remove_task(tmp_path / "out", "one")
    assert content(tmp_path / "out")["swappable.onnx"] == both["swappable.onnx"]
    remove_task(tmp_path / "out", "two")
    assert content(tmp_path / "out")["swappable.onnx"] != both["swappable.onnx"]
    assert logits(tmp_path / "out", "three") == expected


def test_a_task_whose_file_is_malformed_can_be_removed(deployment: Path, form: str) -> None:
    (deployment / f"french{SUFFIXES[form]}").write_bytes(b"nothing")
    remove_task(deployment, "french")
    assert names(deployment) == ["german"]


def test_a_malformed_task_does_not_keep_another(deployment: Path, form: str) -> None:
    (deployment / f"german{SUFFIXES[form]}").write_bytes(b"nothing")
    remove_task(deployment, "french")
    assert names(deployment) == ["german"]


def test_names_that_are_taken_unknown_or_impossible_are_refused(deployment: Path, form: str) -> None:
    before = content(deployment)
    unknown = f"{deployment}: expected one of its tasks (french, german), got dutch"
    taken = (
        f"{deployment / 'german'}{SUFFIXES[form]}: the deployment has this task; choose another name or "
        "remove it"
    )
    impossible = (
        "name: expected letters, digits, '.', '_' and '-' for a task, and not 'model' or 'swappable', got "
    )
    calls: tuple[tuple[Callable[[], None], type[Exception], str], ...] = (
        (lambda: remove_task(deployment, "dutch"), FileError, unknown),
        (lambda: rename_task(deployment, "dutch", "polish"), FileError, unknown),
        (lambda: rename_task(deployment, "french", "german"), FileError, taken),
        (lambda: rename_task(deployment, "french", "a/b"), ConfigError, f"{impossible}'a/b'"),
        (lambda: rename_task(deployment, "../french", "b"), ConfigError, f"{impossible}'../french'"),
        (lambda: rename_task(deployment, "french", "model"), ConfigError, f"{impossible}'model'"),
        (lambda: remove_task(deployment, "swappable"), ConfigError, f"{impossible}'swappable'"),
    )
    for call, kind, message in calls:
        refused(call, kind, message)
    assert content(deployment) == before


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_task_is_added_in_the_dtype_of_its_base(models: Path, tmp_path: Path, dtype: str) -> None:
    export(models / "base", tmp_path / "out", dtype=dtype)
    summary = add_task(tmp_path / "out", "french", models / "base", models / "attention", form="swappable")
    assert summary.dtype == dtype
    assert names(tmp_path / "out") == ["french"]
    refused(
        lambda: add_task(tmp_path, "french", models / "base", models / "attention"),
        FileError,
        f"{tmp_path / 'model.onnx'}: expected a deployment's base, found none; make one with "
        "`loracle export`",
    )


@pytest.mark.parametrize("first", MERGED)
@pytest.mark.parametrize("second", MERGED)
def test_a_task_that_appears_while_another_is_written_is_kept(
    models: Path, tmp_path: Path, first: str, second: str
) -> None:
    """In either form: a name is one task's."""
    deployment = add(models, tmp_path / "deployment", "french", "linked")
    there: list[Content] = []

    def progress(*_: int) -> None:
        if not there:
            add(models, deployment, "german", first, "mlp")
            there.append(content(deployment))

    message = (
        f"{deployment / 'german'}{SUFFIXES[first]}: the deployment has this task; choose another name or "
        "remove it"
    )
    refused(
        lambda: add(models, deployment, "german", second, progress=progress),
        FileError,
        message,
    )
    assert [content(deployment)] == there


def test_a_change_waits_for_the_one_before(deployment: Path, form: str) -> None:
    lock = deployment / ("model.onnx_data" if form == "adapter-inputs" else "model.onnx")
    for work in (
        partial(rename_task, deployment, "german", "dutch"),
        partial(remove_task, deployment, "french"),
    ):
        before = names(deployment)
        thread = threading.Thread(target=work)
        with locked(lock):
            thread.start()
            time.sleep(0.2)
            assert names(deployment) == before
        thread.join(60)
        assert names(deployment) != before


def test_a_task_that_goes_while_a_change_waits_is_not_renamed(deployment: Path, form: str) -> None:
    lock = deployment / ("model.onnx_data" if form == "adapter-inputs" else "model.onnx")
    caught: list[str] = []

    def work() -> None:
        try:
            rename_task(deployment, "french", "dutch")
        except FileError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    with locked(lock):
        thread.start()
        time.sleep(0.2)
        (deployment / f"french{SUFFIXES[form]}").unlink()
    thread.join(60)
    assert caught == [f"{deployment}: expected one of its tasks (german), got french"]


def test_two_processes_add_swappable_tasks_to_one_deployment(models: Path, tmp_path: Path) -> None:
    """Each waits for the other to be writing, so that both are; they need different inputs."""
    deployment = add(models, tmp_path / "deployment", "french", "swappable", "attention")
    before = without(content(deployment))
    expected = logits(deployment, "french")
    context = multiprocessing.get_context("forkserver")
    cache = os.environ["LORACLE_CACHE"]
    processes = [
        context.Process(
            target=add_beside_another,
            args=(models / "base", models / adapter, deployment, name, cache, "swappable"),
        )
        for name, adapter in (("german", "mlp"), ("polish", "attention"))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert without(content(deployment), "german", "polish") == before
    assert names(deployment) == ["french", "german", "polish"]
    assert logits(deployment, "polish") == logits(deployment, "french")
    assert logits(deployment, "german") != expected
    assert not record_file(deployment, "german").exists()
