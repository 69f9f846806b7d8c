"""Examples for a causal language model: the chat template applied, everything but what is learned masked
out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loracle.reference import DataError

from .batches import IGNORED, Columns
from .data import Completion, Conversation, Example, Text, Turn
from .encoded import EncodedData, EncodingSettings, encode_each

__all__ = ["IGNORED", "Encoded", "Tokenizer", "encode", "encode_all", "encode_causal"]


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

    def columns(self) -> Columns:
        """Return the inputs of a model."""
        return {"input_ids": self.input_ids, "labels": self.labels}


def encode_all(tokenizer: Tokenizer, examples: Iterable[Example], max_length: int) -> EncodedData:
    """Encode examples, leaving out those that do not fit; see `encode`.

    Raises:
        DataError: an example cannot be encoded, or none fits.
    """
    return encode_causal(tokenizer, tuple(examples), EncodingSettings(max_length))


def encode_causal(
    tokenizer: Tokenizer, examples: Sequence[Example], settings: EncodingSettings
) -> EncodedData:
    """Encode examples for a causal language model; see `encode`.

    Raises:
        DataError: an example cannot be encoded, or none fits.
    """

    def one(example: Example) -> Encoded | None:
        return encode(tokenizer, example, settings.max_length, settings.place(example))

    return encode_each(examples, one, settings, "prompts and completions")


def encode(
    tokenizer: Tokenizer, example: Example, max_length: int, where: str | None = None
) -> Encoded | None:
    """Return the example's tokens, at most ``max_length``, or None where nothing learnable fits.

    Prompt and completion become a user's and an assistant's turn of the tokenizer's chat template, where it
    has one; else they are joined, and the end-of-sequence token closes the completion. A prompt and what
    follows it are tokenized apart, as they are when a model answers. An assistant's turn is learned up to
    its end-of-sequence token.

    An example that is too long is shortened where that costs least: a prompt loses its end, so that the
    completion and the template around the prompt stay whole; conversations and texts lose their end.

    Raises:
        DataError: a form needs a chat template that is missing or that rewrites earlier turns; the message
            starts with ``where``, or with the line.
    """
    where = f"line {example.line}" if where is None else where
    if isinstance(example, Completion):
        return _encode_completion(tokenizer, example, max_length, where)
    assert isinstance(example, Text | Conversation), example
    segments = (
        [(example.text + (tokenizer.eos_token or ""), True)]
        if isinstance(example, Text)
        else _chat_segments(tokenizer, example.turns, where)
    )
    whole = _tokens(tokenizer, segments, add_special_tokens=isinstance(example, Text))
    cut = Encoded(whole.input_ids[:max_length], whole.labels[:max_length], len(whole.labels) > max_length)
    return cut if cut.learned else None


def _encode_completion(
    tokenizer: Tokenizer, example: Completion, max_length: int, where: str
) -> Encoded | None:
    prompt = example.prompt
    shortened = False
    while True:
        encoded = _completion_tokens(tokenizer, example, prompt, where, shortened=shortened)
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


def _completion_tokens(
    tokenizer: Tokenizer, example: Completion, prompt: str, where: str, *, shortened: bool
) -> Encoded:
    if tokenizer.chat_template is None:
        if example.system is not None:
            raise DataError(
                f"{where}: system: expected a tokenizer with a chat template, got one without; "
                "put the instruction into the prompt"
            )
        segments = [(prompt, False), (example.completion + (tokenizer.eos_token or ""), True)]
        return _tokens(tokenizer, segments, add_special_tokens=True, shortened=shortened)
    system = () if example.system is None else (Turn("system", example.system),)
    turns = (*system, Turn("user", prompt), Turn("assistant", example.completion))
    return _tokens(tokenizer, _chat_segments(tokenizer, turns, where), shortened=shortened)


def _chat_segments(tokenizer: Tokenizer, turns: tuple[Turn, ...], where: str) -> list[tuple[str, bool]]:
    """Split the rendered conversation into what is given and what is learned, in turn."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: messages: expected a tokenizer with a chat template, got one without; "
            "use prompt and completion"
        )
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    segments: list[tuple[str, bool]] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        opened = _rendered(tokenizer, messages[:index], where, add_generation_prompt=True)
        closed = _rendered(tokenizer, messages[: index + 1], where, add_generation_prompt=False)
        if not opened.startswith(done) or not closed.startswith(opened):
            raise DataError(
                f"{where}: expected a chat template that only appends, got one that rewrites earlier "
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
    tokenizer: Tokenizer, messages: list[dict[str, str]], where: str, *, add_generation_prompt: bool
) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except TemplateError as error:
        raise DataError(f"{where}: expected turns that the chat template takes, got: {error}") from error


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
