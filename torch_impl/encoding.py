"""Examples as token ids with labels: the chat template applied, everything but what is learned masked out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loracle.reference import DataError

from .data import Completion, Example, Text, Turn

IGNORED = -100
"""The label of a token that no loss is taken on, torch's ``ignore_index``."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any
    eos_token: str | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...

    def decode(self, token_ids: list[int]) -> Any: ...


@dataclass(frozen=True)
class Encoded:
    """Token ids and, of the same length, labels: the id itself where it is learned, `IGNORED` elsewhere."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    shortened: bool = False

    @property
    def learned(self) -> int:
        """How many tokens a loss is taken on; the first of a sequence is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class EncodedData:
    """Encoded examples, how many of them were shortened and how many left out to respect ``max_length``."""

    examples: tuple[Encoded, ...]
    shortened: int
    left_out: int


def encode_all(tokenizer: Tokenizer, examples: Iterable[Example], max_length: int) -> EncodedData:
    """Encode examples, leaving out those that do not fit; see `encode`.

    Raises:
        DataError: an example cannot be encoded, or none fits.
    """
    encoded = [encode(tokenizer, example, max_length) for example in examples]
    kept = tuple(one for one in encoded if one is not None)
    if not kept:
        raise DataError(
            f"training data: expected prompts and completions of at most max_length {max_length} tokens, "
            f"got {len(encoded)} examples of which none fits; raise max_length"
        )
    return EncodedData(kept, sum(one.shortened for one in kept), len(encoded) - len(kept))


def encode(tokenizer: Tokenizer, example: Example, max_length: int) -> Encoded | None:
    """Return the example's tokens, at most ``max_length``, or None where nothing learnable fits.

    Prompt and completion become a user's and an assistant's turn of the tokenizer's chat template, where it
    has one; else they are joined, and the end-of-sequence token closes the completion. A prompt and what
    follows it are tokenized apart, as they are when a model answers. An assistant's turn is learned up to
    its end-of-sequence token.

    An example that is too long is shortened where that costs least: a prompt loses its end, so that the
    completion and the template around the prompt stay whole; conversations and texts lose their end.

    Raises:
        DataError: a form needs a chat template that is missing or that rewrites earlier turns; the line is
            named.
    """
    if isinstance(example, Completion):
        return _encode_completion(tokenizer, example, max_length)
    segments = (
        [(example.text + (tokenizer.eos_token or ""), True)]
        if isinstance(example, Text)
        else _chat_segments(tokenizer, example.turns, example.line)
    )
    whole = _tokens(tokenizer, segments, add_special_tokens=isinstance(example, Text))
    cut = Encoded(whole.input_ids[:max_length], whole.labels[:max_length], len(whole.labels) > max_length)
    return cut if cut.learned else None


def collate(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """Stack examples as ``input_ids``, ``attention_mask`` and ``labels``, (batch, length) int64, padded on
    the right.

    The length is the longest example's: rounding it up to a friendlier number costs more than it saves.
    """
    length = max(len(one.input_ids) for one in examples)

    def padded(rows: Iterable[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], dtype=torch.int64)

    return {
        "input_ids": padded((one.input_ids for one in examples), 0),
        "attention_mask": padded(([1] * len(one.input_ids) for one in examples), 0),
        "labels": padded((one.labels for one in examples), IGNORED),
    }


def _encode_completion(tokenizer: Tokenizer, example: Completion, max_length: int) -> Encoded | None:
    prompt = example.prompt
    shortened = False
    while True:
        encoded = _completion_tokens(tokenizer, example, prompt, shortened)
        excess = len(encoded.input_ids) - max_length
        if excess <= 0:
            return encoded if encoded.learned else None
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if excess >= len(ids):
            return None
        # Half of a character that was cut decodes to U+FFFD. The text may tokenize anew to more: hence the
        # loop.
        shorter = str(tokenizer.decode(ids[:-excess])).rstrip("\ufffd")
        if len(shorter) >= len(prompt):
            return None
        prompt, shortened = shorter, True


def _completion_tokens(tokenizer: Tokenizer, example: Completion, prompt: str, shortened: bool) -> Encoded:
    if tokenizer.chat_template is None:
        if example.system is not None:
            raise DataError(
                f"line {example.line}: system: expected a tokenizer with a chat template, got one without; "
                "put the instruction into the prompt"
            )
        segments = [(prompt, False), (example.completion + (tokenizer.eos_token or ""), True)]
        return _tokens(tokenizer, segments, add_special_tokens=True, shortened=shortened)
    system = () if example.system is None else (Turn("system", example.system),)
    turns = (*system, Turn("user", prompt), Turn("assistant", example.completion))
    return _tokens(tokenizer, _chat_segments(tokenizer, turns, example.line), shortened=shortened)


def _chat_segments(tokenizer: Tokenizer, turns: tuple[Turn, ...], line: int) -> list[tuple[str, bool]]:
    """Split the rendered conversation into what is given and what is learned, in turn."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"line {line}: messages: expected a tokenizer with a chat template, got one without; "
            "use prompt and completion"
        )
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    segments: list[tuple[str, bool]] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        opened = _rendered(tokenizer, messages[:index], line, add_generation_prompt=True)
        closed = _rendered(tokenizer, messages[: index + 1], line, add_generation_prompt=False)
        if not opened.startswith(done) or not closed.startswith(opened):
            raise DataError(
                f"line {line}: expected a chat template that only appends, got one that rewrites earlier "
                "turns; give one prompt and completion a line"
            )
        # The model stops at the end-of-sequence token; what the template writes after it opens the next
        # turn.
        end = closed.rfind(tokenizer.eos_token, len(opened)) if tokenizer.eos_token else -1
        if end >= 0:
            closed = closed[: end + len(tokenizer.eos_token or "")]
        segments += [(opened[len(done) :], False), (closed[len(opened) :], True)]
        done = closed
    return segments


def _rendered(
    tokenizer: Tokenizer, messages: list[dict[str, str]], line: int, *, add_generation_prompt: bool
) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except TemplateError as error:
        raise DataError(f"line {line}: expected turns that the chat template takes, got: {error}") from error


def _tokens(
    tokenizer: Tokenizer,
    segments: Iterable[tuple[str, bool]],
    *,
    add_special_tokens: bool = False,
    shortened: bool = False,
) -> Encoded:
    input_ids: list[int] = []
    labels: list[int] = []
    for index, (text, learned) in enumerate(segments):
        ids = tokenizer(text, add_special_tokens=add_special_tokens and index == 0)["input_ids"]
        input_ids += ids
        labels += ids if learned else [IGNORED] * len(ids)
    return Encoded(tuple(input_ids), tuple(labels), shortened)
