"""A model's folder in the user's cache: made once, there whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .wheels import sha256

PROVENANCE = "provenance.json"


def cached_model(folder: Path, source: Mapping[str, str], make: Callable[[Path, Path], None]) -> Path:
    """Return ``folder``, which ``make`` has filled on the first call.

    It holds what ``make`` wrote and ``provenance.json``: the origin, and the size and SHA-256 of each file.
    Later calls compare origin and sizes, and make the folder anew where one differs.

    Args:
        folder: where the model lies; its parents are made.
        source: the pinned origin, such as a requirement and a digest.
        make: called as ``make(made, scratch)``: it makes the folder ``made`` and writes the model there. The
            folder ``scratch`` is its own, for what it downloads. Both are removed when it raises.
    """
    if is_whole(folder, source):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made, scratch = Path(temporary) / folder.name, Path(temporary) / "scratch"
        scratch.mkdir()
        make(made, scratch)
        write_provenance(made, source)
        put(made, folder, source)
    return folder


def is_whole(folder: Path, source: Mapping[str, str]) -> bool:
    """Say whether ``folder`` is a finished model of this origin, by names and sizes."""
    try:
        record = json.loads((folder / PROVENANCE).read_text("utf-8"))
        files: dict[str, dict[str, Any]] = record["files"]
        sizes = {name: file["bytes"] for name, file in files.items()}
        same_source = all(record[key] == value for key, value in source.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return same_source and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()
    )


def write_provenance(folder: Path, source: Mapping[str, str]) -> None:
    """Write ``provenance.json`` beside the files of ``folder``."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())
    }
    (folder / PROVENANCE).write_text(json.dumps({**source, "files": files}, indent=2) + "\n", "utf-8")


def put(made: Path, folder: Path, source: Mapping[str, str]) -> None:
    """Move ``made`` to ``folder``; what lies there is damaged, unless another process was quicker."""
    if is_whole(folder, source):
        return
    if folder.exists():
        shutil.rmtree(folder)
    made.replace(folder)
