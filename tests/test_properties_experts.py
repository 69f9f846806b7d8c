"""Stacked experts: the reference, torch's autograd and PEFT's target_parameters agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from exact_linear import error
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import ExpertsProblem, Gradients, experts_problems
from torch.nn import functional

from loracle.reference import LowRank, expert_factors_from_peft

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
BOTH = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
EXAMPLES = settings(max_examples=30)


def tensor(array: Any, train: bool = True) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).requires_grad_(train)


def by_autograd(p: ExpertsProblem) -> tuple[Any, Gradients]:
    """y and the gradients, row by row, each through the linear layer of its expert."""
    leaves: dict[Any, torch.Tensor] = {"x": tensor(p.x)}
    if p.bias is not None:
        leaves["bias"] = tensor(p.bias)
    for number, own in enumerate(p.adapters):
        leaves |= {(number, "A"): tensor(own.A), (number, "B"): tensor(own.B)}
    rows = []
    for n, e in enumerate(map(int, p.expert)):
        x = leaves["x"][n]
        W0 = tensor(p.W0[e].T if p.fan_in_fan_out else p.W0[e], train=False)
        row = functional.linear(x, W0, leaves["bias"][e] if p.bias is not None else None)
        for number, own in enumerate(p.adapters):
            inputs = x if own.dropout is None else x * tensor(own.dropout[n], train=False)
            h = functional.linear(inputs, leaves[number, "A"][e])
            row = row + own.scaling * functional.linear(h, leaves[number, "B"][e])
        rows.append(row)
    y = torch.stack(rows)
    y.backward(tensor(p.dy, train=False))
    gradients: Gradients = {}
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        gradients[key] = leaf.grad.numpy()
    return y.detach().numpy(), gradients


def same(left: Any, right: Any) -> None:
    """Equal numbers, dtypes and shapes; +0 and -0 are one number."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert np.array_equal(left, right)


@BOTH
@EXAMPLES
@given(data=st.data())
def test_exact_tier_torch_agrees_bit_for_bit(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(experts_problems(dtype, exact=True))
    y, gradients = by_autograd(p)
    same(y, p.forward())
    own = p.backward()
    assert own.keys() - gradients.keys() <= {"bias"}
    for key, gradient in gradients.items():
        same(gradient, own[key])


def assert_within(computed: tuple[Any, Gradients], p: ExpertsProblem) -> None:
    y, gradients = computed
    exact, bounds = p.rational(), p.backward_bound(p.dy.dtype)
    assert (error(y, exact.forward()) <= p.forward_bound(p.dy.dtype)).all()
    expected = exact.backward()
    assert expected.keys() - gradients.keys() <= {"bias"}
    for key, gradient in gradients.items():
        assert (error(gradient, expected[key]) <= bounds[key]).all(), key


@BOTH
@EXAMPLES
@given(data=st.data())
def test_derived_tier_torch_stays_within_the_bounds(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(experts_problems(dtype))
    assert_within(by_autograd(p), p)


class Experts(torch.nn.Module):
    """A mixture's stacked weight; ``is_transposed`` says, as in transformers, that it is (E, in, out)."""

    def __init__(self, weight: Any, is_transposed: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(tensor(weight, train=False))
        self.is_transposed = is_transposed

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.is_transposed else self.weight.transpose(1, 2)
        return torch.bmm(x[:, None], weight[expert])[:, 0]


class Model(torch.nn.Module):
    def __init__(self, weight: Any, is_transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(weight, is_transposed)

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> Any:
        return self.experts(x, expert)


def numbers(rng: np.random.Generator, exact: bool, *shape: int) -> Any:
    return rng.integers(-3, 4, shape).astype(float) if exact else rng.normal(size=shape)


def peft_case(
    rng: np.random.Generator, dtype: Any, exact: bool, turned: bool, experts: int, scaling: float
) -> tuple[ExpertsProblem, Any, Any]:
    """A problem whose only adapter is taken out of PEFT's two matrices, and those."""
    n_in, n_out, r, N = (int(n) for n in rng.integers(1, 6, 4))
    shape = (n_in, n_out) if turned else (n_out, n_in)
    lora_A, lora_B = (numbers(rng, exact, r * experts, n_in), numbers(rng, exact, n_out, r * experts))
    lora_A, lora_B = lora_A.astype(dtype), lora_B.astype(dtype)
    p = ExpertsProblem(
        dy=numbers(rng, exact, N, n_out),
        W0=numbers(rng, exact, experts, *shape),
        adapters=(LowRank(*expert_factors_from_peft(lora_A, lora_B, experts), scaling),),
        x=numbers(rng, exact, N, n_in),
        expert=rng.integers(0, experts, N),
        fan_in_fan_out=turned,
    )
    return p.astype(dtype), lora_A, lora_B


def injected(p: ExpertsProblem, lora_A: Any, lora_B: Any) -> tuple[Any, Any]:
    """A model with PEFT's adapter of the stacked weight, and its layer."""
    experts, scaling = len(p.W0), p.adapters[0].scaling
    config = peft.LoraConfig(
        r=len(lora_A) // experts, target_modules=[], target_parameters=["experts.weight"]
    )
    model = Model(p.W0, p.fan_in_fan_out)
    peft.inject_adapter_in_model(config, model)
    layer: Any = model.experts
    layer.scaling["default"] = scaling
    layer.lora_A["default"].weight.data = tensor(lora_A, train=False)
    layer.lora_B["default"].weight.data = tensor(lora_B, train=False)
    return model, layer


@BOTH
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("experts", [2, 3])
def test_the_factors_give_pefts_own_delta_weight(dtype: Any, turned: bool, experts: int) -> None:
    rng = np.random.default_rng(experts)
    for _ in range(5):
        p, lora_A, lora_B = peft_case(rng, dtype, True, turned, experts, 0.5)
        _, layer = injected(p, lora_A, lora_B)
        own = p.adapters[0]
        delta = own.scaling * np.matmul(own.B, own.A)
        expected = layer.get_delta_weight("default").detach().numpy()
        same(delta.swapaxes(1, 2) if turned else delta, expected)


@BOTH
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("exact", [True, False])
def test_pefts_model_with_adapted_experts_is_the_layer(dtype: Any, turned: bool, exact: bool) -> None:
    """Bit for bit on small integers; within the bound, for its x (W0 + delta), on gaussians."""
    rng = np.random.default_rng(11)
    for _ in range(6):
        p, lora_A, lora_B = peft_case(rng, dtype, exact, turned, 3, 2.0 if exact else 1 / 3)
        model, layer = injected(p, lora_A, lora_B)
        x = tensor(p.x)
        y = model(x, tensor(p.expert, train=False))
        y.backward(tensor(p.dy, train=False))
        assert x.grad is not None
        A, B = (low["default"].weight.grad.numpy() for low in (layer.lora_A, layer.lora_B))
        own = dict(zip("AB", expert_factors_from_peft(A, B, 3), strict=True))
        if exact:
            same(y.detach().numpy(), p.forward())
            same(x.grad.numpy(), p.backward()["x"])
            for name, gradient in own.items():
                same(gradient, p.backward()[0, name])
        else:
            true, bounds = p.rational(), p.backward_bound(dtype)
            assert (error(y.detach().numpy(), true.forward()) <= p.forward_bound(dtype)).all()
            assert (error(x.grad.numpy(), true.backward()["x"]) <= bounds["x"]).all()


@BOTH
def test_the_bounds_tell_the_layer_from_a_wrong_one(dtype: Any) -> None:
    rng = np.random.default_rng(12)
    p, lora_A, lora_B = peft_case(rng, dtype, False, False, 3, 1 / 3)
    while len(p.x) < 3 or len(lora_A) < 6:
        p, lora_A, lora_B = peft_case(rng, dtype, False, False, 3, 1 / 3)
    assert_within(by_autograd(p), p)
    own = p.adapters[0]
    blocks = LowRank(own.A, lora_B.reshape(len(lora_B), 3, -1).transpose(1, 0, 2).copy(), own.scaling)
    for wrong in (
        p.with_adapter(0, scaling=0.3334),
        p.with_adapter(0, B=blocks.B),
        p.with_tensor("expert", (p.expert + 1) % 3),
    ):
        with pytest.raises(AssertionError):
            assert_within(by_autograd(wrong), p)
