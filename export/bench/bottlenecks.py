"""AdapterH and AdapterL in a graph: `h + W_up f(W_down h + b) + b'` in the place of a layer part's result h.

* AdapterH (Houlsby et al. 2019): on the results of attention and of the MLP, before each is added; f is the
  GELU.
* AdapterL (Lin et al. 2020): on the result of the MLP alone; a layer norm of its own stands before W_down,
  and f is the ReLU.

Each is spelled in as few operators as onnxruntime has for it: the GELU takes b, and where a sum and its norm
are one operator that adds a bias as well, it takes b'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from .places import MLP, Place, find_places

Array = np.ndarray[Any, Any]

Draw = Callable[[str, tuple[int, ...]], Array]
"""The values of a parameter, from its name and its shape."""

_DOMAIN = "com.microsoft"
_BIASED = "SkipLayerNormalization"
_BIAS = 4
"""Where `SkipLayerNormalization` has a bias among its inputs."""
_EPSILON = 1e-5


def add_adapter_h(graph: ir.Graph, hidden: int, rank: int, draw: Draw) -> int:
    """Put AdapterH into a graph, in place; return the number of its parameters.

    Args:
        hidden: d, the width of the stream.
        rank: of W_down (rank, d) and W_up (d, rank).
        draw: gives the parameters `layers.N.PART.adapter.down.weight` and so on their values.

    Raises TargetError where it has no place; see `find_places`.
    """
    return sum(_insert(graph, place, hidden, rank, draw, normed=False) for place in find_places(graph))


def add_adapter_l(graph: ir.Graph, hidden: int, rank: int, draw: Draw) -> int:
    """Put AdapterL into a graph, in place; see `add_adapter_h`. The norm is `...adapter.norm.weight` and
    `.bias`."""
    places = [place for place in find_places(graph) if place.part == MLP]
    return sum(_insert(graph, place, hidden, rank, draw, normed=True) for place in places)


def constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new initializer of a graph."""
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(graph: ir.Graph, place: Place, hidden: int, rank: int, draw: Draw, *, normed: bool) -> int:
    """Let an adapter stand before a sum; return the number of its parameters."""
    total, prefix = place.total, f"layers.{place.layer}.{place.part}.adapter"
    parameters = 0

    def parameter(name: str, *shape: int) -> ir.Value:
        nonlocal parameters
        array = draw(f"{prefix}.{name}", shape)
        parameters += array.size
        return constant(graph, f"{prefix}.{name}", array)

    result = total.inputs[place.operand]
    assert result is not None
    nodes: list[ir.Node] = []

    def node(
        op_type: str, inputs: list[ir.Value], suffix: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        made = ir.node(op_type, inputs, attributes, domain=domain)
        made.outputs[0].name = f"{prefix}.{suffix}"
        made.outputs[0].dtype = result.dtype
        nodes.append(made)
        return made.outputs[0]

    h = result
    bias = total.inputs[_BIAS] if total.op_type == _BIASED and len(total.inputs) > _BIAS else None
    if bias is not None:
        h = node("Add", [h, bias], "input")
    x = h
    if normed:
        norm = [parameter("norm.weight", hidden), parameter("norm.bias", hidden)]
        x = node("LayerNormalization", [h, *norm], "normed", axis=-1, epsilon=_EPSILON)
    down = parameter("down.weight", rank, hidden), parameter("down.bias", rank)
    up = parameter("up.weight", hidden, rank), parameter("up.bias", hidden)
    inner = node("FusedMatMul", [x, down[0]], "down", _DOMAIN, transB=1)
    if normed:
        inner = node("Relu", [node("Add", [inner, down[1]], "biased")], "inner")
    else:
        inner = node("BiasGelu", [inner, down[1]], "inner", _DOMAIN)
    h = node("Add", [h, node("FusedMatMul", [inner, up[0]], "up", _DOMAIN, transB=1)], "adapted")
    if bias is not None:
        total.replace_input_with(_BIAS, up[1])
    else:
        h = node("Add", [h, up[1]], "output")
    total.replace_input_with(place.operand, h)
    graph.insert_before(total, nodes)
    return parameters
