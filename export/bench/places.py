"""Where a layer's two parts, attention and MLP, give their results to the residual stream of a graph.

A *residual sum* is a sum of two values of which one, the branch, was computed from the other, the stream, by
a product with weights. It is found by what is computed, whatever the architecture calls it: as a sum of its
own, or as one of onnxruntime's operators that also take the norm (`skips.py`). Sums without a product between
their operands, as in an activation, are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from loracle.reference import TargetError

ATTENTION, MLP = "attention", "mlp"

SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_ATTENTION_OPERATORS = frozenset({"GroupQueryAttention", "MultiHeadAttention", "Attention"})
_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "MoE", "QMoE"})
_SOFTMAX = frozenset({"Softmax"})
_SIZES = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Place:
    """The result of a part of a layer, before it is added.

    Attributes:
        layer: from 0.
        part: `ATTENTION` or `MLP`.
        total: the node that adds it.
        operand: which of the node's inputs it is.
    """

    layer: int
    part: str
    total: ir.Node
    operand: int


def find_places(graph: ir.Graph) -> tuple[Place, ...]:
    """The results of attention and MLP of each layer, in order.

    Raises TargetError where the graph is not attention and MLP in turn: its layers add both at once, or
    there are none.
    """
    nodes = list(graph)
    order = {node: number for number, node in enumerate(nodes)}
    attention = _ATTENTION_OPERATORS
    if not any(node.op_type in attention for node in nodes):
        attention = _SOFTMAX
    found = []
    latest = 0
    for node in nodes:
        operand = _branch(node, order)
        # What comes from before the latest sum is no stream: a mask, or a bias of attention.
        if operand is None or order[_producer(node, 1 - operand)] < latest:
            continue
        between = _between(node, operand, nodes, order)
        if between & _PRODUCTS:
            found.append((ATTENTION if between & attention else MLP, node, operand))
            latest = order[node]
    parts = [part for part, _, _ in found]
    if not parts or parts != [ATTENTION, MLP] * (len(parts) // 2):
        raise TargetError(
            f"layers: expected attention and MLP in turn, each added to what it read, found "
            f"{parts.count(ATTENTION)} sums after attention and {parts.count(MLP)} after an MLP alone; "
            "AdapterH and AdapterL have no place in this model, leave them out of --methods"
        )
    return tuple(
        Place(number // 2, part, node, operand) for number, (part, node, operand) in enumerate(found)
    )


def _branch(node: ir.Node, order: Mapping[ir.Node, int]) -> int | None:
    """Which operand of a sum was computed later; None where a node is no sum of two computed values."""
    if node.op_type not in SKIPS and (node.op_type, node.domain) != ("Add", ""):
        return None
    producers = [None if value is None else value.producer() for value in node.inputs[:2]]
    first, second = (-1 if own is None else order[own] for own in producers)
    if min(first, second) < 0 or first == second:
        return None
    return 0 if first > second else 1


def _between(
    total: ir.Node, operand: int, nodes: Sequence[ir.Node], order: Mapping[ir.Node, int]
) -> frozenset[str]:
    """The types of the nodes by which a sum's branch was computed from what the stream's node gave; none
    where it was not.

    A norm that is one operator with the sum before it is given by that node, too. A size is not computed from
    the value that has it.
    """
    source, last = (_producer(total, number) for number in (1 - operand, operand))
    after = {source}
    for node in nodes[order[source] + 1 : order[last] + 1]:
        if node.op_type not in _SIZES and any(own in after for own in _before(node)):
            after.add(node)
    if last not in after:
        return frozenset()
    between, waiting = {last}, [last]
    while waiting:
        for own in _before(waiting.pop()):
            if own in after and own is not source and own not in between:
                between.add(own)
                waiting.append(own)
    return frozenset(node.op_type for node in between)


def _before(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes whose results a node reads."""
    producers = (value.producer() for value in node.inputs if value is not None)
    return (own for own in producers if own is not None)


def _producer(node: ir.Node, operand: int) -> ir.Node:
    value = node.inputs[operand]
    own = None if value is None else value.producer()
    assert own is not None
    return own
