"""The checkpoints of an interrupted run: each whole or absent, used only by a run of the same identity."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loracle.files import Adapter, output_folder, read_adapter, write_adapter_files, write_atomic
from loracle.files.atomic import flush_folder, reported
from loracle.files.json_file import read_json_object
from loracle.files.lock import try_lock
from loracle.files.partial import discard, is_at, remove_abandoned
from loracle.files.safetensors_file import SafetensorsFile
from loracle.files.safetensors_writer import write_safetensors
from loracle.reference import ConfigError, FileError

from .arrays import array_of, tensor_of
from .curve import Curve

_IDENTITY = "run.json"
_CURVE = "curve.json"
_OPTIMIZER = "optimizer.safetensors"
_BEST = "best"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"\.(checkpoint-\d+|run\.json)\.[0-9a-f]+\.partial")


@dataclass(frozen=True, eq=False)
class State:
    """Everything that the rest of a run depends on; masks and the order of the data follow from the step.

    Attributes:
        curve: what was measured; its steps are those done.
        adapter: what is trained.
        best: the adapter of ``curve.best``, where that is to be kept and is another step's.
        optimizer: see `loracle.torch_impl.optimizer.AdapterOptimizer.state`.
    """

    curve: Curve
    adapter: Adapter
    best: Adapter | None
    optimizer: Mapping[str, Tensor]


class Checkpoints:
    """The folder ``<out>.checkpoints`` beside a run's output.

    It holds the run's identity in ``run.json`` and folders ``checkpoint-<step>``, which appear and go by a
    rename. It is one run's: from `open` to `close` it is locked.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.name}.checkpoints")
        self._descriptor: int | None = None

    def open(self, identity: Mapping[str, Any], *, resume: bool) -> State | None:
        """Prepare the folder and return the state to go on from, the latest; None to start from the
        beginning.

        Raises:
            ConfigError: the checkpoints are of a run with other options or data; the first difference is
                named.
            FileError: there are checkpoints and ``resume`` is off, the folder is not one of checkpoints, or
                cannot be written, another run is under way there, or a checkpoint cannot be read.
        """
        with reported(self.folder), ExitStack() as undo:
            remove_abandoned(self.folder)
            self._lock()
            undo.callback(self.close, success=False)
            state = self._open(identity, resume=resume)
            undo.pop_all()
            return state

    def _open(self, identity: Mapping[str, Any], *, resume: bool) -> State | None:
        self._remove_unfinished()
        found = self._all()
        if not found:
            others = sorted({path.name for path in self.folder.iterdir()} - {_IDENTITY})
            if others:
                raise FileError(
                    f"{self.folder}: expected checkpoints of a run, got {others[0]}; move it away or choose "
                    "another --out"
                )
            write_atomic(self.folder / _IDENTITY, json.dumps(identity, indent=2).encode())
            return None
        if not resume:
            raise FileError(
                f"{self.folder}: expected no checkpoints of an earlier run, got {found[-1].name}; "
                "resume that run, or remove the folder"
            )
        self._check_identity(identity)
        state = _read(found[-1])
        for old in found[:-1]:
            discard(old)
        return state

    def save(self, state: State) -> None:
        """Write the state, and remove the earlier ones.

        Raises:
            FileError: it cannot be written; the earlier ones stay.
        """
        earlier = self._all()
        with output_folder(self.folder / f"checkpoint-{state.curve.done}") as folder:
            _write(folder, state)
        for old in earlier:
            discard(old)

    def close(self, *, success: bool) -> None:
        """Remove the folder after a success; else what is unfinished, and a folder without checkpoints."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # what cannot be removed stays
            self._remove_unfinished()
            held = {path.name for path in self.folder.iterdir()}
            if success or held <= {_IDENTITY}:
                discard(self.folder)
        os.close(self._descriptor)
        self._descriptor = None

    def _lock(self) -> None:
        """Make the folder where it is not there, and lock it until `close`."""
        while self._descriptor is None:
            self.folder.mkdir(exist_ok=True)
            flush_folder(self.folder.parent)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            if try_lock(descriptor) is False:
                os.close(descriptor)
                raise FileError(
                    f"{self.folder}: expected no other run, found one under way; wait for its end or choose "
                    "another --out"
                )
            if is_at(descriptor, self.folder):
                self._descriptor = descriptor
            else:  # another run has ended in between, and removed the folder
                os.close(descriptor)

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def _remove_unfinished(self) -> None:
        """Remove what a process that was killed while it wrote has left."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        path = self.folder / _IDENTITY
        try:
            stored = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FileError(
                f"{path}: expected the options of the run, got: {error}; remove the folder"
            ) from error
        for name, value in identity.items():
            before = stored.get(name) if isinstance(stored, dict) else None
            if before != value:
                raise ConfigError(
                    f"{name}: expected {before!r} as in the run to resume, got {value!r}; "
                    f"give the same, or remove {self.folder}"
                )


def _write(folder: Path, state: State) -> None:
    write_adapter_files(folder, state.adapter)
    if state.best is not None:
        (folder / _BEST).mkdir()
        write_adapter_files(folder / _BEST, state.best)
    write_safetensors(
        folder / _OPTIMIZER, {name: array_of(tensor) for name, tensor in sorted(state.optimizer.items())}, {}
    )
    (folder / _CURVE).write_text(json.dumps(state.curve.to_json()), encoding="utf-8")


def _read(folder: Path) -> State:
    optimizer = SafetensorsFile(folder / _OPTIMIZER)
    best = folder / _BEST
    return State(
        curve=Curve.from_json(read_json_object(folder / _CURVE)),
        adapter=read_adapter(folder),
        best=read_adapter(best) if best.is_dir() else None,
        optimizer={name: tensor_of(optimizer.tensor(name)) for name in optimizer.entries},
    )
