"""Dividing examples by what is asked in them, so that the same question is never on two sides."""

import hashlib

from .data import Completion, Conversation, Example, Labelled, Tagged


def question_share(example: Example) -> float:
    """Return a number in [0, 1) that is the question's own: of its SHA-256, white space and case apart."""
    key = "\n".join(" ".join(text.casefold().split()) for text in _asked(example))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2.0**64


def _asked(example: Example) -> tuple[str, ...]:
    match example:
        case Completion():
            return (example.prompt,)
        case Conversation():
            return tuple(turn.content for turn in example.turns if turn.role != "assistant")
        case Labelled():
            return example.text, example.text_pair or ""
        case Tagged():
            return example.tokens
    return (example.text,)
