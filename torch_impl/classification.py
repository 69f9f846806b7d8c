"""Labelled texts and tagged words as rows of tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loracle.reference import DataError

from .batches import IGNORED, Columns
from .data import Example, Labelled, Tagged
from .encoded import EncodedData, EncodingSettings, encode_each


@dataclass(frozen=True)
class LabelledRow:
    """A text's tokens and the number of its class; ``token_types`` tells a text from its pair, where the
    model wants that."""

    input_ids: tuple[int, ...]
    label: int
    token_types: tuple[int, ...] | None = None
    shortened: bool = False

    @property
    def learned(self) -> int:
        """One prediction."""
        return 1

    def columns(self) -> Columns:
        """Return the inputs of a model."""
        types = {} if self.token_types is None else {"token_type_ids": self.token_types}
        return {"input_ids": self.input_ids, **types, "labels": self.label}


@dataclass(frozen=True)
class TaggedRow:
    """Tokens and, of the same length, labels: a word's class at its first token, `IGNORED` elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    shortened: bool = False

    @property
    def learned(self) -> int:
        """How many words a loss is taken on."""
        return sum(label != IGNORED for label in self.labels)

    def columns(self) -> Columns:
        """Return the inputs of a model."""
        return {"input_ids": self.input_ids, "labels": self.labels}


def encode_labelled(tokenizer: Any, examples: Sequence[Example], settings: EncodingSettings) -> EncodedData:
    """Encode `Labelled` texts with the tokenizer's special tokens; a text and its pair as it joins them.

    What is too long loses its end, of a text and its pair the longer one.

    Raises:
        DataError: a class is not one of ``settings.labels``, or no text fits.
    """
    labels = settings.labels
    assert labels is not None

    def one(example: Example) -> LabelledRow | None:
        assert isinstance(example, Labelled), example
        label = labels.index(example.label, f"{settings.place(example)}: label")
        texts = (example.text,) if example.text_pair is None else (example.text, example.text_pair)
        whole = tokenizer(*texts, return_token_type_ids=settings.token_types)
        cut = whole
        if len(whole["input_ids"]) > settings.max_length:
            cut = tokenizer(
                *texts,
                return_token_type_ids=settings.token_types,
                truncation=True,
                max_length=settings.max_length,
            )
        ids = tuple(cut["input_ids"])
        if not ids or len(ids) > settings.max_length:
            return None
        types = tuple(cut["token_type_ids"]) if settings.token_types else None
        return LabelledRow(ids, label, types, len(ids) < len(whole["input_ids"]))

    return encode_each(examples, one, settings, "texts")


def encode_tagged(tokenizer: Any, examples: Sequence[Example], settings: EncodingSettings) -> EncodedData:
    """Encode `Tagged` words with the tokenizer's special tokens; what is too long loses its last words.

    A word that the tokenizer makes nothing of has no token, and its class is not learned. Byte-level
    tokenizers, for which a space belongs to the word behind it, read each word behind one, as with
    transformers' ``add_prefix_space``; so must they when the model is used.

    Raises:
        DataError: a class is not one of ``settings.labels``, the tokenizer cannot tell which word a token
            belongs to, or no example fits.
    """
    labels = settings.labels
    assert labels is not None
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{settings.source}: expected a fast tokenizer, which tells the word of each token, got "
            f"{type(tokenizer).__name__}; give the model's folder a tokenizer.json"
        )

    spaced = _is_byte_level(tokenizer)

    def one(example: Example) -> TaggedRow | None:
        assert isinstance(example, Tagged), example
        where = settings.place(example)
        classes = [labels.index(tag, f"{where}: tags[{at}]") for at, tag in enumerate(example.tags)]
        words = [f" {token}" for token in example.tokens] if spaced else list(example.tokens)
        whole = tokenizer(words, is_split_into_words=True)
        cut = whole
        if len(whole["input_ids"]) > settings.max_length:
            cut = tokenizer(words, is_split_into_words=True, truncation=True, max_length=settings.max_length)
        row: list[int] = []
        before: int | None = None
        for word in cut.word_ids(0):
            row.append(IGNORED if word is None or word == before else classes[word])
            before = word
        ids = tuple(cut["input_ids"])
        encoded = TaggedRow(ids, tuple(row), len(ids) < len(whole["input_ids"]))
        return encoded if encoded.learned and len(ids) <= settings.max_length else None

    return encode_each(examples, one, settings, "tagged words")


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether a fast tokenizer works on bytes, of which a space before a word is one."""
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    if splitter is None:
        return False
    described = json.loads(splitter.__getstate__())
    parts = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    return any(part["type"] == "ByteLevel" for part in parts)
