"""A classifier's head that an adapter brings: merged, the model is what transformers makes of it itself."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_fixtures import (
    CASES,
    LABELS,
    Case,
    classifier,
    heads_of,
    load_merged,
    load_unmerged,
    logits,
    named,
    our_adapter,
    pefts_adapter,
    randomize,
    rewrite,
    write_base,
)
from refusal import refused
from safetensors.torch import load_file, save_file

from loracle.files import Checkpoint, MergedWeights, read_adapter, write_adapter, write_merged_checkpoint
from loracle.files.head_config import HeadConfig
from loracle.reference import DTypeError, LoracleError, ShapeError, TargetError
from loracle.torch_impl import LoraConfig, inject, load_adapter, merge_and_unload, save_adapter

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("maker", [our_adapter, pefts_adapter])
@pytest.mark.parametrize("name", CASES)
def test_merged_tensors_are_those_of_merge_and_unload(
    tmp_path: Path, name: str, maker: Callable[[Path, Case, Path], Path]
) -> None:
    case = CASES[name]
    base = write_base(tmp_path / "base", case)
    adapter = maker(base, case, tmp_path / "adapter")
    write_merged_checkpoint(base, adapter, tmp_path / "merged")
    model = classifier(base, case)
    load_adapter(model, adapter)
    merge_and_unload(model)
    if maker is our_adapter:
        named(model)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert ours[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    merged = load_merged(tmp_path / "merged", case)
    assert type(merged) is type(model)
    assert torch.equal(logits(merged), logits(model))
    for key in ("architectures", "id2label", "label2id", "pad_token_id", "model_type"):
        assert getattr(merged.config, key, None) == getattr(model.config, key, None), key
    assert merged.config.num_labels == len(LABELS)


@pytest.mark.parametrize(
    "name", ["BertModel", "RobertaForMaskedLM", "DistilBertModel", "GPT2Model", "ViTModel"]
)
def test_the_merged_classifier_answers_as_the_unmerged_one(tmp_path: Path, name: str) -> None:
    """In float64 the two differ by far less than float32 rounds either."""
    case = CASES[name]
    base = write_base(tmp_path / "base", case, torch.float64)
    adapter = our_adapter(base, case, tmp_path / "adapter")
    write_merged_checkpoint(base, adapter, tmp_path / "merged")
    merged = load_merged(tmp_path / "merged", case)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float64}
    unmerged = named(classifier(base, case))
    load_adapter(unmerged, adapter)
    expected = logits(unmerged)
    difference = (logits(merged) - expected).abs().max()
    assert difference < (logits(unmerged.float()).double() - expected).abs().max()


def test_a_bfloat16_model_gets_a_head_rounded_once_at_the_end(tmp_path: Path) -> None:
    case = CASES["BertModel"]
    base = write_base(tmp_path / "base", case, torch.bfloat16)
    adapter = our_adapter(base, case, tmp_path / "adapter")
    head = {name: array.astype(np.float32) * np.float32(1.001) for name, array in heads_of(adapter).items()}
    adapter = rewrite(adapter, tmp_path / "wide", tensors=head)
    with Checkpoint(base) as checkpoint:
        merged = MergedWeights(checkpoint, read_adapter(adapter))
        assert merged.names[-2:] == ("classifier.bias", "classifier.weight")
        for name, array in head.items():
            assert merged.dtype(name) == merged.dtype("bert.pooler.dense.weight")
            rounded = torch.from_numpy(array).bfloat16().view(torch.int16).numpy()
            assert merged.tensor(name).tobytes() == rounded.tobytes()
            assert merged.tensor(name, np.float32).tobytes() == array.tobytes()
            assert merged.rows(name, 1, 3, np.float32).tobytes() == array[1:3].tobytes()
            assert merged.base_tensor(name) is None
            merged.release(name)
    write_merged_checkpoint(base, adapter, tmp_path / "merged")
    written = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    write_merged_checkpoint(base, adapter, tmp_path / "converted", dtype=np.float32)
    converted = load_file(tmp_path / "converted/model.safetensors")
    assert converted["classifier.weight"].numpy().tobytes() == head["classifier.weight"].tobytes()
    config = json.loads((tmp_path / "converted/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["dtype"] == "float32"


def test_a_classifier_of_other_classes_gets_the_new_ones(tmp_path: Path) -> None:
    case = CASES["RobertaModel"]
    first = classifier(write_base(tmp_path / "base", case), case, num_labels=5)
    first.config.problem_type = "multi_label_classification"
    first.save_pretrained(tmp_path / "five")
    model = named(classifier(tmp_path / "five", case, ignore_mismatched_sizes=True))
    model.config.problem_type = "single_label_classification"
    inject(model, LoraConfig(r=2, target_modules=case.targets, task_type=case.task))
    randomize(model)
    save_adapter(model, tmp_path / "ours")
    write_merged_checkpoint(tmp_path / "five", tmp_path / "ours", tmp_path / "merged")
    merged = load_merged(tmp_path / "merged", case)
    assert torch.equal(logits(merged), logits(load_unmerged(tmp_path / "five", case, tmp_path / "ours")))
    assert merged.config.id2label == dict(enumerate(LABELS))
    assert merged.config.problem_type == "single_label_classification"
    # PEFT's folder says nothing of the classes
    untold = rewrite(tmp_path / "ours", tmp_path / "untold", head=None)
    write_merged_checkpoint(tmp_path / "five", untold, tmp_path / "numbered")
    numbered = load_merged(tmp_path / "numbered", case)
    assert numbered.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert numbered.config.problem_type is None


def test_a_classifier_of_the_same_classes_keeps_their_names_and_its_file(tmp_path: Path) -> None:
    case = CASES["BertModel"]
    first = named(classifier(write_base(tmp_path / "base", case), case))
    first.config.problem_type = "multi_label_classification"
    first.save_pretrained(tmp_path / "three")
    adapter = pefts_adapter(tmp_path / "three", case, tmp_path / "adapter")
    write_merged_checkpoint(tmp_path / "three", adapter, tmp_path / "merged")
    before, after = ((tmp_path / folder / "config.json").read_bytes() for folder in ("three", "merged"))
    assert before == after
    with Checkpoint(tmp_path / "three") as checkpoint:
        merged = MergedWeights(checkpoint, read_adapter(adapter))
        assert merged.names == checkpoint.names
        assert {"classifier.weight", "classifier.bias"} < set(merged.merged_names)
        assert merged.config == checkpoint.config
        for name in ("classifier.weight", "bert.pooler.dense.weight"):
            own = merged.base_tensor(name)
            assert own is not None
            assert own.tobytes() == checkpoint.tensor(name).tobytes()


def test_buffers_of_old_checkpoints_come_along_in_whole_shards(tmp_path: Path) -> None:
    """Several files, of which another class's head fills one; buffers keep their dtype."""
    case = CASES["BertForMaskedLM"]
    base = write_base(tmp_path / "base", case)
    state = load_file(base / "model.safetensors")
    head = {name: tensor for name, tensor in state.items() if name.startswith("cls.")}
    body = {name: tensor for name, tensor in state.items() if name not in head}
    body["bert.embeddings.position_ids"] = torch.arange(3, dtype=torch.uint8)
    files = {"model-00001-of-00002.safetensors": head, "model-00002-of-00002.safetensors": body}
    (base / "model.safetensors").unlink()
    for name, tensors in files.items():
        save_file(tensors, base / name, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    adapter = our_adapter(base, case, tmp_path / "adapter")
    result = write_merged_checkpoint(base, adapter, tmp_path / "merged")
    assert result.files == ("model-00002-of-00002.safetensors",)
    with Checkpoint(tmp_path / "merged") as merged:  # which compares the files with their index
        ids = "bert.embeddings.position_ids"
        assert merged.tensor(ids).tobytes() == bytes(range(3))
        assert all(merged.tensor(name).flags.aligned for name in merged.names)
        assert merged.total_bytes == result.total_bytes == merged.index["metadata"]["total_size"]
        assert result.tensors == len(merged.names)
        expected = load_unmerged(base, case, adapter).state_dict()
        assert set(merged.names) - {ids} == expected.keys()
        for name, tensor in expected.items():
            assert merged.tensor(name).tobytes() == tensor.numpy().tobytes()


def test_embeddings_of_a_classifier_are_not_tied_to_an_output_layer(tmp_path: Path) -> None:
    """GPT-2's checkpoint says nothing of ties, and its classifier has no output layer."""
    case = replace(CASES["GPT2Model"], targets=("wte",))
    base = write_base(tmp_path / "base", case)
    adapter = our_adapter(base, case, tmp_path / "adapter")
    write_merged_checkpoint(base, adapter, tmp_path / "merged")
    expected = load_unmerged(base, case, adapter).state_dict()
    ours = load_file(tmp_path / "merged/model.safetensors")
    assert torch.equal(ours["transformer.wte.weight"], expected["transformer.wte.weight"])
    causal = replace(read_adapter(adapter).config, task_type="CAUSAL_LM", modules_to_save=None)
    bare = rewrite(adapter, tmp_path / "causal", config=causal, tensors={}, head=None)
    refused(
        lambda: write_merged_checkpoint(base, bare, tmp_path / "none"),
        TargetError,
        "wte.weight: input and output embeddings of this model are one tensor, so merging into "
        "transformer.wte would change both; train the adapter without transformer.wte, or with "
        "ensure_weight_tying",
    )


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        (
            "BertModel",
            {"task_type": "CAUSAL_LM"},
            TargetError,
            "classifier.bias: the model has no such tensor, the adapter replaces it; is this adapter for "
            "another model?",
        ),
        (
            "BertModel",
            {"task_type": "TOKEN_CLS", "head": None, "without": "classifier."},
            TargetError,
            "extra.weight: the model has no such tensor, the adapter replaces it; is this adapter for "
            "another model?",
        ),
        (
            "BertForMaskedLM",
            {"without": "bert.pooler."},
            TargetError,
            "bert.pooler: expected in the model or in the adapter, as BertForSequenceClassification has it, "
            "got neither; train the adapter with it in modules_to_save",
        ),
        (
            "DistilBertModel",
            {"without": "pre_classifier."},
            TargetError,
            "pre_classifier: expected in the model or in the adapter, as DistilBertForSequenceClassification "
            "has it, got neither; train the adapter with it in modules_to_save",
        ),
        (
            "RobertaModel",
            {"head": HeadConfig(labels=("a", "b"))},
            ShapeError,
            "classifier: expected an output for each of the adapter's 2 labels, got 3; are labels and "
            "weights of one adapter?",
        ),
        (
            "BertModel",
            {"cast": np.int32},
            DTypeError,
            "classifier.bias: expected a floating-point tensor of the head, got int32; train the adapter "
            "again",
        ),
    ],
)
def test_what_is_no_whole_head_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], error: type[LoracleError], message: str
) -> None:
    case = CASES[name]
    base = write_base(tmp_path / "base", case)
    own = read_adapter(our_adapter(base, case, tmp_path / "adapter"))
    without, cast = changes.get("without", "\0"), changes.get("cast", np.float32)
    tensors = {key: array.astype(cast) for key, array in own.tensors.items() if not key.startswith(without)}
    saved = own.config.modules_to_save or ()
    if "TOKEN_CLS" in changes.values():
        tensors["extra.weight"], saved = np.ones((3, 16), np.float32), (*saved, "extra")
    task = changes.get("task_type", own.config.task_type)
    config = replace(own.config, task_type=task, modules_to_save=saved)
    head = None if task != own.config.task_type else changes.get("head", own.head)
    write_adapter(tmp_path / "changed", replace(own, config=config, tensors=tensors, head=head))
    refused(lambda: write_merged_checkpoint(base, tmp_path / "changed", tmp_path / "out"), error, message)
    assert not (tmp_path / "out").exists()
