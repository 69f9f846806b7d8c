"""Output is whole or absent: after every failing system call, a full disk, an interrupt."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from refusal import refused

from loracle.files import atomic, output_folder, partial, require_space, write_atomic
from loracle.files.lock import locked, try_lock
from loracle.reference import FileError


def _write_two_files(out: Path) -> None:
    with output_folder(out) as folder:
        (folder / "a").write_bytes(b"first")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_bytes(b"second")


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_whole_at_the_end_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as folder:
        assert folder.parent == out.parent
        assert not list(folder.iterdir())
        (folder / "a").write_bytes(b"first")
        assert not out.exists()
    assert _content(tmp_path) == {"out/a": b"first"}


def test_an_empty_folder_is_accepted_and_a_link_to_one_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    _write_two_files(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "out") == {"a": b"first", "sub/b": b"second"}


def test_the_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    _write_two_files(tmp_path / "out")
    (tmp_path / "ordinary").mkdir()
    expected = stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == expected


@pytest.mark.parametrize("kind", ["file", "full", "dangling", "fifo"])
def test_an_existing_output_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_bytes(b"precious")
    elif kind == "full":
        out.mkdir()
        (out / "x").write_bytes(b"precious")
    elif kind == "fifo":
        os.mkfifo(out)
    else:
        out.symlink_to("missing/folder")
    entered = False
    before = sorted(tmp_path.rglob("*"))
    message = "does not exist" if kind == "dangling" else "exists and is not empty; choose another --out"
    with pytest.raises(FileError, match=message), output_folder(out):
        entered = True
    assert not entered
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(FileError, match=r"missing does not exist"),
        output_folder(tmp_path / "missing" / "out"),
    ):
        pass
    with pytest.raises(FileError, match=r"missing does not exist"):
        write_atomic(tmp_path / "missing" / "file", b"")


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write_while_another_program_does() -> None:
        with output_folder(out) as folder:
            (folder / "a").write_bytes(b"ours")
            out.mkdir()
            (out / "theirs").write_bytes(b"theirs")

    with pytest.raises(FileError, match="exists and is not empty"):
        write_while_another_program_does()
    assert _content(tmp_path) == {"out/theirs": b"theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ValueError("x"), GeneratorExit()])
def test_any_exception_of_the_block_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    def write_and_fail() -> None:
        with output_folder(tmp_path / "out") as folder:
            (folder / "a").write_bytes(b"first")
            raise error

    with pytest.raises(type(error)) as caught:
        write_and_fail()
    assert caught.value is error
    assert not list(tmp_path.iterdir())


@contextmanager
def _failing(
    monkeypatch: pytest.MonkeyPatch, name: str, nth: int, error: BaseException
) -> Iterator[list[int]]:
    """Let the nth call of ``os.<name>`` raise; yield a list that counts the calls."""
    real: Callable[..., Any] = getattr(os, name)
    calls = [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, name, call)
        yield calls


FULL = OSError(errno.ENOSPC, "No space left on device")
DENIED = PermissionError(errno.EACCES, "Permission denied", "somewhere")


@pytest.mark.parametrize(
    ("name", "times"), [("mkdir", 1), ("fsync", 4), ("rename", 1)]
)  # fsync: two files, two folders; a fifth call flushes the parent when all is done
@pytest.mark.parametrize("error", [FULL, DENIED, KeyboardInterrupt()])
def test_each_failing_system_call_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, times: int, error: BaseException
) -> None:
    expected = FileError if isinstance(error, OSError) else KeyboardInterrupt
    for nth in range(1, times + 1):
        with _failing(monkeypatch, name, nth, error) as calls, pytest.raises(expected) as caught:
            _write_two_files(tmp_path / "out")
        assert calls[0] >= nth
        assert not list(tmp_path.iterdir())
        if error is FULL:
            assert "disk full" in str(caught.value)
        if error is DENIED:
            assert "Permission denied somewhere" in str(caught.value)


def test_every_file_and_folder_is_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    monkeypatch.setattr(atomic.os, "rename", rename)
    _write_two_files(tmp_path / "out")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"a", "b", "sub"} <= set(before)
    assert len(before) == 4
    assert after == [tmp_path.name]


def test_a_parent_that_cannot_be_flushed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _failing(monkeypatch, "fsync", 5, OSError(errno.EINVAL, "Invalid argument")) as calls:
        _write_two_files(tmp_path / "out")
    assert calls == [5]
    assert set(_content(tmp_path / "out")) == {"a", "sub/b"}


def test_a_file_is_replaced_in_one_step_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    assert path.read_bytes() == b"old"
    for name, error in (("fsync", FULL), ("replace", DENIED), ("replace", KeyboardInterrupt())):
        expected = FileError if isinstance(error, OSError) else KeyboardInterrupt
        with _failing(monkeypatch, name, 1, error), pytest.raises(expected):
            write_atomic(path, b"new")
        assert _content(tmp_path) == {"file": b"old"}
    write_atomic(path, b"new")
    assert _content(tmp_path) == {"file": b"new"}
    with pytest.raises(FileError, match="got a folder"):
        write_atomic(tmp_path, b"")


LIMITED = """
import resource, signal, sys
from loracle.files import output_folder
from loracle.reference import FileError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    with output_folder(sys.argv[1]) as folder:
        (folder / "small").write_bytes(bytes(1000))
        (folder / "large").write_bytes(bytes(100_000))
except FileError as error:
    print(error)
"""


def test_a_write_that_the_system_cuts_short_leaves_nothing_behind(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", LIMITED, str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "disk full" in done.stdout
    assert not list(tmp_path.iterdir())


ABANDONED = """
import os, signal, sys
from pathlib import Path
from loracle.files import output_folder
from loracle.files.partial import partial_file
final = Path(sys.argv[1])
with output_folder(final) as folder, partial_file(final) as (path, file):
    (folder / "a").write_bytes(b"first")
    file.write(b"first")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["out", "a" * 255])
def test_what_a_killed_process_left_is_removed_by_the_next_with_the_same_output(
    tmp_path: Path, name: str
) -> None:
    out = tmp_path / name[:240]
    subprocess.run([sys.executable, "-c", ABANDONED, str(out)], check=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    write_atomic(tmp_path / "other", b"")
    assert {path.name for path in tmp_path.iterdir()} == {*left, "other"}
    with output_folder(out) as folder:
        assert {path.name for path in tmp_path.iterdir()} == {folder.name, "other"}
    assert {path.name for path in tmp_path.iterdir()} == {out.name, "other"}


def test_a_file_removes_what_was_left_too(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ABANDONED, str(tmp_path / "out")], check=False)
    write_atomic(tmp_path / "out", b"whole")
    assert _content(tmp_path) == {"out": b"whole"}


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write_beside_another() -> None:
        with output_folder(out) as ours, partial.partial_file(out) as (path, _):
            (ours / "a").write_bytes(b"ours")
            with output_folder(out) as theirs:
                (theirs / "a").write_bytes(b"theirs")
            assert path.exists()
            assert (ours / "a").read_bytes() == b"ours"

    message = f"{out}: exists and is not empty; choose another --out or remove it"
    refused(write_beside_another, FileError, message)
    assert _content(tmp_path) == {"out/a": b"theirs"}


@pytest.mark.parametrize("kind", ["link", "fifo", "other name", "short token"])
def test_only_files_and_folders_of_such_a_name_are_removed(tmp_path: Path, kind: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_bytes(b"a")
    path = tmp_path / f".out.{16 * '0'}.partial"
    if kind == "link":
        path.symlink_to("precious")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = tmp_path / (f".outer.{16 * '0'}.partial" if kind == "other name" else ".out.00ff.partial")
        path.mkdir()
    _write_two_files(tmp_path / "out")
    assert os.path.lexists(path)
    assert (tmp_path / "precious" / "a").read_bytes() == b"a"


def test_without_locks_nothing_is_taken_for_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-c", ABANDONED, str(tmp_path / "out")], check=False)
    left = [path.name for path in tmp_path.iterdir()]

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", flock)
    _write_two_files(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *left}
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked", "while it is locked"])
def test_a_new_folder_that_another_process_takes_for_left_behind_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The other process acts between the making of the folder and its locking."""
    real_open, real_lock = os.open, try_lock
    taken: list[str] = []
    descriptors: list[int] = []

    def open_late(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".partial") and not taken and moment == "before it is opened":
            taken.append(path.name)
            os.rmdir(path)
        return real_open(path, *arguments, **options)

    def lock_late(descriptor: int) -> bool | None:
        if not taken and moment != "before it is opened":
            (path,) = tmp_path.iterdir()
            taken.append(path.name)
            if moment == "before it is locked":
                path.rmdir()
            else:
                descriptors.append(real_open(path, os.O_RDONLY))
                assert real_lock(descriptors[0])
        return real_lock(descriptor)

    monkeypatch.setattr(os, "open", open_late)
    monkeypatch.setattr(partial, "try_lock", lock_late)
    with output_folder(tmp_path / "out") as folder:
        assert folder.is_dir()
        assert [folder.name] != taken
    for descriptor in descriptors:
        os.close(descriptor)
    assert len(taken) == 1
    assert (tmp_path / "out").is_dir()


def test_a_folder_that_cannot_be_opened_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.EMFILE, "Too many open files")
    with (
        _failing(monkeypatch, "open", 1, error),
        pytest.raises(FileError, match="Too many open files"),
        output_folder(tmp_path / "out"),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["os.open", "try_lock", "is_at"])
@pytest.mark.parametrize("writer", [partial.partial_folder, partial.partial_file])
def test_ctrl_c_while_it_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Any, call: str
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        monkeypatch.undo()
        assert len(list(tmp_path.iterdir())) == (writer is partial.partial_folder or call != "os.open")
        raise KeyboardInterrupt

    monkeypatch.setattr(f"loracle.files.partial.{call}", interrupted)
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "out"):
        pytest.fail("the block was entered")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_vanishes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parent").mkdir()
    out = tmp_path / "parent" / "out"
    monkeypatch.setattr(atomic, "remove_abandoned", lambda final: final.parent.rmdir())
    message = f"{out}: cannot be written (No such file or directory {out.parent}); nothing was written"
    refused(lambda: _write_two_files(out), FileError, message)


def test_a_lock_is_held_for_its_block_alone(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with locked(tmp_path):
        assert try_lock(descriptor) is False
    assert try_lock(descriptor) is True
    os.close(descriptor)


def test_room_is_asked_for_and_both_numbers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 800, 150))
    require_space(tmp_path, 150)
    message = (
        f"{tmp_path}: expected 151 bytes free, got 150; "
        "free some space or choose another --out; nothing was written"
    )
    refused(lambda: require_space(tmp_path, 151), FileError, message)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    require_space(tmp_path, 1 << 60)
    monkeypatch.undo()
    missing = tmp_path / "missing"
    message = f"{missing}: cannot be read (No such file or directory); choose another --out"
    refused(lambda: require_space(missing, 0), FileError, message)


def test_more_than_any_disk_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=f"expected {1 << 80} bytes free, got [0-9]+; free some space"):
        require_space(tmp_path, 1 << 80)


def test_a_folder_goes_in_one_step_and_what_a_killed_process_leaves_of_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_two_files(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed before it
        partial.discard(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    partial.remove_abandoned(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    partial.discard(tmp_path / "out")  # which is not there
    _write_two_files(tmp_path / "out")
    partial.discard(tmp_path / "out")
    assert not list(tmp_path.iterdir())
