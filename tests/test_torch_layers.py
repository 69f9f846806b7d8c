"""`LoraLinear`: what it wraps, how it starts, and when dropout applies."""

import copy

import pytest
import torch
from torch import nn
from torch_fixtures import same_bits

from loracle.reference import ConfigError, ShapeError, TargetError
from loracle.torch_impl import LoraLinear, lora_linear


def layer_of(base: nn.Linear | None = None, **options: float) -> LoraLinear:
    torch.manual_seed(0)
    layer = LoraLinear(base or nn.Linear(3, 4), 2, 3.0, **options)  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B)
    return layer


def test_a_fresh_layer_computes_what_its_base_does() -> None:
    base = nn.Linear(3, 4)
    layer = LoraLinear(base, 2, 3.0)
    x = torch.randn(5, 3)
    assert same_bits(layer(x), base(x))
    assert layer.base_layer is base
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (3, 4)
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_adapters_are_float32_or_wider(base: torch.dtype, adapter: torch.dtype) -> None:
    layer = LoraLinear(nn.Linear(3, 4, dtype=base), 2, 3.0)
    assert layer.lora_A.dtype is layer.lora_B.dtype is adapter
    x = torch.ones(3, dtype=base, requires_grad=True)
    y = layer(x)
    assert y.dtype is base
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is base
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.dtype is adapter


def test_scaling() -> None:
    assert LoraLinear(nn.Linear(3, 4), 4, 3.0).scaling == 0.75
    assert LoraLinear(nn.Linear(3, 4), 4, 3.0, use_rslora=True).scaling == 1.5


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_multiplies_the_adapters_input_while_training_only(autocast: bool) -> None:
    layer = layer_of(dropout=0.25)
    x = torch.randn(50, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.manual_seed(4)
        trained = layer(x)
        torch.manual_seed(4)
        multiplier = torch.empty_like(x, dtype=trained.dtype).bernoulli_(0.75).div_(0.75)
        operands = (layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
        assert same_bits(trained, lora_linear(x, *operands, multiplier))
        layer.eval()
        state = torch.get_rng_state()
        assert same_bits(layer(x), lora_linear(x, *operands))
        assert torch.equal(torch.get_rng_state(), state)
        assert not same_bits(layer(x), trained)
    # Independent draws for each entry, not for each row or column.
    kept = multiplier != 0
    assert set(multiplier.unique().tolist()) == {0.0, float(torch.ones((), dtype=trained.dtype) / 0.75)}
    assert (kept.any(dim=1) & ~kept.all(dim=1)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 0}, "^r:"), ({"lora_alpha": float("inf")}, "lora_alpha"), ({"dropout": 1.0}, "lora_dropout")],
)
def test_wrong_options_are_refused_before_the_base_is_frozen(options: dict[str, float], message: str) -> None:
    base = nn.Linear(3, 4)
    with pytest.raises(ConfigError, match=message):
        LoraLinear(base, **{"r": 2, "lora_alpha": 1.0, **options})  # type: ignore[arg-type]
    assert base.weight.requires_grad


def test_only_linear_layers_are_wrapped() -> None:
    with pytest.raises(TargetError, match=r"torch\.nn\.Linear, got Embedding"):
        LoraLinear(nn.Embedding(3, 4), 2, 1.0)  # type: ignore[arg-type]


def test_a_merged_weight_must_fit() -> None:
    layer = layer_of()
    for wrong in (torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float64)):
        with pytest.raises(ShapeError, match="weight: expected"):
            layer.set_merged_weight(wrong)
    assert not layer.merged
    layer.set_merged_weight(torch.zeros(4, 3))
    with pytest.raises(TargetError, match="unmerge it first"):
        layer.set_merged_weight(torch.zeros(4, 3))


def test_a_merged_layer_is_its_base() -> None:
    layer = layer_of(dropout=0.5)
    layer.set_merged_weight(torch.ones(4, 3))
    x = torch.randn(2, 3)
    assert same_bits(layer(x), nn.functional.linear(x, torch.ones(4, 3), layer.bias))
    assert not layer(x).requires_grad
    assert "merged=True" in repr(layer)


def test_a_copy_is_independent() -> None:
    layer = layer_of()
    layer.set_merged_weight(torch.zeros(4, 3))
    other = copy.deepcopy(layer)
    other.restore_base_weight()
    assert layer.merged
    assert same_bits(other.weight, layer.base_weight)


def test_the_state_holds_each_parameter_once() -> None:
    layer = layer_of()
    names = {"base_layer.weight", "base_layer.bias", "lora_A", "lora_B"}
    assert set(layer.state_dict()) == names
    layer.set_merged_weight(torch.zeros(4, 3))
    assert set(layer.state_dict()) == names
