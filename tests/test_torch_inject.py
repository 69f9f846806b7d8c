"""Which layers get an adapter (PEFT is asked the same), and that an error changes nothing."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch_fixtures import Chain, same_bits, tiny_llama
from transformers import BertConfig, BertForSequenceClassification

from loracle.files import LoraConfig
from loracle.reference import ConfigError, TargetError
from loracle.torch_impl import LoraLinear, eject, inject, lora_layers, parse_targets
from loracle.torch_impl.inject import injected_config
from loracle.torch_impl.update import UpdateOptions

SPECS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ("q_proj", "down_proj")},
    "a longer end": {"target_modules": ("self_attn.v_proj", "layers.1.mlp.up_proj")},
    "a whole path": {"target_modules": ("model.layers.0.self_attn.q_proj",)},
    "part of a name is no match": {"target_modules": ("proj", "v_proj")},
    "regex": {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    "excluded by name": {
        "target_modules": ("q_proj", "v_proj"),
        "exclude_modules": ("layers.0.self_attn.q_proj",),
    },
    "excluded by regex": {"target_modules": ("q_proj", "v_proj"), "exclude_modules": r".*\.0\..*"},
    "some layers": {"target_modules": ("q_proj",), "layers_to_transform": (1,)},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear but": {"target_modules": "all-linear", "exclude_modules": ("o_proj",)},
    "all-linear but one": {"target_modules": "all-linear", "exclude_modules": ("layers.0.self_attn.q_proj",)},
}


def as_peft(options: dict[str, Any]) -> Any:
    """PEFT's configuration of the same values."""
    return peft.LoraConfig(**{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()})


def peft_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


@pytest.mark.parametrize("name", SPECS)
def test_the_same_layers_as_peft(name: str) -> None:
    model = tiny_llama()
    expected = peft_layers(peft.get_peft_model(copy.deepcopy(model), as_peft(SPECS[name])))
    assert set(inject(model, LoraConfig(**SPECS[name]))) == set(expected)
    # The targets kept with the model are names that PEFT resolves to the same layers.
    resolved = injected_config(model).target_modules
    kept = {**SPECS[name], "target_modules": resolved}
    again = peft_layers(peft.get_peft_model(tiny_llama(), as_peft(kept)))
    assert set(again) == set(expected)


def test_ranks_and_scalings_by_pattern_are_those_of_peft() -> None:
    options: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ("q_proj", "v_proj"),
        "lora_dropout": 0.25,
        "rank_pattern": {"layers.1.self_attn.q_proj": 4},
        "alpha_pattern": {"v_proj": 5},
    }
    expected = peft_layers(peft.get_peft_model(tiny_llama(), as_peft(options)))
    model = tiny_llama()
    inject(model, LoraConfig(**options))
    assert {
        path: (layer.update().options.r, layer.update().scaling) for path, layer in lora_layers(model).items()
    } == {path: (layer.r["default"], layer.scaling["default"]) for path, layer in expected.items()}
    assert {layer.update().options.dropout for layer in lora_layers(model).values()} == {0.25}


@pytest.mark.parametrize(
    ("targets", "names"),
    [(None, {"q_proj", "v_proj"}), ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"})],
)
def test_shorthands(targets: str | None, names: set[str]) -> None:
    model = tiny_llama()
    paths = inject(model, LoraConfig(target_modules=targets))
    assert {path.rpartition(".")[2] for path in paths} == names
    assert len(paths) == 2 * len(names)
    assert set(injected_config(model).target_modules or ()) == names


def test_parse_targets() -> None:
    assert parse_targets("q_proj, v_proj,") == ("q_proj", "v_proj")
    assert parse_targets("attention") == "attention"
    assert parse_targets("all-linear") == "all-linear"
    with pytest.raises(ConfigError, match="targets"):
        parse_targets(" , ")


def test_only_adapters_are_trained_and_a_seed_fixes_their_start() -> None:
    models = [Chain(), Chain(), Chain()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        inject(model, LoraConfig(r=2), generator=torch.Generator().manual_seed(seed))
    trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
    assert trained == {
        f"{path}.adapters.default.lora_{part}" for path in ("q_proj", "v_proj") for part in "AB"
    }
    one, same, other = (model.q_proj.update().lora_A for model in models)  # type: ignore[operator]
    assert same_bits(one, same)
    assert not same_bits(one, other)
    fourth = Chain()
    state = torch.get_rng_state()
    inject(fourth, LoraConfig(), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_start_is_that_of_peft() -> None:
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    layer = peft.get_peft_model(Chain(), options).base_model.model.q_proj
    torch.manual_seed(7)
    layer.reset_lora_parameters("default", True)
    ours = LoraLinear(nn.Linear(3, 4)).start(UpdateOptions(2, 2), torch.Generator().manual_seed(7))
    assert same_bits(ours.lora_A, layer.lora_A["default"].weight)
    assert same_bits(ours.lora_B, layer.lora_B["default"].weight)


def test_eject_puts_back_the_same_objects() -> None:
    model = Chain()
    layers = dict(model.named_children())
    paths = inject(model, LoraConfig(r=2))
    assert eject(model) == paths
    assert all(module is layers[name] for name, module in model.named_children())
    assert inject(model, LoraConfig(r=2)) == paths


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.free = nn.Linear(3, 3)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.free = nn.Linear(3, 3)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


REFUSED: dict[str, tuple[nn.Module, Any, str]] = {
    "no match": (
        Chain(),
        ("query",),
        r"'query', which no module matches; candidates: q_proj, k_proj, v_proj",
    ),
    "no layer": (nn.Sequential(nn.ReLU()), ("query",), "no layer is linear"),
    "not linear": (Tied(), ("embed",), "embed.weight: .* tied to head"),
    "tied": (Tied(), ("head",), r"head.weight: .* tied to embed"),
    "shared": (Shared(), ("first",), r"first.weight: .* tied to second"),
    "never called": (Attention(), ("out_proj",), "attention.out_proj: .* name the whole module, attention$"),
    "another forward": (nn.Sequential(Scaled(3, 3)), ("0",), "got Scaled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adapted_is_refused_and_left_alone(name: str) -> None:
    model, targets, message = REFUSED[name]
    before = {path: (id(module), type(module)) for path, module in model.named_modules()}
    with pytest.raises(TargetError, match=message):
        inject(model, LoraConfig(target_modules=targets))
    assert {path: (id(module), type(module)) for path, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_linear_leaves_out_what_is_never_called() -> None:
    assert inject(Attention(), LoraConfig(target_modules="all-linear")) == ("free",)


def test_injecting_twice_under_one_name_is_refused() -> None:
    model = Chain()
    inject(model, LoraConfig())
    with pytest.raises(ConfigError, match=r"adapter_name: expected a new one, got 'default'; eject\(\) it"):
        inject(model, LoraConfig(target_modules=("k_proj",)))
    assert set(lora_layers(model)) == {"q_proj", "v_proj"}


def test_a_model_without_adapters_has_no_configuration() -> None:
    with pytest.raises(TargetError, match="Chain: expected a model with adapters"):
        injected_config(Chain())


def test_a_start_that_fails_leaves_the_model_as_it_was() -> None:
    model = Chain()
    children = dict(model.named_children())
    # k_proj (3, 4) has no rank of 4 to take away; q_proj, before it, is done by then.
    config = LoraConfig(
        r=3,
        rank_pattern={"k_proj": 4},
        init_lora_weights="pissa",
        target_modules=("q_proj", "k_proj"),
    )
    with pytest.raises(ConfigError, match=r"r: expected at most 3"):
        inject(model, config)
    assert dict(model.named_children()) == children
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not lora_layers(model)


def test_a_model_in_evaluation_drops_nothing() -> None:
    model = Chain().eval()
    inject(model, LoraConfig(r=2, lora_dropout=0.5))
    assert not any(module.training for module in model.modules())


def test_a_classifiers_head_is_trained_as_peft_has_it() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=30, num_labels=3, **sizes)
    options: dict[str, Any] = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(BertForSequenceClassification(config), peft.LoraConfig(**options))
    model = BertForSequenceClassification(config)
    inject(model, LoraConfig(**options))
    assert injected_config(model).modules_to_save == tuple(theirs.peft_config["default"].modules_to_save)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"classifier.weight", "classifier.bias"}
