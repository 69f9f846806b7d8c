"""How many tokens a cache holds: an input that need not be given."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from loracle.reference import TargetError

from .names import PAST_LENGTH

_WHOLE = -1


def let_length_be_told(model: ir.Model, past: str) -> None:
    """Let the cache's tensors be longer than what they hold, in place.

    `past_length` is an input (1,), how many tokens they hold; with its default of -1 as many as they are
    long, as programs that do not know of it expect. Attention appends in place where a past that is long
    enough is bound as the present too.

    Args:
        past: name of an input (batch, heads, length, size), whose length the model reads.

    Raises TargetError where no node reads it.
    """
    graph = model.graph
    value = next(value for value in graph.inputs if value.name == past)
    lengths = [node for node, _ in value.uses() if _is_length(node)]
    if not lengths:
        raise TargetError(f"{past}: expected a node that reads its length, found none")
    told = _initializer(graph, PAST_LENGTH, _WHOLE)
    graph.inputs.append(told)
    zero = _initializer(graph, f"{PAST_LENGTH}.zero", 0)
    whole = ir.node("Shape", [value], {"start": 2, "end": 3})
    is_whole = ir.node("Less", [told, zero])
    held = ir.node("Where", [is_whole.outputs[0], whole.outputs[0], told])
    names = ((whole, ".whole"), (is_whole, ".is_whole"), (held, ".held"))
    for node, suffix in names:
        node.outputs[0].name = f"{PAST_LENGTH}{suffix}"
        node.outputs[0].dtype = ir.DataType.BOOL if node is is_whole else ir.DataType.INT64
    graph.insert_before(graph[0], [whole, is_whole, held])
    for node in lengths:
        node.outputs[0].replace_all_uses_with(held.outputs[0])
        graph.remove(node, safe=True)


def _is_length(node: ir.Node) -> bool:
    """Whether a node's result is the third size of its input, alone."""
    read = {name: attribute.value for name, attribute in node.attributes.items()}
    return node.op_type == "Shape" and read == {"start": 2, "end": 3}


def _initializer(graph: ir.Graph, name: str, number: int) -> ir.Value:
    tensor = ir.tensor(np.array([number], np.int64), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
