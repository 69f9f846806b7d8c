"""A model's folder is whole or made anew; one that is whole is used as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loracle.demo import cached_model, minilm, smollm2

SOURCE = {"requirement": "tinydemo==1.0", "wheel_sha256": "1" * 64}


def write(made: Path, _: Path) -> None:
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(100))


def finished(folder: Path) -> Path:
    return cached_model.cached_model(folder, SOURCE, write)


def never(made: Path, scratch: Path) -> None:
    raise AssertionError("made a second time")


def _forget_source(folder: Path) -> None:
    record = json.loads((folder / cached_model.PROVENANCE).read_text())
    record["wheel_sha256"] = "0" * 64
    (folder / cached_model.PROVENANCE).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "whole"),
    [
        (lambda folder: None, True),
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(99)), False),
        (lambda folder: (folder / "config.json").unlink(), False),
        (lambda folder: (folder / cached_model.PROVENANCE).unlink(), False),
        (lambda folder: (folder / cached_model.PROVENANCE).write_text("{"), False),
        (lambda folder: (folder / cached_model.PROVENANCE).write_text("[]"), False),
        (lambda folder: (folder / cached_model.PROVENANCE).write_text('{"files": [1]}'), False),
        (_forget_source, False),
    ],
)
def test_is_whole(tmp_path: Path, damage: Callable[[Path], object], whole: bool) -> None:
    folder = finished(tmp_path / "model")
    damage(folder)
    assert cached_model.is_whole(folder, SOURCE) is whole
    if whole:
        assert cached_model.cached_model(folder, SOURCE, never) == folder
    else:
        assert cached_model.is_whole(finished(folder), SOURCE)


def test_the_origin_is_written_beside_the_files(tmp_path: Path) -> None:
    record = json.loads((finished(tmp_path / "model") / cached_model.PROVENANCE).read_text())
    files = record.pop("files")
    assert record == SOURCE
    assert {name: file["bytes"] for name, file in files.items()} == {
        "config.json": 2,
        "model.safetensors": 100,
    }


def test_a_damaged_folder_is_replaced_and_a_whole_one_kept(tmp_path: Path) -> None:
    """Another process may have been quicker while this one was making its own."""
    kept, made = finished(tmp_path / "kept"), finished(tmp_path / "made")
    (made / "new.json").write_text("{}")
    cached_model.put(made, kept, SOURCE)
    assert not (kept / "new.json").exists()
    (kept / "config.json").unlink()
    cached_model.put(made, kept, SOURCE)
    assert (kept / "new.json").exists()
    assert not made.exists()


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(made: Path, scratch: Path) -> None:
        write(made, scratch)
        (scratch / "wheel").write_bytes(b"")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        cached_model.cached_model(tmp_path / "cache/model", SOURCE, fail)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("model", [minilm, smollm2])
def test_a_models_whole_folder_is_used_as_it_is(tmp_path: Path, model: Any) -> None:
    folder = tmp_path / model.FOLDER
    cached_model.cached_model(folder, model.SOURCE, write)
    said: list[str] = []
    assert model.model_folder(tmp_path, said.append) == folder
    assert said == []
