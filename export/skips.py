"""A sum of two tensors and the norm of it as one operator of onnxruntime, which gives both.

* `SimplifiedLayerNormalization(a + b)` -> `com.microsoft.SkipSimplifiedLayerNormalization(a, b)`
* `LayerNormalization(a + b)` -> `com.microsoft.SkipLayerNormalization(a, b)`, which adds a bias as well

The operators take tensors of one shape. Shapes are known while a graph is traced, and layers are joined
across their borders, where a trace of a few layers is cut; so sums are marked first and joined at last.
"""

from __future__ import annotations

import onnx_ir as ir

_MARK = "ResidualSum"
_MARK_DOMAIN = "loracle"
_SKIP = {
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}
_SUM = 3
"""Where the operators have the sum among their outputs."""
_BIAS = 4
"""Where `SkipLayerNormalization` has a bias among its inputs."""


def mark_sums(graph: ir.Graph) -> None:
    """Mark each sum of two computed tensors of one shape whose norm is taken, in place."""
    for node in graph:
        if node.op_type != "Add" or node.domain:
            continue
        left, right = node.inputs
        if left is None or right is None or left.producer() is None or right.producer() is None:
            continue
        if left.shape is not None and left.shape == right.shape and _norms(node.outputs[0]):
            node.op_type, node.domain = _MARK, _MARK_DOMAIN


def join_sums(graph: ir.Graph) -> None:
    """Join each marked sum to its first norm, in place; sums that another node reads before it stay sums."""
    places = {node: place for place, node in enumerate(graph)}
    for node in list(graph):
        if (node.op_type, node.domain) != (_MARK, _MARK_DOMAIN):
            continue
        node.op_type, node.domain = "Add", ""
        norms = _norms(node.outputs[0])
        norm = min(norms, key=places.__getitem__, default=None)
        if norm is None or any(places[use.node] < places[norm] for use in node.outputs[0].uses()):
            continue
        _join(graph, node, norm)


def _norms(value: ir.Value) -> list[ir.Node]:
    """Return the norms over the last axis of `value`."""
    if value.is_graph_output():
        return []
    nodes = [use.node for use in value.uses() if use.node.op_type in _SKIP and use.idx == 0]
    axes = [node.attributes.get("axis") for node in nodes]
    return [node for node, axis in zip(nodes, axes, strict=True) if axis is None or axis.as_int() == -1]


def _join(graph: ir.Graph, total: ir.Node, norm: ir.Node) -> None:
    terms: list[ir.Value | None] = list(total.inputs)
    removed = [norm, total]
    bias: ir.Value | None = None
    if norm.op_type == "LayerNormalization":
        for place, term in enumerate(terms):
            biased = _biased(term)
            if biased is not None:
                removed.append(biased)
                terms[place], bias = biased.inputs
                break
    inputs = [*terms, *norm.inputs[1:]]
    if bias is not None:
        inputs += [None] * (_BIAS - len(inputs)) + [bias]
    summed, result = total.outputs[0], norm.outputs[0]
    needed = len(summed.uses()) > 1
    epsilon = norm.attributes.get("epsilon")
    joined = ir.node(
        _SKIP[norm.op_type],
        inputs,
        {} if epsilon is None else {"epsilon": epsilon.as_float()},
        domain="com.microsoft",
        num_outputs=_SUM + 1 if needed else 1,
    )
    graph.insert_before(norm, joined)
    _take_over(result, joined.outputs[0])
    if needed:
        for left_out in joined.outputs[1:_SUM]:
            left_out.name = ""
        _take_over(summed, joined.outputs[_SUM])
    graph.remove(removed, safe=True)


def _biased(value: ir.Value | None) -> ir.Node | None:
    """Return the node that adds a vector to a product, where `value`, used once, is its result."""
    node = None if value is None or len(value.uses()) != 1 else value.producer()
    if node is None or (node.op_type, node.domain) != ("Add", ""):
        return None
    product, bias = node.inputs
    if product is None or product.producer() is None or bias is None or not bias.is_initializer():
        return None
    return node if bias.shape is not None and len(bias.shape) == 1 else None


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` be in the place of `old`, as the graph's output too."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
