"""Adapters that make another model of the base: a classifier's head for one without, a resized vocabulary."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as hf
from architectures import VOCABULARY, make
from head_fixtures import CASES as HEADS
from head_fixtures import LABELS, our_adapter, write_base
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from refusal import refused
from safetensors.numpy import load_file, save_file

from loracle.export import export, verify
from loracle.export.verification.truth import Float64Model
from loracle.files import read_adapter, write_merged_checkpoint
from loracle.files.sidecar import TOKENIZER_FILES
from loracle.reference import ConfigError, ShapeError, TargetError

WEIGHTS = "adapter_model.safetensors"


def same_files(one: Path, other: Path) -> None:
    for file in ("model.onnx", "model.onnx_data", "config.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "ViTModel", "LlamaForCausalLM"])
def test_a_classifier_is_exported_from_a_base_without_its_head(tmp_path: Path, name: str) -> None:
    case = HEADS[name]
    base = write_base(tmp_path / "base", case)
    adapter = our_adapter(base, case, tmp_path / "adapter")
    summary = export(base, tmp_path / "onnx", adapter)
    assert any("classifier" in merged or "score" in merged for merged in summary.merged_names)
    config = json.loads((tmp_path / "onnx/config.json").read_text())
    assert config["id2label"] == {str(number): label for number, label in enumerate(LABELS)}
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    assert session.get_outputs()[0].shape[-1] == len(LABELS)
    report = verify(tmp_path / "onnx", base, adapter)
    assert report.passed, report.checks
    write_merged_checkpoint(base, adapter, tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "again")
    same_files(tmp_path / "onnx", tmp_path / "again")


def test_a_head_with_other_labels_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "bert_token")
    case = HEADS["BertModel, tokens"]
    model = hf.AutoModelForTokenClassification.from_pretrained(
        base, num_labels=3, ignore_mismatched_sizes=True
    )
    config = PeftLoraConfig(r=2, task_type=case.task, target_modules=list(case.targets))
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    export(base, tmp_path / "onnx", tmp_path / "adapter")
    assert verify(tmp_path / "onnx", base, tmp_path / "adapter").passed


def resized(base: Path, folder: Path, size: int, *, save: bool = True, **options: Any) -> Path:
    """An adapter as PEFT writes it of a model whose vocabulary was resized first."""
    torch.manual_seed(4)
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[min(size, VOCABULARY) :].normal_(std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that what is tied is trained apart
        tuned = get_peft_model(model, PeftLoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save_pretrained(str(folder), save_embedding_layers=save)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, untied and tied."""
    root = tmp_path_factory.mktemp("llama")
    model = hf.AutoModelForCausalLM.from_pretrained(make(root / "untied", "llama"))
    config = model.config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    other = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.15)
    other.save_pretrained(root / "tied")
    return root


GROWN, SHRUNK = VOCABULARY + 6, VOCABULARY - 8
RESIZED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "grown": ("untied", GROWN, {}),
    "grown, tied": ("tied", GROWN, {}),
    "shrunk": ("untied", SHRUNK, {}),
    "both embeddings trained whole": ("untied", GROWN, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "both embeddings trained apart": ("tied", GROWN, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "an output layer trained apart": ("tied", VOCABULARY, {"modules_to_save": ["lm_head"]}),
    "rows of new tokens": ("untied", GROWN, {"trainable_token_indices": [3, VOCABULARY + 1]}),
    "an update of the embedding": (
        "untied",
        GROWN,
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    ),
}


@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary_comes_along(llama: Path, tmp_path: Path, name: str) -> None:
    kind, size, options = RESIZED[name]
    base = llama / kind
    adapter = resized(base, tmp_path / "adapter", size, **options)
    summary = export(base, tmp_path / "onnx", adapter)
    if size != VOCABULARY:
        assert "model.embed_tokens.weight" in summary.merged_names
    assert json.loads((tmp_path / "onnx/config.json").read_text())["vocab_size"] == size
    report = verify(tmp_path / "onnx", base, adapter, new_tokens=2)
    assert report.passed, report.checks
    write_merged_checkpoint(base, adapter, tmp_path / "merged")
    model, loading = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == size
    export(tmp_path / "merged", tmp_path / "again")
    same_files(tmp_path / "onnx", tmp_path / "again")
    ids = np.array([[5, 7, size - 1]])
    truth = Float64Model(
        base, read_adapter(adapter), config=json.loads((tmp_path / "merged/config.json").read_text())
    )
    (expected,) = truth.evaluate(ids.tolist(), np.dtype(np.float32))
    with torch.no_grad():
        got = model(torch.from_numpy(ids)).logits[0].double().numpy()
    assert np.abs(got - expected.logits).max() <= expected.tolerance


def test_a_vocabulary_that_is_resized_in_part_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = resized(llama / "untied", tmp_path / "adapter", GROWN)
    tensors = load_file(adapter / WEIGHTS)
    head = tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, adapter / WEIGHTS)
    message = (
        f"lm_head.weight: the model's shape is ({VOCABULARY}, 48), and the adapter's "
        f"model.embed_tokens.weight has {GROWN} tokens; it should bring this tensor too: resize the model's "
        "vocabulary first, or save the adapter with its embedding layers"
    )
    refused(lambda: export(llama / "untied", tmp_path / "onnx", adapter), ShapeError, message)
    save_file({**tensors, "base_model.model.lm_head.weight": head[:-1].copy()}, adapter / WEIGHTS)
    message = (
        f"model.embed_tokens.weight: expected {GROWN - 1} rows, as lm_head.weight has, got "
        f"{GROWN}; save the adapter with both embeddings resized alike"
    )
    refused(lambda: export(llama / "untied", tmp_path / "onnx", adapter), ShapeError, message)
    assert not (tmp_path / "onnx").exists()


def test_tied_embeddings_that_are_resized_must_be_one(llama: Path, tmp_path: Path) -> None:
    adapter = resized(llama / "tied", tmp_path / "adapter", GROWN)
    tensors = load_file(adapter / WEIGHTS)
    embedding = tensors["base_model.model.model.embed_tokens.weight"]
    tensors["base_model.model.lm_head.weight"] = embedding + 1
    save_file(tensors, adapter / WEIGHTS)
    message = (
        "lm_head.weight: expected the values of model.embed_tokens.weight, which is the same tensor in this "
        "model, got others; train the adapter with ensure_weight_tying"
    )
    refused(lambda: export(llama / "tied", tmp_path / "onnx", adapter), TargetError, message)


def test_a_linked_task_has_the_graph_of_its_base(llama: Path, tmp_path: Path) -> None:
    adapter = resized(llama / "untied", tmp_path / "adapter", GROWN)
    refused(
        lambda: export(llama / "untied", tmp_path / "onnx", adapter, form="linked", name="french"),
        ConfigError,
        "form: expected baked for an adapter that brings a head or a vocabulary of its own, got linked for "
        "french",
    )


def test_the_tokenizer_of_the_resized_vocabulary_is_the_adapters(llama: Path, tmp_path: Path) -> None:
    """All of its files; one of the base's beside them would belong to another tokenizer."""
    base = shutil.copytree(llama / "untied", tmp_path / "base")
    adapter = resized(base, tmp_path / "adapter", GROWN)
    own = {"tokenizer.json": b"adapter", "tokenizer_config.json": b"{}"}
    for folder, files in ((base, {"tokenizer.json": b"base", "merges.txt": b"base"}), (adapter, own)):
        for name, content in files.items():
            (folder / name).write_bytes(content)
    export(base, tmp_path / "onnx", adapter)
    write_merged_checkpoint(base, adapter, tmp_path / "merged")
    for folder in (tmp_path / "onnx", tmp_path / "merged"):
        found = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
        assert found == own
    same = resized(base, tmp_path / "same", VOCABULARY)
    (same / "tokenizer.json").write_bytes(b"adapter")
    write_merged_checkpoint(base, same, tmp_path / "unchanged")
    assert (tmp_path / "unchanged/tokenizer.json").read_bytes() == b"base"
