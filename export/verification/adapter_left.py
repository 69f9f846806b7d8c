"""An adapter that is still in a graph: its factors, told by content or by name, and the nodes that are there
for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracle.files import Adapter

from .content_search import ContentSearch, nearly_equal
from .graph_tensors import MOVING, Array, constant_behind, held_tensors
from .weight_signatures import array_groups

_DOWN, _UP = "lora_A", "lora_B"
_NAMED = re.compile(r"(?:^|[._/:])lora_?(?:embedding_)?(A|B|down|up)(?![a-z])", re.IGNORECASE)
_SIDES = {"a": _DOWN, "down": _DOWN, "b": _UP, "up": _UP}
_SUMS = ("Add", "Sum")


@dataclass(frozen=True)
class AdapterLeft:
    """What a graph holds of an adapter.

    Attributes:
        pairs: of lora_A and lora_B; those of which one alone was found count too.
        nodes: that are there for the adapter: products with it, what is made of them alone, and the sums that
            add it to the model's own products.
        names: of the initializers and inputs that are lora_A or lora_B.
        operators: of the nodes, and how many of each.
    """

    pairs: int
    nodes: int
    names: tuple[str, ...]
    operators: Mapping[str, int]

    def __str__(self) -> str:
        made = ", ".join(f"{count} {operator}" for operator, count in self.operators.items())
        return f"an adapter is left in the graph: {self.pairs} pairs, {self.nodes} nodes ({made or 'unused'})"


def find_adapter(graph: ir.Graph, adapter: Adapter | None, others: Collection[str]) -> AdapterLeft | None:
    """Return what a graph holds of an adapter, None where it holds nothing.

    Args:
        adapter: the one whose factors are looked for by content, in either orientation, times any number, and
            with those of several layers in one tensor; None for names alone.
        others: the graph's tensors that are no weights of the model.
    """
    sides = _by_name(graph)
    if adapter is not None:
        for name, found in _by_content(graph, adapter, others).items():
            sides[name] = found
    if not sides:
        return None
    down, up = (sum(found.count(side) for found in sides.values()) for side in (_DOWN, _UP))
    values = {str(value.name): value for value in graph.inputs}
    values |= {name: own.value for name, own in held_tensors(graph).items()}
    operators = Counter(node.op_type for node in _nodes_of(graph, {values[name] for name in sides}))
    return AdapterLeft(max(down, up), operators.total(), tuple(sides), dict(operators.most_common()))


def _by_name(graph: ir.Graph) -> dict[str, list[str]]:
    """For each input or floating-point constant that is called so, lora_A or lora_B."""
    names = [str(value.name) for value in graph.inputs]
    names += [name for name, own in held_tensors(graph).items() if own.floating]
    return {
        name: [_SIDES[found[-1].lower()]] for name in dict.fromkeys(names) if (found := _NAMED.findall(name))
    }


def _by_content(graph: ir.Graph, adapter: Adapter, others: Collection[str]) -> dict[str, list[str]]:
    """For each tensor that holds factors of the adapter what they are."""
    held = {name: own for name, own in held_tensors(graph).items() if name in others and own.size}
    search = ContentSearch(held, array_groups(_factors(adapter), _directions), _directions)
    search.give_whole(search.groups.values(), nearly_equal, "")
    search.give_packed(lambda _: True, nearly_equal, "", skip=True)
    sides: dict[str, list[str]] = {}
    for name, places in search.found.items():
        for found in places:
            sides.setdefault(found.place.initializer, []).append(name.rpartition(".")[2])
    return sides


def _factors(adapter: Adapter) -> dict[str, Array]:
    """A and the transpose of B of every pair, both with a row for each rank, but for those of zeros."""
    factors = {}
    for path, pair in adapter.pairs.items():
        factors[f"{path}.{_DOWN}"] = pair.A.reshape(len(pair.A), -1)
        factors[f"{path}.{_UP}"] = pair.B.reshape(len(pair.B), -1).T
    return {name: factor for name, factor in factors.items() if factor.any()}


def _directions(signatures: Array) -> Array:
    """Signatures of size 1: what is the same times a number is equal."""
    wide = signatures.astype(np.float64)
    sizes = np.sqrt(np.square(wide).sum(1, keepdims=True))
    return wide / np.where(sizes > 0, sizes, 1)


def _nodes_of(graph: ir.Graph, factors: set[ir.Value]) -> list[ir.Node]:
    """The nodes that compute with the factors, and those that serve or use them alone."""
    laid_out, made = set(factors), set[ir.Value]()
    branch: set[ir.Node] = set()
    sums: set[ir.Node] = set()
    nodes = [node for node in graph.all_nodes() if node.op_type != "Constant"]
    for node in nodes:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type in MOVING and inputs and inputs[0] in laid_out:
            branch.add(node)
            laid_out.update(node.outputs)
        elif any(value in laid_out for value in inputs) or (
            any(value in made for value in inputs)
            and all(value in made or constant_behind(value) is not None for value in inputs)
        ):
            branch.add(node)
            made.update(node.outputs)
        elif node.op_type in _SUMS and any(value in made for value in inputs):
            sums.add(node)
    for node in reversed(nodes):
        users = [user for out in node.outputs for user in out.consumers()]
        ends = any(out.is_graph_output() for out in node.outputs)
        if users and not ends and all(user in branch for user in users):
            branch.add(node)
    return [node for node in nodes if node in branch or node in sums]
