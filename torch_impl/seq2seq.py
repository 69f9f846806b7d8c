"""Prompts and completions for a model with an encoder and a decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loracle.reference import DataError

from .batches import Columns
from .data import Completion, Example
from .encoded import EncodedData, EncodingSettings, encode_each


@dataclass(frozen=True)
class TranslatedRow:
    """A source's tokens for the encoder, and a target's, of which each is learned."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    shortened: bool = False

    @property
    def learned(self) -> int:
        """How many tokens a loss is taken on: all of the target."""
        return len(self.labels)

    def columns(self) -> Columns:
        """Return the inputs of a model; the decoder's are the labels, shifted by the model itself."""
        return {"input_ids": self.input_ids, "labels": self.labels}


def encode_translated(tokenizer: Any, examples: Sequence[Example], settings: EncodingSettings) -> EncodedData:
    """Encode prompts as sources and completions as targets, each with the tokenizer's special tokens.

    A source that is too long loses its end; an example whose target is too long is left out.

    Raises:
        DataError: an example has a ``system`` instruction, or none fits.
    """

    def one(example: Example) -> TranslatedRow | None:
        assert isinstance(example, Completion), example
        if example.system is not None:
            raise DataError(
                f"{settings.place(example)}: system: expected none for a model with an encoder, got one; "
                "put the instruction into the prompt"
            )
        target = tuple(tokenizer(text_target=example.completion)["input_ids"])
        whole = tuple(tokenizer(example.prompt)["input_ids"])
        cut = whole
        if len(whole) > settings.max_length:
            cut = tuple(
                tokenizer(example.prompt, truncation=True, max_length=settings.max_length)["input_ids"]
            )
        if not cut or not target or max(len(cut), len(target)) > settings.max_length:
            return None
        return TranslatedRow(cut, target, len(cut) < len(whole))

    return encode_each(examples, one, settings, "completions")
