"""Text of an answer as its tokens arrive: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from loracle.reference import ConfigError

_REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are no character


class Detokenizer:
    """Turns tokens into text one by one, each in a time that does not grow with the text.

    Special tokens have no text. Bytes that are no whole character yet wait, and are dropped if the answer
    ends there. Tokens are decoded together with those of the piece before them, for many decoders treat the
    first token of a text in a way of its own.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._tokens: list[int] = []  # those of the piece before, then those after it
        self._before = 0  # how many the former are
        self._given = 0  # characters of their text that have been returned

    def push(self, token: int) -> str:
        """Take one more token; return the text that it completes."""
        if token in self._special:
            return ""
        self._tokens.append(token)
        text = self._decode()
        whole = text.rstrip(_REPLACEMENT)
        piece = whole[self._given :]
        if piece:
            self._given = len(whole)
            if len(whole) == len(text):
                self._tokens = self._tokens[self._before :]
                self._before = len(self._tokens)
                self._given = len(self._decode())
        return piece

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=False))


class StopFilter:
    """Lets text through up to the first stop string, and holds back what may become one.

    That is the stop string that is complete first, and of those that end together the longest, however the
    text is cut into pieces.

    Args:
        stops: none of them empty.

    Attributes:
        found: whether a stop string has come.

    Raises ConfigError for an empty stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ConfigError("stop: expected some text, got an empty string")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take more text; return what is no part of a stop string for certain. Nothing follows one."""
        if self.found:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if ends:
            end, length = min(ends)
            self.found, self._held = True, ""
            return text[: end + length]
        held = next(
            (
                length
                for length in range(min(len(text), self._longest - 1), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stops)
            ),
            0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def close(self) -> str:
        """What is still held back: the text has ended, so it is no stop string."""
        rest, self._held = self._held, ""
        return rest


class AnswerText:
    """The text of one answer: `Detokenizer` and `StopFilter` one after the other.

    Attributes:
        tokens: all that came.
        text: what has been returned by `push` and `close`.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._filter = StopFilter(stops)
        self.tokens: list[int] = []
        self.text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._filter.found

    def finish_reason(self, ends: Collection[int]) -> str:
        """Why a whole answer ended: "stop", for a stop string or a token of `ends`; or "length"."""
        return "stop" if self.stopped or self.tokens[-1] in ends else "length"

    def push(self, token: int) -> str:
        """Take one more token; return the text that may be shown."""
        self.tokens.append(token)
        piece = self._filter.push(self._detokenizer.push(token))
        self.text += piece
        return piece

    def close(self) -> str:
        """Return the rest of the text: no token follows."""
        piece = self._filter.close()
        self.text += piece
        return piece
