"""Products of one input as one: `[x W1^T, x W2^T] = x [W1; W2]^T`.

Each entry is the same sum as before; fewer, wider products keep the cores busier. Query, key and value go
into the attention operator as they come; other packed products are split again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from .recipes import RECIPES, ROWS
from .template import GraphTemplate, Made

_ATTENTION = "GroupQueryAttention"


@dataclass(frozen=True)
class _Product:
    """`x W^T + b`: the product, the sum with the bias or None, and their initializers."""

    product: ir.Node
    weight: ir.Value
    total: ir.Node | None
    bias: ir.Value | None

    @property
    def result(self) -> ir.Value:
        return (self.total or self.product).outputs[0]


def pack_products(template: GraphTemplate) -> GraphTemplate:
    """Pack the products whose results are query, key and value of an attention operator with a cache.

    The template is used up. Products stay as they are where only some have a bias, or where something lies
    between them and the operator.
    """
    graph = template.model.graph
    made = dict(template.made)
    shapes = dict(template.shapes)
    for node in list(graph):
        if node.op_type != _ATTENTION:
            continue
        products = [_product(value, template) for value in node.inputs[:3]]
        found = [product for product in products if product is not None]
        if len(found) < 3 or len({product.product.inputs[0] for product in found}) > 1:
            continue
        if len({product.bias is None for product in found}) > 1:
            continue
        _pack(graph, node, found, made, shapes)
    return replace(template, made=made, shapes=shapes)


def _product(value: ir.Value | None, template: GraphTemplate) -> _Product | None:
    """Return the product of which `value`, used once, is the result."""
    if value is None or not _used_once(value):
        return None
    node, total, bias = value.producer(), None, None
    if node is not None and node.op_type == "Add":
        total, (left, bias) = node, node.inputs
        if left is None or bias is None or not _is_own(bias, template) or not _used_once(left):
            return None
        node = left.producer()
    if node is None or node.op_type != "FusedMatMul" or len(node.inputs) != 2:
        return None
    if {name: attribute.value for name, attribute in node.attributes.items()} != {"transB": 1}:
        return None
    weight = node.inputs[1]
    if weight is None or not _is_own(weight, template):
        return None
    return _Product(node, weight, total, bias)


def _used_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _is_own(value: ir.Value, template: GraphTemplate) -> bool:
    """Whether a value is a weight that nothing else uses or is tied to."""
    name = str(value.name)
    return len(template.aliases.get(name, ())) == 1 and name in template.unbound and _used_once(value)


def _pack(
    graph: ir.Graph,
    attention: ir.Node,
    products: Sequence[_Product],
    made: dict[str, Made],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    weight = _rows(graph, [product.weight for product in products], made, shapes)
    first = products[0].product
    nodes = [ir.node("FusedMatMul", [first.inputs[0], weight], {"transB": 1}, domain=first.domain)]
    biases = [product.bias for product in products if product.bias is not None]
    if biases:
        bias = _rows(graph, biases, made, shapes)
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias]))
    for node in nodes:
        node.outputs[0].dtype = products[0].result.dtype
    graph.insert_before(attention, nodes)
    attention.replace_input_with(0, nodes[-1].outputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    for product in products:
        graph.remove([node for node in (product.total, product.product) if node is not None], safe=True)
    for value in [product.weight for product in products] + biases:
        del graph.initializers[str(value.name)]


def _rows(
    graph: ir.Graph, values: Sequence[ir.Value], made: dict[str, Made], shapes: dict[str, tuple[int, ...]]
) -> ir.Value:
    """Make an initializer of the rows of all `values`."""
    names = [str(value.name) for value in values]
    for name, value in zip(names, values, strict=True):
        assert value.shape is not None
        shapes[name] = tuple(int(size) for size in value.shape.numpy())
    packed = ir.Value(
        name=packed_name(names),
        type=values[0].type,
        shape=ir.Shape(RECIPES[ROWS].shape([shapes[name] for name in names])),
    )
    graph.initializers.add(packed)
    made[str(packed.name)] = Made(ROWS, tuple(names))
    return packed


def packed_name(names: Sequence[str]) -> str:
    """`a.q.weight`, `a.k.weight` -> `a.q+k.weight`: what names share at both ends, once."""
    parts = [name.split(".") for name in names]
    start = _shared(parts)
    end = _shared([part[start:][::-1] for part in parts])
    middle = "+".join(".".join(part[start : len(part) - end]) for part in parts)
    return ".".join([*parts[0][:start], middle, *parts[0][len(parts[0]) - end :]])


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """Return how many first entries all lists share."""
    count = 0
    for entries in zip(*lists, strict=False):
        if len(set(entries)) > 1:
            break
        count += 1
    return count
