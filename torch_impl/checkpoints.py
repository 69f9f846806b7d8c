"""The checkpoints of an interrupted run: each whole or absent, used only by a run of the same identity."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loracle.files import Adapter, output_folder, read_adapter, write_adapter_files
from loracle.files.atomic import reported
from loracle.files.json_file import read_json_object
from loracle.files.partial import discard
from loracle.files.run_folder import Kept, RunFolder
from loracle.files.safetensors_file import SafetensorsFile
from loracle.files.safetensors_writer import write_safetensors

from .arrays import array_of, tensor_of
from .curve import Curve

_CURVE = "curve.json"
_OPTIMIZER = "optimizer.safetensors"
_BEST = "best"
_KEPT = Kept("checkpoints", r"checkpoint-\d+")


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
    """Folders ``checkpoint-<step>`` in ``<out>.checkpoints`` beside a run's output; see `RunFolder`."""

    def __init__(self, out: Path) -> None:
        self._runs = RunFolder(out, _KEPT)

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self._runs.path

    def open(self, identity: Mapping[str, Any], *, resume: bool) -> State | None:
        """Prepare the folder and return the state to go on from, the latest; None to start from the
        beginning.

        Raises:
            ConfigError, FileError: see `RunFolder.open`; or a checkpoint cannot be read.
        """
        found = self._runs.open(identity, resume=resume)
        if not found:
            return None
        with reported(self.folder), ExitStack() as undo:
            undo.callback(self.close, success=False)
            state = _read(found[-1])
            for old in found[:-1]:
                discard(old)
            undo.pop_all()
            return state

    def save(self, state: State) -> None:
        """Write the state, and remove the earlier ones.

        Raises:
            FileError: it cannot be written; the earlier ones stay.
        """
        earlier = self._runs.held()
        with output_folder(self.folder / f"checkpoint-{state.curve.done}") as folder:
            _write(folder, state)
        for old in earlier:
            discard(old)

    def close(self, *, success: bool) -> None:
        """Remove the folder after a success; else what is unfinished, and a folder without checkpoints."""
        self._runs.close(success=success)


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
