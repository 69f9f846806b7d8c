"""Whether query, key and value stand in each other's places, which only what is done with them tells."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from .graph_tensors import HeldTensor
from .weight_matching import Match, Matches

_NAMES = (
    ("q_proj", "query", "q", "q_lin"),
    ("k_proj", "key", "k", "k_lin"),
    ("v_proj", "value", "v", "v_lin"),
)
_ROLES = {name: role for role, names in enumerate(_NAMES) for name in names}
_KEY, _VALUE = 1, 2
_ATTENTION = ("Attention", "GroupQueryAttention", "MultiHeadAttention")
_SOFTMAX = "Softmax"
_WEIGHT = ".weight"


def exchanged_projections(graph: ir.Graph, matches: Matches, held: Mapping[str, HeldTensor]) -> Iterator[str]:
    """Name the weights of an attention layer that are used as another one of its query, key and value is.

    An attention operator takes them in turn, apart or as rows of one product. Elsewhere keys go into a
    softmax, and values into none before the next layer's. Where neither is there nothing is said.
    """
    order = {node: number for number, node in enumerate(graph.all_nodes())}
    for roles in _layers(matches).values():
        places = {role: matches.found[name][0] for role, name in roles.items()}
        uses = {role: _use(held[place.initializer].value, order) for role, place in places.items()}
        wrong = _wrong(places, uses, order)
        if wrong:
            yield f"{' and '.join(roles[role] for role in wrong)}: stand in one another's place"


def _layers(matches: Matches) -> dict[str, dict[int, str]]:
    """For each attention layer the weights of its query, key and value, as many as have one place."""
    layers: dict[str, dict[int, str]] = {}
    for name, places in matches.found.items():
        layer, _, last = name.removesuffix(_WEIGHT).rpartition(".")
        if name.endswith(_WEIGHT) and last in _ROLES and len(places) == 1:
            layers.setdefault(layer, {})[_ROLES[last]] = name
    return layers


def _use(value: ir.Value, order: Mapping[ir.Node, int]) -> ir.Usage | None:
    """The first use as an operand of attention, or in a softmax, of what is computed with a constant."""
    made = [out for node in value.consumers() for out in node.outputs]
    waiting = [(order[use.node], use.idx, use) for out in made for use in out.uses() if use.node in order]
    heapq.heapify(waiting)
    seen = set()
    while waiting:
        _, _, use = heapq.heappop(waiting)
        if use.node.op_type in (*_ATTENTION, _SOFTMAX):
            return use
        if use.node not in seen:
            seen.add(use.node)
            for out in use.node.outputs:
                for further in out.uses():
                    if further.node in order:
                        heapq.heappush(waiting, (order[further.node], further.idx, further))
    return None


def _wrong(
    places: Mapping[int, Match], uses: Mapping[int, ir.Usage | None], order: Mapping[ir.Node, int]
) -> list[int]:
    """The roles whose weights have another one's."""
    used = {role: use for role, use in uses.items() if use is not None}
    operators = {use.node for use in used.values()}
    if len(used) > 1 and len(operators) == 1 and (node := operators.pop()).op_type in _ATTENTION:
        if len({use.idx for use in used.values()}) == len(used):
            return [role for role, use in used.items() if use.idx != role]
        rows = [(place.rows[0], role) for role, place in sorted(places.items()) if place.rows is not None]
        if len(rows) == len(places) and all(value is None for value in node.inputs[1:3]):
            return [role for (_, role), (_, own) in zip(rows, sorted(rows), strict=True) if role != own]
        return []
    key, value = used.get(_KEY), used.get(_VALUE)
    if value is None or value.node.op_type != _SOFTMAX:
        return []
    if key is None or order[value.node] < order[key.node]:
        return [_KEY, _VALUE] if _KEY in places else []
    return []
