"""One meaning, three implementations: NumPy, PyTorch and onnxruntime, forward, backward and merged.

Exact tier (numerics, clause 5): small integers, a scaling that is a power of two, every partial sum a number
of the dtype: the three agree bit for bit, merged and unmerged. Derived tier (clause 4): gaussians; each stays
within the a-priori bound around the reference in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from strategies import LoraProblem, exact_problems, lora_problems

from loracle.reference import (
    linear_backward,
    linear_backward_bound,
    linear_forward,
    linear_forward_bound,
    merge,
    merged_forward_bound,
)
from loracle.torch_impl import LoraLinear
from loracle.torch_impl import merge as torch_merge
from loracle.torch_impl import unmerge as torch_unmerge

Arrays = dict[str, np.ndarray[Any, Any]]
GRADIENTS = ("dx", "dA", "dB", "dbias")
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
ELEMENT = {F32: TensorProto.FLOAT, F64: TensorProto.DOUBLE}


def _session(dtype: np.dtype[Any], inputs: str, outputs: str, nodes: list[onnx.NodeProto]) -> Any:
    def values(names: str) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, ELEMENT[dtype], None) for name in names.split()]

    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def _transposes(names: str) -> list[onnx.NodeProto]:
    return [_node("Transpose", name, f"{name}_t", perm=[1, 0]) for name in names.split()]


def _unmerged(dtype: np.dtype[Any]) -> Any:
    """y = x W0^T + bias + ((x A^T) B^T) scaling."""
    return _session(
        dtype,
        "x W0 A B bias scaling",
        "y",
        [
            *_transposes("W0 A B"),
            _node("MatMul", "x W0_t", "base"),
            _node("Add", "base bias", "biased"),
            _node("MatMul", "x A_t", "h"),
            _node("MatMul", "h B_t", "d"),
            _node("Mul", "d scaling", "delta"),
            _node("Add", "biased delta", "y"),
        ],
    )


def _merged(dtype: np.dtype[Any]) -> Any:
    """y = x W^T + bias."""
    nodes = [*_transposes("W"), _node("MatMul", "x W_t", "base"), _node("Add", "base bias", "y")]
    return _session(dtype, "x W bias", "y", nodes)


def _backward(dtype: np.dtype[Any]) -> Any:
    """dx = dy W0 + scaling (dy B) A; dA = scaling (dy B)^T x; dB = scaling dy^T (x A^T); dbias = sum dy."""
    return _session(
        dtype,
        "x dy W0 A B scaling",
        "dx dA dB dbias",
        [
            *_transposes("A dy"),
            _node("MatMul", "dy W0", "base"),
            _node("MatMul", "dy B", "g"),
            _node("Mul", "g scaling", "gs"),
            _node("MatMul", "gs A", "low"),
            _node("Add", "base low", "dx"),
            _node("Transpose", "gs", "gs_t", perm=[1, 0]),
            _node("MatMul", "gs_t x", "dA"),
            _node("MatMul", "x A_t", "h"),
            _node("MatMul", "dy_t h", "db"),
            _node("Mul", "db scaling", "dB"),
            helper.make_node("Constant", [], ["axis"], value_ints=[0]),
            helper.make_node("ReduceSum", ["dy", "axis"], ["dbias"], keepdims=0),
        ],
    )


MAKERS = {"unmerged": _unmerged, "merged": _merged, "backward": _backward}
SESSIONS = {(kind, dtype): make(dtype) for dtype in (F32, F64) for kind, make in MAKERS.items()}


def _run(kind: str, problem: LoraProblem, **more: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    dtype = problem.x.dtype
    session = SESSIONS[kind, dtype]
    given = {name: getattr(problem, name) for name in ("x", "dy", "W0", "A", "B", "bias")}
    given |= {"scaling": np.array(problem.scaling, dtype), **more}
    feeds = {entry.name: np.ascontiguousarray(given[entry.name]) for entry in session.get_inputs()}
    result: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return result


def _layer(problem: LoraProblem) -> LoraLinear:
    """A `LoraLinear` that holds the problem's numbers; its scaling is set through alpha."""
    out_features, in_features = problem.W0.shape
    r = problem.A.shape[0]
    linear = torch.nn.Linear(in_features, out_features)
    linear.weight.data = torch.from_numpy(problem.W0.copy())
    linear.bias.data = torch.from_numpy(problem.bias.copy())
    layer = LoraLinear(linear, r, 1.0)
    layer.scaling = problem.scaling
    layer.lora_A.data = torch.from_numpy(problem.A.copy())
    layer.lora_B.data = torch.from_numpy(problem.B.copy())
    return layer


def _torch(problem: LoraProblem) -> tuple[np.ndarray[Any, Any], Arrays]:
    """y and the gradients by autograd."""
    layer = _layer(problem)
    x = torch.from_numpy(problem.x.copy()).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(problem.dy.copy()))
    assert x.grad is not None
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert layer.base_layer.weight.grad is None
    gradients = {"dx": x.grad, "dA": layer.lora_A.grad, "dB": layer.lora_B.grad}
    return y.detach().numpy(), {name: gradient.numpy() for name, gradient in gradients.items()}


def _same(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> None:
    """Equal numbers, dtypes and shapes; +0 and -0 are one number (a sum's order decides its zero)."""
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert np.array_equal(left, right)


def _reference(problem: LoraProblem) -> tuple[np.ndarray[Any, Any], Arrays]:
    p = problem
    gradients = linear_backward(p.dy, p.x, p.W0, p.A, p.B, p.scaling)
    y = linear_forward(p.x, p.W0, p.A, p.B, p.scaling, bias=p.bias)
    return y, {name: getattr(gradients, name) for name in GRADIENTS}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@given(data=st.data())
def test_exact_tier_forward_and_backward_agree_bit_for_bit(dtype: np.dtype[Any], data: st.DataObject) -> None:
    problem = data.draw(exact_problems(dtype))
    y, gradients = _reference(problem)
    torch_y, torch_gradients = _torch(problem)
    _same(torch_y, y)
    _same(_run("unmerged", problem)[0], y)
    for name, gradient in torch_gradients.items():
        _same(gradient, gradients[name])
    for name, gradient in zip(GRADIENTS, _run("backward", problem), strict=True):
        _same(gradient, gradients[name])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@given(data=st.data())
def test_exact_tier_merged_equals_unmerged_bit_for_bit(dtype: np.dtype[Any], data: st.DataObject) -> None:
    """Merging changes no answer where no rounding hides a difference."""
    problem = data.draw(exact_problems(dtype))
    y, _ = _reference(problem)
    W = merge(problem.W0, problem.A, problem.B, problem.scaling)
    _same(_run("merged", problem, W=W)[0], y)
    layer = _layer(problem)
    model = torch.nn.Sequential(layer)
    torch_merge(model)
    _same(layer.weight.detach().numpy(), W)
    with torch.no_grad():
        _same(model(torch.from_numpy(problem.x.copy())).numpy(), y)
    torch_unmerge(model)
    assert layer.weight.detach().numpy().tobytes() == problem.W0.tobytes()


def _within(
    computed: np.ndarray[Any, Any], exact: np.ndarray[Any, Any], *bounds: np.ndarray[Any, Any]
) -> None:
    assert computed.dtype == F32
    assert np.all(np.abs(computed.astype(F64) - exact) <= sum(bounds))


@given(lora_problems(dtype=F32))
def test_derived_tier_forward_and_backward_stay_within_the_bounds(problem: LoraProblem) -> None:
    """Float64 stands for the exact value, with its own bound added."""
    p, wide = problem, problem.astype(F64)
    y, gradients = _reference(wide)
    arguments = (p.x, p.W0, p.A, p.B, p.scaling)
    bounds = [linear_forward_bound(*arguments, dtype, bias=p.bias) for dtype in (F32, F64)]
    torch_y, torch_gradients = _torch(problem)
    for computed in (_reference(problem)[0], torch_y, _run("unmerged", problem)[0]):
        _within(computed, y, *bounds)
    allowed = [linear_backward_bound(p.dy, *arguments, dtype) for dtype in (F32, F64)]
    runtime = dict(zip(GRADIENTS, _run("backward", problem), strict=True))
    for implementation in (_reference(problem)[1], torch_gradients, runtime):
        for name, gradient in implementation.items():
            _within(gradient, gradients[name], *(getattr(bound, name) for bound in allowed))


@given(lora_problems(dtype=F32))
def test_derived_tier_merged_layer_stays_within_the_bounds(problem: LoraProblem) -> None:
    """The merged weight is itself rounded once, half an ulp at most: |x| |W - W_exact|^T comes on top."""
    p, wide = problem, problem.astype(F64)
    y, _ = _reference(wide)
    W = merge(p.W0, p.A, p.B, p.scaling)
    exact = merge(wide.W0, wide.A, wide.B, p.scaling)
    rounded = np.abs(wide.x) @ np.abs(W.astype(F64) - exact).T
    bounds = (
        merged_forward_bound(p.x, W, F32, bias=p.bias),
        merged_forward_bound(p.x, exact, F64, bias=p.bias),
        linear_forward_bound(p.x, p.W0, p.A, p.B, p.scaling, F64, bias=p.bias),
        rounded * (1 + 2.0**-20),
    )
    _within(_run("merged", problem, W=W)[0], y, *bounds)
    layer = _layer(problem)
    torch_merge(torch.nn.Sequential(layer))
    with torch.no_grad():
        _within(layer(torch.from_numpy(p.x.copy())).numpy(), y, *bounds)


@given(lora_problems(dtype=F32))
def test_merging_is_the_reference_in_torch_bit_for_bit(problem: LoraProblem) -> None:
    layer = _layer(problem)
    model = torch.nn.Sequential(layer)
    W = merge(problem.W0, problem.A, problem.B, problem.scaling)
    for _ in range(2):
        torch_merge(model)
        assert layer.weight.detach().numpy().tobytes() == W.tobytes()
        torch_unmerge(model)
        assert layer.weight.detach().numpy().tobytes() == problem.W0.tobytes()
