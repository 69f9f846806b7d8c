"""What a model is for, read from `config.json`: its head, its inputs and outputs, under Optimum's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loracle.reference import ConfigError


@dataclass(frozen=True)
class Task:
    """One kind of head.

    Attributes:
        name: Optimum's word for it.
        auto: the transformers class that builds it from a configuration.
        suffixes: how the class names of `architectures` in `config.json` end.
        outputs: names of the model's outputs, and of the graph's.
        cached: whether the graph has a key-value cache.
        encoded: whether the model has an encoder before its decoder.
    """

    name: str
    auto: str
    suffixes: tuple[str, ...]
    outputs: tuple[str, ...]
    cached: bool = False
    encoded: bool = False

    @property
    def pooled(self) -> bool:
        """Whether there is one answer for each row, whatever its length."""
        return self.name in ("text-classification", "image-classification")


TASKS = (
    Task("text-generation", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), ("logits",), cached=True),
    Task("fill-mask", "AutoModelForMaskedLM", ("ForMaskedLM",), ("logits",)),
    Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
        ("logits",),
    ),
    Task("token-classification", "AutoModelForTokenClassification", ("ForTokenClassification",), ("logits",)),
    Task(
        "question-answering",
        "AutoModelForQuestionAnswering",
        ("ForQuestionAnswering",),
        ("start_logits", "end_logits"),
    ),
    Task("image-classification", "AutoModelForImageClassification", ("ForImageClassification",), ("logits",)),
    Task(
        "text2text-generation",
        "AutoModelForSeq2SeqLM",
        ("ForConditionalGeneration",),
        ("logits",),
        cached=True,
        encoded=True,
    ),
    Task("feature-extraction", "AutoModel", ("Model",), ("last_hidden_state",)),
)


def task_of(config: Mapping[str, Any], source: str) -> Task:
    """Return the task that `architectures` in `config.json` names.

    Raises:
        ConfigError: it names none, or a head that cannot be exported.
    """
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise ConfigError(
            f"{source}: architectures: expected the name of one class, got {named!r}; "
            "save the model with transformers"
        )
    for task in TASKS:
        if named[0].endswith(task.suffixes):
            return task
    raise ConfigError(
        f"{source}: architectures: expected a class whose name ends in one of "
        f"{', '.join(suffix for task in TASKS for suffix in task.suffixes)}, got {named[0]}; "
        "export a model with one of these heads"
    )
