"""The folder in which a run keeps what it has, for as long as it lasts, and one that goes on finds it."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loracle.reference import ConfigError, FileError

from .atomic import flush_folder, reported, write_atomic
from .json_file import read_json_object
from .lock import try_lock
from .partial import discard, is_at, remove_abandoned

_IDENTITY = "run.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """What a `RunFolder` holds.

    Attributes:
        name: of the folder behind the output's own and a full stop; in messages what it holds.
        pattern: of the names of the files or folders in it, of one length or with a number in them.
        run: what a run is called in messages.
    """

    name: str
    pattern: str
    run: str = "run"


class RunFolder:
    """The folder ``<out>.<name>`` beside a run's output.

    It holds the run's identity in ``run.json`` and what `Kept` says, each of which appears and goes by a
    rename. It is one run's: from `open` to `close` it is locked.
    """

    def __init__(self, out: Path, kept: Kept) -> None:
        self.path = out.with_name(f"{out.name}.{kept.name}")
        self._kept = kept
        self._descriptor: int | None = None

    def open(self, identity: Mapping[str, Any], *, resume: bool) -> tuple[Path, ...]:
        """Prepare the folder and return what it holds, see `held`; nothing to start from the beginning.

        Raises:
            ConfigError: it is of a run with other options or data; the first difference is named.
            FileError: it holds something and ``resume`` is off, it is no such folder, or cannot be written,
                or another run is under way there.
        """
        with reported(self.path), ExitStack() as undo:
            remove_abandoned(self.path)
            self._lock()
            undo.callback(self.close, success=False)
            found = self._open(identity, resume=resume)
            undo.pop_all()
            return found

    def held(self) -> tuple[Path, ...]:
        """Return the files or folders that the folder holds, the shorter names first, then by name."""
        if not self.path.is_dir():
            return ()
        found = [path for path in self.path.iterdir() if re.fullmatch(self._kept.pattern, path.name)]
        return tuple(sorted(found, key=lambda path: (len(path.name), path.name)))

    def close(self, *, success: bool) -> None:
        """Remove the folder after a success; else what is unfinished, and a folder that holds nothing."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # what cannot be removed stays
            self._remove_unfinished()
            names = {path.name for path in self.path.iterdir()}
            if success or names <= {_IDENTITY}:
                discard(self.path)
        os.close(self._descriptor)
        self._descriptor = None

    def _open(self, identity: Mapping[str, Any], *, resume: bool) -> tuple[Path, ...]:
        self._remove_unfinished()
        found, kept = self.held(), self._kept
        if not found:
            others = sorted({path.name for path in self.path.iterdir()} - {_IDENTITY})
            if others:
                raise FileError(
                    f"{self.path}: expected {kept.name} of a {kept.run}, got {others[0]}; move it away or "
                    "choose another --out"
                )
            write_atomic(self.path / _IDENTITY, json.dumps(identity, indent=2).encode())
            return ()
        if not resume:
            raise FileError(
                f"{self.path}: expected no {kept.name} of an earlier {kept.run}, got {found[-1].name}; "
                f"resume that {kept.run}, or remove the folder"
            )
        self._check_identity(identity)
        return found

    def _lock(self) -> None:
        """Make the folder where it is not there, and lock it until `close`."""
        while self._descriptor is None:
            self.path.mkdir(exist_ok=True)
            flush_folder(self.path.parent)
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            if try_lock(descriptor) is False:
                os.close(descriptor)
                raise FileError(
                    f"{self.path}: expected no other run, found one under way; wait for its end or choose "
                    "another --out"
                )
            if is_at(descriptor, self.path):
                self._descriptor = descriptor
            else:  # another run has ended in between, and removed the folder
                os.close(descriptor)

    def _remove_unfinished(self) -> None:
        """Remove what a process that was killed while it wrote has left."""
        unfinished = re.compile(rf"\.({self._kept.pattern}|{re.escape(_IDENTITY)})\.[0-9a-f]+\.partial")
        if self.path.is_dir():
            for path in self.path.iterdir():
                if unfinished.fullmatch(path.name):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        path = self.path / _IDENTITY
        try:
            stored = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FileError(
                f"{path}: expected the options of the {self._kept.run}, got: {error}; remove the folder"
            ) from error
        for name, value in identity.items():
            before = stored.get(name) if isinstance(stored, dict) else None
            if before != value:
                raise ConfigError(
                    f"{name}: expected {before!r} as in the {self._kept.run} to resume, got {value!r}; "
                    f"give the same, or remove {self.path}"
                )


def read_record(path: Path, what: str, from_json: Callable[[Mapping[str, Any]], T]) -> T:
    """Return what a file in the folder records.

    Args:
        what: it is the record of, in messages.
        from_json: makes it of the file's object; KeyError and TypeError say that it is none.

    Raises:
        FileError: it cannot be read, or is none.
    """
    try:
        return from_json(read_json_object(path))
    except (KeyError, TypeError) as error:
        raise FileError(f"{path}: expected the record of {what}, got {error}; remove the file") from None


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write a record into the folder, whole. Raises FileError where it cannot be written."""
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())
