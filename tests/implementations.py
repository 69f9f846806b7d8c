"""The LoRA linear layer three times over: NumPy, PyTorch and onnxruntime, on the same problem.

Each takes a `LoraProblem` and returns y and the gradients by name; dropout is left out (see the rooms' own
tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from strategies import LoraProblem

from loracle.reference import linear_backward, linear_forward
from loracle.torch_impl import LoraLinear
from loracle.torch_impl.update import UpdateOptions

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Nodes = list[onnx.NodeProto]
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
ELEMENT = {F32: TensorProto.FLOAT, F64: TensorProto.DOUBLE}


def numpy_layer(problem: LoraProblem) -> Arrays:
    """The reference."""
    p = problem
    gradients = linear_backward(p.dy, p.x, p.W0, p.A, p.B, p.scaling)
    y = linear_forward(p.x, p.W0, p.A, p.B, p.scaling, bias=p.bias)
    return {"y": y, "dx": gradients.dx, "dA": gradients.dA, "dB": gradients.dB, "dbias": gradients.dbias}


@dataclass(frozen=True)
class _Scaled(UpdateOptions):
    """Options with a scaling that need not be alpha / r."""

    exact: float = 1.0

    @property
    def scaling(self) -> float:
        return self.exact


def torch_module(problem: LoraProblem) -> LoraLinear:
    """A `LoraLinear` with one adapter that holds the problem's numbers."""
    out_features, in_features = problem.W0.shape
    linear = torch.nn.Linear(in_features, out_features)
    linear.weight.data = torch.from_numpy(problem.W0.copy())
    linear.bias.data = torch.from_numpy(problem.bias.copy())
    layer = LoraLinear(linear)
    layer.add_adapter("default", _Scaled(len(problem.A), 1.0, exact=problem.scaling))
    layer.activate(("default",))
    layer.update().lora_A.data = torch.from_numpy(problem.A.copy())
    layer.update().lora_B.data = torch.from_numpy(problem.B.copy())
    return layer


def torch_layer(problem: LoraProblem) -> Arrays:
    """`LoraLinear` and autograd; the bias is frozen, so it has no gradient."""
    layer = torch_module(problem)
    x = torch.from_numpy(problem.x.copy()).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(problem.dy.copy()))
    assert x.grad is not None
    A, B = layer.update().lora_A.grad, layer.update().lora_B.grad
    assert A is not None
    assert B is not None
    assert layer.base_layer.weight.grad is None
    tensors = {"y": y.detach(), "dx": x.grad, "dA": A, "dB": B}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def onnx_layer(problem: LoraProblem, change: Callable[[Nodes], Nodes] | None = None) -> Arrays:
    """A graph of standard operators in onnxruntime; ``change`` rewrites its nodes first."""
    y = onnx_run("unmerged", problem, change=change)[0]
    gradients = onnx_run("backward", problem, change=change)
    return {"y": y} | dict(zip(("dx", "dA", "dB", "dbias"), gradients, strict=True))


def onnx_merged(problem: LoraProblem, W: Array, change: Callable[[Nodes], Nodes] | None = None) -> Array:
    """y of the graph of a merged layer."""
    result: Array = onnx_run("merged", problem, W=W, change=change)[0]
    return result


def onnx_run(
    kind: str, problem: LoraProblem, *, W: Array | None = None, change: Callable[[Nodes], Nodes] | None = None
) -> list[Array]:
    inputs, outputs, nodes = GRAPHS[kind]
    dtype = problem.x.dtype
    session = _session(dtype, inputs, outputs, nodes if change is None else change(list(nodes)))
    given = {name: getattr(problem, name) for name in ("x", "dy", "W0", "A", "B", "bias")}
    given |= {"scaling": np.array(problem.scaling, dtype), "W": W}
    feeds = {entry.name: np.ascontiguousarray(given[entry.name]) for entry in session.get_inputs()}
    result: list[Array] = session.run(None, feeds)
    return result


def _session(dtype: np.dtype[Any], inputs: str, outputs: str, nodes: Nodes) -> Any:
    key = (dtype, outputs, tuple(node.SerializeToString() for node in nodes))
    if key not in _SESSIONS:
        graph = helper.make_graph(nodes, "g", _values(dtype, inputs), _values(dtype, outputs))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        _SESSIONS[key] = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    return _SESSIONS[key]


_SESSIONS: dict[Any, Any] = {}


def _values(dtype: np.dtype[Any], names: str) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, ELEMENT[dtype], None) for name in names.split()]


def _node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def _transposes(names: str) -> Nodes:
    return [_node("Transpose", name, f"{name}_t", perm=[1, 0]) for name in names.split()]


# Inputs, outputs and nodes of y = x W0^T + bias + ((x A^T) B^T) scaling; of y = x W^T + bias; and of
# dx = dy W0 + scaling (dy B) A, dA = scaling (dy B)^T x, dB = scaling dy^T (x A^T), dbias = sum dy.
GRAPHS: dict[str, tuple[str, str, Nodes]] = {
    "unmerged": (
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
    ),
    "merged": (
        "x W bias",
        "y",
        [*_transposes("W"), _node("MatMul", "x W_t", "base"), _node("Add", "base bias", "y")],
    ),
    "backward": (
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
    ),
}
