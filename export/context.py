"""How many tokens an exported model takes."""

from __future__ import annotations

from pathlib import Path

from loracle.files.json_file import read_json_object
from loracle.reference import ConfigError, FileError

from .names import GENAI_FILE, model_folder


def context_length(folder: str | Path) -> int | None:
    """Most tokens of one text, `model.context_length` of `genai_config.json`; None where nothing says it.

    Raises FileError where the entry is no positive integer.
    """
    path = model_folder(folder) / GENAI_FILE
    if not path.is_file():
        return None
    model = read_json_object(path).get("model")
    length = model.get("context_length") if isinstance(model, dict) else None
    if length is None:
        return None
    if not isinstance(length, int) or length < 1:
        raise FileError(f"{path}: model.context_length: expected a positive integer, got {length!r}")
    return length


def check_capacity(folder: str | Path, capacity: int) -> None:
    """Raise ConfigError where the model in a folder has not as many positions."""
    context = context_length(folder)
    if context is not None and capacity > context:
        raise ConfigError(
            f"capacity: expected at most the model's context of {context} tokens, got {capacity}"
        )
