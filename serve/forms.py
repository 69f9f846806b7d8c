"""OpenAI's response objects, for completions and for chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Object = dict[str, Any]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Usage:
    """How many tokens were read and written."""

    prompt: int
    answer: int

    @property
    def body(self) -> Object:
        """The response's object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
        }


@dataclass(frozen=True)
class Head:
    """What all objects of one response begin with."""

    id: str
    created: int
    model: str

    def object(self, kind: str, choices: Sequence[Object], **usage: Object | None) -> Object:
        """A response of some kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            **usage,
        }


class CompletionForm:
    """Texts that are continued."""

    prefix = "cmpl-"
    whole = "text_completion"
    chunk = "text_completion"

    def choice(self, index: int, text: str, reason: FinishReason) -> Object:
        """A whole answer."""
        return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}

    def opening(self, index: int) -> Object | None:
        """What a stream of an answer begins with."""
        return None

    def piece(self, index: int, text: str, reason: FinishReason | None) -> Object:
        """A piece of an answer; the last one has the reason why it ends."""
        return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}


class ChatForm:
    """A chat's next turn."""

    prefix = "chatcmpl-"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: FinishReason) -> Object:
        """A whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def opening(self, index: int) -> Object | None:
        """What a stream of an answer begins with."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, reason: FinishReason | None) -> Object:
        """A piece of an answer; the last one has the reason why it ends."""
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


Form = CompletionForm | ChatForm


def model_object(name: str, created: int) -> Object:
    """A model that there is."""
    return {"id": name, "object": "model", "created": created, "owned_by": "loracle"}
