"""The tolerance beside an adapter: that of the merged model, and sharp enough to see a fault in one layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import feeds
from torch import nn
from truth_cases import FLOAT32, Feeds, checkpoints, error_of, loaded, outputs, truth_of

from loracle.export.verification.adapter_noise import as_merged
from loracle.export.verification.float64_mode import in_float64
from loracle.export.verification.rounding_noise import RoundingNoise
from loracle.files import Adapter, LoraConfig, LoraPair
from loracle.reference import unit_roundoff
from loracle.torch_impl import adapter_of, inject, load_adapter, lora_layers, merge, merge_and_unload


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of a case, once."""
    return checkpoints(tmp_path_factory.mktemp("bases"))


def random_adapter(base: Path, name: str, config: LoraConfig) -> Adapter:
    """An adapter whose tensors are all random, large enough to change every answer."""
    model = loaded(base, name)
    inject(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for update in layer.updates:
                update.lora_A.normal_(std=0.1, generator=generator)
                update.lora_B.normal_(std=0.1, generator=generator)
                if update.lora_bias is not None:
                    update.lora_bias.normal_(std=0.1, generator=generator)
                if update.lora_magnitude_vector is not None:
                    scales = torch.rand(update.lora_magnitude_vector.shape, generator=generator)
                    update.lora_magnitude_vector.mul_(scales + 0.5)
    return adapter_of(model)


KINDS = {
    "every linear layer": ("llama", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")),
    "large updates": ("llama", LoraConfig(r=8, lora_alpha=160, target_modules="all-linear")),
    "DoRA": ("qwen2", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)),
    "a bias of lora_B": ("qwen2", LoraConfig(r=4, target_modules=("q_proj", "k_proj"), lora_bias=True)),
    "stored (in, out)": ("gpt2", LoraConfig(r=4, lora_alpha=8, target_modules=("c_attn", "c_proj"))),
    "a tied embedding": ("gpt2", LoraConfig(r=4, target_modules=("wte",), ensure_weight_tying=True)),
    "a convolution": ("vit", LoraConfig(r=4, lora_alpha=8, target_modules=("projection", "q_proj"))),
    "experts": (
        "mixtral",
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=(),
            target_parameters=("experts.gate_up_proj", "experts.down_proj"),
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_beside_an_adapter_is_that_of_the_merged_model(
    bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Draw for draw: products of A and B add none, an adapted layer is one product, of the merged weight."""
    name, config = KINDS[kind]
    adapter = random_adapter(bases(name), name, config)
    model = loaded(bases(name), name, torch.float64)
    load_adapter(model, adapter)
    merge_and_unload(model)
    model.save_pretrained(tmp_path / "merged")
    inputs = feeds(name)
    truths = truth_of(bases(name), adapter, name).evaluate_feeds(inputs, FLOAT32)
    merged = truth_of(tmp_path / "merged", None, name).evaluate_feeds(inputs, FLOAT32)
    plain = truth_of(bases(name), None, name).evaluate_feeds(inputs, FLOAT32)
    for key, truth in truths.items():
        # Variances are computed in float32.
        assert truth.deviation == pytest.approx(merged[key].deviation, rel=64 * unit_roundoff(FLOAT32))
        assert np.abs(truth.logits - merged[key].logits).max() < truth.deviation / 1000
        assert np.abs(truth.logits - plain[key].logits).max() > 100 * truth.tolerance


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 7)),
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"), (4, 9)),
        (nn.Linear(5, 7), (2, 3, 5)),
    ],
    ids=["convolution in groups", "circular convolution without a batch", "linear of three axes"],
)
def test_an_adapted_layer_by_itself_has_the_merged_layers_noise(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(layer)
    inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=("0",), init_lora_weights=False))
    model.double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def drawn() -> torch.Tensor:
        results = []
        for noise in (RoundingNoise(2.0**-11, 2.0**-11, 1), None):
            with in_float64(model, noise) as mode, as_merged(model, mode):
                results.append(model(x))
        return results[0] - results[1]

    unmerged = drawn()
    merge_and_unload(model)
    merged = drawn()
    assert bool((merged.abs() > 0).all())
    assert torch.allclose(unmerged, merged, rtol=64 * unit_roundoff(FLOAT32), atol=1e-14)


def without_one(adapter: Adapter, path: str) -> Adapter:
    return scaled_in_one(adapter, path, 0.0)


def scaled_in_one(adapter: Adapter, path: str, factor: float) -> Adapter:
    pair = adapter.pairs[path]
    wrong = LoraPair(pair.A, np.float32(factor) * pair.B, pair.scaling, pair.kind, pair.bias, pair.magnitude)
    return Adapter(adapter.config, {**adapter.pairs, path: wrong}, adapter.tensors, adapter.tokens)


def merged_outputs(base: Path, name: str, adapter: Adapter, inputs: Feeds, narrow: str = "") -> Any:
    """What a float32 model answers with an adapter merged, one of its matrices rounded to bfloat16."""
    model = loaded(base, name)
    load_adapter(model, adapter)
    merge(model)
    if narrow:
        weight = lora_layers(model)[narrow].weight
        weight.copy_(weight.bfloat16())
    return outputs(model, inputs)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt2", "mixtral", "bert_sequence", "bert_question", "vit", "bart"]
)
def test_a_fault_in_one_layer_is_outside_the_tolerance_and_a_right_merge_inside(
    bases: Callable[[str], Path], name: str
) -> None:
    """A delta dropped, a scaling off by a tenth, one matrix in bfloat16: in an early layer and a late one."""
    inputs = feeds(name)
    adapter = random_adapter(bases(name), name, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    truths = truth_of(bases(name), adapter, name).evaluate_feeds(inputs, FLOAT32)

    def ratio(wrong: Adapter, narrow: str = "") -> float:
        with torch.no_grad():
            got = merged_outputs(bases(name), name, wrong, inputs, narrow)
        return error_of(got, truths, inputs, name)

    assert 0.001 < ratio(adapter) < 1
    paths = list(adapter.pairs)
    for path in (paths[0], paths[-2]):
        assert ratio(without_one(adapter, path)) > 1, path
        assert ratio(scaled_in_one(adapter, path, 1.1)) > 1, path
        assert ratio(adapter, path) > 1, path
