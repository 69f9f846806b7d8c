"""What `loracle bench` leaves in a folder: `bench.png`, and `bench.json` last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracle.files import write_atomic
from loracle.files.atomic import reported
from loracle.reference import FileError

from .document import document_bytes
from .picture import picture

JSON_FILE, PICTURE_FILE = "bench.json", "bench.png"


def check_folder(folder: Path) -> None:
    """Raise FileError unless results can be written to a folder; it need not exist where its parent does."""
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder}: expected a folder, got a file; choose another --out")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise FileError(f"{folder}: the folder {folder.absolute().parent} does not exist; create it")


def write_results(folder: Path, document: Mapping[str, Any]) -> None:
    """Write both files, each in one step, in the place of what an earlier run has left.

    Raises FileError: the folder cannot be written.
    """
    check_folder(folder)
    drawn = picture(document["rows"], title_of(document))
    with reported(folder):
        folder.mkdir(exist_ok=True)
    write_atomic(folder / PICTURE_FILE, drawn)
    write_atomic(folder / JSON_FILE, document_bytes(document))


def title_of(document: Mapping[str, Any]) -> str:
    """The model, and where it was measured."""
    model = document["model"]
    layers = "" if model["layers"] == model["full_layers"] else f", {model['layers']} layers"
    threads = document["effort"]["threads"]
    where = f"{threads} thread{'s' if threads > 1 else ''}" if document["provider"] == "cpu" else "CUDA"
    return f"{model['name']}{layers}: onnxruntime, {document['dtype']}, {where}"
