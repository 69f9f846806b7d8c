"""Options of a measurement as they stand in its result."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def options_to_json(options: "DataclassInstance", model: str) -> dict[str, Any]:
    """Return a dataclass of options as JSON values; of files, folders and the model the names alone.

    Without ``out`` and ``resume``, which say nothing of what is measured.
    """
    return {
        name: value.name if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in {**asdict(options), "model": Path(model).name}.items()
        if name not in ("out", "resume")
    }
