"""Layers that share an input compute together: the same numbers, and only where they do share it."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_fixtures import fill_integers, same_bits, tiny_llama

from loracle.files import LoraConfig
from loracle.torch_impl import disable_adapter, inject, lora_layers, merge, unmerge
from loracle.torch_impl.shared_input import SharedInput, SiblingWatch


class Attention(nn.Module):
    """Three projections of one input and one of another; ``apart`` gives v an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(3, 4)
        self.k = nn.Linear(3, 2, bias=False)
        self.v = nn.Linear(3, 4)
        self.o = nn.Linear(4, 3)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        v = self.v(x.clone() if self.apart else x)
        y: Tensor = self.o(q * k.sum(-1, keepdim=True) + v)
        return y


def adapted(seed: int = 0, **options: Any) -> Attention:
    """The module with adapters of integers everywhere."""
    model = Attention()
    inject(model, LoraConfig(r=2, lora_alpha=1, target_modules=("q", "k", "v", "o"), **options))
    fill_integers(model, seed)
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """y, the gradient of x and those of all that trains."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def apart(model: nn.Module) -> nn.Module:
    """A copy whose layers share nothing."""
    other = copy.deepcopy(model)
    for layer in lora_layers(other).values():
        layer.sharing = None  # type: ignore[assignment]
    return other


def groups(model: nn.Module) -> dict[str, int]:
    """The layers that share an input, by path, numbered by who they share it with."""
    numbers: dict[int, int] = {}
    return {
        path: numbers.setdefault(id(layer.sharing), len(numbers))
        for path, layer in lora_layers(model).items()
        if isinstance(layer.sharing, SharedInput)
    }


X = torch.tensor([[1.0, -2.0, 1.0], [0.0, 1.0, 2.0], [2.0, 1.0, -1.0], [1.0, 1.0, 0.0]])


def test_layers_with_one_input_share_it_from_the_second_call_on() -> None:
    model = adapted()
    expected = step(apart(model), X)
    assert all(isinstance(layer.sharing, SiblingWatch) for layer in lora_layers(model).values())
    for _ in range(3):
        found = step(model, X)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    assert groups(model) == {"q": 0, "k": 0, "v": 0}


def test_one_product_is_made_for_all_that_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from loracle.torch_impl import linear, shared_input

    calls: list[int] = []
    for module in (linear, shared_input):
        original = module.lora_products

        def counted(x: Tensor, members: Any, terms: Any, original: Any = original) -> Any:
            calls.append(len(members))
            return original(x, members, terms)

        monkeypatch.setattr(module, "lora_products", counted)
    model = adapted()
    step(model, X)
    assert calls == [1, 1, 1, 1]
    calls.clear()
    step(model, X)
    assert calls == [3, 1]


def test_a_llamas_projections_share() -> None:
    model = tiny_llama()
    inject(model, LoraConfig(r=2, target_modules="all-linear"))
    ids = torch.arange(12).reshape(2, 6)
    expected = apart(model)(ids).logits
    for _ in range(2):
        assert torch.allclose(model(ids).logits, expected)
    names: dict[int, set[str]] = {}
    for path, number in groups(model).items():
        names.setdefault(number, set()).add(path.rpartition(".")[2])
    assert list(names.values()) == [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}] * 2


def test_an_input_that_stops_being_shared_is_computed_apart() -> None:
    model = adapted()
    for _ in range(2):
        step(model, X)
    model.apart = True
    expected = step(apart(model), X)
    for _ in range(2):
        found = step(model, X)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    model.apart = False
    assert all(same_bits(a, b) for a, b in zip(step(model, X), step(apart(model), X), strict=True))


def test_an_input_modified_in_between_is_not_shared() -> None:
    model = adapted()
    for _ in range(2):
        step(model, X)
    x = X.clone()
    q = model.q(x)
    x.mul_(2)
    k = model.k(x)
    other = apart(model)
    assert same_bits(k, other.k(x))  # type: ignore[operator]
    assert same_bits(q, other.q(X))  # type: ignore[operator]


def test_nothing_is_shared_without_gradients_or_with_hooks() -> None:
    model = adapted()
    for _ in range(2):
        step(model, X)
    seen: list[Tensor] = []
    model.k.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model.v.register_forward_hook(lambda module, args, y: seen.append(y))
    hooked = step(model, X)
    assert all(same_bits(a, b) for a, b in zip(hooked, step(apart(model), X), strict=True))
    assert seen
    with torch.no_grad():
        assert same_bits(model(X), apart(model)(X))


def test_adapters_can_be_switched_and_merged_between_steps() -> None:
    model = adapted()
    expected = step(model, X)
    step(model, X)
    with disable_adapter(model):
        base = model(X)
    assert not same_bits(base, expected[0])
    assert all(same_bits(a, b) for a, b in zip(step(model, X), expected, strict=True))
    merge(model)
    assert same_bits(model(X), expected[0])
    unmerge(model)
    assert all(same_bits(a, b) for a, b in zip(step(model, X), expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same(reentrant: bool, dropout: float) -> None:
    model = adapted(lora_dropout=dropout)
    plain = apart(model)

    def run(module: nn.Module, wrapped: bool) -> list[Tensor]:
        module.zero_grad()
        torch.manual_seed(5)
        x = X.clone().requires_grad_()
        y = checkpoint(module, x, use_reentrant=reentrant) if wrapped else module(x)
        y.sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]

    expected = run(plain, False)
    for wrapped in (False, True, True, False):
        assert all(same_bits(a, b) for a, b in zip(run(model, wrapped), expected, strict=True))


def test_dropout_is_drawn_for_each_layer_and_the_same_as_apart() -> None:
    model = adapted(lora_dropout=0.5)
    plain = apart(model)
    for seed in range(3):
        torch.manual_seed(seed)
        found = step(model, X)
        torch.manual_seed(seed)
        assert all(same_bits(a, b) for a, b in zip(found, step(plain, X), strict=True))
    sharing = model.q.sharing
    assert isinstance(sharing, SharedInput)
    terms = [term for at, layer in enumerate((model.q, model.k)) for term in layer.terms(at, X)]  # type: ignore[operator]
    assert terms[0].dropout != terms[1].dropout


def test_no_input_is_kept_after_a_step() -> None:
    model = adapted()
    for _ in range(2):
        x = X.clone()
        reference = weakref.ref(x)
        model(x).sum().backward()
        del x
        gc.collect()
        assert reference() is None


def test_a_model_can_be_copied_between_forward_and_backward() -> None:
    model = adapted()
    step(model, X)
    model.q(X)
    model.k(X)
    other = copy.deepcopy(model)
    assert all(same_bits(a, b) for a, b in zip(step(other, X), step(apart(model), X), strict=True))
