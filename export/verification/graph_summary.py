"""What `verify` says of a candidate's graph, as a certificate holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .adapter_left import AdapterLeft
from .candidate import Candidate
from .graph_content import GraphContent
from .report import Check
from .weight_matching import Matches

_REMADE = "the base model's graph, made again"
_GIVEN = "the base's graph that was given"


@dataclass(frozen=True)
class GraphSummary:
    """A candidate's graph.

    Attributes:
        nodes: their number.
        beside: the graph that it was compared with, node for node; None where there was none.
        differences: from that graph.
        added, removed: operators of which it has more or fewer nodes than that graph, and how many.
        adapter: what is left of one.
        strangers: products with weights that are none of the model's.
        misplaced: weights that stand in another one's place.
        found: in how many places weights were found, by how.
    """

    nodes: int
    beside: str | None = None
    differences: tuple[str, ...] = ()
    added: Mapping[str, int] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)
    adapter: AdapterLeft | None = None
    strangers: tuple[str, ...] = ()
    misplaced: tuple[str, ...] = ()
    found: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        left = self.adapter
        return {
            "nodes": self.nodes,
            "beside": self.beside,
            "differences": list(self.differences),
            "added": dict(self.added),
            "removed": dict(self.removed),
            "adapter": None
            if left is None
            else {
                "pairs": left.pairs,
                "nodes": left.nodes,
                "operators": dict(left.operators),
                "names": list(left.names),
            },
            "strangers": list(self.strangers),
            "misplaced": list(self.misplaced),
            "found": dict(self.found),
        }


def exported_graph(candidate: Candidate, check: Check) -> GraphSummary:
    """Of a model that `loracle export` has made; `check` is what `check_graphs` has found."""
    nodes = sum(len(model.graph) for model in candidate.models.values())
    return GraphSummary(nodes, _REMADE, check.failures)


def foreign_graph_summary(content: GraphContent, matches: Matches) -> GraphSummary:
    """Of anybody's graph."""
    base = content.base
    found = Counter(place.how for places in matches.found.values() for place in places)
    return GraphSummary(
        content.nodes,
        None if base is None else _GIVEN,
        () if base is None or base.difference is None else (base.difference,),
        {} if base is None else base.added,
        {} if base is None else base.removed,
        content.adapter,
        content.strangers,
        content.misplaced,
        dict(found.most_common()),
    )
