"""Masked language modelling: texts whose tokens are hidden anew in every epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from loracle.reference import ConfigError

from .batches import IGNORED, Columns
from .data import Example, Text
from .encoded import EncodedData, EncodingSettings, encode_each

_MASK, _RANDOM = 0.8, 0.1
"""Of the chosen tokens, how many become the mask and how many a random token; the rest stay as they are.

Source: BERT, arXiv 1810.04805, section 3.1.
"""

# Last in the seed, and not 0: NumPy's seeds (a, b) and (a, b, 0) draw the same numbers.
_TRAINING, _HELD_OUT = 1, 2


@dataclass(frozen=True)
class MaskableRow:
    """A text's tokens, and which of them may be hidden: all but the special ones."""

    input_ids: tuple[int, ...]
    maskable: tuple[bool, ...]
    shortened: bool = False

    @property
    def learned(self) -> int:
        """How many tokens may be hidden; a loss is taken on a share of them, others in every epoch."""
        return sum(self.maskable)

    def columns(self) -> Columns:
        """Return the inputs of a model, with nothing hidden and nothing to learn."""
        return {"input_ids": self.input_ids, "labels": (IGNORED,) * len(self.input_ids)}


@dataclass(frozen=True)
class MaskedRow:
    """Tokens of which some are hidden, and as many labels: what was hidden, `IGNORED` elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    shortened: bool = False

    @property
    def learned(self) -> int:
        """How many tokens a loss is taken on."""
        return sum(label != IGNORED for label in self.labels)

    def columns(self) -> Columns:
        """Return the inputs of a model."""
        return {"input_ids": self.input_ids, "labels": self.labels}


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden.

    Attributes:
        probability: of a token to be chosen; one is chosen where chance chooses none.
        mask_id: the token that hides another.
        ordinary_ids: the tokens that a random one is drawn from: all but the special ones.
        seed: of all choices.
    """

    probability: float
    mask_id: int
    ordinary_ids: NDArray[np.int64] = field(repr=False)
    seed: int

    @classmethod
    def of(cls, tokenizer: Any, probability: float, seed: int) -> "Masking":
        """Return how tokens of ``tokenizer`` are hidden.

        Raises:
            ConfigError: the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                "task: expected a tokenizer with a mask token for masked-lm, got one without; "
                "choose the task that the model was made for"
            )
        ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        return cls(probability, int(tokenizer.mask_token_id), ordinary, seed)

    def hide(self, row: MaskableRow, *key: int) -> MaskedRow:
        """Return ``row`` with tokens hidden, as ``seed`` and ``key`` decide and nothing else.

        Each token that may be hidden is chosen with `probability`; of the chosen ones 80% become the mask,
        10% a random token, and 10% stay; all of them are learned.
        """
        generator = np.random.default_rng((self.seed, *key))
        ids = np.array(row.input_ids, dtype=np.int64)
        maskable = np.array(row.maskable, dtype=bool)
        chosen = maskable & (generator.random(ids.size) < self.probability)
        fate = generator.random(ids.size)
        others = generator.choice(self.ordinary_ids, ids.size)
        certain = generator.choice(np.flatnonzero(maskable))
        if not chosen.any():
            chosen[certain] = True
        labels = np.where(chosen, ids, IGNORED)
        hidden = np.where(chosen & (fate < _MASK), self.mask_id, ids)
        hidden = np.where(chosen & (fate >= _MASK) & (fate < _MASK + _RANDOM), others, hidden)
        return MaskedRow(tuple(hidden.tolist()), tuple(labels.tolist()), row.shortened)


class MaskedRows(Dataset[MaskedRow]):
    """The rows of each epoch: item (epoch, index) is row ``index`` as it is hidden in that epoch.

    It depends on the masking's seed, the epoch and the index alone, not on what was drawn before: a run that
    is resumed sees the same masks.
    """

    def __init__(self, rows: Sequence[MaskableRow], masking: Masking) -> None:
        self._rows = tuple(rows)
        self._masking = masking

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, draw: tuple[int, int]) -> MaskedRow:
        epoch, index = draw
        return self._masking.hide(self._rows[index], epoch, index, _TRAINING)

    def held_out(self) -> Iterator[MaskedRow]:
        """Yield every row as it is hidden when it is not learned from: always the same."""
        return (self._masking.hide(row, index, _HELD_OUT) for index, row in enumerate(self._rows))


def encode_maskable(tokenizer: Any, examples: Sequence[Example], settings: EncodingSettings) -> EncodedData:
    """Encode `Text` examples with the tokenizer's special tokens; what is too long loses its end.

    Raises:
        DataError: no text fits.
    """
    special = frozenset(tokenizer.all_special_ids)

    def one(example: Example) -> MaskableRow | None:
        assert isinstance(example, Text), example
        whole = tokenizer(example.text)["input_ids"]
        ids = whole
        if len(whole) > settings.max_length:
            ids = tokenizer(example.text, truncation=True, max_length=settings.max_length)["input_ids"]
        row = MaskableRow(tuple(ids), tuple(token not in special for token in ids), len(ids) < len(whole))
        return row if row.learned and len(ids) <= settings.max_length else None

    return encode_each(examples, one, settings, "texts")
