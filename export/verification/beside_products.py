"""Biases told by what they stand beside: many are equal, zeros above all, and their content tells nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from .content_search import ContentSearch, Found, Place
from .content_signature import ROUNDED, squeezed
from .graph_tensors import HeldTensor, constant_behind
from .weight_signatures import Group

_WEIGHT, _BIAS = "weight", "bias"


def give_biases(graph: ir.Graph, search: ContentSearch, how: str) -> None:
    """Give vectors that are added to the products of a weight that has been found to the bias of its module;
    those of several weights in one tensor to their biases.

    One that is equal to another bias, and not to this one, is left.
    """
    held = {own.value: own for own in search.held.values()}
    pieces: dict[str, list[tuple[str, tuple[int, int] | None]]] = {}
    for name, places in search.found.items():
        for found in places:
            pieces.setdefault(found.place.initializer, []).append((name, found.place.rows))
    for node in graph.all_nodes():
        for value in node.inputs:
            origin = constant_behind(value)
            weights = pieces.get(held[origin].name) if origin in held else None
            for vector in _vectors_beside(node, held) if weights else ():
                if vector.name not in search.claimed:
                    _give(search, vector, weights or [], how)


def _vectors_beside(node: ir.Node, held: dict[ir.Value, HeldTensor]) -> Iterator[HeldTensor]:
    """The constant vectors that a node takes itself, or that are added to its results."""
    nodes = [node, *(user for out in node.outputs for user in out.consumers() if user.op_type == "Add")]
    for own in nodes:
        for value in own.inputs:
            origin = constant_behind(value)
            if origin is not None and origin in held and len(squeezed(held[origin].shape)) == 1:
                yield held[origin]


def _give(
    search: ContentSearch,
    vector: HeldTensor,
    weights: Sequence[tuple[str, tuple[int, int] | None]],
    how: str,
) -> None:
    for name, rows in weights:
        bias = name.removesuffix(_WEIGHT) + _BIAS
        home = search.home(bias)
        if not name.endswith(_WEIGHT) or home is None or bias in search.found:
            continue
        group, index = home
        whole = group.shape == (vector.size, 1)
        if (rows is None and whole and not _is_another(search, vector, group, index)) or (
            rows is not None and rows[1] - rows[0] == group.shape[0] and rows[1] <= vector.size
        ):
            search.claim(bias, Found(Place(vector.name, False, rows), how))


def _is_another(search: ContentSearch, vector: HeldTensor, group: Group, index: int) -> bool:
    """Whether a vector is equal to a missing weight, and not to the one in question."""
    scores = search.similarities(Place(vector.name), group)
    equal = np.flatnonzero(scores >= 1 - ROUNDED)
    return index not in equal and bool(np.intersect1d(equal, search.missing(group)).size)
