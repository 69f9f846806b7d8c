"""The document of a task: what it was made of, and the hash of what it holds.

It lies in the task's own file, so that there is no index that could disagree with what is there: of a linked
task in its graph's metadata, of a swappable one in the header of its file, of one with adapters as inputs
after the parameters. The task's name is the file's, and not in the document: so a rename is one step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.files import Adapter
from loracle.files.adapter import WEIGHTS_FILE
from loracle.files.json_file import parse_json_object

from .json_fields import COUNT, FLAG, NUMBER, SHA256, Rule, check_fields, is_count, is_set, one_of
from .task_names import SUFFIXES

_VERSION = 1
_REMEDY = "add the task again"
_WRAPPED = "base_layer"
_RULES: Mapping[str, Rule] = {
    "version": one_of(_VERSION),
    "form": one_of(*SUFFIXES),
    "r": Rule(
        lambda value: is_set(value, lambda rank: is_count(rank) and rank > 0), "ranks, sorted and distinct"
    ),
    "lora_alpha": NUMBER,
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "target_modules": Rule(
        lambda value: is_set(value, lambda name: isinstance(name, str) and bool(name)),
        "names of modules, sorted and distinct",
    ),
    "adapter_sha256": SHA256,
    "tensors": COUNT,
    "bytes": COUNT,
    "sha256": SHA256,
}


@dataclass(frozen=True)
class TaskDocument:
    """What a task's file says of the task.

    Attributes:
        form: "linked", "swappable" or "adapter-inputs".
        r: the ranks of its adapter's pairs, sorted and distinct.
        lora_alpha, use_rslora, use_dora: the adapter's own.
        target_modules: the last names of the paths that the adapter has pairs for, sorted and distinct.
        adapter_sha256: of `adapter_model.safetensors`.
        tensors: how many the task brings.
        bytes: of its data: a linked task's data file, a swappable one's file after the header, or A and B of
            all pairs.
        sha256: of these bytes.
    """

    form: str
    r: tuple[int, ...]
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    target_modules: tuple[str, ...]
    adapter_sha256: str
    tensors: int
    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """The fields without the version, as JSON has them."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }


def task_document(form: str, adapter: Adapter, adapter_dir: str | Path) -> dict[str, Any]:
    """What a document says of the adapter; number, bytes and hash of the tensors are added when they are
    written.

    Args:
        form: "linked", "swappable" or "adapter-inputs".
        adapter: read from `adapter_dir`.
    """
    with Path(adapter_dir, WEIGHTS_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "version": _VERSION,
        "form": form,
        "r": sorted({adapter.config.rank_of(path) for path in adapter.pairs}),
        "lora_alpha": adapter.config.lora_alpha,
        "use_rslora": adapter.config.use_rslora,
        "use_dora": adapter.config.use_dora,
        "target_modules": target_names(adapter),
        "adapter_sha256": digest,
    }


def target_names(adapter: Adapter) -> list[str]:
    """The last names of the paths that an adapter has pairs for, sorted and distinct."""
    return sorted({_module_name(path) for path in adapter.pairs})


def parse_document(text: str, source: str) -> TaskDocument:
    """The document that `text` spells.

    Raises FileError, naming `source`, where it is no document, or of another version.
    """
    return read_document(parse_json_object(text.encode("utf-8", "surrogatepass"), source), source)


def read_document(content: Mapping[str, Any], source: str) -> TaskDocument:
    """The document that a JSON object is. Raises FileError, naming `source`, where it is none."""
    check_fields(content, _RULES, source, _REMEDY)
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    del values["version"]
    return TaskDocument(**values)


def document_text(document: Mapping[str, Any], tensors: int, nbytes: int, sha256: str) -> str:
    """A whole document as JSON: `document` says what is known of the adapter."""
    return json.dumps({**document, "tensors": tensors, "bytes": nbytes, "sha256": sha256})


def _module_name(path: str) -> str:
    """The last part of a module's path that is a name: no number, and no wrapper of PEFT's."""
    names = [part for part in path.split(".") if not part.isdigit() and part != _WRAPPED]
    return names[-1] if names else path
