"""One prompt on its way to an answer, and what its request hears of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loracle.export.sampling import Sampling
from loracle.export.streaming import AnswerText

from .errors import RequestError
from .forms import FinishReason


@dataclass(frozen=True)
class Piece:
    """One more token has come, and the text that it completes, if any.

    Attributes:
        index: of the prompt in its request.
        text: to be appended.
        reason: why the answer ends here; None where it goes on.
        tokens: of the answer so far.
    """

    index: int
    text: str
    reason: FinishReason | None
    tokens: int


Event = Piece | RequestError


class Row:
    """One prompt.

    The worker alone calls `push` and `fail`; any thread may set `cancelled`.

    Args:
        index: of the prompt in its request.
        task: whose answer it is; None is the base's.
        prompt: its tokens.
        max_tokens: of the answer.
        sampling: how tokens are chosen.
        stop: tokens that end the answer.
        answer: its text, empty.
        send: takes what the request hears.

    Attributes:
        cancelled: nobody waits for the answer any more.
        ended: the answer is whole, or an error has been sent.
    """

    def __init__(
        self,
        index: int,
        task: str | None,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        stop: frozenset[int],
        answer: AnswerText,
        send: Callable[[Event], None],
    ) -> None:
        self.index = index
        self.task = task
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.cancelled = False
        self.ended = False
        self._stop = stop
        self._answer = answer
        self._send = send

    def push(self, token: int) -> None:
        """Take the next token."""
        text = self._answer.push(token)
        count = len(self._answer.tokens)
        reason: FinishReason | None = None
        if self._answer.stopped or token in self._stop:
            reason = "stop"
        elif count == self.max_tokens:
            reason = "length"
        if reason is not None:
            text += self._answer.close()
            self.ended = True
        self._send(Piece(self.index, text, reason, count))

    def fail(self, error: RequestError) -> None:
        """End without an answer, or in the middle of one; nothing happens where it has ended."""
        if not self.ended:
            self.ended = True
            self._send(error)
