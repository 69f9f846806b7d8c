"""The shards of a checkpoint that a graph refers to, told from others by what its metadata say.

A graph that refers to a checkpoint's own files would read whatever lies at its offsets in files that took
their place. So it notes of each shard its bytes and its `fingerprint`
(`loracle.files.safetensors_file.SafetensorsFile`), which are compared whenever the graph is opened here.

Needs NumPy alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from loracle.files.json_file import parse_json_object
from loracle.files.safetensors_file import SafetensorsFile
from loracle.reference import FileError

from .json_fields import COUNT, OBJECT, SHA256, check_fields
from .names import SHARDS_KEY

_REMEDY = "remove the graphs beside it and export again"


def shards_text(folder: Path, names: Iterable[str]) -> str:
    """What a graph notes of these shards in a folder."""
    shards = {name: SafetensorsFile(folder / name) for name in sorted(names)}
    noted = {name: {"bytes": file.nbytes, "sha256": file.fingerprint()} for name, file in shards.items()}
    return json.dumps(noted)


def check_shards(text: str | None, folder: Path, graph: str) -> None:
    """Raise FileError unless the shards are those that a graph noted; nothing is to be checked where it noted
    none.

    Args:
        text: what the graph has under `SHARDS_KEY` in its metadata.
        folder: the graph's.
        graph: what an error calls it.
    """
    if text is None:
        return
    source = f"{graph} ({SHARDS_KEY})"
    for name, noted in parse_json_object(text.encode(), source).items():
        if not OBJECT.fits(noted) or Path(name).name != name or name in ("", ".", ".."):
            raise FileError(f"{source}: expected plain names of shards, got {name[:80]!r}; {_REMEDY}")
        check_fields(noted, {"bytes": COUNT, "sha256": SHA256}, f"{source}: {name}", _REMEDY)
        path = folder / name
        if os.path.islink(path):
            raise FileError(f"{path}: expected a file, got a link, which runtimes do not follow; {_REMEDY}")
        file = SafetensorsFile(path)
        if (file.nbytes, file.fingerprint()) != (noted["bytes"], noted["sha256"]):
            raise FileError(
                f"{path}: expected the shard that {graph} was made of, got another: its tensors are not the "
                f"base's; put the shard back, or {_REMEDY}"
            )
