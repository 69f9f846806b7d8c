"""Merging is `loracle.reference.merge`, changes all layers or none, and is undone bit for bit."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch_fixtures import Chain, fill_integers, same_bits

from loracle.files import LoraConfig
from loracle.reference import NonFiniteError, TargetError
from loracle.reference import merge as merge_arrays
from loracle.torch_impl import LoraLinear, eject, inject, lora_layers, merge, unmerge
from loracle.torch_impl.arrays import array_of, tensor_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def adapted(dtype: torch.dtype = torch.float32) -> Chain:
    """A chain with adapters of rank 2 and random values at q_proj and v_proj."""
    torch.manual_seed(1)
    model = Chain(dtype)
    inject(model, LoraConfig(r=2, lora_alpha=3))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.base_layer.weight)
        nn.init.normal_(layer.update().lora_B)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_weight_is_the_references_and_unmerge_restores_the_bits(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    before = {path: layer.weight for path, layer in lora_layers(model).items()}
    bits = copy.deepcopy(before)
    paths = merge(model)
    assert paths == ("q_proj", "v_proj")
    for path, layer in lora_layers(model).items():
        assert layer.merged
        expected = merge_arrays(
            array_of(bits[path]),
            array_of(layer.update().lora_A),
            array_of(layer.update().lora_B),
            layer.update().scaling,
        )
        assert same_bits(layer.weight, tensor_of(expected))
        assert not same_bits(layer.weight, bits[path])
        assert layer.base_weight is before[path]
    assert unmerge(model) == paths
    for path, layer in lora_layers(model).items():
        assert not layer.merged
        assert layer.weight is before[path]
        assert same_bits(layer.weight, bits[path])
    assert unmerge(model) == ()


def test_merged_and_unmerged_agree_bit_for_bit_on_integers() -> None:
    model = Chain()
    inject(model, LoraConfig(r=2, lora_alpha=1))
    for seed, layer in enumerate(lora_layers(model).values()):
        fill_integers(layer, seed)
    x = torch.randint(-2, 3, (5, 3)).float()
    unmerged = model(x)
    base = copy.deepcopy(model)
    eject(base)
    merge(model)
    assert same_bits(model(x), unmerged)
    assert not same_bits(base(x), unmerged)


def test_neither_mode_nor_forward_merges() -> None:
    model = adapted()
    weight = model.q_proj.weight
    for switch in (model.eval, model.train):
        switch()
        model(torch.ones(3))
        assert model.q_proj.weight is weight
        assert not any(layer.merged for layer in lora_layers(model).values())
    merge(model)
    merged = model.q_proj.weight
    for switch in (model.eval, model.train):
        switch()
        model(torch.ones(3))
        assert model.q_proj.weight is merged


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3e38])
def test_an_error_in_the_last_layer_leaves_every_layer_as_it_was(wrong: float) -> None:
    model = adapted()
    with torch.no_grad():
        model.v_proj.update().lora_A[0, 0] = wrong  # type: ignore[operator]
        model.v_proj.update().lora_B[0, 0] = 4.0  # type: ignore[operator]
    weights = [layer.weight for layer in lora_layers(model).values()]
    with pytest.raises(NonFiniteError):
        merge(model)
    for layer, weight in zip(lora_layers(model).values(), weights, strict=True):
        assert layer.weight is weight
        assert not layer.merged


def test_merging_twice_or_nothing_is_refused() -> None:
    model = adapted()
    merge(model)
    weight = model.q_proj.weight
    with pytest.raises(TargetError, match="q_proj: expected an unmerged adapter"):
        merge(model)
    assert model.q_proj.weight is weight
    with pytest.raises(TargetError, match="Chain: expected a model with adapters"):
        merge(Chain())


def test_eject_unmerges() -> None:
    model = adapted()
    weight = model.q_proj.weight
    merge(model)
    eject(model)
    assert type(model.q_proj) is nn.Linear
    assert model.q_proj.weight is weight


def test_a_kept_weight_moves_and_casts_with_the_model() -> None:
    model = adapted()
    expected = model.q_proj.weight.double()
    merge(model)
    model.double()
    assert model.q_proj.weight.dtype is torch.float64
    unmerge(model)
    assert same_bits(model.q_proj.weight, expected)


def test_a_module_tied_to_the_weight_keeps_it() -> None:
    layer = LoraLinear(nn.Linear(2, 3))
    other = nn.Embedding(3, 2)
    other.weight = layer.base_layer.weight
    kept = other.weight.clone()
    layer.set_merged({"weight": kept + 1})
    assert same_bits(other.weight, kept)
    layer.restore_base()
    assert layer.base_layer.weight is other.weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_and_tensors_have_the_same_bits(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, -0.0], [float("nan"), 2.0**-20]]).to(dtype)
    array = array_of(tensor)
    assert array.itemsize == tensor.element_size()
    assert same_bits(tensor_of(array), tensor)
    assert same_bits(tensor_of(array.T), tensor.T.contiguous())
    array.flags.writeable = False
    copied = tensor_of(array)
    copied.zero_()
    assert np.signbit(array.astype(np.float64))[0, 1]
