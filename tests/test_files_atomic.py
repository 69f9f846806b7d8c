"""Output is whole or absent: after every failing system call, a full disk, an interrupt."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loracle.files import atomic, output_folder, write_atomic
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
