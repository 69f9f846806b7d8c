"""Where a difference arises: the first value of the model that anybody's graph does not have.

Each weight that was found in the graph is used by a node, which reads what the weight's module reads in the
unmerged model, and returns what that returns. These values are compared in the order of the graph.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import Adapter

from ..opening import open_graph
from ..tasks import Task
from ..texts import Texts
from .foreign_inputs import Interface
from .foreign_outputs import one_input, open_foreign, run_input
from .foreign_session import ForeignSession
from .graph_paths import Between, behind, between, described
from .module_places import INPUT, OUTPUT, Gap, Place, module_places
from .module_values import ModuleValues, module_values
from .truth import Float64Model
from .weight_matching import Matches
from .weight_products import Terms, multiplied_dtype

Array = np.ndarray[Any, Any]

_NAMED = 6


@dataclass(frozen=True)
class FirstDifference:
    """The first value of a graph that is outside the bound around the unmerged model's.

    Attributes:
        module: path of the module whose value it is.
        side: "input", or "output".
        error: its largest error, held to `tolerance`.
        sources: what it is computed from, all of which is right.
        nodes: the graph's nodes between them and it, as operator and name.
        also: paths of other modules whose input is right and whose output is not, and does not depend on it.
        compared: how many values were compared.
    """

    module: str
    side: str
    error: float
    tolerance: float
    sources: tuple[str, ...]
    nodes: tuple[str, ...]
    also: tuple[str, ...]
    compared: int

    def __str__(self) -> str:
        off = f"{self.module}: its {self.side} is off by {self.error:.2g} (tolerance {self.tolerance:.2g})"
        right = f", though it is computed from what is right, {_listed(self.sources)}" if self.sources else ""
        if not self.nodes:
            return f"{off}{right}, and from nothing else: what should come between is missing"
        weight = "its weight or in " if self.side == OUTPUT else ""
        more = f"; {_listed(self.also)} alike" if self.also else ""
        return f"{off}{right}: the fault is in {weight}{self._suspects()}{more}"

    def _suspects(self) -> str:
        if len(self.nodes) <= _NAMED:
            return _listed(self.nodes)
        kinds = Counter(node.rpartition(" ")[0] for node in self.nodes)
        counted = ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in kinds.items())
        return f"one of {len(self.nodes)} nodes from {self.nodes[0]} to {self.nodes[-1]}: {counted}"


def first_difference_node(
    graph_path: Path,
    model: ir.Model,
    matches: Matches,
    task: Task,
    model_dir: str | Path,
    adapter: Adapter | None,
    config: Mapping[str, Any],
    texts: Texts | None,
    *,
    trusted: bool = False,
    rounded_to: np.dtype[Any] | None = None,
) -> FirstDifference | None:
    """Run the longest text, or an image, through the graph and through the unmerged model, and compare what
    modules with weights read and return.

    Args:
        graph_path: the graph's file.
        model: its content.
        matches: which weight lies where in it.
        task: what the model is for.
        model_dir: the base model's folder.
        config: the content of the merged model's `config.json`.
        texts: None for a model of images.
        trusted: whether the folder's own modelling code may run.
        rounded_to: the dtype in which weights were merged that the graph holds in a wider one.

    Returns:
        None where every value that can be compared is inside its bound: then the difference arises behind
        the last of them, or with a cache or a padding that this text has not.

    Raises:
        as `foreign_outputs.check_foreign_outputs`.
    """
    session = open_foreign(graph_path, task, config)
    feeds, interface = one_input(session, texts, config), session.interface
    del session
    truth = Float64Model(model_dir, adapter, task, config, trusted=trusted)
    modules = module_values(truth, feeds, multiplied_dtype(model.graph, rounded_to))
    del truth
    return compared_with(modules, interface, model, matches, feeds, config)


def compared_with(
    modules: Mapping[str, ModuleValues],
    interface: Interface,
    model: ir.Model,
    matches: Matches,
    feeds: Mapping[str, Array],
    config: Mapping[str, Any],
) -> FirstDifference | None:
    """As `first_difference_node`, beside what the unmerged model makes of the same feeds."""
    places = module_places(model.graph, matches, modules, config)
    got = _values(interface, model, places, feeds)
    return first_difference(model.graph, places, got)


def first_difference(
    graph: ir.Graph, places: Sequence[Place], got: Mapping[str, Array]
) -> FirstDifference | None:
    """The first of some places, in the graph's order, whose value is outside its tolerance.

    Args:
        got: the graph's values by their names.
    """
    gaps = [(place, own) for place in places if (own := place.gaps(got))]
    inside = {id(place): any(gap.is_inside for gap in own.values()) for place, own in gaps}
    right: dict[ir.Value, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    wrong: set[ir.Value] = set()
    for place, own in gaps:
        for terms, gap in own.items():
            if not gap.is_inside:
                # Another module's output may be read, and be right as that.
                if not inside[id(place)] and place.side == OUTPUT:
                    wrong.update(terms)
            elif len(terms) == 1:
                right[terms[0]][place.side].append(place.module)
    outside = [(place, own) for place, own in gaps if not inside[id(place)]]
    if not outside:
        return None
    place, own = outside[0]
    terms = min(own, key=lambda terms: own[terms].error) if place.side == OUTPUT else next(iter(own))
    known = {value: _named(modules) for value, modules in right.items() if value not in wrong}
    path = between(graph, terms, known)
    return FirstDifference(
        place.module,
        place.side,
        own[terms].error,
        own[terms].tolerance,
        tuple(known[value] for value in path.sources),
        tuple(described(node) for node in _suspects(place, terms, path)),
        _alike(gaps, inside, place, behind(graph, terms)),
        len(gaps),
    )


def _named(modules: Mapping[str, Sequence[str]]) -> str:
    """A value, by the modules that return it; or else by the first that reads it."""
    if modules.get(OUTPUT):
        return f"the output of {_listed(modules[OUTPUT])}"
    return f"the input of {modules[INPUT][0]}"


def _suspects(place: Place, terms: Terms, path: Between) -> tuple[ir.Node, ...]:
    """The nodes between; the node itself where it adds what it reads."""
    return path.nodes or ((place.node,) if len(terms) > 1 else ())


def _alike(
    gaps: Sequence[tuple[Place, Mapping[Terms, Gap]]],
    inside: Mapping[int, bool],
    first: Place,
    following: Collection[ir.Node],
) -> tuple[str, ...]:
    """Other modules that have a right input and a wrong output, at nodes that follow nothing wrong."""
    given = {place.module: inside[id(place)] for place, _ in gaps if place.side == INPUT}
    return tuple(
        place.module
        for place, _ in gaps
        if place.side == OUTPUT
        and not inside[id(place)]
        and given.get(place.module, True)
        and place.module != first.module
        and place.node not in following
    )


def _values(
    interface: Interface, model: ir.Model, places: Sequence[Place], feeds: Mapping[str, Array]
) -> dict[str, Array]:
    """The graph's values at some places, by their names."""
    wanted = {str(value.name) for place in places for terms in place.values for value in terms}
    proto = ir.to_proto(model)
    for name in sorted(wanted - {str(value.name) for value in model.graph.outputs}):
        proto.graph.output.add().name = name
    session = open_graph(proto.SerializeToString(), interface.graph.parent, reuse=False)
    names = sorted(wanted)
    return dict(zip(names, run_input(ForeignSession(session, interface), feeds, names), strict=True))


def _listed(items: Sequence[str]) -> str:
    shown = list(items[:_NAMED])
    if len(items) > _NAMED:
        shown.append(f"{len(items) - _NAMED} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
