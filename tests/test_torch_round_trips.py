"""Adapters of PEFT through our models and back, and ours through PEFT's: same bytes, same function."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fixtures import same_bits, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from loracle.files import LoraConfig, read_adapter
from loracle.reference import ConfigError
from loracle.torch_impl import adapter_of, inject, load_adapter, save_adapter

# PEFT says that it will write copies of embeddings, and takes a bias of lora_B for an incomplete matrix.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
]

WEIGHTS = "adapter_model.safetensors"
IDS = torch.tensor([[5, 9, 2, 7, 31], [1, 3, 3, 8, 40]])


def llama(**options: Any) -> nn.Module:
    return tiny_llama(attention_bias=True, **options).double()


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=264, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    ).double()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    # The other implementations of experts have no float64.
    config = MixtralConfig(vocab_size=264, experts_implementation="eager", **sizes, **heads)
    return MixtralForCausalLM(config).double()


QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}

# One for each field of the configuration.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "r and lora_alpha": (llama, {"r": 3, "lora_alpha": 7, **QV}),
    "lora_dropout": (llama, {"lora_dropout": 0.25, **QV}),
    "target_modules, a regex": (llama, {"target_modules": r".*layers\.1\..*(q|v)_proj"}),
    "target_modules, all-linear": (llama, {"target_modules": "all-linear"}),
    "exclude_modules": (llama, {"exclude_modules": ["layers.0.self_attn.q_proj"], **QV}),
    "layers_to_transform": (llama, {"layers_to_transform": [1], "layers_pattern": ["layers"], **QV}),
    "rank_pattern": (llama, {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, **QV}),
    "alpha_pattern": (llama, {"alpha_pattern": {"v_proj": 5}, **QV}),
    "bias, all": (llama, {"bias": "all", **QV}),
    "bias, lora_only": (llama, {"bias": "lora_only", **QV}),
    "lora_bias": (llama, {"lora_bias": True, **QV}),
    "use_rslora": (llama, {"use_rslora": True, **QV}),
    "use_dora": (llama, {"use_dora": True, **QV}),
    "fan_in_fan_out": (gpt2, {"fan_in_fan_out": True, "target_modules": ["c_attn"]}),
    "modules_to_save": (llama, {"modules_to_save": ["lm_head", "input_layernorm"], **QV}),
    "trainable_token_indices": (llama, {"trainable_token_indices": [1, 3], **QV}),
    "trainable_token_indices, by name": (
        llama,
        {"trainable_token_indices": {"lm_head": [1, 3], "embed_tokens": [2]}, **QV},
    ),
    "target_parameters": (
        mixtral,
        {
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "target_modules": ["q_proj"],
        },
    ),
    "init_lora_weights, False": (llama, {"init_lora_weights": False, **QV}),
    "init_lora_weights, gaussian": (llama, {"init_lora_weights": "gaussian", **QV}),
    "init_lora_weights, orthogonal": (llama, {"init_lora_weights": "orthogonal", **QV}),
    "an embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "ensure_weight_tying": (
        tied_llama,
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
}


def trained_peft(name: str) -> Any:
    """PEFT's model with every trained tensor moved off its start."""
    make, options = CASES[name]
    torch.manual_seed(1)
    model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 16
            parameter.data += noise.to(parameter.dtype)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS).logits
        return result


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(sorted(load_file(folder / WEIGHTS).items()))


def without_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the copies of embeddings' own weights that PEFT writes beside an update of one."""
    return {key: tensor for key, tensor in tensors.items() if ".base_layer.weight" not in key}


def assert_same_function(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    """To one part in a million of what the adapter does; both compute in float64, adapters being float32."""
    effect = float((theirs - base).abs().max())
    assert effect > 1e-4
    assert float((ours - theirs).abs().max()) <= 2.0**-20 * effect


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_peft_goes_through_ours_and_back(name: str, tmp_path: Path) -> None:
    make, _ = CASES[name]
    theirs = trained_peft(name)
    theirs.save_pretrained(str(tmp_path / "peft"))
    model = make().eval()
    base = logits(model)
    load_adapter(model, tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    assert_same_function(logits(model), logits(theirs), base)
    expected, found = tensors_of(tmp_path / "peft"), tensors_of(tmp_path / "ours")
    assert list(found) == list(without_copies(expected))
    assert all(same_bits(found[key], expected[key]) for key in found)
    assert read_adapter(tmp_path / "ours").config == read_adapter(tmp_path / "peft").config
    again = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert same_bits(logits(again), logits(theirs))


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_ours_goes_through_peft_and_back(name: str, tmp_path: Path) -> None:
    make, options = CASES[name]
    model = make().eval()
    base = logits(model)
    inject(model, LoraConfig(**options), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 16
            parameter.data += noise.to(parameter.dtype)
    model.eval()
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert_same_function(logits(model), logits(theirs), base)
    theirs.save_pretrained(str(tmp_path / "peft"))
    back = without_copies(tensors_of(tmp_path / "peft"))
    first = without_copies(tensors_of(tmp_path / "ours"))
    assert list(back) == list(first)
    assert all(same_bits(back[key], first[key]) for key in first)
    other = make().eval()
    load_adapter(other, tmp_path / "peft")
    assert same_bits(logits(other), logits(model))
    kept, first_config = adapter_of(other).config, adapter_of(model).config
    if options.get("ensure_weight_tying"):
        # PEFT names the embedding twice when it saves one that is tied.
        kept = replace(kept, target_modules=tuple(options["target_modules"]))
    if options.get("target_parameters"):
        # They are a set; PEFT writes them in an order of its own.
        kept = replace(kept, target_parameters=tuple(options["target_parameters"]))
    assert kept == first_config


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_taken_from_the_base_is_saved_as_an_adapter_of_the_base_itself(
    init: str, tmp_path: Path
) -> None:
    model = llama().eval()
    base, weights = logits(model), copy.deepcopy(model.state_dict())
    inject(model, LoraConfig(r=2, lora_alpha=4, init_lora_weights=init, target_modules=("q_proj", "v_proj")))
    state = {key.replace(".base_layer", ""): tensor for key, tensor in model.state_dict().items()}
    assert all(same_bits(state[key], weights[key]) for key in weights)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 16
    save_adapter(model, tmp_path / "ours")
    config = read_adapter(tmp_path / "ours").config
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (4, 8, True)
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    assert_same_function(logits(theirs), logits(model), base)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_an_adapter_that_changed_its_base_is_refused_with_the_reason(init: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**QV))
    model.save_pretrained(str(tmp_path / "peft"))
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(path.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{init}"'))
    fresh = tiny_llama()
    with pytest.raises(ConfigError, match=rf"init_lora_weights: .*{init}"):
        load_adapter(fresh, tmp_path / "peft")
    assert not any(isinstance(module, nn.ParameterDict) for module in fresh.modules())
    assert np.array_equal(logits(fresh), logits(tiny_llama()))
