"""Whether an exported model's outputs are those of the unmerged model, whatever the model is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loracle.files import Adapter

from ..names import PIXEL_VALUES, TOKEN_TYPE_IDS
from ..tasks import Task
from ..texts import Texts, texts_of
from .candidate import Candidate
from .encoder_check import check_encoder
from .outputs_check import OutputsResult
from .outputs_check import check_outputs as check_decoder
from .seq2seq_check import check_seq2seq


def check_outputs(
    task: Task,
    candidate: Candidate,
    model_dir: str | Path,
    adapter: Adapter | None,
    config: Mapping[str, Any],
    prompts: Sequence[str] | None,
    *,
    new_tokens: int,
    trusted: bool = False,
) -> OutputsResult:
    """Run the prompts through onnxruntime and through the unmerged model in float64, and compare.

    Args:
        task: what the model is for.
        candidate: the exported model.
        model_dir: the base model's folder.
        config: the content of the merged model's `config.json`.
        prompts: None for our own (`texts.py`); a model of images gets pixels from a seed.
        new_tokens: how many tokens a model with a cache writes.
        trusted: whether the folder's own modelling code may run.
    """
    inputs = {str(value.name) for value in next(iter(candidate.models.values())).graph.inputs}
    if PIXEL_VALUES in inputs:
        return check_encoder(task, candidate, model_dir, adapter, config, None, trusted=trusted)
    texts = texts_of(candidate.folder, config, prompts, pairs=TOKEN_TYPE_IDS in inputs)
    if task.encoded:
        result = check_seq2seq(
            task,
            candidate,
            model_dir,
            adapter,
            [list(text) for text in texts.tokens],
            config=config,
            new_tokens=new_tokens,
            trusted=trusted,
        )
    elif task.cached:
        tokens = [list(text) for text in texts.tokens]
        result = check_decoder(
            candidate,
            model_dir,
            adapter,
            tokens,
            config=config,
            new_tokens=new_tokens,
            trusted=trusted,
        )
    else:
        result = check_encoder(task, candidate, model_dir, adapter, config, texts, trusted=trusted)
    return _with_note(result, texts)


def _with_note(result: OutputsResult, texts: Texts) -> OutputsResult:
    if not texts.note:
        return result
    checks = tuple(replace(check, figure=f"{check.figure}; {texts.note}") for check in result.checks)
    return replace(result, checks=checks)
