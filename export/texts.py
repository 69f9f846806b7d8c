"""The texts on which an exported model is compared with its truth: prompts, or tokens drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loracle.files.config_checks import short
from loracle.reference import ConfigError, DataError

from .text import TextModel

PROMPTS = (
    "The capital of France is",
    "Translate the word 'house' into German:",
    "def mean(values):\n    ",
)

_LENGTHS = (7, 12, 9)
_SEED = 0
_MOST_TOKENS = 10_000_000  # far above any vocabulary


@dataclass(frozen=True)
class Texts:
    """Texts as a model reads them.

    Attributes:
        tokens: of each text.
        types: for each of its tokens the number of the segment that it is in.
        note: what is to be said of them beside a figure; empty where they are prompts.
    """

    tokens: tuple[tuple[int, ...], ...]
    types: tuple[tuple[int, ...], ...]
    note: str = ""


def texts_of(
    folder: Path, config: Mapping[str, Any], prompts: Sequence[str] | None, *, pairs: bool = False
) -> Texts:
    """Texts for the model in `folder`.

    Args:
        folder: where `tokenizer.json` is looked for.
        config: the content of the model's `config.json`.
        prompts: None for our own; without a tokenizer these are tokens drawn from a seed instead.
        pairs: whether each prompt is followed by the next one, as a second segment.

    Raises:
        FileError: prompts are given and there is no tokenizer. DataError: a prompt has no token.
        ConfigError: there is neither a tokenizer nor a `vocab_size`.
    """
    if prompts is None and not (folder / "tokenizer.json").is_file():
        return _drawn(folder, config, pairs=pairs)
    text = TextModel(folder)
    own = PROMPTS if prompts is None else tuple(prompts)
    found = [
        text.encoding(prompt, own[(number + 1) % len(own)] if pairs else None)
        for number, prompt in enumerate(own)
    ]
    for number, encoding in enumerate(found, 1):
        if not encoding.ids:
            raise DataError(f"prompt {number}: expected some text, got no token; leave it out")
    return Texts(tuple(tuple(e.ids) for e in found), tuple(tuple(e.type_ids) for e in found))


def _drawn(folder: Path, config: Mapping[str, Any], *, pairs: bool) -> Texts:
    """Tokens that `config` gives no meaning of their own."""
    size = config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise ConfigError(
            f"{folder}: expected tokenizer.json, or vocab_size in config.json to draw tokens from, got "
            "neither; put the model's tokenizer beside it"
        )
    if size > _MOST_TOKENS:
        raise ConfigError(f"{folder}: vocab_size: expected at most {_MOST_TOKENS}, got {short(size)}")
    special = {value for key, value in config.items() if key.endswith("_token_id") and type(value) is int}
    plain = np.array([token for token in range(size) if token not in special] or [0])
    rng = np.random.default_rng(_SEED)
    tokens = tuple(tuple(rng.choice(plain, length).tolist()) for length in _LENGTHS)
    types = tuple(tuple(int(pairs and 2 * place >= length) for place in range(length)) for length in _LENGTHS)
    return Texts(tokens, types, "tokens drawn from a seed, for there is no tokenizer.json")
