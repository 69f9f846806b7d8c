"""The checkpoints of an interrupted run: each whole or absent, used only by a run of the same identity."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracle.files import write_atomic
from loracle.reference import ConfigError, FileError

_IDENTITY = "run.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """The folder ``<out>.checkpoints`` beside a run's output.

    It holds the run's identity in ``run.json`` and folders ``checkpoint-<step>``, which appear by a rename.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.name}.checkpoints")
        self.staging = self.folder / "partial"

    def open(self, identity: Mapping[str, Any], *, resume: bool) -> Path | None:
        """Prepare the folder and return the checkpoint to go on from, the latest; None to start from the
        beginning.

        Raises:
            ConfigError: the checkpoints are of a run with other options or data; the first difference is
                named.
            FileError: there are checkpoints and ``resume`` is off, or the folder is not one of checkpoints.
        """
        latest = self._latest()
        if latest is None:
            self.folder.mkdir(exist_ok=True)
            write_atomic(self.folder / _IDENTITY, json.dumps(identity, indent=2).encode())
            return None
        if not resume:
            raise FileError(
                f"{self.folder}: expected no checkpoints of an earlier run, got {latest.name}; "
                "resume that run, or remove the folder"
            )
        self._check_identity(identity)
        shutil.rmtree(self.staging, ignore_errors=True)
        return latest

    def commit(self, name: str) -> None:
        """Put the finished checkpoint ``name`` from `staging` in its place, and remove the earlier ones."""
        earlier = self._all()
        (self.staging / name).rename(self.folder / name)
        for folder in earlier:
            shutil.rmtree(folder)

    def close(self, *, success: bool) -> None:
        """Remove the folder after a success; else what is unfinished, and a folder without checkpoints."""
        shutil.rmtree(self.staging, ignore_errors=True)
        if success or not self._all():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def _latest(self) -> Path | None:
        return next(reversed(self._all()), None)

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
