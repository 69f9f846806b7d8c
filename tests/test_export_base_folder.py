"""A base model by its folder, or by its name in the hub's cache."""

from pathlib import Path

import pytest

from loracle.export.verification.base_folder import base_folder
from loracle.reference import FileError
from tests.files_fixtures import write_model

REVISION = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with one model, and no hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--somebody--small"
    (repository / "snapshots").mkdir(parents=True)
    write_model(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return tmp_path


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert base_folder(write_model(tmp_path / "model")) == tmp_path / "model"


def test_a_name_is_found_in_the_cache(cache: Path) -> None:
    found = base_folder("somebody/small")
    assert found == cache / "models--somebody--small" / "snapshots" / REVISION


def test_what_is_neither_is_an_error(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"somebody/else: expected a model folder, or a model's name"):
        base_folder("somebody/else")
    with pytest.raises(FileError, match="nothing there"):
        base_folder(tmp_path / "no such folder")
