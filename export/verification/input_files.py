"""Which files are the inputs of a verification: those that it reads, and the tokenizer beside them.

A link among them is followed as far as readers follow one: within the folder, and into the hub's cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from loracle.files import Checkpoint
from loracle.files.adapter import CONFIG_FILE as ADAPTER_CONFIG
from loracle.files.adapter import WEIGHTS_FILE
from loracle.files.checkpoint import INDEX_FILE
from loracle.files.contained import require_contained
from loracle.files.head_config import HEAD_FILE
from loracle.files.sidecar import CONFIG_FILE, TOKENIZER_FILES

from ..external import data_files
from .digests import InputFiles

_ADAPTER_FILES = (ADAPTER_CONFIG, WEIGHTS_FILE, HEAD_FILE)


def checkpoint_files(checkpoint: Checkpoint, role: str, given: str | Path) -> InputFiles:
    """Of a checkpoint: its configuration, index and shards, and its tokenizer."""
    weights = (*([] if checkpoint.index is None else [INDEX_FILE]), *checkpoint.shards)
    names = (CONFIG_FILE, *weights, *_there(checkpoint.dir, TOKENIZER_FILES))
    return InputFiles(role, "checkpoint", str(given), {name: checkpoint.dir / name for name in names})


def adapter_files(given: str | Path) -> InputFiles:
    """Of an adapter: its configuration and weights, and what lies beside them of a head or a tokenizer; or
    the one file that it is."""
    path = Path(given)
    if path.is_file():
        return InputFiles("adapter", "adapter", str(given), {path.name: path})
    names = (*_there(path, _ADAPTER_FILES), *_there(path, TOKENIZER_FILES))
    return InputFiles("adapter", "adapter", str(given), {name: path / name for name in names})


def onnx_files(
    graphs: Mapping[Path, ir.Model], given: str | Path, others: Iterable[Path] = (), kind: str = "onnx"
) -> InputFiles:
    """Of an ONNX model: its graphs, the data files that they name, and the configuration and tokenizer.

    Args:
        graphs: by their files, all of one folder, as `load_graph` returns them.
        others: more files of that folder.
    """
    folder = next(iter(graphs)).parent
    names = dict.fromkeys(path.name for path in (*graphs, *others))
    for model in graphs.values():
        names |= dict.fromkeys(data_files(model))
    names |= dict.fromkeys(_there(folder, (CONFIG_FILE, *TOKENIZER_FILES)))
    return InputFiles("candidate", kind, str(given), {name: folder / name for name in names})


def _there(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    found = tuple(name for name in names if os.path.lexists(folder / name))
    for name in found:
        require_contained(folder, name)
    return found
