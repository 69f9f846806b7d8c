"""A batch of prompts as arrays, checked and padded to one length, and of what follows them, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loracle.reference import DataError, ShapeError

Array = np.ndarray[Any, Any]


def padded(
    prompts: Sequence[Sequence[int] | Array],
    batch: int,
    longest: int | None,
    vocabulary: int,
    *,
    left: bool,
    remedy: str,
) -> tuple[Array, Array]:
    """Prompts as tokens and mask (batch, length), int64; where the mask is 0 the token is 0.

    Args:
        prompts: for each row its tokens, at least one.
        batch: how many there must be.
        longest: most tokens of one; None where any number will do.
        vocabulary: how many tokens there are.
        left: whether shorter prompts are padded on the left.
        remedy: what to do about one that is too long or empty.

    Raises:
        ShapeError: another number of prompts, an empty one, or one that is too long.
        DataError: a token that the model does not have.
    """
    if len(prompts) != batch:
        raise ShapeError(
            f"prompts: expected {batch}, one a row, got {len(prompts)}; "
            f"open the session with batch={len(prompts)}"
        )
    lengths = [len(prompt) for prompt in prompts]
    for number, length in enumerate(lengths, 1):
        if length < 1 or (longest is not None and length > longest):
            wanted = "at least 1 token" if longest is None else f"1 to {longest} tokens"
            raise ShapeError(f"prompt {number}: expected {wanted}, got {length}; {remedy}")
    width = max(lengths)
    tokens = np.zeros((batch, width), np.int64)
    mask = np.zeros((batch, width), np.int64)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        place = slice(width - length, None) if left else slice(None, length)
        tokens[row, place] = prompt
        mask[row, place] = 1
    for number, own in enumerate(tokens, 1):
        wrong = own[(own < 0) | (own >= vocabulary)]
        if wrong.size:
            raise DataError(
                f"prompt {number}: expected tokens from 0 to {vocabulary - 1}, got {wrong[0]}; "
                "use the model's own tokenizer"
            )
    return tokens, mask


def require_one_a_row(tokens: Array | Sequence[int], rows: int) -> None:
    """Raise ShapeError unless there are as many tokens as rows."""
    if len(tokens) != rows:
        raise ShapeError(f"tokens: expected {rows}, one a row, got {len(tokens)}")


def require_rows(chosen: Sequence[int], rows: int) -> None:
    """Raise ShapeError where no row is chosen, or one that is not among `rows`."""
    if not chosen or not all(0 <= row < rows for row in chosen):
        raise ShapeError(f"rows: expected some of 0 to {rows - 1}, got {list(chosen)}")
