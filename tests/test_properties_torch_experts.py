"""Stacked parameters in torch against the reference: exact on integers, within the bound elsewhere."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_problems import ExpertsProblem, experts_problems
from torch import Tensor, nn
from torch_layers import frozen, give, gradients_of
from torch_modes import (
    LAYER_MODES,
    Mode,
    arithmetic,
    assert_bounded,
    assert_equal,
    autocast,
    cases,
    finite,
    placed,
    wide,
)

from loracle.reference import LowRank, expert_factors_from_peft
from loracle.torch_impl.arrays import tensor_of
from loracle.torch_impl.parameters import LoraParameter, LoraParameters


class Experts(nn.Module):
    """A mixture's stacked weight, read expert by expert as transformers' own forward does."""

    def __init__(self, problem: ExpertsProblem, dtype: Any, device: str) -> None:
        super().__init__()
        self.is_transposed = problem.fan_in_fan_out
        self.weight = frozen(problem.W0, dtype, device)
        self.bias = None if problem.bias is None else frozen(problem.bias, dtype, device)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """Map (N, in) and (N,) to (N, out)."""
        rows, places = [], []
        for e in expert.unique():
            place = (expert == e).nonzero()[:, 0]
            weight = self.weight[e].T if self.is_transposed else self.weight[e]
            rows.append(nn.functional.linear(x[place], weight, None if self.bias is None else self.bias[e]))
            places.append(place)
        return torch.cat(rows)[torch.cat(places).argsort()]


def stacked(own: LowRank) -> LowRank:
    """The adapter in the layout of PEFT's files, without dropout."""
    experts, r, inputs = own.A.shape
    A = own.A.reshape(experts * r, inputs)
    return LowRank(A, own.B.transpose(1, 2, 0).reshape(-1, r * experts), own.scaling)


def layer_of(problem: ExpertsProblem, mode: Mode, device: str) -> LoraParameters:
    """The module with the problem's adapters."""
    module = Experts(problem, mode.base, device)
    wrapper, layer = LoraParameters(module), LoraParameter(module, "weight")
    wrapper.attach(layer)
    give(layer, map(stacked, problem.adapters), mode.adapter, device)
    return wrapper


def run(problem: ExpertsProblem, mode: Mode, device: str) -> tuple[Tensor, dict[Any, Any]]:
    """y, and the gradients by the problem's keys."""
    wrapper = layer_of(problem, mode, device)
    leaves: dict[Any, Tensor] = {"x": placed(problem.x, mode.base, device).requires_grad_()}
    (layer,) = wrapper.lora_layers().values()
    for number, update in enumerate(layer.updates):
        leaves |= {(number, "A"): update.lora_A, (number, "B"): update.lora_B}
    expert = torch.from_numpy(problem.expert).to(device)
    with arithmetic(device, mode), autocast(device, mode):
        y = wrapper(leaves["x"], expert)
    with arithmetic(device, mode):
        gradients = gradients_of(y, placed(problem.dy, mode.computes, device), leaves)
    for number, own in enumerate(problem.adapters):
        experts, r, inputs = own.A.shape
        gradients[number, "A"] = gradients[number, "A"].view(experts, r, inputs)
        gradients[number, "B"] = gradients[number, "B"].view(-1, r, experts).permute(2, 0, 1)
    assert wrapper.base_layer.weight.grad is None
    return y.detach(), gradients


def without_dropout(problem: ExpertsProblem) -> ExpertsProblem:
    """The problem as it can be: the input of a stacked weight is its module's own matter."""
    adapters = tuple(LowRank(own.A, own.B, own.scaling) for own in problem.adapters)
    return ExpertsProblem(
        problem.dy, problem.W0, adapters, problem.x, problem.expert, problem.bias, problem.fan_in_fan_out
    )


def as_given(problem: ExpertsProblem, mode: Mode) -> ExpertsProblem:
    """The problem with the numbers that the tensors have, in float64."""

    def rounded(array: Any, dtype: Any) -> Any:
        return None if array is None else array.astype(dtype).astype(float)

    adapters = tuple(
        LowRank(rounded(own.A, mode.adapter), rounded(own.B, mode.adapter), own.scaling)
        for own in problem.adapters
    )
    return ExpertsProblem(
        rounded(problem.dy, mode.computes),
        rounded(problem.W0, mode.base),
        adapters,
        rounded(problem.x, mode.base),
        problem.expert,
        rounded(problem.bias, mode.base),
        problem.fan_in_fan_out,
    )


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=20)
@given(data=st.data())
def test_small_integers_come_out_exactly(device: str, mode: Mode, data: st.DataObject) -> None:
    problem = without_dropout(data.draw(experts_problems(mode.computes, exact=True)).astype(float))
    y, gradients = run(problem, mode, device)
    assert_equal(y, problem.forward())
    expected = problem.backward()
    for key, gradient in gradients.items():
        assert_equal(gradient, expected[key], key)


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=12)
@given(data=st.data())
def test_everything_else_stays_within_the_bound(device: str, mode: Mode, data: st.DataObject) -> None:
    problem = without_dropout(data.draw(experts_problems(np.float64)))
    y, gradients = run(problem, mode, device)
    assume(finite(y, *gradients.values()))
    given_numbers = as_given(problem, mode)
    exact, bounds = given_numbers.rational(), given_numbers.backward_bound(mode.precision)
    assert_bounded(y, exact.forward(), given_numbers.forward_bound(mode.precision), mode, "y")
    expected = exact.backward()
    for key, gradient in gradients.items():
        assert_bounded(gradient, expected[key], bounds[key], mode, key)


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=15)
@given(data=st.data())
def test_merged_and_unmerged_agree_bit_for_bit_on_integers(
    device: str, mode: Mode, data: st.DataObject
) -> None:
    problem = without_dropout(data.draw(experts_problems(mode.computes, exact=True)).astype(float))
    wrapper = layer_of(problem, mode, device)
    (layer,) = wrapper.lora_layers().values()
    x, expert = placed(problem.x, mode.base, device), torch.from_numpy(problem.expert).to(device)
    own = wrapper.base_layer.weight
    with arithmetic(device, mode), autocast(device, mode):
        unmerged = wrapper(x, expert)
        for _ in range(2):
            merged = layer.merged_arrays(layer.active, "weight")
            layer.set_merged({name: tensor_of(array).to(device) for name, array in merged.items()})
            assert_equal(unmerged, wide(wrapper(x, expert)))
            layer.restore_base()
            assert wrapper.base_layer.weight is own


def test_the_layout_is_pefts() -> None:
    rng = np.random.default_rng(0)
    own = LowRank(rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 5, 2)), 1.0)
    layout = stacked(own)
    A, B = expert_factors_from_peft(layout.A, layout.B, 3)
    assert np.array_equal(A, own.A)
    assert np.array_equal(B, own.B)
