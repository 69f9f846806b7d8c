"""An adapter's names may have or lack the body's prefix; the checkpoint's own names stay what they are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from files_fixtures import Array, random_array, write_model
from head_fixtures import DISTIL, GPT2, SIZES, randomize
from refusal import refused
from safetensors.torch import load_file

from loracle.files import (
    Adapter,
    Checkpoint,
    LoraConfig,
    LoraPair,
    MergedWeights,
    write_merged_checkpoint,
)
from loracle.reference import TargetError, merge_exact
from loracle.torch_impl import adapter_of, inject, merge_and_unload, save_adapter


def gpt2(kind: str) -> Any:
    return getattr(hf, kind)(hf.GPT2Config(**GPT2))


def bert(kind: str) -> Any:
    return getattr(hf, kind)(hf.BertConfig(**SIZES))


def distilbert(kind: str) -> Any:
    return getattr(hf, kind)(hf.DistilBertConfig(**DISTIL))


@pytest.mark.parametrize(
    ("make", "stored", "trained", "targets"),
    [
        (gpt2, "GPT2Model", "GPT2LMHeadModel", ("c_attn",)),
        (gpt2, "GPT2LMHeadModel", "GPT2Model", ("c_attn", "c_fc")),
        (bert, "BertForSequenceClassification", "BertModel", ("query",)),
        (distilbert, "DistilBertForMaskedLM", "DistilBertModel", ("q_lin",)),
    ],
)
def test_a_body_and_its_model_with_a_head_take_each_others_adapters(
    tmp_path: Path, make: Callable[[str], Any], stored: str, trained: str, targets: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    make(stored).save_pretrained(tmp_path / "base")
    model = getattr(hf, trained).from_pretrained(tmp_path / "base")
    inject(model, LoraConfig(r=2, target_modules=targets, task_type=None, bias="all"))
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    result = write_merged_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert list(before) == list(after)
    assert (tmp_path / "base/config.json").read_bytes() == (tmp_path / "merged/config.json").read_bytes()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == set(result.merged_names)
    merge_and_unload(model)
    loaded, report = getattr(hf, trained).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_layers_that_transformers_renames_are_merged_under_the_checkpoints_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    hf.ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    model = hf.ViTForImageClassification.from_pretrained(tmp_path / "base")
    inject(model, LoraConfig(r=2, target_modules=("q_proj", "o_proj", "fc1", "fc2"), task_type=None))
    randomize(model)
    assert set(adapter_of(model).pairs) == {
        f"vit.layers.0.{name}" for name in ("attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    }
    save_adapter(model, tmp_path / "adapter")
    result = write_merged_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert set(result.merged_names) == {
        f"vit.encoder.layer.0.{name}.weight"
        for name in (
            "attention.attention.query",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    }
    merge_and_unload(model)
    loaded = hf.ViTForImageClassification.from_pretrained(tmp_path / "merged")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


A, B = random_array((2, 6), 1), random_array((8, 2), 2)
TENSORS = {"h.0.w.weight": random_array((8, 6), 3), "h.0.w.bias": random_array((8,), 4)}
BUFFERS = {"h.0.attn.bias": np.ones((1, 1, 3, 3), bool), "h.0.attn.masked_bias": np.float32([-1e4])}


def gpt2_base(folder: Path, tensors: dict[str, Array]) -> Path:
    return write_model(folder, [tensors], {"model_type": "gpt2"})


def adapter_for(path: str, **options: Any) -> Adapter:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=(path.rpartition(".")[2],), **options)
    return Adapter(config, {path: LoraPair(A, B, 2.0, bias=B[:, 0] if config.lora_bias else None)})


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("stored", ["", "transformer."])
def test_biases_and_rows_are_found_like_weights(tmp_path: Path, prefix: str, stored: str) -> None:
    tensors = {"wte.weight": random_array((9, 6), 5), **TENSORS, **BUFFERS}
    base = gpt2_base(tmp_path / "m", {f"{stored}{name}": array for name, array in tensors.items()})
    tokens: dict[str, Any] = {"trainable_token_indices": {"wte": (3, 1)}}
    config = replace(adapter_for("h.0.w", lora_bias=True, bias="lora_only").config, **tokens)
    rows, trained = random_array((2, 6), 7), random_array((8,), 8)
    pair = LoraPair(A, B, 2.0, bias=B[:, 0])
    adapter = Adapter(
        config, {f"{prefix}h.0.w": pair}, {f"{prefix}h.0.w.bias": trained}, {f"{prefix}wte": rows}
    )
    with Checkpoint(base) as checkpoint:
        merged = MergedWeights(checkpoint, adapter)
        assert merged.names == checkpoint.names
        changed = {f"{stored}{name}" for name in ("wte.weight", "h.0.w.weight", "h.0.w.bias")}
        assert set(merged.merged_names) == changed
        ours = {name.removeprefix(stored): merged.tensor(name) for name in merged.names}
    np.testing.assert_array_equal(ours["wte.weight"][[3, 1]], rows)
    weight = np.asarray(merge_exact(TENSORS["h.0.w.weight"], A, B, 2.0, np.float32))
    assert ours["h.0.w.weight"].tobytes() == weight.tobytes()
    bias = np.asarray(merge_exact(trained[:, None], np.ones((1, 1)), B[:, :1], 2.0, np.float32))
    assert ours["h.0.w.bias"].tobytes() == bias.tobytes()
    for name, array in BUFFERS.items():
        assert ours[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("stored", ["", "transformer."])
def test_stacked_parameters_are_found_like_weights(tmp_path: Path, prefix: str, stored: str) -> None:
    name = f"{stored}experts.up"
    base = gpt2_base(tmp_path / "m", {name: random_array((1, 8, 6), 6)})
    config = LoraConfig(r=2, lora_alpha=4, target_modules=(), target_parameters=("experts.up",))
    adapter = Adapter(config, {f"{prefix}experts.up": LoraPair(A, B, 2.0, "parameter")})
    with Checkpoint(base) as checkpoint:
        merged = MergedWeights(checkpoint, adapter)
        exact = np.asarray(merge_exact(random_array((1, 8, 6), 6)[0], A, B, 2.0, np.float32))
        assert merged.merged_names == (name,)
        assert merged.tensor(name)[0].tobytes() == exact.tobytes()


def test_the_very_name_is_preferred_to_one_with_the_prefix(tmp_path: Path) -> None:
    both = {**TENSORS, "transformer.h.0.w.weight": random_array((8, 6), 9)}
    with Checkpoint(gpt2_base(tmp_path / "m", both)) as checkpoint:
        for path in ("h.0.w", "transformer.h.0.w"):
            assert MergedWeights(checkpoint, adapter_for(path)).merged_names == (f"{path}.weight",)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            adapter_for("model.h.0.w"),
            "model.h.0.w.weight: the model has no such tensor, the adapter has a pair for shape (8, 6); is "
            "this adapter for another model?",
        ),
        (
            Adapter(
                adapter_for("h.0.w").config,
                dict.fromkeys(("h.0.w", "transformer.h.0.w"), LoraPair(A, B, 2.0)),
            ),
            "h.0.w.weight: two pairs of the adapter are of it, transformer.h.0.w is one; is this adapter for "
            "another model?",
        ),
        (
            replace(
                adapter_for("h.0.w", bias="all"),
                tensors=dict.fromkeys(("h.0.w.bias", "transformer.h.0.w.bias"), B[:, 0]),
            ),
            "h.0.w.bias: two tensors of the adapter take its place, transformer.h.0.w.bias is one; is this "
            "adapter for another model?",
        ),
    ],
)
def test_a_name_that_is_nowhere_or_given_twice_is_refused(
    tmp_path: Path, adapter: Adapter, message: str
) -> None:
    with Checkpoint(gpt2_base(tmp_path / "m", TENSORS)) as checkpoint:
        refused(lambda: MergedWeights(checkpoint, adapter), TargetError, message)


def test_a_model_type_that_is_not_known_has_no_prefix(tmp_path: Path) -> None:
    base = write_model(tmp_path / "m", [TENSORS], {"model_type": "unheard of"})
    with Checkpoint(base) as checkpoint:
        assert MergedWeights(checkpoint, adapter_for("h.0.w")).merged_names == ("h.0.w.weight",)
        with pytest.raises(TargetError, match=r"^transformer\.h\.0\.w\.weight: the model has no such tensor"):
            MergedWeights(checkpoint, adapter_for("transformer.h.0.w"))
