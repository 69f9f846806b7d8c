"""`LoraLinear`: what it wraps, how it starts, and when dropout applies."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch_fixtures import same_bits

from loracle.reference import ConfigError, ShapeError, TargetError
from loracle.torch_impl import LoraLinear, lora_linear
from loracle.torch_impl.dropout import SeededDropout
from loracle.torch_impl.update import UpdateOptions


def fresh_layer(base: nn.Module | None = None, r: int = 2, alpha: float = 3.0, **options: Any) -> LoraLinear:
    layer = LoraLinear(base or nn.Linear(3, 4))
    layer.add_adapter("default", UpdateOptions(r, alpha, **options))
    layer.activate(("default",))
    return layer


def layer_of(base: nn.Module | None = None, **options: Any) -> LoraLinear:
    torch.manual_seed(0)
    layer = fresh_layer(base, **options)
    nn.init.normal_(layer.update().lora_B)
    return layer


def test_a_fresh_layer_computes_what_its_base_does() -> None:
    base = nn.Linear(3, 4)
    layer = fresh_layer(base)
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
    layer = fresh_layer(nn.Linear(3, 4, dtype=base))
    update = layer.update()
    assert update.lora_A.dtype is update.lora_B.dtype is adapter
    x = torch.ones(3, dtype=base, requires_grad=True)
    y = layer(x)
    assert y.dtype is base
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is base
    assert update.lora_B.grad is not None
    assert update.lora_B.grad.dtype is adapter


def test_scaling() -> None:
    assert fresh_layer(r=4).update().scaling == 0.75
    assert fresh_layer(r=4, use_rslora=True).update().scaling == 1.5


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_multiplies_the_adapters_input_while_training_only(autocast: bool) -> None:
    layer = layer_of(dropout=0.25)
    x = torch.randn(50, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.manual_seed(4)
        trained = layer(x)
        torch.manual_seed(4)
        seed = int(torch.randint(2**63 - 1, ()))
        mask = SeededDropout(0.25, seed).mask(trained, x.shape)
        update = layer.update()
        operands = (layer.weight, layer.bias, update.lora_A, update.lora_B)
        # A mask of ones and zeros, and its factor in the scaling, is the multiplier with one rounding less.
        assert same_bits(trained, lora_linear(x, *operands, update.scaling / 0.75, mask))
        operands = (*operands, update.scaling)
        layer.eval()
        state = torch.get_rng_state()
        assert same_bits(layer(x), lora_linear(x, *operands))
        assert torch.equal(torch.get_rng_state(), state)
        assert not same_bits(layer(x), trained)
    # Independent draws for each entry, not for each row or column.
    kept = mask != 0
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert 0.6 < kept.double().mean() < 0.9
    assert (kept.any(dim=1) & ~kept.all(dim=1)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 0}, "^r:"), ({"lora_alpha": float("inf")}, "lora_alpha"), ({"dropout": 1.0}, "lora_dropout")],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpdateOptions(**{"r": 2, "lora_alpha": 1.0, **options})


@pytest.mark.parametrize("name", ["", "a.b", "a b", "1a"])
def test_a_name_must_serve_in_parameter_names(name: str) -> None:
    layer = LoraLinear(nn.Linear(3, 4))
    with pytest.raises(ConfigError, match="adapter_name: expected letters"):
        layer.add_adapter(name, UpdateOptions(2, 1.0))
    assert not layer.adapters


def test_a_second_adapter_needs_a_name_of_its_own_and_an_unmerged_layer() -> None:
    layer = layer_of()
    with pytest.raises(ConfigError, match="adapter_name: expected a new one, got 'default'"):
        layer.add_adapter("default", UpdateOptions(2, 1.0))
    layer.set_merged({"weight": torch.zeros(4, 3)})
    with pytest.raises(TargetError, match="expected an unmerged layer"):
        layer.add_adapter("other", UpdateOptions(2, 1.0))
    with pytest.raises(TargetError, match=r"other: expected an adapter of this layer, .* it has default"):
        layer.update("other")


def test_only_linear_layers_are_wrapped() -> None:
    with pytest.raises(TargetError, match=r"nn\.Linear or Conv1D, got Embedding"):
        LoraLinear(nn.Embedding(3, 4))


def test_a_merged_weight_must_fit() -> None:
    layer = layer_of()
    for wrong in (torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float64)):
        with pytest.raises(ShapeError, match="weight: expected"):
            layer.set_merged({"weight": wrong})
    assert not layer.merged
    layer.set_merged({"weight": torch.zeros(4, 3)})
    with pytest.raises(TargetError, match="unmerge it first"):
        layer.set_merged({"weight": torch.zeros(4, 3)})


def test_a_merged_layer_is_its_base() -> None:
    layer = layer_of(dropout=0.5)
    layer.set_merged({"weight": torch.ones(4, 3)})
    x = torch.randn(2, 3)
    assert same_bits(layer(x), nn.functional.linear(x, torch.ones(4, 3), layer.bias))
    assert not layer(x).requires_grad
    assert "merged=True" in repr(layer)


def test_a_copy_is_independent() -> None:
    layer = layer_of()
    layer.set_merged({"weight": torch.zeros(4, 3)})
    other = copy.deepcopy(layer)
    other.restore_base()
    assert layer.merged
    assert same_bits(other.weight, layer.base_weight)


def test_the_state_holds_each_parameter_once() -> None:
    layer = layer_of()
    names = {"base_layer.weight", "base_layer.bias", "adapters.default.lora_A", "adapters.default.lora_B"}
    assert set(layer.state_dict()) == names
    layer.set_merged({"weight": torch.zeros(4, 3)})
    assert set(layer.state_dict()) == names
