"""Tasks on a disk that is full, fills up, or cannot be written: refused in one line, and all is as before."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from deployments import MERGED, add, content, make_models, record
from export_fixtures import make_adapter
from mounts import FILLING, mounted, skip_unless_mounting

READ_ONLY = 'mount -o remount,ro "$0" || exit 99; '
HASHED = ["sh", "-c", '"$@"; code=$?; (cd "$MOUNTED" && sha256sum *); exit $code', "sh"]
LORACLE = [sys.executable, "-m", "loracle.cli"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`deployment` has the task `french`, linked, and `german`, swappable; both verified."""
    skip_unless_mounting()
    models = make_models(tmp_path_factory.mktemp("models"))
    make_adapter(models / "wide", models / "base", ("q_proj", "o_proj", "up_proj", "down_proj"))
    for name, form in zip(("french", "german"), MERGED, strict=True):
        add(models, models / "deployment", name, form, "mlp")
        record(models / "deployment", name)
    return models


def attempt(models: Path, place: Path, size: int, arguments: list[str], before: str = "") -> tuple[int, str]:
    """Run a command on a copy of the deployment, alone on a disk; its exit code and its error. Nothing may be
    changed by it, but for the file that fills the disk."""
    place.mkdir()
    copy = f'cp {models / "deployment"}/* "$0" || exit 99; '
    command = mounted(place, f"size={size}", [*HASHED, *arguments], copy + before)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    hashes = {line[1]: line[0] for line in lines if len(line) == 2 and line[1] != "filler"}
    names = {line[0] for line in lines if len(line) == 1 and line[0] != "filler"}
    held = content(models / "deployment")
    assert hashes == {name: hashlib.sha256(data).hexdigest() for name, data in held.items()}
    assert names == held.keys()
    return done.returncode, done.stderr


def adding(models: Path, place: Path, form: str) -> list[str]:
    options = ["--model", str(models / "base"), "--adapter", str(models / "wide"), "--form", form]
    return ["tasks", "add", str(place), "dutch", *options]


def disk_bytes(models: Path, spare: int) -> int:
    """A disk that the deployment fills, in pages, but for about `spare` bytes."""
    held = content(models / "deployment").values()
    return sum(-(-len(data) // 4096) * 4096 for data in held) + spare


@pytest.mark.parametrize("form", MERGED)
def test_a_disk_without_room_for_a_task_is_refused(models: Path, tmp_path: Path, form: str) -> None:
    place = tmp_path / "disk"
    code, error = attempt(models, place, disk_bytes(models, 16_384), [*LORACLE, *adding(models, place, form)])
    assert code == 2
    assert error.startswith(f"error: {place}: expected ")
    assert error.endswith("free some space or choose another --out; nothing was written\n")


@pytest.mark.parametrize("form", MERGED)
def test_a_disk_that_fills_up_while_a_task_is_written_leaves_nothing(
    models: Path, tmp_path: Path, form: str
) -> None:
    place = tmp_path / "disk"
    arguments = [sys.executable, "-c", FILLING, *adding(models, place, form)]
    code, error = attempt(models, place, disk_bytes(models, 1 << 20), arguments)
    file = place / ("dutch.onnx" if form == "linked" else "dutch.task.safetensors")
    assert error == (
        f"error: {file}: disk full (No space left on device); free some space, nothing was written\n"
    )
    assert code == 2


@pytest.mark.parametrize("name", ["french", "german"])
@pytest.mark.parametrize("command", ["add", "remove", "rename"])
def test_a_folder_that_cannot_be_written_is_named(
    models: Path, tmp_path: Path, name: str, command: str
) -> None:
    place = tmp_path / "disk"
    form = dict(zip(("french", "german"), MERGED, strict=True))[name]
    arguments = {
        "add": adding(models, place, form),
        "remove": ["tasks", "remove", str(place), name],
        "rename": ["tasks", "rename", str(place), name, "polish"],
    }[command]
    code, error = attempt(models, place, disk_bytes(models, 1 << 20), [*LORACLE, *arguments], READ_ONLY)
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith(f"error: {place}/")
    assert "cannot be written (Read-only file system" in error
