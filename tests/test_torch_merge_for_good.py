"""Merging for good gives the numbers of merging, and holds a few layers beside the model."""

import copy
import weakref
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_fixtures import same_bits

from loracle.files import LoraConfig
from loracle.reference import NonFiniteError, TargetError, merge_adapters
from loracle.torch_impl import LoraLinear, inject, lora_layers, merge, merge_and_unload
from loracle.torch_impl.arrays import array_of
from loracle.torch_impl.device_factors import DeviceLowRank
from loracle.torch_impl.layer import LoraLayer
from loracle.torch_impl.overflow import cannot_overflow

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEPTH = 8


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Sequential:
    """Eight linear layers, not square in turn, with adapters that are not zero."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(5 + n % 2, 6 - n % 2, dtype=dtype) for n in range(DEPTH)))
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=[str(n) for n in range(DEPTH)], **options))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.update().lora_B)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_the_numbers_are_those_of_merge(dtype: torch.dtype, options: dict[str, bool]) -> None:
    model = adapted(dtype, **options)
    twin = copy.deepcopy(model)
    paths = merge(twin)
    assert merge_and_unload(model) == paths == tuple(str(n) for n in range(DEPTH))
    for path in paths:
        layer, expected = model.get_submodule(path), lora_layers(twin)[path]
        assert type(layer) is nn.Linear
        assert same_bits(layer.weight, expected.weight)
        assert same_bits(layer.bias, expected.bias)
    assert not lora_layers(model)


def test_a_model_that_is_merged_stays_merged() -> None:
    model = adapted()
    paths = merge(model)
    weights = [layer.weight for layer in lora_layers(model).values()]
    assert merge_and_unload(model) == paths
    assert all(model.get_submodule(path).weight is own for path, own in zip(paths, weights, strict=True))


def test_own_weights_are_let_go_of_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    own = [weakref.ref(layer.weight) for layer in lora_layers(model).values()]
    alive: list[int] = []
    started: list[str] = []
    ahead: list[int] = []
    start, forget = LoraLinear.start_merge, LoraLayer.forget_base

    def start_noted(self: LoraLinear, names: Sequence[str], label: str) -> Any:
        started.append(label)
        return start(self, names, label)

    def forget_counted(self: LoraLayer) -> None:
        forget(self)
        alive.append(sum(one() is not None for one in own))
        ahead.append(len(started) - len(alive))

    monkeypatch.setattr(LoraLinear, "start_merge", start_noted)
    monkeypatch.setattr(LoraLayer, "forget_base", forget_counted)
    merge_and_unload(model)
    assert alive == [DEPTH - done for done in range(1, DEPTH + 1)]
    assert ahead == [2] * (DEPTH - 2) + [1, 0]


def test_what_is_not_sure_is_computed_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = adapted(), []
    layers = lora_layers(model)
    monkeypatch.setattr(layers["6"], "merges_surely", lambda names: False)
    for path, layer in layers.items():
        for name in ("start_merge", "set_merged"):
            own = getattr(layer, name)
            monkeypatch.setattr(layer, name, lambda *a, p=path, n=name, f=own: order.append((n, p)) or f(*a))
    merge_and_unload(model)
    assert order[:3] == [("start_merge", "6"), ("set_merged", "6"), ("start_merge", "0")]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [*product(("W0", "A", "B"), (torch.nan, torch.inf, -torch.inf)), ("A", 3e38), ("B", 3e38)],
)
def test_an_error_in_the_last_layer_leaves_the_model_as_it_was(name: str, wrong: float) -> None:
    model = adapted()
    layer = lora_layers(model)[str(DEPTH - 1)]
    update = layer.update()
    with torch.no_grad():
        update.lora_A[0, 0] = update.lora_B[0, 0] = 4.0
        {"W0": layer.weight, "A": update.lora_A, "B": update.lora_B}[name][0, 0] = wrong
    before = {path: layer.weight for path, layer in lora_layers(model).items()}
    with pytest.raises(NonFiniteError):
        merge_and_unload(model)
    for path, own in lora_layers(model).items():
        assert own.weight is before[path]
        assert own.active
        assert not own.merged


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_an_error_beside_the_product_does_so_too(option: str) -> None:
    model = adapted(**{option: True})
    update = lora_layers(model)[str(DEPTH - 1)].update()
    tensor = update.lora_magnitude_vector if option == "use_dora" else update.lora_bias
    assert tensor is not None
    nn.init.constant_(tensor, torch.nan)
    before = {path: layer.weight for path, layer in lora_layers(model).items()}
    with pytest.raises(NonFiniteError):
        merge_and_unload(model)
    assert all(own.weight is before[path] for path, own in lora_layers(model).items())


def test_what_may_overflow_and_does_not_is_merged() -> None:
    model = adapted()
    layer = lora_layers(model)["3"]
    with torch.no_grad():
        layer.weight[0, 0] = torch.finfo(torch.float32).max
        layer.update().lora_B[0] = 0
    assert not layer.merges_surely(layer.active)
    merge_and_unload(model)
    assert float(model[3].weight[0, 0]) == torch.finfo(torch.float32).max


def test_nothing_active_is_refused() -> None:
    with pytest.raises(TargetError, match="Linear: expected a model with adapters, got none"):
        merge_and_unload(nn.Linear(2, 3))


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    seed=st.integers(0, 2**16),
    size=st.sampled_from([0.1, 0.9, 0.999, 1.0, 1.5]),
)
def test_what_cannot_overflow_does_not(
    dtype: torch.dtype, shape: tuple[int, int, int], seed: int, size: float
) -> None:
    out, inputs, r = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*own: int) -> Tensor:
        return torch.randint(-2, 3, own, generator=generator).double()

    largest = torch.finfo(dtype).max
    W0 = (draw(out, inputs) / 2 * largest * min(size, 1.0)).to(dtype)
    adapter = DeviceLowRank(draw(r, inputs), draw(out, r) * largest / 8 * size, -0.25)
    if cannot_overflow(W0, [adapter, adapter]):
        merge_adapters(array_of(W0), [adapter.to_host()] * 2)
    # A bound that proved nothing would pass as well.
    small = DeviceLowRank(adapter.A, adapter.B / 2**20, -0.25)
    assert cannot_overflow(W0 / 2, [small, small])


def test_the_bound_counts_each_adapter_with_its_scaling() -> None:
    largest = torch.finfo(torch.float32).max
    W0, A = torch.full((2, 3), largest / 2), torch.ones(1, 3)
    half = DeviceLowRank(A, torch.tensor([[0.0], [largest / 10]]), 2.0)
    assert cannot_overflow(W0, [half, half])
    assert not cannot_overflow(W0, [half, half, half])
    assert not cannot_overflow(-W0, [DeviceLowRank(A, half.B, -6.0)])
    # A row's numbers add up, those of B's column do not.
    wide = DeviceLowRank(torch.ones(4, 3), torch.full((1, 4), largest / 9), 1.0)
    assert cannot_overflow(W0[:1], [wide])
    assert not cannot_overflow(W0[:1], [wide, wide])
    assert not cannot_overflow(W0[:0], [])
    assert not cannot_overflow(W0.to(torch.float8_e4m3fn), [])
