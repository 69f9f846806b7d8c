"""Prompt tuning in a graph: tokens beyond the vocabulary whose embeddings are trained.

A text is longer by p tokens, V to V + p - 1 where V is the size of the vocabulary, which stand before its
own. They are looked up in a table of their own; the model's stays as it is, so that an output layer that is
tied to it has no more logits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from loracle.reference import TargetError

from .bottlenecks import Draw, constant

NAME = "prompt.embeddings"


def add_virtual_tokens(graph: ir.Graph, vocabulary: int, hidden: int, count: int, draw: Draw) -> int:
    """Let `count` tokens more have embeddings, in place; return the number of their parameters.

    Args:
        vocabulary: V, the rows of the model's table.
        hidden: the width of an embedding.
        draw: gives `prompt.embeddings`, (count, hidden), its values.

    Raises TargetError where there is no one table of that size that tokens are looked up in.
    """
    lookups = [node for node in graph if _is_lookup(node, vocabulary)]
    if len(lookups) != 1:
        raise TargetError(
            f"embeddings: expected one table of {vocabulary} tokens, found {len(lookups)}; prompt tuning has "
            "no place in this model, leave it out of --methods"
        )
    (lookup,) = lookups
    tokens, found = lookup.inputs[1], lookup.outputs[0]
    assert tokens is not None
    table = constant(graph, NAME, draw(NAME, (count, hidden)))

    def number(name: str, *values: int) -> ir.Value:
        array = np.array(values if name == "axes" else values[0], np.int64)
        return constant(graph, f"prompt.{name}", array)

    first, zero = number("first", vocabulary), number("zero", 0)
    own = ir.node("Min", [tokens, number("last", vocabulary - 1)])
    place = ir.node("Sub", [tokens, first])
    inside = ir.node("Max", [place.outputs[0], zero])
    given = ir.node("Gather", [table, inside.outputs[0]])
    virtual = ir.node("GreaterOrEqual", [tokens, first])
    mask = ir.node("Unsqueeze", [virtual.outputs[0], number("axes", -1)])
    chosen = ir.node("Where", [mask.outputs[0], given.outputs[0], found])
    nodes = {"own": own, "place": place, "inside": inside, "given": given, "virtual": virtual, "mask": mask}
    for name, node in {**nodes, "chosen": chosen}.items():
        node.outputs[0].name = f"prompt.{name}.result"
    for node in (own, place, inside):
        node.outputs[0].dtype = ir.DataType.INT64
    for node in (virtual, mask):
        node.outputs[0].dtype = ir.DataType.BOOL
    given.outputs[0].dtype, chosen.outputs[0].dtype, chosen.outputs[0].shape = (
        found.dtype,
        found.dtype,
        found.shape,
    )
    graph.insert_before(lookup, [own, place, inside, given, virtual, mask])
    lookup.replace_input_with(1, own.outputs[0])
    found.replace_all_uses_with(chosen.outputs[0])
    chosen.replace_input_with(2, found)
    graph.insert_after(lookup, chosen)
    return count * hidden


def _is_lookup(node: ir.Node, vocabulary: int) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" else None
    if table is None or not table.is_initializer() or table.shape is None or len(table.shape) != 2:
        return False
    return int(table.shape.numpy()[0]) == vocabulary
