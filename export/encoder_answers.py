"""What a model without a cache says of texts: classes, classes of tokens, or tokens for a mask.

Needs onnxruntime, tokenizers and NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from loracle.files.head_config import labels_of
from loracle.files.json_file import read_json_object
from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import ConfigError, DataError, FileError

from .deployment import Deployment
from .encoder_inputs import text_inputs
from .names import ATTENTION_MASK, LOGITS, model_folder
from .opening import open_session
from .tasks import Task, task_of
from .text import TextModel
from .texts import Texts

Array = np.ndarray[Any, Any]

TOP = 5
_RUNNERS = {
    "question-answering": "ORTModelForQuestionAnswering",
    "feature-extraction": "ORTModelForFeatureExtraction",
    "image-classification": "ORTModelForImageClassification",
}
_OUTSIDE = "O"


@dataclass(frozen=True)
class Scored:
    """A class or a token with its score, a probability unless the model is a regression.

    Attributes:
        label: the class's name, or the token's text.
        place: the characters of the text that it is of, from and to; None for the whole text.
    """

    label: str
    score: float
    place: tuple[int, int] | None = None


def encoder_task(model: Path) -> Task | None:
    """The task of an exported model without a cache; None for other models, and where nothing says it.

    Args:
        model: an exported folder, or one of its graphs.
    """
    path = model_folder(model) / CONFIG_FILE
    if not path.is_file():
        return None
    task = task_of(read_json_object(path), str(path))
    return None if task.cached else task


def answer_texts(
    model: Path, prompts: Sequence[str], *, task: str | None = None, threads: int = 0, top: int = TOP
) -> list[list[Scored]]:
    """What an exported model says of each text; with `task` this task of a `Deployment`.

    Of text-classification all classes, the most likely first; with ``problem_type`` "multi_label_..." each
    has a probability of its own. Of token-classification the class of each token that is not ``O``. Of
    fill-mask the ``top`` tokens for each mask.

    Raises:
        ConfigError: the model has another task. FileError: a file is missing, or labels are.
        DataError: a text has no token, or no mask. ShapeError: a text is longer than the model's positions.
    """
    folder = model_folder(model)
    config = read_json_object(folder / CONFIG_FILE)
    head = task_of(config, str(folder / CONFIG_FILE))
    if head.name in _RUNNERS:
        raise ConfigError(
            f"{model}: expected a model that classifies, fills masks or generates, got {head.name}; run it "
            f"with optimum.onnxruntime.{_RUNNERS[head.name]}"
        )
    text = TextModel(folder)
    encodings = [text.encoding(prompt) for prompt in prompts]
    for number, encoding in enumerate(encodings, 1):
        if not encoding.ids:
            raise DataError(f"prompt {number}: expected some text, got no token")
    mask = _mask_token(folder, text, encodings) if head.name == "fill-mask" else None
    logits = _logits(model, task, encodings, config, threads)
    if mask is not None:
        return [_filled(row, own.ids, mask, text, top) for row, own in zip(logits, encodings, strict=True)]
    labels = _labels(config, logits[0].shape[-1], folder)
    if head.name == "token-classification":
        return [_tagged(row, own, labels) for row, own in zip(logits, encodings, strict=True)]
    return [_ranked(_scores(row, config.get("problem_type")), labels) for row in logits]


def _logits(
    model: Path, task: str | None, encodings: Sequence[Encoding], config: Mapping[str, Any], threads: int
) -> list[Array]:
    """The logits of each text in float64, without those of padding."""
    opened = _opened(model, task, threads)
    texts = Texts(tuple(tuple(e.ids) for e in encodings), tuple(tuple(e.type_ids) for e in encodings))
    found = []
    for feeds in text_inputs(texts, opened.inputs, config):
        logits = opened.run(feeds)
        for row, mask in zip(logits.astype(np.float64), feeds[ATTENTION_MASK], strict=True):
            found.append(row if row.ndim == 1 else row[mask == 1])
    return found


@dataclass(frozen=True)
class _Opened:
    """A model's inputs, and what gives its logits for them."""

    inputs: Sequence[str]
    run: Callable[[Mapping[str, Array]], Array]


def _opened(model: Path, task: str | None, threads: int) -> _Opened:
    if task is not None:
        deployment = Deployment(model, threads=threads)
        return _Opened(deployment.inputs, lambda feeds: deployment.run(task, feeds)[LOGITS])
    session = open_session(model, threads)
    inputs = [entry.name for entry in session.get_inputs()]
    return _Opened(inputs, lambda feeds: session.run([LOGITS], feeds)[0])


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = powers / powers.sum(-1, keepdims=True)
    return result


def _scores(logits: Array, problem: object) -> Array:
    """As in transformers' pipelines: sigmoids where classes do not exclude each other, or there is one."""
    if problem == "regression":
        return logits
    if problem == "multi_label_classification" or len(logits) == 1:
        sigmoid: Array = 1 / (1 + np.exp(-logits))
        return sigmoid
    return _softmax(logits)


def _ranked(scores: Array, labels: Sequence[str]) -> list[Scored]:
    return [Scored(labels[index], float(scores[index])) for index in np.argsort(-scores, kind="stable")]


def _tagged(logits: Array, encoding: Encoding, labels: Sequence[str]) -> list[Scored]:
    found = []
    for row, special, place in zip(
        _softmax(logits), encoding.special_tokens_mask, encoding.offsets, strict=True
    ):
        label = labels[int(row.argmax())]
        if not special and label != _OUTSIDE:
            found.append(Scored(label, float(row.max()), place))
    return found


def _filled(logits: Array, ids: Sequence[int], mask: int, text: TextModel, top: int) -> list[Scored]:
    found = []
    for position in np.flatnonzero(np.array(ids) == mask):
        scores = _softmax(logits[position])
        for token in np.argsort(-scores, kind="stable")[:top]:
            found.append(Scored(text.tokenizer.decode([int(token)]), float(scores[token])))
    return found


def _mask_token(folder: Path, text: TextModel, encodings: Sequence[Encoding]) -> int:
    """The token that stands for a masked one, which each text must have."""
    path = folder / "tokenizer_config.json"
    held = read_json_object(path).get("mask_token") if path.is_file() else None
    token = held.get("content") if isinstance(held, dict) else held
    number = text.tokenizer.token_to_id(token) if isinstance(token, str) else None
    if number is None:
        raise FileError(f"{path}: mask_token: expected a token of the tokenizer, got {token!r}")
    for place, encoding in enumerate(encodings, 1):
        if number not in encoding.ids:
            raise DataError(f"prompt {place}: expected {token} for each token to fill in, found none")
    return number


def _labels(config: Mapping[str, Any], count: int, folder: Path) -> tuple[str, ...]:
    labels = labels_of(config.get("id2label")) or tuple(f"LABEL_{number}" for number in range(count))
    if len(labels) != count:
        raise FileError(
            f"{folder / CONFIG_FILE}: id2label: expected {count} labels, one for each output, "
            f"got {len(labels)}"
        )
    return labels
