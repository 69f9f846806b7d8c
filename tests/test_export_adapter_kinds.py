"""Whatever an adapter can be is merged into the graph once: as `loracle merge` does, by its mathematics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as hf
from architectures import AUTO, CASES, feeds, make
from numpy.typing import NDArray
from refusal import refused

from loracle.export import export, verify
from loracle.export.texts import texts_of
from loracle.files import LoraPair, read_adapter, write_adapter, write_merged_checkpoint
from loracle.reference import TargetError
from loracle.torch_impl import LoraConfig, inject, save_adapter

TOKENS = tuple(
    texts_of(Path(), {"vocab_size": 264, "bos_token_id": 1, "eos_token_id": 2}, None).tokens[0][:3]
)


@dataclass(frozen=True)
class Kind:
    """An adapter of a case: what its configuration says, and how many tensors it changes."""

    case: str
    merged: int
    options: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "ranks and alphas by pattern": Kind(
        "llama",
        6,
        {
            "target_modules": ("q_proj", "v_proj", "down_proj"),
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"v_proj": 3.0},
        },
    ),
    "rsLoRA": Kind("llama", 4, {"target_modules": ("k_proj", "o_proj"), "use_rslora": True}),
    "DoRA": Kind("llama", 4, {"target_modules": ("q_proj", "down_proj"), "use_dora": True}),
    "one layer": Kind("llama", 2, {"target_modules": ("q_proj", "up_proj"), "layers_to_transform": (1,)}),
    "an embedding": Kind("llama", 3, {"target_modules": ("embed_tokens", "q_proj")}),
    "an output layer": Kind("llama", 1, {"target_modules": ("lm_head",)}),
    "an embedding that is tied": Kind(
        "gpt2", 3, {"target_modules": ("wte", "c_attn"), "ensure_weight_tying": True, "fan_in_fan_out": True}
    ),
    "a scaled embedding that is tied": Kind(
        "gemma3", 1, {"target_modules": ("embed_tokens",), "ensure_weight_tying": True}
    ),
    "rows of tokens": Kind("llama", 3, {"target_modules": ("q_proj",), "trainable_token_indices": TOKENS}),
    "rows of tokens that are tied": Kind(
        "gpt2", 3, {"target_modules": ("c_attn",), "trainable_token_indices": TOKENS, "fan_in_fan_out": True}
    ),
    "an output layer saved whole": Kind(
        "llama", 3, {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)}
    ),
    "embedding and norm saved whole": Kind(
        "llama", 4, {"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens", "model.norm")}
    ),
    "a tied embedding saved whole": Kind(
        "gpt2",
        3,
        {
            "target_modules": ("attn.c_proj",),
            "modules_to_save": ("wte",),
            "ensure_weight_tying": True,
            "fan_in_fan_out": True,
        },
    ),
    "all biases": Kind("bert_sequence", 2 + 19, {"target_modules": ("query",), "bias": "all"}),
    "biases of adapted layers": Kind("qwen2", 4, {"target_modules": ("k_proj",), "bias": "lora_only"}),
    "a bias of lora_B": Kind("qwen2", 8, {"target_modules": ("q_proj", "v_proj"), "lora_bias": True}),
    "a classifier saved whole": Kind(
        "bert_sequence", 4, {"target_modules": ("key",), "modules_to_save": ("classifier",)}
    ),
    "a convolution": Kind("vit", 3, {"target_modules": ("patch_embeddings.projection", "q_proj")}),
}


def adapter_of(base: Path, kind: Kind, folder: Path) -> Path:
    """An adapter with all that it trains at random."""
    model = getattr(hf, AUTO[CASES[kind.case].task]).from_pretrained(base)
    generator = torch.Generator().manual_seed(7)
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **kind.options}), generator=generator)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                if "magnitude" in path:
                    parameter.mul_(1.5)
                else:
                    parameter.normal_(std=0.15, generator=generator)
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with base and onnx of a case, made once."""
    root = tmp_path_factory.mktemp("kinds")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            export(make(root / name / "base", name), root / name / "onnx")
        return root / name

    return folder


def answers(folder: Path, name: str) -> NDArray[Any]:
    """The first output for the inputs of a case, or for a text with the tokens that adapters train."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    inputs = feeds(name)
    if "input_ids" in inputs:
        inputs["input_ids"][:, : len(TOKENS)] = TOKENS
    inputs |= {
        entry.name: np.zeros((2, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    result: NDArray[Any] = session.run(None, inputs)[0]
    return result


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_merged_as_its_mathematics_say(
    bases: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Verified against the unmerged model in float64; the same bytes as an export of the merged folder."""
    kind = KINDS[name]
    root = bases(kind.case)
    adapter = adapter_of(root / "base", kind, tmp_path / "adapter")
    summary = export(root / "base", tmp_path / "onnx", adapter)
    assert len(summary.merged_names) == kind.merged, summary.merged_names
    report = verify(tmp_path / "onnx", root / "base", adapter, new_tokens=2)
    assert report.passed, report.checks
    assert report.tolerance is not None
    change = np.abs(answers(tmp_path / "onnx", kind.case) - answers(root / "onnx", kind.case))
    assert change.max() > 10 * report.tolerance
    write_merged_checkpoint(root / "base", adapter, tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "again")
    for file in ("model.onnx", "model.onnx_data", "config.json"):
        assert (tmp_path / "onnx" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def changed(adapter: Path, out: Path, change: Callable[[dict[str, LoraPair]], None], **options: Any) -> Path:
    """The adapter with other pairs."""
    read = read_adapter(adapter)
    pairs = dict(read.pairs)
    change(pairs)
    write_adapter(out, replace(read, config=replace(read.config, **options), pairs=pairs))
    return out


def test_a_tensor_that_finds_no_weight_and_a_target_without_tensors_are_named(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("llama") / "base"
    whole = adapter_of(base, Kind("llama", 4, {"target_modules": ("q_proj", "v_proj")}), tmp_path / "whole")
    last = "model.layers.1.self_attn.q_proj"

    def out_of_range(pairs: dict[str, LoraPair]) -> None:
        pairs["model.layers.2.self_attn.q_proj"] = pairs[last]

    cases: tuple[tuple[Path, str], ...] = (
        (
            changed(whole, tmp_path / "more", out_of_range),
            "model.layers.2.self_attn.q_proj.weight: the model has no such tensor, the adapter has a pair "
            "for shape (64, 48); is this adapter for another model?",
        ),
        (
            changed(whole, tmp_path / "less", lambda pairs: pairs.pop(last)),
            f"{last}.weight: targeted by the adapter's config (target_modules ('q_proj', 'v_proj')), but the "
            "adapter has no lora_A and lora_B for it; was the copy complete?",
        ),
        (
            changed(whole, tmp_path / "none", lambda _: None, target_modules=("o_proj", "q_proj", "v_proj")),
            "model.layers.0.self_attn.o_proj.weight: targeted by the adapter's config (target_modules "
            "('o_proj', 'q_proj', 'v_proj')), but the adapter has no lora_A and lora_B for it; was the copy "
            "complete?",
        ),
    )
    for adapter, message in cases:
        refused(partial(export, base, tmp_path / "onnx", adapter), TargetError, message)
    assert not (tmp_path / "onnx").exists()
