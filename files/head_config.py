"""What a classifier's ``config.json`` says of its head, kept beside an adapter that trained the head."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.reference import FileError

from .config_checks import short
from .json_file import read_json_object

HEAD_FILE = "head.json"
_KEYS = ("architectures", "id2label", "label2id", "pad_token_id", "problem_type")


@dataclass(frozen=True)
class HeadConfig:
    """The head of the model that an adapter was trained in.

    Attributes:
        architecture: the model's class; None where nothing says it.
        labels: the classes in the order of their numbers; None where nothing says them.
        problem_type: as transformers has it, which chooses the loss.
        pad_token_id: of the model, by which some classifiers find a text's last token.
    """

    architecture: str | None = None
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    pad_token_id: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the keys and values that a ``config.json`` has for them."""
        content: dict[str, Any] = {}
        if self.architecture is not None:
            content["architectures"] = [self.architecture]
        if self.labels is not None:
            content["id2label"] = {str(number): label for number, label in enumerate(self.labels)}
            content["label2id"] = {label: number for number, label in enumerate(self.labels)}
        if self.pad_token_id is not None:
            content["pad_token_id"] = self.pad_token_id
        if self.problem_type is not None:
            content["problem_type"] = self.problem_type
        return content


def write_head(folder: Path, head: HeadConfig) -> None:
    """Write `HEAD_FILE` into an existing folder. Raises: OSError."""
    with (folder / HEAD_FILE).open("x", encoding="utf-8") as file:
        file.write(json.dumps(head.to_json(), indent=2, ensure_ascii=False) + "\n")


def read_head(folder: Path, adapter_config: Mapping[str, Any]) -> HeadConfig | None:
    """Return what a folder's `HEAD_FILE` says; without one the class that PEFT's ``auto_mapping`` names.

    Raises:
        FileError: the file is malformed; the message names the key.
    """
    path = folder / HEAD_FILE
    if path.exists():
        return _parse(read_json_object(path), str(path))
    mapping = adapter_config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return HeadConfig(architecture=name) if isinstance(name, str) else None


def labels_of(id2label: object) -> tuple[str, ...] | None:
    """Return the labels of an ``id2label`` in the order of their numbers; None where it is none."""
    if not isinstance(id2label, Mapping) or not id2label:
        return None
    by_number = {str(number): label for number, label in id2label.items()}
    numbers = [str(number) for number in range(len(by_number))]
    if set(by_number) != set(numbers) or not all(isinstance(label, str) for label in by_number.values()):
        return None
    return tuple(by_number[number] for number in numbers)


def _parse(content: Mapping[str, Any], source: str) -> HeadConfig:
    def refuse(key: str, expected: str) -> FileError:
        return FileError(
            f"{source}: {key}: expected {expected}, got {short(content.get(key))}; restore the file"
        )

    for key in content:
        if key not in _KEYS:
            raise refuse(key, f"only the keys {', '.join(_KEYS)}")
    named = content.get("architectures", [None])
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str | None):
        raise refuse("architectures", "the name of one class")
    labels = None
    if "id2label" in content or "label2id" in content:
        labels = labels_of(content.get("id2label"))
        if labels is None:
            raise refuse("id2label", "labels by the numbers 0, 1, ...")
        if content.get("label2id") != {label: number for number, label in enumerate(labels)}:
            raise refuse("label2id", "the numbers of id2label's labels")
    padding, problem = content.get("pad_token_id"), content.get("problem_type")
    if isinstance(padding, bool) or not isinstance(padding, int | None):
        raise refuse("pad_token_id", "an integer")
    if not isinstance(problem, str | None):
        raise refuse("problem_type", "a string")
    return HeadConfig(named[0], labels, problem, padding)
