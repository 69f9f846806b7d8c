"""Files that a command is asked to write beside its inputs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loracle.reference import ConfigError


def check_new_file(option: str, path: Path, inputs: Iterable[Path]) -> None:
    """Check, before any work is done, that a file can be written without harm to an input.

    Args:
        option: that names `path`.
        inputs: files and folders that the command reads.

    Raises:
        ConfigError: `path` is a folder or in none, is an input, or exists in an input's folder.
    """
    final = Path(os.path.realpath(path))
    if not final.parent.is_dir():
        raise ConfigError(f"{option}: the folder {final.parent} does not exist; create it")
    if final.is_dir():
        raise ConfigError(f"{option}: expected a file, got the folder {path}; choose another name")
    for own in inputs:
        folder = Path(os.path.realpath(own))
        if final == folder or (os.path.lexists(final) and final.is_relative_to(folder)):
            raise ConfigError(
                f"{option}: {path} exists and is, or lies in, the input {own}; choose another name"
            )
