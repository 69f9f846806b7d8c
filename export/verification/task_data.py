"""The user's own examples, as the inputs of a model and the labels that its logits are held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loracle.files.head_config import labels_of
from loracle.reference import ConfigError, FileError
from loracle.torch_impl.batches import IGNORED
from loracle.torch_impl.data import Example, Labelled, Tagged, read_examples
from loracle.torch_impl.encoded import EncodedData, EncodingSettings
from loracle.torch_impl.labels import Labels
from loracle.torch_impl.loading import quiet_transformers
from loracle.torch_impl.tasks import Task as LearningTask
from loracle.torch_impl.tasks import task_named
from loracle.torch_impl.training_set import held_out_batches

from ..encoder_inputs import positions_of
from ..tasks import Task

Batch = Mapping[str, Tensor]

_LEARNED = {
    "text-generation": "causal-lm",
    "fill-mask": "masked-lm",
    "text-classification": "sequence-classification",
    "token-classification": "token-classification",
}
_LOGITS = 2**24
"""Most logits of a batch; in float64, and several times at once while deviations are sampled."""
_UNNAMED = ("LABEL_0", "LABEL_1")
"""transformers' classes where a configuration names none."""


@dataclass(frozen=True)
class LabelledRows:
    """Examples in batches, padded on the right.

    Attributes:
        task: what is learned of them.
        batches: inputs by the names of the model's forward, (rows, length), and "labels".
        shown: which examples, in words.
    """

    task: LearningTask
    batches: tuple[Batch, ...]
    shown: str

    def kept(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which of a batch's logits are of labels, True there, and these labels."""
        labels = batch["labels"]
        if self.task.name == "causal-lm":
            labels = labels[:, 1:]  # the logits at a position are of the next token
        kept = labels != IGNORED
        return kept, labels[kept]


def labelled_rows(
    data: str | Path,
    task: Task,
    tokenizer_dir: str | Path,
    config: Mapping[str, Any],
    *,
    rows: int,
    max_length: int,
    trusted: bool = False,
) -> LabelledRows:
    """Read the first examples of a file.

    Args:
        data: JSON Lines in the form that `loracle finetune --data` reads for the task.
        task: what the model is for.
        tokenizer_dir: where the tokenizer is.
        config: the content of the model's `config.json`.
        rows: how many examples are read.
        max_length: how many tokens of each, if the model has positions for so many.
        trusted: whether the tokenizer's own code may run.

    Raises:
        ConfigError: no data can be given for such a model, or no rows are asked for.
        DataError: a line of the data is malformed, or has a class that the model has not.
        FileError: a file is missing.
    """
    learned = _learned(task, rows)
    examples = read_examples(data, learned.forms)
    chosen = examples[:rows]
    labels = _labels(config, chosen[0]) if learned.classes else None
    longest = min(max_length, positions_of(config) or max_length)
    segments = int(config.get("type_vocab_size") or 0) > 1
    tokenizer = _tokenizer(tokenizer_dir, trusted)
    settings = EncodingSettings(longest, str(data), labels, segments)
    encoded: EncodedData = learned.encode(tokenizer, chosen, settings)
    shown = f"{len(encoded.examples)} of {len(examples)} examples of {Path(data).name}"
    if encoded.shortened:
        shown += f", {encoded.shortened} of them cut at {longest} tokens"
    if encoded.left_out:
        shown += f", {encoded.left_out} left out"
    together = _together(learned, encoded, config)
    # Tokens to be guessed are the same ones each time.
    return LabelledRows(
        learned, tuple(held_out_batches(learned, encoded, tokenizer, together, seed=0)), shown
    )


def _together(learned: LearningTask, encoded: EncodedData, config: Mapping[str, Any]) -> int:
    """How many rows are a batch: as many as memory has room for the logits of."""
    if learned.name != "causal-lm" and type(config.get("pad_token_id")) is not int:
        return 1
    classes = 1 if learned.classes else int(config.get("vocab_size") or 1)
    longest = max(len(row.input_ids) for row in encoded.examples)
    return max(1, _LOGITS // (longest * classes))


def _learned(task: Task, rows: int) -> LearningTask:
    if rows < 1:
        raise ConfigError(f"rows: expected at least 1, got {rows}")
    name = _LEARNED.get(task.name)
    if name is None:
        raise ConfigError(
            f"data: expected a model for {', '.join(_LEARNED)}, got one for {task.name}; leave the data out"
        )
    return task_named(name)


def _tokenizer(folder: str | Path, trusted: bool) -> Any:
    import transformers

    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trusted
            )
    except (OSError, ValueError, KeyError) as error:
        raise FileError(f"{folder}: expected a tokenizer, got: {' '.join(str(error).split())}") from error


def _labels(config: Mapping[str, Any], example: Example) -> Labels:
    """The model's classes by name; by number where the data, of which this is the first, number them."""
    named = labels_of(config.get("id2label")) or _UNNAMED
    problem = config.get("problem_type") or "single_label_classification"
    if problem != "single_label_classification" or len(named) < 2:
        raise ConfigError(
            f"data: expected a classifier that tells two classes or more apart, got {problem} with "
            f"{len(named)}; leave the data out"
        )
    label = example.label if isinstance(example, Labelled) else ""
    first = example.tags[0] if isinstance(example, Tagged) else label
    return Labels(tuple(map(str, range(len(named)))) if isinstance(first, int) else named)
