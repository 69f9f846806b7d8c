"""Whole runs of every task but plain causal language modelling, from files to an adapter folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from refusal import refused
from task_fixtures import tiny_bert, tiny_t5, word_tokenizer, write_words_model
from torch_fixtures import upper_pairs, write_lines, write_model
from transformers import AutoModelForSequenceClassification

from loracle.files import read_adapter
from loracle.reference import DataError
from loracle.torch_impl import FinetuneOptions, finetune, load_adapter
from loracle.torch_impl.labels import Labels
from loracle.torch_impl.loading import load_model
from loracle.torch_impl.tasks import task_named

LABELLED = [
    {"text": word, "label": "early" if word[0] in "ab" else "late"}
    for word in ("ab", "cd", "ba", "dc", "ada", "cad", "bad", "dab", "aa", "bb", "cc", "dd")
]
TAGGED = [
    {"tokens": list(record["text"]), "tags": [int(letter == "a") for letter in record["text"]]}
    for record in LABELLED
]
TEXTS = [{"text": f"xxx {record['text']} yyy"} for record in LABELLED]
PAIRS = [{"prompt": record["text"], "completion": record["text"][0]} for record in LABELLED]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Run = Callable[..., FinetuneOptions]


@pytest.fixture
def options(tmp_path: Path) -> Run:
    """Options of a run on records that are also held out, in batches of four."""

    def make(task: str, tiny: Any, records: list[Any], **changes: Any) -> FinetuneOptions:
        folder = tmp_path / "model"
        if not folder.exists():
            write_words_model(folder, tiny)
        data = write_lines(tmp_path / "data.jsonl", records)
        settings = {"model": folder, "data": data, "eval_data": data, "out": tmp_path / "out", "task": task}
        sizes = {"rank": 4, "epochs": 2.0, "batch_size": 4, "max_length": 32, "bf16": False, "lr": 0.02}
        return FinetuneOptions(**{**settings, **sizes, **changes})

    return make


def test_a_sequence_classifier_is_written_and_read_by_peft(options: Run) -> None:
    run = options("sequence-classification", tiny_bert(), LABELLED, targets=("query", "value"), epochs=20.0)
    result = finetune(run)
    assert result.labels == ("early", "late")
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["macro_f1"] == 1.0
    record = json.loads((run.out / "training.json").read_text())
    assert record["result"]["labels"] == ["early", "late"]
    assert read_adapter(run.out).config.task_type == "SEQ_CLS"
    task = task_named("sequence-classification")
    ours = load_model(run.model, bf16=False, task=task, labels=Labels(("early", "late")), seed=99).model
    load_adapter(ours, run.out)
    base = AutoModelForSequenceClassification.from_pretrained(run.model, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, str(run.out)).eval()
    batch = word_tokenizer()([record["text"] for record in LABELLED], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits, other = ours.eval()(**batch).logits, theirs(**batch).logits
    # Equal to four digits: a head, a pooler or an adapter that did not arrive would show in the first.
    assert [[f"{x:.4f}" for x in row] for row in logits.tolist()] == [
        [f"{x:.4f}" for x in row] for row in other.tolist()
    ]
    assert logits.argmax(dim=-1).tolist() == [int(record["label"] == "late") for record in LABELLED]


@pytest.mark.parametrize(
    ("task", "make", "records", "targets", "metric"),
    [
        ("token-classification", tiny_bert, TAGGED, ("query", "value"), "accuracy"),
        ("masked-lm", tiny_bert, TEXTS, ("query", "value"), "perplexity"),
        ("seq2seq-lm", tiny_t5, PAIRS, ("q", "v"), "perplexity"),
    ],
)
def test_a_run_is_repeated_bit_for_bit_when_it_is_resumed(
    options: Run, tmp_path: Path, task: str, make: Any, records: list[Any], targets: Any, metric: str
) -> None:
    whole = finetune(options(task, make(), records, targets=targets, dropout=0.1, out=tmp_path / "whole"))
    assert whole.steps == 6
    assert metric in whole.metrics
    assert whole.eval_before is not None
    assert whole.eval_after is not None
    assert whole.eval_after < whole.eval_before

    def stop(done: int, total: int, loss: float | None) -> None:
        if done == 5 and loss is not None:
            raise KeyboardInterrupt

    changed = options(task, make(), records, targets=targets, dropout=0.1, save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        finetune(changed, stop)
    resumed = finetune(
        options(task, make(), records, targets=targets, dropout=0.1, save_steps=2, resume=True)
    )
    assert resumed.losses == whole.losses
    weights = "adapter_model.safetensors"
    assert (resumed.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()


def test_masks_differ_from_epoch_to_epoch(options: Run) -> None:
    """One batch of everything, and a learning rate that changes nothing: the losses differ by masks alone."""
    run = options("masked-lm", tiny_bert(), TEXTS, targets=("query",), batch_size=12, lr=1e-30, epochs=3.0)
    assert len(set(finetune(run).losses)) == 3


@pytest.mark.parametrize("chunked", [False, True])
def test_packing_changes_no_loss_and_saves_padding(options: Run, tmp_path: Path, chunked: bool) -> None:
    """One batch of everything: its loss before the first update is that of the examples apart."""
    model = write_model(tmp_path / "llama")
    shared = {"model": model, "targets": ("q_proj", "v_proj"), "epochs": 1.0, "max_length": 64}
    apart = finetune(options("causal-lm", tiny_bert(), upper_pairs(), **shared, batch_size=11))
    shared = {**shared, "packing": True, "chunked_loss": chunked}
    packed = finetune(
        options("causal-lm", None, upper_pairs(), **shared, batch_size=11, out=tmp_path / "packed")
    )
    assert packed.learned == apart.learned
    # To four digits: a leak across a border would show in the first or second.
    assert f"{packed.losses[0]:.4f}" == f"{apart.losses[0]:.4f}" == f"{apart.eval_before:.4f}"
    many = options("causal-lm", None, upper_pairs(), **shared, batch_size=1, out=tmp_path / "many")
    assert finetune(many).steps < 11


def test_a_class_that_is_only_held_out_is_refused(options: Run, tmp_path: Path) -> None:
    held = write_lines(tmp_path / "held.jsonl", [*LABELLED[:2], {"text": "a", "label": "never"}])
    run = options("sequence-classification", tiny_bert(), LABELLED, targets=("query",), eval_data=held)
    refused(
        lambda: finetune(run),
        DataError,
        f"{held}, line 3: label: expected one of the classes 'early', 'late', got 'never'; "
        "only classes of the training data can be told apart",
    )
    assert not run.out.exists()
