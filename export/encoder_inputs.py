"""The arrays that a model without a cache is fed with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from loracle.reference import ShapeError

from .names import ATTENTION_MASK, INPUT_IDS, PIXEL_VALUES, TOKEN_TYPE_IDS
from .texts import Texts

Feeds = dict[str, np.ndarray[Any, Any]]

_POSITIONS = ("max_position_embeddings", "n_positions")
# These count positions from the number of the padding token on.
FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "data2vec-text")
_IMAGES = 2
_SEED = 0


def text_inputs(texts: Texts, names: Collection[str], config: Mapping[str, Any]) -> list[Feeds]:
    """The texts as one batch, padded on the right; one by one where the model has no padding token.

    Args:
        texts: their tokens.
        names: of the graph's inputs.
        config: the content of the model's `config.json`.

    Raises:
        ShapeError: a text has more tokens than the model has positions.
    """
    limit = positions_of(config)
    for number, tokens in enumerate(texts.tokens, 1):
        if limit is not None and len(tokens) > limit:
            raise ShapeError(
                f"text {number}: expected at most {limit} tokens, as many as the model has positions, "
                f"got {len(tokens)}; shorten it"
            )
    padding = config.get("pad_token_id")
    rows = list(range(len(texts.tokens)))
    if type(padding) is int:
        return [_batch(texts, rows, padding, names)]
    return [_batch(texts, [row], 0, names) for row in rows]


def _batch(texts: Texts, rows: Sequence[int], padding: int, names: Collection[str]) -> Feeds:
    longest = max(len(texts.tokens[row]) for row in rows)
    shape = (len(rows), longest)
    feeds = {
        INPUT_IDS: np.full(shape, padding, np.int64),
        ATTENTION_MASK: np.zeros(shape, np.int64),
        TOKEN_TYPE_IDS: np.zeros(shape, np.int64),
    }
    for place, row in enumerate(rows):
        own = slice(len(texts.tokens[row]))
        feeds[INPUT_IDS][place, own] = texts.tokens[row]
        feeds[ATTENTION_MASK][place, own] = 1
        feeds[TOKEN_TYPE_IDS][place, own] = texts.types[row]
    return {name: array for name, array in feeds.items() if name in names}


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a text may have; None where nothing says it."""
    found = [config[key] for key in _POSITIONS if type(config.get(key)) is int]
    if not found:
        return None
    padding = config.get("pad_token_id")
    if config.get("model_type") in FROM_PADDING and isinstance(padding, int):
        return int(found[0]) - padding - 1
    return int(found[0])


def image_inputs(shape: Sequence[int], dtype: np.dtype[Any], images: int = _IMAGES) -> Feeds:
    """Images whose pixels are drawn from a standard normal distribution.

    Args:
        shape: of one: (channels, height, width).
        dtype: of the pixels.
        images: how many.
    """
    pixels = np.random.default_rng(_SEED).standard_normal((images, *shape))
    return {PIXEL_VALUES: pixels.astype(dtype)}
