"""One meaning, three implementations: NumPy, PyTorch and onnxruntime, forward, backward and merged.

Exact tier (numerics, clause 5): small integers, a scaling that is a power of two, every partial sum a number
of the dtype: the three agree bit for bit, merged and unmerged. Derived tier (clause 4): gaussians; each stays
within the a-priori bound around the reference in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from implementations import F32, F64, Array, numpy_layer, onnx_layer, onnx_merged, torch_layer, torch_module
from strategies import LoraProblem, exact_problems, lora_problems

from loracle.reference import linear_backward_bound, linear_forward_bound, merge, merged_forward_bound
from loracle.torch_impl import merge as torch_merge
from loracle.torch_impl import unmerge as torch_unmerge


def _same(left: Array, right: Array) -> None:
    """Equal numbers, dtypes and shapes; +0 and -0 are one number (a sum's order decides its zero)."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert np.array_equal(left, right)


def _within(computed: Array, exact: Array, *bounds: Array) -> None:
    assert computed.dtype == F32
    assert np.all(np.abs(computed.astype(F64) - exact) <= sum(bounds))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@given(data=st.data())
def test_exact_tier_forward_and_backward_agree_bit_for_bit(dtype: np.dtype[Any], data: st.DataObject) -> None:
    problem = data.draw(exact_problems(dtype))
    expected = numpy_layer(problem)
    for implementation in (torch_layer, onnx_layer):
        for name, computed in implementation(problem).items():
            _same(computed, expected[name])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@given(data=st.data())
def test_exact_tier_merged_equals_unmerged_bit_for_bit(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """Merging changes no answer where no rounding hides a difference."""
    problem = data.draw(exact_problems(dtype))
    y = numpy_layer(problem)["y"]
    W = merge(problem.W0, problem.A, problem.B, problem.scaling)
    _same(onnx_merged(problem, W), y)
    layer = torch_module(problem)
    model = torch.nn.Sequential(layer)
    torch_merge(model)
    _same(layer.weight.detach().numpy(), W)
    with torch.no_grad():
        _same(model(torch.from_numpy(problem.x.copy())).numpy(), y)
    torch_unmerge(model)
    assert layer.weight.detach().numpy().tobytes() == problem.W0.tobytes()


@given(lora_problems(dtype=F32))
def test_derived_tier_forward_and_backward_stay_within_the_bounds(problem: LoraProblem) -> None:
    """Float64 stands for the exact value, with its own bound added."""
    p = problem
    expected = numpy_layer(problem.astype(F64))
    arguments = (p.x, p.W0, p.A, p.B, p.scaling)
    y_bounds = [linear_forward_bound(*arguments, dtype, bias=p.bias) for dtype in (F32, F64)]
    gradient_bounds = [linear_backward_bound(p.dy, *arguments, dtype) for dtype in (F32, F64)]
    for implementation in (numpy_layer, torch_layer, onnx_layer):
        for name, computed in implementation(problem).items():
            bounds = y_bounds if name == "y" else [getattr(bound, name) for bound in gradient_bounds]
            _within(computed, expected[name], *bounds)


@given(lora_problems(dtype=F32))
def test_derived_tier_merged_layer_stays_within_the_bounds(problem: LoraProblem) -> None:
    """The merged weight is itself rounded once, half an ulp at most: |x| |W - W_exact|^T comes on top."""
    p, wide = problem, problem.astype(F64)
    y = numpy_layer(wide)["y"]
    W = merge(p.W0, p.A, p.B, p.scaling)
    exact = merge(wide.W0, wide.A, wide.B, p.scaling)
    rounded = np.abs(wide.x) @ np.abs(W.astype(F64) - exact).T
    bounds = (
        merged_forward_bound(p.x, W, F32, bias=p.bias),
        merged_forward_bound(p.x, exact, F64, bias=p.bias),
        linear_forward_bound(p.x, p.W0, p.A, p.B, p.scaling, F64, bias=p.bias),
        rounded * (1 + 2.0**-20),
    )
    _within(onnx_merged(problem, W), y, *bounds)
    layer = torch_module(problem)
    torch_merge(torch.nn.Sequential(layer))
    with torch.no_grad():
        _within(layer(torch.from_numpy(p.x.copy())).numpy(), y, *bounds)


@given(lora_problems(dtype=F32))
def test_merging_is_the_reference_in_torch_bit_for_bit(problem: LoraProblem) -> None:
    layer = torch_module(problem)
    model = torch.nn.Sequential(layer)
    W = merge(problem.W0, problem.A, problem.B, problem.scaling)
    for _ in range(2):
        torch_merge(model)
        assert layer.weight.detach().numpy().tobytes() == W.tobytes()
        torch_unmerge(model)
        assert layer.weight.detach().numpy().tobytes() == problem.W0.tobytes()
