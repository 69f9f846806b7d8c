"""The kinds of model that can be trained, and what each needs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from loracle.reference import ConfigError

from .classification import encode_labelled, encode_tagged
from .data import LANGUAGE_FORMS, Example, Form
from .encoded import EncodedData, EncodingSettings
from .encoding import encode_causal
from .loss import completion_loss
from .masking import encode_maskable
from .metrics import language_metrics, score_metrics
from .scores import Scores, cross_entropy, masked_scores, sequence_scores, target_scores, token_scores
from .seq2seq import encode_translated

TaskName = Literal["causal-lm", "masked-lm", "sequence-classification", "token-classification", "seq2seq-lm"]

TASKS: tuple[TaskName, ...] = get_args(TaskName)

Loss = Callable[[nn.Module, Mapping[str, Tensor], Tensor | int | None], Tensor]
"""(model, inputs, items) to the sum of the labels' cross-entropies over ``items``, their number when None."""


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        name: as in `FinetuneOptions.task`.
        auto_class: the class of transformers that loads its models.
        peft_type: PEFT's ``task_type``; None where PEFT has none.
        forms: the forms of an example in a data file.
        classes: whether it tells classes apart, which are collected from the data; then the model's head is
            made for them and trained in full.
        encode: (tokenizer, examples, settings) to rows of tokens.
        loss: see `Loss`.
        measure: (model, batches, device) to metrics by name, ``"loss"`` among them.
    """

    name: TaskName
    auto_class: str
    peft_type: str | None
    forms: tuple[Form, ...]
    classes: bool
    encode: Callable[[Any, Sequence[Example], EncodingSettings], EncodedData]
    loss: Loss
    measure: Callable[[nn.Module, Iterable[Mapping[str, Tensor]], torch.device], dict[str, float]]


def task_named(name: str) -> Task:
    """Return the task called ``name``.

    Raises:
        ConfigError: there is none.
    """
    if name not in _TASKS:
        raise ConfigError(f"task: expected one of {', '.join(_TASKS)}, got {name!r}")
    return _TASKS[name]


def _scored(
    scores: Callable[[nn.Module, Mapping[str, Tensor]], Scores], *metrics: str
) -> tuple[Loss, Callable[..., dict[str, float]]]:
    def loss(model: nn.Module, inputs: Mapping[str, Tensor], items: Tensor | int | None) -> Tensor:
        return cross_entropy(scores(model, inputs), items)

    return loss, partial(score_metrics, scores, metrics)


_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "causal-lm",
            "AutoModelForCausalLM",
            "CAUSAL_LM",
            LANGUAGE_FORMS,
            False,
            encode_causal,
            completion_loss,
            language_metrics,
        ),
        Task(
            "masked-lm",
            "AutoModelForMaskedLM",
            None,
            ("text",),
            False,
            encode_maskable,
            *_scored(masked_scores, "perplexity"),
        ),
        Task(
            "sequence-classification",
            "AutoModelForSequenceClassification",
            "SEQ_CLS",
            ("labelled",),
            True,
            encode_labelled,
            *_scored(sequence_scores, "accuracy", "macro_f1"),
        ),
        Task(
            "token-classification",
            "AutoModelForTokenClassification",
            "TOKEN_CLS",
            ("tagged",),
            True,
            encode_tagged,
            *_scored(token_scores, "accuracy"),
        ),
        Task(
            "seq2seq-lm",
            "AutoModelForSeq2SeqLM",
            "SEQ_2_SEQ_LM",
            ("completion",),
            False,
            encode_translated,
            *_scored(target_scores, "perplexity"),
        ),
    )
}

CAUSAL_LM = _TASKS["causal-lm"]
assert tuple(_TASKS) == TASKS
