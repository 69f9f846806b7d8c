"""The small files that travel with a model's weights: configuration, tokenizer, chat template."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .contained import require_contained
from .json_file import check_regular_file

CONFIG_FILE = "config.json"
TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Those of ``SIDECARS`` that are one tokenizer, and belong together."""

SIDECARS: tuple[str, ...] = (
    CONFIG_FILE,
    "generation_config.json",
    *TOKENIZER_FILES,
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
"""Every file name that is carried along. Code (``*.py``) and pickles are not."""


def resized_tokenizer(
    adapter_dir: str | os.PathLike[str] | None, config: Mapping[str, object], base: Mapping[str, object]
) -> str | os.PathLike[str] | None:
    """Return the adapter's folder where the tokenizer in it is the merged model's; None elsewhere.

    It is where the merged model's ``config.json`` has another ``vocab_size`` than the base's: the base's
    tokenizer does not know all of its tokens then.
    """
    if adapter_dir is None or config.get("vocab_size") == base.get("vocab_size"):
        return None
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return adapter_dir if any(os.path.lexists(Path(adapter_dir) / name) for name in known) else None


def copy_sidecars(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    exclude: tuple[str, ...] = (),
    tokenizer_dir: str | os.PathLike[str] | None = None,
) -> tuple[str, ...]:
    """Copy those files of ``SIDECARS`` that ``model_dir`` has into ``out_dir``; return their names.

    A symbolic link is followed within the model's folder, and into the ``blobs`` folder of the hub's cache;
    one that leads anywhere else is refused, so that a downloaded folder cannot draw other files into the
    output.

    Args:
        exclude: names that are not copied.
        tokenizer_dir: a folder whose ``TOKENIZER_FILES`` take the place of the model's.

    Raises:
        FileError: a file is no regular file, leads out of the folder, or cannot be read.
        OSError: ``out_dir`` cannot be written, or has the file already.
    """
    model, target = Path(model_dir), Path(out_dir)
    tokenizer = model if tokenizer_dir is None else Path(tokenizer_dir)
    copied = []
    for name in SIDECARS:
        source = tokenizer if name in TOKENIZER_FILES else model
        if name in exclude or not os.path.lexists(source / name):
            continue
        check_regular_file(source / name)
        require_contained(source, name)
        with (source / name).open("rb") as reader, (target / name).open("xb") as writer:
            shutil.copyfileobj(reader, writer)
        copied.append(name)
    return tuple(copied)


def sidecar_bytes(model_dir: str | os.PathLike[str]) -> int:
    """Return the bytes that `copy_sidecars` writes of ``model_dir``'s files, as far as they can be read."""
    total = 0
    for name in SIDECARS:
        with suppress(OSError):
            total += os.stat(Path(model_dir) / name).st_size
    return total


def config_bytes(config: dict[str, object]) -> bytes:
    """Return a ``config.json`` as transformers formats it."""
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
