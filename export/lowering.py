"""A graph of operators of the ONNX standard alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

from loracle.reference import TargetError

from .names import PAST, past_names
from .recipes import RECIPES, TRANSPOSED
from .template import GraphTemplate, Made
from .tidy import name_values

_PRODUCT = "FusedMatMul"
_NORM = "SimplifiedLayerNormalization"
_SUFFIX = ".transposed"


def lower(template: GraphTemplate) -> GraphTemplate:
    """Spell every product of a weight, and every RMS norm, in standard operators; the template is used up.

    A weight that is used in products alone is stored transposed, (in, out), for `MatMul`. One that is an
    embedding too stays as it is, once, and is multiplied by `Gemm`, on rows: (batch * length, in).

    Raises TargetError where another operator is not of the standard.
    """
    graph = template.model.graph
    made = dict(template.made)
    shapes = dict(template.shapes)
    products = [node for node in graph if node.op_type == _PRODUCT]
    stored: dict[ir.Value, ir.Value] = {}
    for node in products:
        weight = node.inputs[1]
        assert weight is not None
        if weight not in stored and _only_product(weight):
            stored[weight] = _transposed(graph, weight, made, shapes)
    for node in products:
        weight = node.inputs[1]
        if weight in stored:
            _replace(graph, node, _matmul(node, stored[weight]))
        else:
            _replace(graph, node, _gemm(graph, node))
    for node in [node for node in graph if node.op_type == _NORM]:
        _replace(graph, node, _rms_norm(graph, node))
    for weight in stored:
        del graph.initializers[str(weight.name)]
    graph.opset_imports.pop("com.microsoft", None)
    lowered = replace(template, made=made, shapes=shapes)
    check_standard(lowered.model)
    name_values(lowered.model, lowered.unbound)
    return lowered


def read_sizes_of_first(graph: ir.Graph) -> None:
    """Let a cache's sizes, which are the same in all layers, be read from the first layer's key, in place."""
    inputs = {str(value.name): value for value in graph.inputs}
    (first, *_) = past_names(1)
    for name, value in inputs.items():
        if not name.startswith(PAST) or name == first:
            continue
        for node, place in list(value.uses()):
            if node.op_type == "Shape":
                node.replace_input_with(place, inputs[first])


def check_standard(model: ir.Model) -> None:
    """Raise TargetError unless every node is of the ONNX standard, in the version that the graph imports, and
    computes in a type that runtimes have everywhere."""
    version = model.graph.opset_imports[""]
    for node in model.graph:
        if any(value.dtype == ir.DataType.BFLOAT16 for value in node.outputs):
            raise TargetError(
                f"{node.name}: expected no bfloat16, got {node.op_type} in it, which few runtimes have; "
                "this model cannot be exported"
            )
        if node.domain or not onnx.defs.has(node.op_type, version, ""):
            raise TargetError(
                f"{node.name}: expected an operator of the ONNX standard, version {version}, got "
                f"{node.domain or 'onnxruntime'}::{node.op_type}; export without --portable"
            )


def _only_product(weight: ir.Value) -> bool:
    uses = weight.uses()
    return all(use.node.op_type == _PRODUCT and use.idx == 1 for use in uses)


def _transposed(
    graph: ir.Graph, weight: ir.Value, made: dict[str, Made], shapes: dict[str, tuple[int, ...]]
) -> ir.Value:
    """Make an initializer of a weight's transpose."""
    name = str(weight.name)
    assert weight.shape is not None
    shapes[name] = tuple(int(size) for size in weight.shape.numpy())
    value = ir.Value(
        name=name + _SUFFIX, type=weight.type, shape=ir.Shape(RECIPES[TRANSPOSED].shape([shapes[name]]))
    )
    graph.initializers.add(value)
    made[str(value.name)] = Made(TRANSPOSED, (name,))
    return value


def _matmul(node: ir.Node, weight: ir.Value) -> list[ir.Node]:
    return [ir.node("MatMul", [node.inputs[0], weight])]


def _gemm(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    x, weight = node.inputs
    assert weight is not None
    assert weight.shape is not None
    out, inner = (int(size) for size in weight.shape.numpy())
    rows = ir.node("Reshape", [x, _constant(graph, "rows", [-1, inner])])
    product = ir.node("Gemm", [rows.outputs[0], weight], {"transB": 1})
    outer = ir.node("Shape", [x], {"start": 0, "end": -1})
    shape = ir.node("Concat", [outer.outputs[0], _constant(graph, "out", [out])], {"axis": 0})
    result = ir.node("Reshape", [product.outputs[0], shape.outputs[0]])
    for own in (rows, product):
        own.outputs[0].dtype = node.outputs[0].dtype
    for own in (outer, shape):
        own.outputs[0].dtype = ir.DataType.INT64
    return [rows, product, outer, shape, result]


def _rms_norm(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """Return the nodes of `weight * x / sqrt(mean(x^2) + eps)`, whose quotient is computed in float32."""
    x, weight = node.inputs
    assert x is not None
    narrow = None if x.dtype == ir.DataType.FLOAT else x.dtype
    nodes: list[ir.Node] = []

    def add(operator: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        nodes.append(ir.node(operator, inputs, attributes))
        nodes[-1].outputs[0].dtype = ir.DataType.FLOAT
        return nodes[-1].outputs[0]

    wide = x if narrow is None else add("Cast", [x], to=int(ir.DataType.FLOAT))
    square = add("Mul", [wide, wide])
    mean = add("ReduceMean", [square, _constant(graph, "axis", [-1])], keepdims=1)
    epsilon = _scalar(graph, "epsilon", node.attributes["epsilon"].as_float())
    length = add("Sqrt", [add("Add", [mean, epsilon])])
    quotient = add("Div", [wide, length])
    if narrow is not None:
        quotient = add("Cast", [quotient], to=int(narrow))
        quotient.dtype = narrow
    add("Mul", [quotient, weight])
    return nodes


def _scalar(graph: ir.Graph, kind: str, value: float) -> ir.Value:
    name = f"{kind}_{value!r}".replace(".", "_")
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(value, np.float32), name=name)
        held = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(held)
    return graph.initializers[name]


def _constant(graph: ir.Graph, kind: str, values: list[int]) -> ir.Value:
    name = f"{kind}_{'_'.join(map(str, values))}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _replace(graph: ir.Graph, node: ir.Node, nodes: Collection[ir.Node]) -> None:
    """Put `nodes`, the last of which has the result, in the place of a node."""
    nodes = list(nodes)
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.dtype, new.shape = old.dtype, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])
