"""The folder of an interrupted run: found again, guarded against another run, gone after a success."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from refusal import refused

from loracle.files import Adapter, LoraConfig, run_folder
from loracle.files.lock import try_lock
from loracle.reference import ConfigError, FileError
from loracle.torch_impl.checkpoints import Checkpoints, State
from loracle.torch_impl.curve import Curve, Evaluation, Step

RUN = {"seed": 1, "lr": 0.5}


def adapter(value: float) -> Adapter:
    matrices = np.full((1, 2), value, np.float32), np.full((3, 1), value, np.float32)
    return Adapter.from_arrays(LoraConfig(r=1, target_modules=("q_proj",)), {"q_proj": matrices})


def state(steps: int, best: float | None = None) -> State:
    """The state of a run after ``steps`` steps."""
    made = [Step(number, number / 3, 1 / number, 0.1, 2.0) for number in range(1, steps + 1)]
    optimizer = {"q/step": torch.tensor(float(steps)), "q/exp_avg": torch.arange(4.0).reshape(2, 2) / 3}
    kept = None if best is None else adapter(best)
    return State(Curve(made, [Evaluation(1, 0.1, {"accuracy": 0.3})]), adapter(steps), kept, optimizer)


def interrupted(out: Path, *steps: int) -> Checkpoints:
    """Checkpoints of a run that got this far."""
    checkpoints = Checkpoints(out)
    checkpoints.open(RUN, resume=False)
    for step in steps:
        checkpoints.save(state(step))
    checkpoints.close(success=False)
    return checkpoints


@pytest.mark.parametrize("best", [None, 0.5])
def test_a_state_comes_back_whole(tmp_path: Path, best: float | None) -> None:
    checkpoints = interrupted(tmp_path / "out")
    checkpoints.open(RUN, resume=False)
    written = state(3, best)
    checkpoints.save(written)
    read = checkpoints.open(RUN, resume=True)
    assert read is not None
    assert read.curve == written.curve
    for one, other in ((read.adapter, written.adapter), (read.best, written.best)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.config == other.config
            assert np.array_equal(one.pairs["q_proj"].A, other.pairs["q_proj"].A)
    assert set(read.optimizer) == set(written.optimizer)
    for name, value in read.optimizer.items():
        assert value.dtype is torch.float32
        assert torch.equal(value, written.optimizer[name])


def test_the_latest_checkpoint_is_found_and_the_earlier_are_gone(tmp_path: Path) -> None:
    checkpoints = interrupted(tmp_path / "out", 9, 10)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["checkpoint-10", "run.json"]
    read = checkpoints.open(RUN, resume=True)
    assert read is not None
    assert read.curve.done == 10


def test_the_latest_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    """Two are there when the machine stopped between the arrival of one and the removal of the other."""
    checkpoints = interrupted(tmp_path / "out", 10)
    (checkpoints.folder / "checkpoint-9").mkdir()
    read = checkpoints.open(RUN, resume=True)
    assert read is not None
    assert read.curve.done == 10


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    checkpoints = interrupted(tmp_path / "out", 3)
    (checkpoints.folder / ".checkpoint-4.00ff.partial").mkdir()
    (checkpoints.folder / ".run.json.00ff.partial").touch()
    (checkpoints.folder / ".mine.partial").touch()
    checkpoints.open(RUN, resume=True)
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == [".mine.partial", "checkpoint-3", "run.json"]


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


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "curve.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    checkpoints = interrupted(tmp_path / "out", 3)
    (checkpoints.folder / "checkpoint-3" / name).write_bytes(b"{")
    with pytest.raises(FileError, match=name):
        checkpoints.open(RUN, resume=True)


def test_success_removes_everything(tmp_path: Path) -> None:
    checkpoints = interrupted(tmp_path / "out", 3)
    checkpoints.open(RUN, resume=True)
    checkpoints.close(success=True)
    assert not any(tmp_path.iterdir())


def test_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = Checkpoints(tmp_path / "out"), Checkpoints(tmp_path / "out")
    first.open(RUN, resume=False)
    first.save(state(3))
    (first.folder / ".checkpoint-4.00ff.partial").mkdir()  # under way
    before = sorted(first.folder.iterdir())
    message = (
        f"{first.folder}: expected no other run, found one under way; wait for its end or choose "
        "another --out"
    )
    for resume in (False, True):
        refused(partial(second.open, RUN, resume=resume), FileError, message)
    second.close(success=False)
    assert sorted(first.folder.iterdir()) == before
    first.close(success=False)
    read = second.open(RUN, resume=True)
    assert read is not None
    assert read.curve.done == 3
    second.close(success=True)
    assert not any(tmp_path.iterdir())


def test_a_run_that_ends_while_another_begins_is_not_mixed_up_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder goes after it was opened, before it is locked."""
    second = Checkpoints(tmp_path / "out")
    gone: list[Path] = []

    def late(descriptor: int) -> bool | None:
        if not gone:
            second.folder.rmdir()
            gone.append(second.folder)
        return try_lock(descriptor)

    monkeypatch.setattr(run_folder, "try_lock", late)
    assert second.open(RUN, resume=False) is None
    second.save(state(3))
    assert gone
    assert (second.folder / "checkpoint-3").is_dir()


@pytest.mark.parametrize("kind", ["file", "folder of something else"])
def test_what_is_no_folder_of_checkpoints_is_left_alone(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "out.checkpoints"
    if kind == "file":
        place.write_bytes(b"precious")
        said = "cannot be written"
    else:
        (place / "precious").mkdir(parents=True)
        said = "expected checkpoints of a run, got precious; move it away or choose another --out"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileError, match=rf"out\.checkpoints: {said}"):
        Checkpoints(tmp_path / "out").open(RUN, resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_being_removed_is_removed_by_the_next_run(tmp_path: Path) -> None:
    checkpoints = interrupted(tmp_path / "out", 3)
    checkpoints.folder.rename(tmp_path / f".out.checkpoints.{16 * '0'}.partial")
    assert checkpoints.open(RUN, resume=True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoints"]
