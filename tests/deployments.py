"""Folders with tasks, for tests: made, recorded as verified, and compared file by file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export_fixtures import make_adapter, make_model

from loracle.export import export
from loracle.export.deployed_tasks import deployed_task
from loracle.export.verified import Verified, write_verified

Content = dict[str, bytes]
MERGED = ("linked", "swappable")
SUFFIXES = {"linked": ".onnx", "swappable": ".task.safetensors", "adapter-inputs": ".onnx_adapter"}


def make_models(root: Path) -> Path:
    """`base`, and the adapters `attention` and `mlp`, of different ranks and targets."""
    base = make_model(root / "base")
    make_adapter(root / "attention", base)
    make_adapter(root / "mlp", base, ("gate_proj",), r=2, seed=2)
    return root


def add(models: Path, out: Path, name: str, form: str, adapter: str = "attention", **options: Any) -> Path:
    """A deployment with one more task."""
    export(models / "base", out, models / adapter, form=form, name=name, **options)
    return out


def content(folder: Path) -> Content:
    """The files' content; what a killed process has left is no file, or is called partial."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith(".partial")
    }


def without(held: Content, *tasks: str) -> Content:
    """What is there beside the files of tasks, and the graph that swappable tasks share."""
    starts = tuple(f"{task}." for task in tasks)
    return {name: data for name, data in held.items() if not name.startswith((*starts, "swappable."))}


def record(deployment: Path, name: str) -> None:
    """Let a task be verified."""
    document = deployed_task(deployment, name).document
    assert document is not None
    check = {"name": "all is well", "figure": "1 check"}
    verified = Verified(document.sha256, "2026-01-02T03:04:05+00:00", (check,), 0.5, 1.0, {"loracle": "0"})
    write_verified(deployment, name, verified)
