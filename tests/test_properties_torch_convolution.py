"""The torch convolution against the reference: bit for bit on small integers, within the bound elsewhere."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from convolution_cases import (
    ConvolutionProblem,
    backward,
    backward_bound,
    exact_convolutions,
    forward,
    forward_bound,
    gaussian_convolutions,
    named,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_layers import convolution_of, convolution_terms, give, gradients_of
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

from loracle.torch_impl.arrays import tensor_of
from loracle.torch_impl.convolution import LoraConvolution
from loracle.torch_impl.convolution_function import Geometry, lora_convolution

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def run(problem: ConvolutionProblem, mode: Mode, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """y, and the gradients by the names that `named` gives."""
    base = convolution_of(problem, mode.base, device)
    terms = convolution_terms(problem, mode.base, mode.adapter, device)
    leaves = {
        "dx": placed(problem.x, mode.base, device).requires_grad_(),
        "dbias": base.bias.requires_grad_(),
    }
    for n, term in enumerate(terms):
        leaves |= {f"dA{n}": term.A, f"dB{n}": term.B}
        if term.lora_bias is not None:
            leaves[f"dbias{n}"] = term.lora_bias
    # cuDNN's algorithms may be others than sums of products, which is all that the bounds hold for.
    with torch.backends.cudnn.flags(enabled=False):
        with arithmetic(device, mode), autocast(device, mode):
            y = lora_convolution(leaves["dx"], base.weight, base.bias, terms, Geometry.of(base))
        with arithmetic(device, mode):
            gradients = gradients_of(y, placed(problem.dy, mode.computes, device), leaves)
    assert y.dtype is placed(problem.dy, mode.computes, "cpu").dtype
    for name, gradient in gradients.items():
        assert gradient.dtype is leaves[name].dtype
        assert gradient.shape == leaves[name].shape
    return y.detach(), gradients


@pytest.mark.parametrize(("device", "mode"), cases())
@settings(max_examples=20)
@given(data=st.data())
def test_small_integers_come_out_exactly(device: str, mode: Mode, data: st.DataObject) -> None:
    problem = data.draw(exact_convolutions(mode.computes)).astype(float)
    y, gradients = run(problem, mode, device)
    assert_equal(y, forward(problem))
    expected = named(backward(problem))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_equal(gradient, expected[name].reshape(gradient.shape), name)


@pytest.mark.parametrize(("device", "mode"), cases())
@settings(max_examples=8)
@given(data=st.data())
def test_everything_else_stays_within_the_bound(device: str, mode: Mode, data: st.DataObject) -> None:
    problem = data.draw(gaussian_convolutions())
    y, gradients = run(problem, mode, device)
    assume(finite(y, *gradients.values()))
    given_numbers = _as_given(problem, mode)
    exact, allowed = given_numbers.rational(), backward_bound(given_numbers, mode.precision)
    assert_bounded(y, forward(exact), forward_bound(given_numbers, mode.precision), mode, "y")
    expected, bounds = named(backward(exact)), named(allowed)
    for name, gradient in gradients.items():
        shape = gradient.shape
        assert_bounded(gradient, expected[name].reshape(shape), bounds[name].reshape(shape), mode, name)


def _as_given(problem: ConvolutionProblem, mode: Mode) -> ConvolutionProblem:
    """The problem with the numbers that the tensors have, in float64."""

    def rounded(array: Any, dtype: Any) -> Any:
        return None if array is None else array.astype(dtype).astype(float)

    adapters = tuple(
        replace(
            own,
            A=rounded(own.A, mode.adapter),
            B=rounded(own.B, mode.adapter),
            bias=rounded(own.bias, mode.adapter),
            dropout=rounded(own.dropout, mode.base),
        )
        for own in problem.adapters
    )
    return ConvolutionProblem(
        rounded(problem.x, mode.base),
        rounded(problem.dy, mode.computes),
        rounded(problem.W0, mode.base),
        rounded(problem.bias, mode.base),
        adapters,
        problem.geometry,
    )


@pytest.mark.parametrize(("device", "mode"), cases(LAYER_MODES))
@settings(max_examples=12)
@given(data=st.data())
def test_merged_and_unmerged_agree_bit_for_bit_on_integers(
    device: str, mode: Mode, data: st.DataObject
) -> None:
    problem = data.draw(exact_convolutions(mode.computes)).astype(float)
    kernel = (1,) * (problem.x.ndim - 2)
    adapters = [
        replace(own, B=own.B.reshape(*own.B.shape[:2], *kernel), dropout=None) for own in problem.adapters
    ]
    layer = LoraConvolution(convolution_of(problem, mode.base, device))
    give(layer, adapters, mode.adapter, device)
    x = placed(problem.x, mode.base, device)
    own_weight = layer.weight
    with torch.backends.cudnn.flags(enabled=False), arithmetic(device, mode), autocast(device, mode):
        unmerged = layer(x)
        merged = layer.merged_arrays(layer.active, "layer")
        layer.set_merged({name: tensor_of(array).to(device) for name, array in merged.items()})
        y = layer(x)
    layer.restore_base()
    assert layer.weight is own_weight
    assert_equal(unmerged, forward(replace(problem, adapters=tuple(adapters))))
    assert_equal(unmerged, wide(y))
