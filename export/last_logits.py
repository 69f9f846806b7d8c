"""Logits of the last positions alone: an input that need not be given."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from loracle.reference import TargetError

from .names import LOGITS_TO_KEEP

_END = np.iinfo(np.int64).max


def keep_last(model: ir.Model, head: str, aliases: Mapping[str, tuple[str, ...]]) -> None:
    """Let the output layer see only the last `num_logits_to_keep` positions, in place.

    That is an input (1,) with a default of 0, which stands for all positions: programs that do not know of it
    get what they expect.

    Args:
        head: name of the output layer's weight.
        aliases: as in `GraphTemplate`.

    Raises TargetError where the weight is not used by one product.
    """
    graph = model.graph
    first = next(name for name, group in aliases.items() if head in group)
    products = [
        use.node
        for use in graph.initializers[first].uses()
        if use.node.op_type in ("FusedMatMul", "MatMul", "Gemm") and use.idx == 1
    ]
    if len(products) != 1:
        raise TargetError(f"{head}: expected one product that uses it, found {len(products)}")
    count = _initializer(graph, LOGITS_TO_KEEP, [0])
    graph.inputs.append(count)
    start = ir.node("Neg", [count])
    axis = _initializer(graph, f"{LOGITS_TO_KEEP}.axis", [1])
    end = _initializer(graph, f"{LOGITS_TO_KEEP}.end", [_END])
    hidden = products[0].inputs[0]
    assert hidden is not None
    last = ir.node("Slice", [hidden, start.outputs[0], end, axis])
    start.outputs[0].name = f"{LOGITS_TO_KEEP}.start"
    last.outputs[0].name = f"{LOGITS_TO_KEEP}.hidden"
    start.outputs[0].dtype, last.outputs[0].dtype = ir.DataType.INT64, hidden.dtype
    products[0].replace_input_with(0, last.outputs[0])
    graph.insert_before(products[0], [start, last])


def _initializer(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    tensor = ir.tensor(np.array(values, np.int64), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
