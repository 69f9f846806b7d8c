"""Rows of tokens stacked into padded batches."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that no loss is taken on, torch's ``ignore_index``."""

Columns = Mapping[str, Sequence[int] | int]
"""One row of a batch by the names of the model's inputs: numbers for each token, or one for the row."""


class Row(Protocol):
    """An encoded example, or several packed into one."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Its tokens."""

    @property
    def shortened(self) -> bool:
        """Whether it was cut to fit."""

    @property
    def learned(self) -> int:
        """How many predictions a loss is taken on."""

    def columns(self) -> Columns:
        """Return what a batch is made of."""


def collate(rows: Sequence[Row], pad_id: int = 0) -> dict[str, Tensor]:
    """Stack rows as int64 tensors by name, (batch, length) padded on the right, or (batch,) where a row has
    one number.

    Each name is padded to its own longest row: ``input_ids`` with ``pad_id``, ``labels`` with `IGNORED`,
    ``position_ids`` with 0, 1, 2, ... (a sequence of its own), others with 0. ``attention_mask`` is 1 for a
    row's tokens and 0 for padding; packed rows, those with ``position_ids``, have none.

    The length is the longest row's: rounding it up to a friendlier number costs more than it saves.
    """
    columns = [row.columns() for row in rows]
    batch: dict[str, Tensor] = {}
    for name in columns[0]:
        values = [column[name] for column in columns]
        batch[name] = torch.tensor(_padded(name, values, pad_id), dtype=torch.int64)
        if name == "input_ids" and "position_ids" not in columns[0]:
            ones = [[1] * len(row.input_ids) for row in rows]
            batch["attention_mask"] = torch.tensor(_padded("attention_mask", ones, 0), dtype=torch.int64)
    return batch


def _padded(name: str, values: Sequence[Sequence[int] | int], pad_id: int) -> list[list[int] | int]:
    length = max((len(value) for value in values if not isinstance(value, int)), default=0)
    filler = {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)
    padded: list[list[int] | int] = []
    for value in values:
        if isinstance(value, int):
            padded.append(value)
        else:
            missing = length - len(value)
            padded.append([*value, *(range(missing) if name == "position_ids" else [filler] * missing)])
    return padded
