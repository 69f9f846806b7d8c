"""Where anybody's graph should have what the modules of the unmerged model read and return."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files.architectures import architecture_of
from loracle.files.tensor_names import TensorNames

from .graph_tensors import held_tensors
from .module_values import Call, Expected, ModuleValues
from .weight_matching import Matches
from .weight_products import Terms, Use, uses_of

Array = np.ndarray[Any, Any]

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Gap:
    """The largest error of a value, and what it is held to."""

    error: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """The error as a multiple of the tolerance."""
        if self.error == 0:
            return 0.0
        return self.error / self.tolerance if self.tolerance else math.inf

    @property
    def is_inside(self) -> bool:
        """Whether the error is allowed."""
        return self.ratio <= 1


@dataclass(frozen=True)
class Place:
    """Where a graph should have a value.

    Attributes:
        module: the module whose value it is.
        side: `INPUT` or `OUTPUT`.
        node: the node that uses the module's weight.
        values: what may be it, the most likely first.
        expected: what it should be; or one of these.
        columns: of several modules' values in one, the range of this one's; None for all of it.
    """

    module: str
    side: str
    node: ir.Node
    values: tuple[Terms, ...]
    expected: tuple[Expected, ...]
    columns: tuple[int, int] | None = None

    def gaps(self, got: Mapping[str, Array]) -> dict[Terms, Gap]:
        """How far off each of `values` is that can be compared.

        Args:
            got: the graph's values by their names.
        """
        found: dict[Terms, Gap] = {}
        for terms in self.values:
            own = None if any(str(value.name) not in got for value in terms) else _sum(terms, got)
            if own is not None and self.columns is not None:
                own = own[..., slice(*self.columns)]
            for expected in self.expected:
                gap = None if own is None else _gap(own, expected.exact)
                if gap is None:
                    continue
                now = Gap(gap, expected.tolerance)
                if terms not in found or now.ratio < found[terms].ratio:
                    found[terms] = now
        return found


def module_places(
    graph: ir.Graph, matches: Matches, modules: Mapping[str, ModuleValues], config: Mapping[str, Any]
) -> list[Place]:
    """The places of a graph that can be compared with the model, in the graph's order.

    A module counts whose weight was found, and is used as often as the module is called.

    Args:
        matches: which weight lies where in the graph.
        modules: by their paths.
        config: the content of the model's `config.json`.
    """
    owners: dict[str, list[ModuleValues]] = defaultdict(list)
    for module in modules.values():
        for weight in module.weights:
            owners[weight].append(module)
    names = TensorNames(owners, architecture_of(config))
    held = held_tensors(graph)
    order = {node: number for number, node in enumerate(graph)}
    uses: dict[str, dict[ir.Node, tuple[Use, tuple[int, int] | None]]] = defaultdict(dict)
    for weight, own in matches.found.items():
        for match in own:
            for use in uses_of(graph, held[match.initializer].value):
                for module in owners.get(names.find(weight) or "", ()):
                    if use.looked_up == module.looks_up:
                        uses[module.path][use.node] = use, match.rows
    places = []
    for path, found in uses.items():
        module = modules[path]
        if len(found) == len(module.calls):
            for node, call in zip(sorted(found, key=order.__getitem__), module.calls, strict=True):
                places += _places(module, call, *found[node])
    numbers = {path: number for number, path in enumerate(modules)}
    return sorted(places, key=lambda place: (order[place.node], place.side == OUTPUT, numbers[place.module]))


def _places(module: ModuleValues, call: Call, use: Use, rows: tuple[int, int] | None) -> list[Place]:
    places = []
    if use.inputs and call.given is not None:
        places.append(Place(module.path, INPUT, use.node, use.inputs, (call.given,)))
    expected = [call.returned]
    if module.bias is not None and not use.adds_bias:
        # The bias may be an input of what comes next.
        expected.append(Expected(call.returned.exact - module.bias, call.returned.tolerance))
    if rows is None or rows[1] - rows[0] == call.returned.exact.shape[-1]:
        values = tuple((value,) for value in use.outputs)
        places.append(Place(module.path, OUTPUT, use.node, values, tuple(expected), rows))
    return places


def _sum(terms: Terms, got: Mapping[str, Array]) -> Array:
    first, *others = (got[str(value.name)].astype(np.float64) for value in terms)
    for other in others:
        first = first + other
    return first


def _gap(got: Array, exact: Array) -> float | None:
    """The largest difference, infinite where something is no number; None where the shapes do not fit.

    Axes may be joined or split, the second and the third of four exchanged; the last position alone counts
    where there are no others.
    """
    if not got.ndim or not exact.ndim:
        return None
    if got.ndim == exact.ndim == 4 and got.shape != exact.shape:
        got = got.swapaxes(1, 2)
    if got.shape[-1] != exact.shape[-1]:
        return None
    if got.size != exact.size:
        exact = exact.reshape(-1, exact.shape[-1])[-1:]
        if got.size != exact.size:
            return None
    difference = np.abs(got.reshape(exact.shape) - exact)
    largest = float(difference.max(initial=0.0))
    return largest if np.isfinite(largest) else math.inf
