"""What is in anyone's graph beside the products of the model: an adapter, other weights, other nodes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from loracle.files import Adapter

from .adapter_left import AdapterLeft, find_adapter
from .attention_order import exchanged_projections
from .base_comparison import BaseComparison, compare_with_base
from .content_signature import squeezed
from .graph_tensors import Array, HeldTensor, constant_behind, held_tensors
from .report import Check, named_first
from .weight_matching import AGAINST_NAME, Matches

_NAMED = 8
_MATRIX = 2
_SINE_AND_COSINE = 2
_LOOKUPS = ("Gather", "GatherND")
_PRODUCTS = (
    "Conv",
    "ConvTranspose",
    "Einsum",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "FusedMatMulActivation",
    "Gemm",
    "MatMul",
    "TransposeMatMul",
    *_LOOKUPS,
)
_LAYER = re.compile(r"\.(\d{1,9})\.")


@dataclass(frozen=True)
class GraphContent:
    """What a graph holds, beside a model whose weights have been found in it.

    Attributes:
        nodes: their number, with those of graphs in nodes.
        adapter: what is left of one; None where there is nothing.
        strangers: products and lookups with a weight that is none of the model's, in words.
        misplaced: weights that stand in another one's place, in words.
        base: the comparison with the base's graph by the same exporter; None where none was given.
    """

    nodes: int
    adapter: AdapterLeft | None
    strangers: tuple[str, ...]
    misplaced: tuple[str, ...]
    base: BaseComparison | None = None

    def check(self) -> Check:
        """The statement as a whole: no adapter, no product with another weight, each weight in its place; and
        the base's graph node for node, where that was given."""
        failures = [] if self.adapter is None else [_with_names(self.adapter)]
        failures += [*named_first(self.strangers, "products"), *named_first(self.misplaced, "weights")]
        if self.base is not None:
            failures += self.base.failures
        name = "graph holds the model's products and no adapter"
        if self.base is not None:
            name = "graph is the base graph, node for node"
        return Check(name, not failures, f"{self.nodes} nodes", tuple(failures))


def describe_graph(
    model: ir.Model, matches: Matches, adapter: Adapter | None = None, base_graph: ir.Model | None = None
) -> GraphContent:
    """Return what a graph holds beside the weights that have been found in it.

    Args:
        model: the candidate.
        matches: of its graph, see `match_weights`.
        adapter: what must not be left in it; None to look for adapters by their names alone.
        base_graph: the base model, exported in the same way.

    Raises:
        FileError: a tensor's data are not there, or do not fit its shape.
    """
    graph = model.graph
    held = held_tensors(graph)
    left = find_adapter(graph, adapter, matches.others)
    own = frozenset(matches.others) - frozenset(() if left is None else left.names)
    return GraphContent(
        sum(1 for _ in graph.all_nodes()),
        left,
        tuple(_strangers(graph, held, own)),
        (
            *_against_names(matches),
            *_out_of_order(matches, held),
            *exchanged_projections(graph, matches, held),
        ),
        None if base_graph is None else compare_with_base(model, base_graph, matches),
    )


def _strangers(graph: ir.Graph, held: Mapping[str, HeldTensor], others: Collection[str]) -> Iterator[str]:
    names = {own.value: name for name, own in held.items() if name in others}
    for node in graph.all_nodes():
        if node.op_type not in _PRODUCTS:
            continue
        operands = node.inputs[:1] if node.op_type in _LOOKUPS else node.inputs
        for value in operands:
            origin = constant_behind(value)
            name = None if origin is None else names.get(origin)
            if name is None or len(squeezed(held[name].shape)) < _MATRIX:
                continue
            if node.op_type not in _LOOKUPS or not _is_table(held[name]):
                yield f"{node.op_type} {node.name or node.outputs[0].name}: {name} is no weight of the model"


def _is_table(held: HeldTensor) -> bool:
    """Whether a matrix is one of sines and cosines of positions: the first are 0 and 1, or a multiple
    of them."""

    def first_row(array: Array) -> Array:
        return np.array(array.reshape(-1, array.shape[-1])[0], np.float64)

    return len(np.unique(held.read(first_row))) <= _SINE_AND_COSINE


def _against_names(matches: Matches) -> Iterator[str]:
    for weight, places in matches.found.items():
        for place in places:
            if place.how == AGAINST_NAME:
                yield f"{place.initializer}: holds {weight}"


def _out_of_order(matches: Matches, held: Mapping[str, HeldTensor]) -> Iterator[str]:
    """Weights of a layer which the result of a later layer is multiplied by."""
    layers: dict[str, list[tuple[int, str, HeldTensor]]] = {}
    for weight, places in matches.found.items():
        found = _LAYER.search(weight)
        if found is not None and len(places) == 1:
            kind = weight[: found.start()] + "." + weight[found.end() :]
            layers.setdefault(kind, []).append((int(found[1]), weight, held[places[0].initializer]))
    for own in layers.values():
        own.sort(key=lambda item: item[0])
        for (_, weight, first), (_, later, second) in pairwise(own):
            if second.order < first.order and _depends(first.value, second.value):
                yield f"{later}: stands before {weight} in the graph"


def _depends(value: ir.Value, other: ir.Value) -> bool:
    """Whether what is computed with a constant depends on what is computed with another."""
    users = set(other.consumers())
    seen: set[ir.Node] = set()
    waiting = list(value.consumers())
    while waiting:
        node = waiting.pop()
        if node in users:
            return True
        if node not in seen:
            seen.add(node)
            waiting.extend(filter(None, (own.producer() for own in node.inputs if own is not None)))
    return False


def _with_names(left: AdapterLeft) -> str:
    names = ", ".join(left.names[:_NAMED])
    more = f" and {len(left.names) - _NAMED} more" if len(left.names) > _NAMED else ""
    return f"{left}: {names}{more}"
