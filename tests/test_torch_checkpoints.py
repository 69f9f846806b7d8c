"""The folder of an interrupted run: found again, guarded against another run, gone after a success."""

import json
from pathlib import Path

import pytest

from loracle.reference import ConfigError, FileError
from loracle.torch_impl.checkpoints import Checkpoints

RUN = {"seed": 1, "lr": 0.5}


def interrupted(out: Path, *steps: int) -> Checkpoints:
    """Checkpoints of a run that got this far."""
    checkpoints = Checkpoints(out)
    checkpoints.open(RUN, resume=False)
    for step in steps:
        (checkpoints.staging / f"checkpoint-{step}").mkdir(parents=True)
        checkpoints.commit(f"checkpoint-{step}")
    (checkpoints.staging / "checkpoint-999").mkdir(parents=True)
    checkpoints.close(success=False)
    return checkpoints


def test_the_latest_checkpoint_is_found_and_the_earlier_are_gone(tmp_path: Path) -> None:
    checkpoints = interrupted(tmp_path / "out", 9, 10)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["checkpoint-10", "run.json"]
    assert checkpoints.open(RUN, resume=True) == tmp_path / "out.checkpoints" / "checkpoint-10"


def test_the_latest_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    """Two are there when the machine stopped between the arrival of one and the removal of the other."""
    checkpoints = interrupted(tmp_path / "out", 10)
    (checkpoints.folder / "checkpoint-9").mkdir()
    assert checkpoints.open(RUN, resume=True) == checkpoints.folder / "checkpoint-10"


def test_without_a_checkpoint_a_run_starts_from_the_beginning(tmp_path: Path) -> None:
    checkpoints = interrupted(tmp_path / "out")
    assert not checkpoints.folder.exists()
    assert checkpoints.open(RUN, resume=True) is None


def test_checkpoints_are_not_ignored_silently(tmp_path: Path) -> None:
    checkpoints = interrupted(tmp_path / "out", 3)
    with pytest.raises(FileError, match=r"out\.checkpoints: .*checkpoint-3; resume that run, or remove"):
        checkpoints.open(RUN, resume=False)


def test_another_run_is_told_the_difference(tmp_path: Path) -> None:
    checkpoints = interrupted(tmp_path / "out", 3)
    with pytest.raises(ConfigError, match=r"lr: expected 0\.5 as in the run to resume, got 0\.25"):
        checkpoints.open({**RUN, "lr": 0.25}, resume=True)
    with pytest.raises(ConfigError, match="data_sha256: expected None"):
        checkpoints.open({**RUN, "data_sha256": "0"}, resume=True)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_that_is_none_of_ours_is_not_trusted(tmp_path: Path, content: str | None) -> None:
    checkpoints = interrupted(tmp_path / "out", 3)
    record = checkpoints.folder / "run.json"
    assert json.loads(record.read_text()) == RUN
    record.unlink()
    if content is not None:
        record.write_text(content)
    with pytest.raises((FileError, ConfigError), match=r"out\.checkpoints"):
        checkpoints.open(RUN, resume=True)


def test_success_removes_everything(tmp_path: Path) -> None:
    checkpoints = interrupted(tmp_path / "out", 3)
    checkpoints.open(RUN, resume=True)
    checkpoints.close(success=True)
    assert not any(tmp_path.iterdir())
