"""Merged weights as ONNX, and the proof that they are what was trained.

`loracle.export.session`, `.growing_session`, `.generation`, `.sampling`, `.streaming` and `.text` run an
exported model without torch; so this package loads its parts on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answers import Answer
    from .deployment import Deployment
    from .exporter import ExportSummary, export
    from .generation import generate, greedy
    from .growing_session import open_decoder
    from .opening import open_session
    from .sampling import Sampling
    from .seq2seq_session import Seq2SeqSession
    from .session import DecoderSession
    from .text import TextModel
    from .verification.report import Check, VerifyReport
    from .verification.verify import verify

_HOMES = {
    "Answer": "answers",
    "Check": "verification.report",
    "DecoderSession": "session",
    "Deployment": "deployment",
    "ExportSummary": "exporter",
    "Sampling": "sampling",
    "Seq2SeqSession": "seq2seq_session",
    "TextModel": "text",
    "VerifyReport": "verification.report",
    "export": "exporter",
    "generate": "generation",
    "greedy": "generation",
    "open_decoder": "growing_session",
    "open_session": "opening",
    "verify": "verification.verify",
}

__all__ = [
    "Answer",
    "Check",
    "DecoderSession",
    "Deployment",
    "ExportSummary",
    "Sampling",
    "Seq2SeqSession",
    "TextModel",
    "VerifyReport",
    "export",
    "generate",
    "greedy",
    "open_decoder",
    "open_session",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
