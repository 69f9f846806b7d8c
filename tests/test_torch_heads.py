"""A trained head goes into the adapter's folder with its classes, and from there into the merged model."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from head_fixtures import CASES, LABELS, Case, classifier, load_merged, named, randomize, write_base
from safetensors.torch import load_file
from task_fixtures import tiny_bert, word_tokenizer, write_words_model
from torch import nn
from torch_fixtures import tiny_llama, write_lines

from loracle.files import read_adapter, write_merged_checkpoint
from loracle.files.head_config import HEAD_FILE, HeadConfig
from loracle.torch_impl import (
    FinetuneOptions,
    LoraConfig,
    finetune,
    inject,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from loracle.torch_impl.heads import head_of
from loracle.torch_impl.labels import Labels
from loracle.torch_impl.loading import load_model
from loracle.torch_impl.tasks import task_named

WORDS = ("ab", "cd", "ba", "dc", "ada", "cad", "bad", "dab")
LABELLED = [{"text": word, "label": "early" if word[0] in "ab" else "late"} for word in WORDS]
TAGGED = [{"tokens": list(word), "tags": [int(letter == "a") for letter in word]} for word in WORDS]


def test_a_classifiers_configuration_tells_its_classes_and_its_padding() -> None:
    model = tiny_bert(
        "BertForSequenceClassification", num_labels=3, problem_type="single_label_classification"
    )
    named(model)
    expected = HeadConfig("BertForSequenceClassification", LABELS, "single_label_classification", 0)
    assert head_of(model) == expected
    tokens = tiny_bert("BertForTokenClassification")
    assert head_of(tokens) == HeadConfig("BertForTokenClassification", ("LABEL_0", "LABEL_1"), None, 0)


@pytest.mark.parametrize("model", [tiny_llama(), tiny_bert(), nn.Linear(2, 2)])
def test_other_models_have_no_such_head(model: Any) -> None:
    assert head_of(model) is None


def test_an_adapter_without_a_trained_head_says_nothing_of_it(tmp_path: Path) -> None:
    case = CASES["BertModel"]
    base = write_base(tmp_path / "base", case)
    model = classifier(base, case)
    inject(model, LoraConfig(r=2, target_modules=case.targets, task_type=None))
    save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / HEAD_FILE).exists()


def test_a_loaded_adapter_that_is_saved_again_keeps_its_classes(tmp_path: Path) -> None:
    case = CASES["BertModel"]
    base = write_base(tmp_path / "base", case)
    model = named(classifier(base, case))
    inject(model, LoraConfig(r=2, target_modules=case.targets, task_type=case.task))
    randomize(model)
    save_adapter(model, tmp_path / "first")
    again = named(classifier(base, case))
    load_adapter(again, tmp_path / "first")
    save_adapter(again, tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("task", "kind", "records", "labels"),
    [
        ("sequence-classification", "BertModel", LABELLED, ("early", "late")),
        # A masked model's checkpoint has no pooler, which is trained with the head.
        ("sequence-classification", "BertForMaskedLM", LABELLED, ("early", "late")),
        ("token-classification", "BertModel", TAGGED, ("0", "1")),
    ],
)
def test_a_run_is_merged_and_loaded_with_its_classes(
    tmp_path: Path, task: str, kind: str, records: list[Any], labels: tuple[str, ...]
) -> None:
    model = write_words_model(tmp_path / "model", tiny_bert(kind))
    data = write_lines(tmp_path / "data.jsonl", records)
    out = tmp_path / "out"
    options = {"rank": 2, "max_steps": 3, "batch_size": 4, "bf16": False, "lr": 0.02, "max_length": 32}
    finetune(FinetuneOptions(str(model), data, out, task, **options))  # type: ignore[arg-type]
    problem = "single_label_classification" if task == "sequence-classification" else None
    name = f"BertFor{''.join(map(str.capitalize, task.split('-')))}"
    assert read_adapter(out).head == HeadConfig(name, labels, problem, 0)
    assert json.loads((out / HEAD_FILE).read_text())["architectures"] == [name]
    write_merged_checkpoint(model, out, tmp_path / "merged")
    auto = f"AutoModelFor{name.removeprefix('BertFor')}"
    merged = load_merged(tmp_path / "merged", Case(lambda: None, auto, None, ()))
    assert merged.config.id2label == dict(enumerate(labels))
    assert merged.config.label2id == {label: number for number, label in enumerate(labels)}
    assert merged.config.problem_type == problem
    theirs, ours = (
        load_model(str(model), bf16=False, task=task_named(task), labels=Labels(labels), seed=seed).model
        for seed in (8, 9)
    )
    load_adapter(ours, out)
    merge_and_unload(ours)
    batch = word_tokenizer()(list(WORDS), padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(merged.eval()(**batch).logits, ours.eval()(**batch).logits)
    # PEFT reads the folder as if the file were not there.
    state = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(theirs, str(out)))
    stored = load_file(out / "adapter_model.safetensors")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[key], stored[key]) for key in stored)
