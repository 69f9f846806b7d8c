"""Adapter folders: written, read back, exchanged with PEFT, and refused where they do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch_fixtures import Chain, fill_integers, same_bits, tiny_llama

from loracle.files import Adapter, LoraConfig
from loracle.reference import ConfigError, FileError, TargetError
from loracle.torch_impl import adapter_of, inject, load_adapter, lora_layers, save_adapter
from loracle.torch_impl.arrays import tensor_of

# Without a task PEFT takes any module, not only language models.
CONFIG = LoraConfig(r=2, lora_alpha=1, rank_pattern={"v_proj": 1}, task_type=None)
EVERY = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", task_type=None)


def adapted(model: Any, config: LoraConfig = CONFIG) -> Any:
    """The model with adapters of integer values."""
    inject(model, config)
    for seed, layer in enumerate(lora_layers(model).values()):
        for at, parameter in enumerate((layer.update().lora_A, layer.update().lora_B)):
            values = torch.randint(
                -2, 3, parameter.shape, generator=torch.Generator().manual_seed(2 * seed + at)
            )
            parameter.data = values.to(parameter.dtype)
    return model


def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    torch.nn.init.normal_(lora_layers(model)["model.layers.1.self_attn.v_proj"].update().lora_B)
    save_adapter(model, tmp_path / "adapter")
    other = tiny_llama()
    state = torch.get_rng_state()
    assert load_adapter(other, tmp_path / "adapter") == tuple(lora_layers(model))
    assert torch.equal(torch.get_rng_state(), state)
    for path, layer in lora_layers(other).items():
        own, expected = layer.update(), lora_layers(model)[path].update()
        assert same_bits(own.lora_A, expected.lora_A)
        assert same_bits(own.lora_B, expected.lora_B)
        assert own.scaling == expected.scaling
    assert {name for name, p in other.named_parameters() if p.requires_grad} == {
        f"{path}.adapters.default.lora_{part}" for path in lora_layers(model) for part in "AB"
    }


def test_what_adapter_of_returns_is_a_copy() -> None:
    model = adapted(Chain())
    adapter = adapter_of(model)
    before = adapter.pairs["q_proj"].A.copy()
    with torch.no_grad():
        model.q_proj.update().lora_A.add_(1)
    assert np.array_equal(adapter.pairs["q_proj"].A, before)


@pytest.mark.parametrize("config", [CONFIG, EVERY])
def test_peft_computes_the_same_from_our_files(tmp_path: Path, config: LoraConfig) -> None:
    model = adapted(Chain(), config)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(Chain(), str(tmp_path / "adapter"))
    x = torch.randint(-2, 3, (4, 3)).float()
    assert same_bits(theirs(x), model(x))
    assert not same_bits(model(x), Chain()(x))


def test_we_compute_the_same_from_files_of_peft(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 1,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj"],
    }
    theirs = peft.get_peft_model(Chain(), peft.LoraConfig(**options)).eval()
    for seed, parameter in enumerate(p for name, p in theirs.named_parameters() if "lora_" in name):
        holder = nn.ParameterList([parameter])
        fill_integers(holder, seed)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model = Chain()
    load_adapter(model, tmp_path / "adapter")
    x = torch.randint(-2, 3, (4, 3)).float()
    assert same_bits(model(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_values(dtype: torch.dtype) -> None:
    A, B = (
        torch.randn(2, 3, dtype=torch.float64).to(dtype),
        torch.randn(4, 2, dtype=torch.float64).to(dtype),
    )
    from loracle.torch_impl.arrays import array_of

    config = LoraConfig(r=2, target_modules=("q_proj",))
    adapter = Adapter.from_arrays(config, {"q_proj": (array_of(A), array_of(B))})
    model = Chain()
    load_adapter(model, adapter)
    layer = lora_layers(model)["q_proj"].update()
    assert layer.lora_A.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert torch.equal(layer.lora_A.double(), A.double())
    assert torch.equal(layer.lora_B.double(), B.double())
    assert same_bits(tensor_of(adapter.pairs["q_proj"].A), A)


def arrays(A: tuple[int, int], B: tuple[int, int]) -> tuple[Any, Any]:
    return np.ones(A, np.float32), np.ones(B, np.float32)


FITTING = {"q_proj": arrays((2, 3), (4, 2)), "v_proj": arrays((2, 3), (2, 2))}

UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "in": (
        {**FITTING, "q_proj": arrays((2, 5), (4, 2))},
        r"q_proj.lora_A: expected shape \(2, 3\) .* got \(2, 5\)",
    ),
    "out": (
        {**FITTING, "v_proj": arrays((2, 3), (3, 2))},
        r"v_proj.lora_B: expected shape \(2, 2\) .* got \(3, 2\)",
    ),
    "missing": ({"q_proj": FITTING["q_proj"]}, "v_proj: expected lora_A and lora_B"),
    "absent": (
        {**FITTING, "layers.9.q_proj": FITTING["q_proj"]},
        r"layers.9.q_proj: expected a layer of the model, got no such module",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_adapter_for_another_model_is_refused_and_the_model_left_alone(name: str) -> None:
    pairs, message = UNFIT[name]
    adapter = Adapter.from_arrays(LoraConfig(r=2, target_modules=("q_proj", "v_proj")), pairs)
    model = Chain()
    with pytest.raises(TargetError, match=message + r".*is this adapter for another model\?"):
        load_adapter(model, adapter)
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loading_twice_and_saving_nothing_are_refused(tmp_path: Path) -> None:
    model = adapted(Chain(), LoraConfig(r=2))
    adapter = adapter_of(model)
    with pytest.raises(ConfigError, match="adapter_name"):
        load_adapter(model, adapter)
    with pytest.raises(TargetError, match="expected a model with adapters"):
        save_adapter(Chain(), tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    model = adapted(Chain())
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(FileError, match="not empty"):
        save_adapter(model, tmp_path / "adapter")
