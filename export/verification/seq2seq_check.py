"""Whether an encoder and a decoder write what the unmerged model writes: logits and greedy tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loracle.files import Adapter

from ..names import ATTENTION_MASK, INPUT_IDS
from ..prompts import padded
from ..seq2seq_model import open_seq2seq
from ..seq2seq_session import Seq2SeqSession
from ..tasks import Task
from .candidate import Candidate
from .outputs_check import Generated, OutputsResult, judged

_DECODER_INPUT_IDS = "decoder_input_ids"


def answer_with_logits(
    session: Seq2SeqSession, sources: Sequence[Sequence[int]], new_tokens: int
) -> list[Generated]:
    """The greedy targets of a batch of sources, each from the last of the tokens that it begins with on."""
    steps = [session.prefill(sources).astype(np.float64)]
    tokens = [steps[0].argmax(1)]
    for _ in range(new_tokens - 1):
        steps.append(session.decode(tokens[-1]).astype(np.float64))
        tokens.append(steps[-1].argmax(1))
    return [
        Generated((session.start[-1], *map(int, ids)), 1, logits)
        for ids, logits in zip(np.stack(tokens, 1), np.stack(steps, 1), strict=True)
    ]


def check_seq2seq(
    task: Task,
    candidate: Candidate,
    model_dir: str | Path,
    adapter: Adapter | None,
    sources: Sequence[Sequence[int]],
    *,
    config: Mapping[str, Any],
    new_tokens: int,
    trusted: bool = False,
) -> OutputsResult:
    """Run the sources as one batch through onnxruntime and through the float64 model, and compare.

    Raises:
        FileError: the graphs have other inputs or outputs, or nothing says what a target begins with.
        ShapeError: a source has more tokens than the model has positions.
        ConfigError: the model has no positions for so many new tokens.
    """
    from .truth import Float64Model, Truth

    # The last token that is chosen is not read.
    model = open_seq2seq(candidate.folder)
    session = Seq2SeqSession(model, len(model.start) + new_tokens - 1, batch=len(sources))
    runs = answer_with_logits(session, sources, new_tokens)
    start, positions, vocabulary = model.start, model.positions, session.vocabulary
    del session, model
    tokens, mask = padded(sources, len(sources), positions, vocabulary, left=False, remedy="shorten the text")
    targets = np.array([[*start, *run.ids[1:-1]] for run in runs], np.int64)
    feeds = {INPUT_IDS: tokens, ATTENTION_MASK: mask, _DECODER_INPUT_IDS: targets}
    (truth,) = (
        Float64Model(model_dir, adapter, task, config, trusted=trusted)
        .evaluate_feeds(feeds, candidate.options.numpy_dtype)
        .values()
    )
    rows = [Truth(logits[len(start) - 1 :], truth.deviation) for logits in truth.logits]
    return judged(runs, rows, quantised=candidate.options.quantization is not None)
