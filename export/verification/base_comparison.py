"""Whether a graph is the base's by the same exporter, whatever the two call their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from .graph_diff import first_difference, node_difference
from .graph_tensors import held_tensors
from .quantized_tensors import code_holders
from .weight_matching import Matches

_Nodes: TypeAlias = ir.Graph | ir.Function

_SMALL = 16
"""Entries of a constant that is no weight: a scale, an epsilon, a shape."""


@dataclass(frozen=True)
class BaseComparison:
    """A candidate's graph beside the base's.

    Attributes:
        difference: the first in words; None where the graphs are equal.
        added: operators of which the candidate has more nodes, and how many more.
        removed: those of which it has fewer.
    """

    difference: str | None
    added: Mapping[str, int]
    removed: Mapping[str, int]

    @property
    def failures(self) -> list[str]:
        """What speaks against equality, a line each."""
        if self.difference is None:
            return []
        lines = [f"the base graph differs: {self.difference}"]
        for word, operators in (("added", self.added), ("missing", self.removed)):
            if operators:
                lines.append(f"{word}: " + ", ".join(f"{count} {name}" for name, count in operators.items()))
        return lines


def compare_with_base(candidate: ir.Model, base: ir.Model, matches: Matches) -> BaseComparison:
    """Compare node for node; where the initializers have other names, their names may differ.

    Args:
        candidate: the graph in which weights have been found.
        base: the base model, exported in the same way.
        matches: the candidate's weights, whose values are not compared.
    """
    weights = frozenset(place.initializer for places in matches.found.values() for place in places)
    weights |= code_holders(candidate.graph) if matches.quantized else frozenset()
    if candidate.graph.initializers.keys() == base.graph.initializers.keys() and not base.functions:
        difference = first_difference(candidate, base, weights)
    else:
        difference = _nameless_difference(candidate, base, weights)
    ours, theirs = _operators(candidate), _operators(base)
    return BaseComparison(difference, dict(ours - theirs), dict(theirs - ours))


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def _nameless_difference(candidate: ir.Model, base: ir.Model, weights: frozenset[str]) -> str | None:
    if dict(candidate.opset_imports) != dict(base.opset_imports):
        return f"operator sets: expected {dict(base.opset_imports)}, got {dict(candidate.opset_imports)}"
    if candidate.functions.keys() != base.functions.keys():
        return f"functions: expected {list(base.functions)}, got {list(candidate.functions)}"
    ends = frozenset(str(value.name) for value in (*base.graph.inputs, *base.graph.outputs))
    pairs: list[tuple[_Nodes, _Nodes, frozenset[str]]] = [(candidate.graph, base.graph, ends)]
    pairs += [(candidate.functions[own], base.functions[own], frozenset()) for own in base.functions]
    differences = (node_difference(*pair) for pair in pairs)
    found = next((difference for difference in differences if difference is not None), None)
    return found or _constant_difference(candidate.graph, base.graph, weights)


def _constant_difference(candidate: ir.Graph, base: ir.Graph, weights: frozenset[str]) -> str | None:
    """Name a small constant whose value the base's graph does not have, or not as often."""
    known = Counter(value for _, value in _small_constants(base, frozenset()))
    for name, value in _small_constants(candidate, weights):
        known[value] -= 1
        if known[value] < 0:
            return f"constant {name}: the base graph has none of this value"
    return None


def _small_constants(graph: ir.Graph, weights: frozenset[str]) -> list[tuple[str, tuple[object, ...]]]:
    return [
        (name, (own.tensor.dtype, own.shape, own.read(lambda array: array.tobytes())))
        for name, own in held_tensors(graph).items()
        if name not in weights and own.size <= _SMALL and own.tensor.dtype != ir.DataType.STRING
    ]
