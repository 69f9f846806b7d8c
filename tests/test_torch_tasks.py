"""Every kind of model learns: encoded, stacked, and trained with adapters for a few steps."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from refusal import refused
from task_fixtures import (
    encoded,
    tiny_bart,
    tiny_bert,
    tiny_causal,
    tiny_t5,
    train,
    write_words_model,
)
from transformers import Trainer, TrainingArguments

from loracle.reference import ConfigError
from loracle.torch_impl import LoraConfig, inject
from loracle.torch_impl.batches import collate
from loracle.torch_impl.data import Completion, Example, Labelled, Tagged, Text
from loracle.torch_impl.labels import collect_labels
from loracle.torch_impl.loading import LoadedModel, load_model
from loracle.torch_impl.tasks import Task, task_named
from loracle.torch_impl.training_set import held_out_batches, training_set

CPU = torch.device("cpu")


def words(count: int) -> list[str]:
    """Words of two to four letters; the same ones always."""
    chance = random.Random(0)
    return ["".join(chance.choices("abcd", k=chance.randint(2, 4))) for _ in range(count)]


def examples_of(name: str) -> list[Example]:
    """Twelve examples of a task, none of which is noise."""
    found: list[Example] = []
    for line, word in enumerate(words(12), start=1):
        if name == "sequence-classification":
            found.append(Labelled(line, word, None, "early" if word[0] in "ab" else "late"))
        elif name == "token-classification":
            found.append(Tagged(line, tuple(word), tuple("V" if one == "a" else "C" for one in word)))
        elif name == "masked-lm":
            found.append(Text(line, f"{'x' * 3} {word[0] * 4} {'y' * 3}"))
        elif name == "seq2seq-lm":
            found.append(Completion(line, None, word, word[0]))
        else:
            found.append(Completion(line, None, f"{word} ", word[0]))
    return found


MODELS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "llama": ("causal-lm", tiny_causal, ("q_proj", "v_proj")),
    "bert masks": ("masked-lm", tiny_bert, ("query", "value")),
    "bert sequences": ("sequence-classification", tiny_bert, ("query", "value")),
    "llama sequences": ("sequence-classification", tiny_causal, ("q_proj", "v_proj")),
    "bert tokens": ("token-classification", tiny_bert, ("query", "value")),
    "llama tokens": ("token-classification", tiny_causal, ("q_proj", "v_proj")),
    "t5": ("seq2seq-lm", tiny_t5, ("q", "v")),
    "bart": ("seq2seq-lm", tiny_bart, ("q_proj", "v_proj")),
}


def adapted(name: str, folder: Path) -> tuple[Task, LoadedModel, Sequence[Example]]:
    """A tiny model with adapters, as loaded from a folder, and what to learn."""
    task_name, make, targets = MODELS[name]
    task, examples = task_named(task_name), examples_of(task_name)
    write_words_model(folder, make())
    labels = collect_labels(examples, "d") if task.classes else None
    loaded = load_model(str(folder), bf16=False, task=task, labels=labels, seed=1)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=targets,
        task_type=task.peft_type,
        modules_to_save=loaded.modules_to_save or None,
    )
    inject(loaded.model, config, generator=torch.Generator().manual_seed(0))
    return task, loaded, examples


@pytest.mark.parametrize("name", MODELS)
def test_adapters_learn(name: str, tmp_path: Path) -> None:
    task, loaded, examples = adapted(name, tmp_path / "m")
    data = encoded(task, loaded, examples)
    assert len(data.examples) == 12

    def measured() -> dict[str, float]:
        return task.measure(loaded.model, held_out_batches(task, data, loaded.tokenizer, 4, seed=0), CPU)

    frozen = {
        parameter_name: parameter.detach().clone()
        for parameter_name, parameter in loaded.model.named_parameters()
        if not parameter.requires_grad
    }
    before = measured()
    assert before == measured()
    train(task, loaded, data, epochs=40)
    after = measured()
    # Of a hidden letter the others tell only the word's first one; and the head, tied, stays as it was.
    assert after["loss"] < (before["loss"] - 1 if task.name == "masked-lm" else before["loss"] / 2)
    if task.classes:
        assert after["accuracy"] > 0.9
    else:
        assert after["perplexity"] < before["perplexity"]
    for parameter_name, parameter in loaded.model.named_parameters():
        if parameter_name in frozen:
            assert torch.equal(parameter, frozen[parameter_name]), parameter_name


def test_packed_examples_teach_as_much(tmp_path: Path) -> None:
    task, loaded, examples = adapted("llama", tmp_path / "m")
    data = encoded(task, loaded, examples)
    before = task.measure(loaded.model, held_out_batches(task, data, loaded.tokenizer, 4, seed=0), CPU)
    rows = train(task, loaded, data, epochs=120, packing=True)
    assert len(rows.lengths) < 12
    assert sum(rows.lengths) == sum(len(one.input_ids) for one in data.examples)
    assert max(rows.lengths) <= 32
    after = task.measure(loaded.model, held_out_batches(task, data, loaded.tokenizer, 4, seed=0), CPU)
    assert after["loss"] < before["loss"] / 2


@torch.no_grad()
def test_a_packed_batch_has_the_loss_of_its_examples(tmp_path: Path) -> None:
    task, loaded, examples = adapted("llama", tmp_path / "m")
    data = encoded(task, loaded, examples)
    rows = training_set(task, data, loaded.model, loaded.tokenizer, seed=0, packing=True, max_length=32)
    assert loaded.model.config.use_cache  # as a caller's own loop may leave it
    together = rows.loss(loaded.model, rows.collate(rows.rows[:]), None)
    apart = task.loss(loaded.model, collate(data.examples), None)
    assert f"{float(together):.4f}" == f"{float(apart):.4f}"


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    task, loaded, examples = adapted("t5", tmp_path / "m")
    data = encoded(task, loaded, examples)
    refused(
        lambda: training_set(task, data, loaded.model, loaded.tokenizer, seed=0, packing=True, max_length=32),
        ConfigError,
        "packing: expected task causal-lm, got seq2seq-lm; train without packing",
    )


@pytest.mark.parametrize("name", ["bert tokens", "t5", "llama"])
def test_transformers_own_trainer_trains_adapters(name: str, tmp_path: Path) -> None:
    task, loaded, examples = adapted(name, tmp_path / "m")
    data = encoded(task, loaded, examples)
    rows = training_set(task, data, loaded.model, loaded.tokenizer, seed=0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=30,
        learning_rate=0.02,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=loaded.model, args=arguments, data_collator=rows.collate, train_dataset=list(data.examples)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3]) / 2


def test_an_unknown_task_is_refused() -> None:
    refused(
        lambda: task_named("regression"),
        ConfigError,
        "task: expected one of causal-lm, masked-lm, sequence-classification, token-classification, "
        "seq2seq-lm, got 'regression'",
    )
