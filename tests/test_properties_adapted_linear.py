"""The linear layer with several adapters: the reference, torch's autograd, PEFT and loralib agree.

Exact tier: bit for bit. Derived tier: each within the a-priori bound around the exact value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import loralib
import numpy as np
import peft
import pytest
import torch
from exact_linear import error
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import Gradients, LinearProblem, linear_problems
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from loracle.reference import LowRank, fused_adapters

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
# Each adapter after the first is announced.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
BOTH = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
EXAMPLES = settings(max_examples=30)


def tensor(array: Any, train: bool = True) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).requires_grad_(train)


def by_autograd(p: LinearProblem) -> tuple[Any, Gradients]:
    """y and the gradients of the layer as torch's own functions compose it."""
    leaves: dict[Any, torch.Tensor] = {"x": tensor(p.x)}
    if p.bias is not None:
        leaves["bias"] = tensor(p.bias)
    W0 = tensor(p.W0.T if p.fan_in_fan_out else p.W0, train=False)
    parts = list(functional.linear(leaves["x"], W0, leaves.get("bias")).unbind(-1))
    for number, own in enumerate(p.adapters):
        for name in ("A", "B", "bias"):
            if getattr(own, name) is not None:
                leaves[number, name] = tensor(getattr(own, name))
        inputs = leaves["x"] if own.dropout is None else leaves["x"] * tensor(own.dropout, train=False)
        h = functional.linear(inputs, leaves[number, "A"])
        update = own.scaling * functional.linear(h, leaves[number, "B"], leaves.get((number, "bias")))
        first = 0 if own.rows is None else own.rows.start
        for column in range(update.shape[-1]):
            parts[first + column] = parts[first + column] + update[..., column]
    y = torch.stack(parts, dim=-1)
    y.backward(tensor(p.dy, train=False))
    zeros = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
    gradients = {key: (zeros[key] if leaf.grad is None else leaf.grad) for key, leaf in leaves.items()}
    return y.detach().numpy(), {key: gradient.numpy() for key, gradient in gradients.items()}


class Multiply(torch.nn.Module):
    """A dropout whose mask is given."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = tensor(mask, train=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


def by_peft(p: LinearProblem) -> tuple[Any, Gradients]:
    """y and the gradients by PEFT, with all adapters active at once; Conv1D where the weight is turned."""
    out_features, in_features = p.dy.shape[-1], p.x.shape[-1]
    base: torch.nn.Module
    base = (
        Conv1D(out_features, in_features) if p.fan_in_fan_out else torch.nn.Linear(in_features, out_features)
    )
    bias = np.zeros(out_features, p.dy.dtype) if p.bias is None else p.bias
    base.weight.data, base.bias.data = tensor(p.W0, train=False), tensor(bias, train=False)
    model = torch.nn.Sequential(base)
    names = [f"adapter{number}" for number in range(len(p.adapters))]
    for name, own in zip(names, p.adapters, strict=True):
        config = peft.LoraConfig(
            r=len(own.A),
            target_modules=["0"],
            lora_bias=own.bias is not None,
            fan_in_fan_out=p.fan_in_fan_out,
        )
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    layer = model[0]
    layer.set_adapter(names)
    leaves: dict[Any, torch.Tensor] = {"x": tensor(p.x)}
    for number, (name, own) in enumerate(zip(names, p.adapters, strict=True)):
        layer.scaling[name] = own.scaling
        layer.lora_dropout[name] = torch.nn.Identity() if own.dropout is None else Multiply(own.dropout)
        layer.lora_A[name].weight.data = tensor(own.A, train=False)
        layer.lora_B[name].weight.data = tensor(own.B, train=False)
        leaves |= {(number, "A"): layer.lora_A[name].weight, (number, "B"): layer.lora_B[name].weight}
        if own.bias is not None:
            layer.lora_B[name].bias.data = tensor(own.bias, train=False)
            leaves[number, "bias"] = layer.lora_B[name].bias
    y = model(leaves["x"])
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


def assert_same(computed: tuple[Any, Gradients], p: LinearProblem) -> None:
    y, gradients = computed
    same(y, p.forward())
    own = p.backward()
    assert own.keys() - gradients.keys() <= {"bias"}
    for key, gradient in gradients.items():
        same(gradient, own[key])


def assert_within(computed: tuple[Any, Gradients], p: LinearProblem) -> None:
    y, gradients = computed
    exact = p.rational()
    expected, bounds = exact.backward(), p.backward_bound(p.dy.dtype)
    assert (error(y, exact.forward()) <= p.forward_bound(p.dy.dtype)).all()
    assert expected.keys() - gradients.keys() <= {"bias"}
    for key, gradient in gradients.items():
        assert (error(gradient, expected[key]) <= bounds[key]).all(), key


@BOTH
@EXAMPLES
@given(data=st.data())
def test_exact_tier_torch_agrees_bit_for_bit(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(linear_problems(dtype, exact=True))
    assert_same(by_autograd(p), p)


@BOTH
@EXAMPLES
@given(data=st.data())
def test_derived_tier_torch_stays_within_the_bounds(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(linear_problems(dtype))
    assert_within(by_autograd(p), p)


@BOTH
@settings(max_examples=12)
@given(data=st.data())
def test_exact_tier_peft_with_all_adapters_active_agrees_bit_for_bit(dtype: Any, data: st.DataObject) -> None:
    p = data.draw(linear_problems(dtype, exact=True, rows=False).filter(lambda p: p.adapters))
    assert_same(by_peft(p), p)


@BOTH
@settings(max_examples=12)
@given(data=st.data())
def test_derived_tier_peft_with_all_adapters_active_stays_within_the_bounds(
    dtype: Any, data: st.DataObject
) -> None:
    p = data.draw(linear_problems(dtype, rows=False).filter(lambda p: p.adapters))
    assert_within(by_peft(p), p)


def peft_case(dtype: Any) -> LinearProblem:
    """Two adapters with lora_bias and dropout on a Conv1D."""
    rng = np.random.default_rng(8)
    adapters = tuple(
        LowRank(
            rng.normal(size=(r, 7)),
            rng.normal(size=(5, r)),
            scaling,
            bias=rng.normal(size=5),
            dropout=rng.integers(0, 2, (6, 7)) * 2.0,
        )
        for r, scaling in ((3, 1 / 3), (9, 1.7))
    )
    dy, x, W0 = rng.normal(size=(6, 5)), rng.normal(size=(6, 7)), rng.normal(size=(7, 5))
    return LinearProblem(dy, W0, adapters, x, rng.normal(size=5), fan_in_fan_out=True).astype(dtype)


@BOTH
def test_the_bounds_tell_pefts_layer_from_a_wrong_one(dtype: Any) -> None:
    p = peft_case(dtype)
    assert_within(by_peft(p), p)
    first, second = p.adapters
    for wrong in (
        replace(p, adapters=(first,)),
        p.with_adapter(1, scaling=1.701),
        p.with_adapter(0, dropout=second.dropout),
        p.with_adapter(0, bias=first.bias * 3),
    ):
        with pytest.raises(AssertionError):
            assert_within(by_peft(wrong), p)


@st.composite
def fused_problems(draw: st.DrawFn, exact: bool) -> tuple[Any, ...]:
    """x, dy, W0, bias and the tensors of a fused projection; the slices are of one width for loralib."""
    enabled = draw(st.lists(st.booleans(), min_size=1, max_size=4).filter(any))
    n_in, width, r, batch = (draw(st.integers(1, most)) for most in (6, 4, 3, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def numbers(*shape: int) -> Any:
        return rng.integers(-4, 5, shape).astype(float) if exact else rng.normal(size=shape)

    count, out = sum(enabled), width * len(enabled)
    A, B = numbers(r * count, n_in), numbers(width * count, r)
    return numbers(batch, n_in), numbers(batch, out), numbers(out, n_in), numbers(out), A, B, width, enabled


def by_loralib(problem: tuple[Any, ...], alpha: float, dtype: Any, turned: bool) -> tuple[Any, Any, Any, Any]:
    """y, dx, dA and dB of loralib's layer for fused projections."""
    x, dy, W0, bias, A, B, _, enabled = problem
    r = B.shape[1]
    layer = loralib.MergedLinear(
        W0.shape[1], len(W0), r=r, lora_alpha=alpha * r, enable_lora=enabled, fan_in_fan_out=turned
    )
    given_tensors = {"weight": W0.T if turned else W0, "bias": bias, "lora_A": A, "lora_B": B}
    for name, value in given_tensors.items():
        getattr(layer, name).data = tensor(value.astype(dtype), train=False)
    leaf = tensor(x.astype(dtype))
    y = layer(leaf)
    y.backward(tensor(dy.astype(dtype), train=False))
    assert leaf.grad is not None
    return y.detach().numpy(), leaf.grad.numpy(), layer.lora_A.grad.numpy(), layer.lora_B.grad.numpy()


def fused(problem: tuple[Any, ...], scaling: float, dtype: Any) -> LinearProblem:
    x, dy, W0, bias, A, B, width, enabled = problem
    adapters = fused_adapters(A, B, scaling, [width] * len(enabled), enabled)
    return LinearProblem(dy, W0, adapters, x, bias).astype(dtype)


def stacked(gradients: Gradients, name: str, number: int) -> Any:
    return np.concatenate([gradients[i, name] for i in range(number)])


@BOTH
@settings(max_examples=20)
@given(problem=fused_problems(True), scaling=st.sampled_from([0.5, 2.0]), turned=st.booleans())
def test_exact_tier_a_fused_projection_is_loralibs_bit_for_bit(
    dtype: Any, problem: tuple[Any, ...], scaling: float, turned: bool
) -> None:
    p = fused(problem, scaling, dtype)
    y, dx, dA, dB = by_loralib(problem, scaling, dtype, turned)
    gradients, count = p.backward(), len(p.adapters)
    same(y, p.forward())
    same(dx, gradients["x"])
    same(dA, stacked(gradients, "A", count))
    same(dB, stacked(gradients, "B", count))


@settings(max_examples=20)
@given(problem=fused_problems(False), scaling=st.sampled_from([1 / 3, 1.7]))
def test_derived_tier_loralibs_forward_stays_within_the_bound(
    problem: tuple[Any, ...], scaling: float
) -> None:
    """Its x (B A)^T is another order; the bound covers that for y and dx, where nothing else is summed."""
    rounded = tuple(
        part.astype(F32).astype(F64) if isinstance(part, np.ndarray) else part for part in problem
    )
    p = fused(rounded, scaling, F32)
    y, dx, _, _ = by_loralib(rounded, scaling, F32, False)
    exact = p.rational()
    assert (error(y, exact.forward()) <= p.forward_bound(F32)).all()
    assert (error(dx, exact.backward()["x"]) <= p.backward_bound(F32)["x"]).all()


@BOTH
@EXAMPLES
@given(data=st.data())
def test_exact_tier_a_fused_projection_of_unequal_widths_is_its_slices(
    dtype: Any, data: st.DataObject
) -> None:
    """Query, key and value with grouped heads: torch computes each slice as a layer of its own."""
    widths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    enabled = data.draw(st.lists(st.booleans(), min_size=len(widths), max_size=len(widths)))
    n_in, r, batch = (data.draw(st.integers(1, 5)) for _ in range(3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def numbers(*shape: int) -> Any:
        return rng.integers(-4, 5, shape).astype(dtype)

    out, on = sum(widths), [width for width, flag in zip(widths, enabled, strict=True) if flag]
    A, B = numbers(r * len(on), n_in), numbers(sum(on), r)
    p = LinearProblem(
        numbers(batch, out),
        numbers(out, n_in),
        fused_adapters(A, B, 2.0, widths, enabled),
        numbers(batch, n_in),
    )
    x = tensor(p.x)
    As = [tensor(part) for part in np.split(A, len(on))] if on else []
    Bs = [tensor(part) for part in np.split(B, np.cumsum(on)[:-1])] if on else []
    pairs = iter(zip(As, Bs, strict=True))
    slices = []
    for own, flag in zip(np.split(p.W0, np.cumsum(widths)[:-1]), enabled, strict=True):
        y = functional.linear(x, tensor(own, train=False))
        if flag:
            a, b = next(pairs)
            y = y + 2.0 * functional.linear(functional.linear(x, a), b)
        slices.append(y)
    y = torch.cat(slices, dim=-1)
    y.backward(tensor(p.dy, train=False))
    gradients = p.backward()
    same(y.detach().numpy(), p.forward())
    assert x.grad is not None
    same(x.grad.numpy(), gradients["x"])
    for number, (a, b) in enumerate(zip(As, Bs, strict=True)):
        assert a.grad is not None
        assert b.grad is not None
        same(a.grad.numpy(), gradients[number, "A"])
        same(b.grad.numpy(), gradients[number, "B"])
