"""Perplexity and accuracy before and after, on the user's own data, and the bound on the candidate's loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from export_fixtures import make_adapter, make_model
from refusal import refused
from task_fixtures import tiny_bert, write_words_model

from loracle.export import export
from loracle.export.external import load_graph
from loracle.export.tasks import TASKS
from loracle.export.verification.report import Check
from loracle.export.verification.task_metric import TaskMetric, _check, _is_whole, measure_task
from loracle.files import read_adapter, write_merged_checkpoint
from loracle.files.json_file import read_json_object
from loracle.reference import ConfigError, DataError, FileError
from loracle.torch_impl import LoraConfig, inject, load_adapter, save_adapter
from loracle.torch_impl.data import read_examples
from loracle.torch_impl.encoded import EncodingSettings
from loracle.torch_impl.labels import Labels
from loracle.torch_impl.tasks import task_named
from loracle.torch_impl.training_set import held_out_batches

TASK = {task.name: task for task in TASKS}
PAIRS = [
    {"prompt": "one", "completion": " two three"},
    {"prompt": "a longer one", "completion": " b"},
    {"text": "some text that is learned whole"},
    {"prompt": "left", "completion": " out"},
]
CLASSED = [
    {"text": "cab", "label": "no"},
    {"text": "a bad cab", "text_pair": "dab", "label": "yes"},
    {"text": "fade", "label": "maybe"},
]


def write_data(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, onnx (merged), plain (the base alone), merged (checkpoint), data.jsonl."""
    root = tmp_path_factory.mktemp("metric")
    make_adapter(root / "adapter", make_model(root / "base"))
    export(root / "base", root / "onnx", root / "adapter")
    export(root / "base", root / "plain")
    write_merged_checkpoint(root / "base", root / "adapter", root / "merged")
    write_data(root / "data.jsonl", PAIRS)
    return root


def measured(root: Path, candidate: str, task: str = "text-generation", **options: Any) -> TaskMetric:
    path = root / candidate
    graph = load_graph(path / "model.onnx").graph if (path / "model.onnx").exists() else None
    return measure_task(
        options.pop("data", root / "data.jsonl"),
        path if graph is None else path / "model.onnx",
        graph,
        TASK[task],
        root / "base",
        read_adapter(root / "adapter"),
        options.pop("config", read_json_object(root / "base/config.json")),
        **options,
    )


def in_float32(
    root: Path, task: str, auto: str, adapter: bool, data: str, **settings: Any
) -> dict[str, float]:
    """The figures of `loracle finetune`'s own evaluation."""
    learned = task_named(task)
    model = getattr(hf, auto).from_pretrained(root / "base", dtype=torch.float32).eval()
    if adapter:
        load_adapter(model, root / "adapter")
    tokenizer = hf.AutoTokenizer.from_pretrained(root / "base")
    examples = read_examples(root / data, learned.forms)
    encoded = learned.encode(tokenizer, examples, EncodingSettings(64, "d", **settings))
    batches = list(held_out_batches(learned, encoded, tokenizer, 1, seed=0))
    return learned.measure(model, batches, torch.device("cpu"))


def test_the_figures_are_those_of_finetunes_own_evaluation(made: Path) -> None:
    result = measured(made, "onnx")
    assert result.check.passed
    assert result.base is not None
    assert result.bound is not None
    assert 0 < abs(result.candidate["loss"] - result.trained["loss"]) <= result.bound < 1e-3
    for own, adapter in ((result.base, False), (result.trained, True)):
        expected = in_float32(made, "causal-lm", "AutoModelForCausalLM", adapter, "data.jsonl")
        assert own.keys() == expected.keys() == {"loss", "perplexity"}
        # Which is in float32, within the same bound.
        assert abs(own["loss"] - expected["loss"]) <= result.bound
        assert own["perplexity"] == math.exp(own["loss"])
    assert abs(result.base["loss"] - result.trained["loss"]) > 100 * result.bound
    numbers = [f"{own['perplexity']:.4g}" for own in (result.base, result.trained, result.candidate)]
    assert str(result) == f"perplexity: base {numbers[0]}, trained {numbers[1]}, candidate {numbers[2]}"
    assert numbers[1] == numbers[2]
    assert f"{result.labels} labels in 4 of 4 examples of data.jsonl" in result.check.figure
    # A byte a token, and the end of the sequence; the first token of a text is not predicted.
    assert result.labels == sum(map(len, (" two three", " b", " out"))) + 3 + len(PAIRS[2]["text"])
    document = json.loads(json.dumps(result.to_json()))
    assert document["trained"] == dict(result.trained)
    assert (document["labels"], document["bound"]) == (result.labels, result.bound)


def test_the_base_in_the_candidates_place_is_outside(made: Path) -> None:
    result = measured(made, "plain")
    assert not result.check.passed
    (failure,) = result.check.failures
    assert failure.startswith(f"loss {result.candidate['loss']:.6g}: off by ")
    assert result.base is not None
    assert result.bound is not None
    assert abs(result.candidate["loss"] - result.base["loss"]) <= result.bound


def test_a_checkpoint_is_measured_in_torch(made: Path) -> None:
    right, wrong = measured(made, "merged"), measured(made, "base")
    assert right.check.passed
    assert not wrong.check.passed
    assert wrong.candidate == wrong.base


def test_the_first_rows_and_tokens_are_read_and_it_is_said(made: Path) -> None:
    result = measured(made, "onnx", rows=3, max_length=32)
    assert result.data == "45 labels in 3 of 4 examples of data.jsonl, 2 of them cut at 32 tokens"
    # Prompts are cut, completions are not.
    assert result.labels == len(" two three") + 1 + len(" b") + 1 + len(PAIRS[2]["text"])
    shorter = measured(made, "onnx", rows=3, max_length=30)
    assert (
        shorter.data == "32 labels in 2 of 4 examples of data.jsonl, 2 of them cut at 30 tokens, 1 left out"
    )


def test_the_bound_is_twice_the_mean_tolerance_of_a_label(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tolerance a batch, each as often as it has labels."""
    from loracle.export.verification import task_data, task_metric
    from loracle.export.verification.truth import Truth

    monkeypatch.setattr(task_data, "_LOGITS", 1)
    tolerances = iter([1.0, 3.0])

    def evaluate(self: Any, feeds: Any, dtype: Any) -> dict[str, Truth]:
        (exact,) = next(self.draws(feeds, dtype, samples=0))
        return {"logits": Truth(exact.numpy(), next(tolerances) / 2)}

    monkeypatch.setattr(task_metric.Float64Model, "evaluate_feeds", evaluate)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "long one", "completion": "bcdef"}]
    data = write_data(made / "two.jsonl", rows)
    assert measured(made, "onnx", data=data).bound == 2 * (2 * 1.0 + 6 * 3.0) / 8


def test_as_many_rows_are_evaluated_together_as_memory_allows(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A language model's by their logits; others one by one where nothing pads."""
    from loracle.export.verification import task_data

    def sizes(task: str, **config: Any) -> list[int]:
        own = {**read_json_object(made / "base/config.json"), **config}
        data = made / "data.jsonl"
        read = task_data.labelled_rows(data, TASK[task], made / "base", own, rows=4, max_length=64)
        widths.append(max(batch["input_ids"].shape[1] for batch in read.batches))
        return [len(batch["input_ids"]) for batch in read.batches]

    widths: list[int] = []
    assert sizes("text-generation") == [4]
    monkeypatch.setattr(task_data, "_LOGITS", 2 * widths[0] * 264)
    assert sizes("text-generation", pad_token_id=None) == [2, 2]
    monkeypatch.setattr(task_data, "_LOGITS", 2 * widths[0] * 264 - 1)
    assert sizes("text-generation") == [1, 1, 1, 1]


def test_a_base_without_some_weights_is_not_whole(made: Path) -> None:
    from loracle.files import Checkpoint

    assert _is_whole(made / "base", read_adapter(made / "adapter"))
    with Checkpoint(made / "base") as checkpoint:
        rows = np.zeros((264 + 2, checkpoint.shape("model.embed_tokens.weight")[1]), np.float32)
    resized = replace(read_adapter(made / "adapter"), tensors={"model.embed_tokens.weight": rows})
    assert not _is_whole(made / "base", resized)


def test_the_check_says_what_it_found() -> None:
    def checked(loss: float, bound: float | None) -> Check:
        return _check({"loss": 2.0}, {"loss": loss}, bound, "d")

    assert checked(2.25, 0.25) == Check(
        "loss on the data is the trained model's",
        True,
        "loss 2.25, trained 2, off by 0.25 of 0.25 allowed; d",
    )
    assert checked(2.5, 0.25).failures == ("loss 2.5: off by 0.5, bound 0.25",)
    assert not checked(math.nan, 0.25).passed
    assert checked(9.0, None) == Check("loss on the data is a finite number", True, "loss 9, trained 2; d")
    assert checked(math.inf, None).failures == ("loss inf",)
    worse = TaskMetric(None, {"loss": 1.0}, {"loss": math.inf}, 3, None, "d", checked(1.0, None))
    assert worse.to_json() == {
        "data": "d",
        "labels": 3,
        "bound": None,
        "base": None,
        "trained": {"loss": 1.0},
        "candidate": {"loss": None},
    }


def test_what_cannot_be_measured_is_refused(made: Path) -> None:
    refused(
        lambda: measured(made, "onnx", "feature-extraction"),
        ConfigError,
        "data: expected a model for text-generation, fill-mask, text-classification, token-classification, "
        "got one for feature-extraction; leave the data out",
    )
    refused(lambda: measured(made, "onnx", rows=0), ConfigError, "rows: expected at least 1, got 0")
    own = {**read_json_object(made / "base/config.json"), "auto_map": {"AutoModel": "code.Model"}}
    refused(
        lambda: measured(made, "merged", config=own),
        ConfigError,
        f"{made}/merged: expected a checkpoint that transformers knows by itself, got one with code of its "
        "own; leave the data out, or give an ONNX model",
    )
    with pytest.raises(DataError, match="line 1"):
        measured(made, "onnx", data=write_data(made / "bad.jsonl", [{"label": 3}]))
    with pytest.raises(FileError, match="expected a tokenizer"):
        measured(made, "onnx", tokenizer_dir=made / "adapter")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `made`, a BERT that classifies texts and pairs, three classes."""
    root = tmp_path_factory.mktemp("classifier")
    labels = {0: "maybe", 1: "no", 2: "yes"}
    model = tiny_bert(
        "BertForSequenceClassification", id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    write_words_model(root / "base", model)
    inject(model, LoraConfig(r=2, lora_alpha=8, target_modules=("query", "value")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    save_adapter(model, root / "adapter")
    export(root / "base", root / "onnx", root / "adapter")
    write_data(root / "data.jsonl", CLASSED)
    write_data(
        root / "numbers.jsonl",
        [{**row, "label": place} for row, place in zip(CLASSED, (1, 2, 0), strict=True)],
    )
    return root


@pytest.mark.slow
def test_a_classifiers_accuracy(classifier: Path) -> None:
    result = measured(classifier, "onnx", "text-classification")
    assert result.check.passed
    assert (result.labels, result.trained.keys()) == (3, {"loss", "accuracy", "macro_f1"})
    expected = in_float32(
        classifier,
        "sequence-classification",
        "AutoModelForSequenceClassification",
        True,
        "data.jsonl",
        labels=Labels(("maybe", "no", "yes")),
        token_types=True,
    )
    assert result.bound is not None
    assert abs(expected["loss"] - result.trained["loss"]) <= result.bound
    assert {name: result.trained[name] for name in ("accuracy", "macro_f1")} == {
        name: expected[name] for name in ("accuracy", "macro_f1")
    }
    assert str(result).startswith(f"accuracy: base {result.base['accuracy']:.1%}, trained ")  # type: ignore[index]
    assert "; macro f1: base " in str(result)
    numbered = measured(classifier, "onnx", "text-classification", data=classifier / "numbers.jsonl")
    assert numbered.candidate == result.candidate
    data = write_data(classifier / "other.jsonl", [{"text": "a", "label": "other"}])
    with pytest.raises(DataError, match="expected one of the classes 'maybe', 'no', 'yes', got 'other'"):
        measured(classifier, "onnx", "text-classification", data=data)


@pytest.mark.slow
def test_classifiers_that_tell_no_classes_apart_are_refused(classifier: Path) -> None:
    config = {**read_json_object(classifier / "base/config.json"), "problem_type": "regression"}
    refused(
        lambda: measured(classifier, "onnx", "text-classification", config=config),
        ConfigError,
        "data: expected a classifier that tells two classes or more apart, got regression with 3; leave the "
        "data out",
    )


@pytest.mark.slow
def test_tokens_to_guess_and_tags(tmp_path: Path) -> None:
    for kind, task, rows in (
        ("BertForMaskedLM", "fill-mask", [{"text": "a cab fades"}, {"text": "bad"}]),
        ("BertForTokenClassification", "token-classification", [{"tokens": ["cab", "a"], "tags": [0, 1]}]),
    ):
        root = tmp_path / kind
        model = tiny_bert(kind)
        write_words_model(root / "base", model)
        inject(model, LoraConfig(r=2, lora_alpha=8, target_modules=("query", "value")))
        save_adapter(model, root / "adapter")
        export(root / "base", root / "onnx", root / "adapter")
        write_data(root / "data.jsonl", rows)
        result = measured(root, "onnx", task)
        assert result.check.passed
        # An adapter that starts at zero changes nothing.
        assert result.base == result.trained
        assert ("perplexity" in result.trained) == (task == "fill-mask")


@pytest.mark.slow
def test_a_head_that_the_adapter_brings_is_not_measured_before(tmp_path: Path) -> None:
    from head_fixtures import CASES, our_adapter, write_base

    from loracle.files import Checkpoint, MergedWeights

    case = CASES["BertModel"]
    write_base(tmp_path / "base", case)
    our_adapter(tmp_path / "base", case, tmp_path / "adapter")
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=_words(), pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "onnx", tmp_path / "adapter")
    with Checkpoint(tmp_path / "base") as checkpoint:
        config = MergedWeights(checkpoint, read_adapter(tmp_path / "adapter")).config
    rows = [{"text": "a b", "label": "no"}, {"text": "c", "label": "yes"}]
    data = write_data(tmp_path / "data.jsonl", rows)
    result = measured(tmp_path, "onnx", "text-classification", data=data, config=config)
    assert result.check.passed
    assert result.base is None
    assert str(result).startswith("accuracy: trained ")


def _words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.slow
def test_a_quantised_graph_has_no_bound(made: Path) -> None:
    export(made / "base", made / "int8", made / "adapter", quantization="int8")
    result = measured(made, "int8")
    assert result.bound is None
    assert result.check.name == "loss on the data is a finite number"
    assert result.check.passed
    assert isinstance(load_graph(made / "int8/model.onnx"), ir.Model)
    assert np.isfinite(result.candidate["loss"])
