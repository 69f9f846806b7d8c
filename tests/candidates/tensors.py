"""Reading a checkpoint of one file as torch's tensors, and writing another like it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    return load_file(folder / WEIGHTS)


def write(folder: Path, tensors: Mapping[str, Tensor], like: Path) -> Path:
    """A checkpoint with these tensors, and with all else that `like` has."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    return folder


def copy_tokenizer(folder: Path, like: Path) -> None:
    """What `save_pretrained` of a model leaves out."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (like / name).exists():
            shutil.copy(like / name, folder / name)
