"""The nodes of a graph between values that are known to be right and one that is not."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx_ir as ir

_CAST_TO = "to"


@dataclass(frozen=True)
class Between:
    """What computes some values.

    Attributes:
        nodes: those that the right values go through, in the graph's order; where there are none, all that
            the values are computed by.
        sources: the right values that are read, in the order in which they were given.
    """

    nodes: tuple[ir.Node, ...]
    sources: tuple[ir.Value, ...]


def between(graph: ir.Graph, wrong: Iterable[ir.Value], right: Collection[ir.Value]) -> Between:
    """The nodes that compute some values of a graph from right ones.

    What comes from the graph's inputs or its constants alone, as a mask or angles do, is left out.
    """
    sources: set[ir.Value] = set()
    before: set[ir.Node] = set()
    waiting = list(wrong)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in right:
            sources.add(value)
        elif node is not None and node not in before:
            before.add(node)
            waiting += [own for own in node.inputs if own is not None]
    reached = set(sources)
    nodes = []
    for node in graph:
        if node in before and any(own in reached for own in node.inputs if own is not None):
            nodes.append(node)
            reached.update(node.outputs)
    if not sources:
        nodes = [node for node in graph if node in before]
    return Between(tuple(nodes), tuple(value for value in right if value in sources))


def behind(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Node]:
    """The nodes that depend on some values of a graph."""
    reached = set(values)
    found = set()
    for node in graph:
        if any(own in reached for own in node.inputs if own is not None):
            found.add(node)
            reached.update(node.outputs)
    return found


def described(node: ir.Node) -> str:
    """The operator and the name of a node, or of what it computes; of a cast also the dtype."""
    name = node.name or node.outputs[0].name
    to = node.attributes.get(_CAST_TO) if node.op_type == "Cast" else None
    kind = node.op_type if to is None else f"Cast to {ir.DataType(to.value).name.lower()}"
    return f"{kind} {name}"
