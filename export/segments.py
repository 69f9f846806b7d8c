"""A traced graph cut into what comes before the layers, one segment a layer, and what comes after."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field

import onnx_ir as ir

from .stack import Stack, layer_of, renumber
from .wrappers import HELD

PORT = re.compile(r"(past_key_values|present)\.(\d+)\.(.+)")


class IrregularError(Exception):
    """The graph is no sequence of like layers."""


@dataclass
class Segment:
    """One layer's nodes in graph order.

    Attributes:
        nodes: all of them.
        own: those that depend on the layer's weights or input. The others compute what later layers share.
        entry: the value that comes from the layer before; None for the first layer.
        exit: the value that goes on.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    own: list[ir.Node] = field(default_factory=list)
    entry: ir.Value | None = None
    exit: ir.Value | None = None


class Samples:
    """A traced graph cut into layers, those of one kind found alike."""

    def __init__(self, model: ir.Model, stack: Stack) -> None:
        self.source = model
        self.stack = stack
        self.kinds = [stack.kinds[layer] for layer in stack.samples]
        self.first = {kind: self.kinds.index(kind) for kind in self.kinds}
        self.latest = {kind: layer for layer, kind in enumerate(self.kinds)}
        if self.first[self.kinds[-1]] == len(self.kinds) - 1:
            raise IrregularError  # nothing tells where the last layer ends
        self.before, self.segments, self.after = self._cut()
        self._where = {
            value: (layer, (place, output))
            for layer, segment in enumerate(self.segments)
            for place, node in enumerate(segment.own)
            for output, value in enumerate(node.outputs)
        }
        self._find_ends()
        self._check_alike()

    def layer(self, value: ir.Value) -> int | None:
        """The layer that an input, an output or an initializer belongs to by its name."""
        name = str(value.name)
        port = PORT.fullmatch(name)
        return int(port[2]) if port else layer_of(self.stack.path, self._plain(name))

    def renamed(self, value: ir.Value, layer: int) -> str:
        """The name of what is to another layer what `value` is to its own."""
        name = str(value.name)
        port = PORT.fullmatch(name)
        if port:
            return f"{port[1]}.{layer}.{port[3]}"
        plain = self._plain(name)
        return name.removesuffix(plain) + renumber(self.stack.path, plain, layer)

    def _plain(self, name: str) -> str:
        return name.removeprefix(HELD) if name.startswith(f"{HELD}{self.stack.path}.") else name

    def _cut(self) -> tuple[list[ir.Node], list[Segment], list[ir.Node]]:
        """The nodes before the layers, each layer's, and those after.

        A layer begins with the first node that depends on it and ends where the next begins; the last one
        where it has as many nodes of its own as the first of its kind.
        """
        graph, depth = self.source.graph, len(self.kinds)
        depends: dict[ir.Value, int] = {}  # the last layer that takes part in a value; -1 where none does
        for value in (*graph.inputs, *graph.initializers.values()):
            layer = self.layer(value)
            depends[value] = -1 if layer is None else layer
        before: list[ir.Node] = []
        after: list[ir.Node] = []
        segments: list[Segment] = []
        waiting: list[ir.Node] = []  # what depends on no layer goes to the layer that follows
        for node in graph:
            if any(
                a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()
            ):
                raise IrregularError
            number = max((depends[v] for v in node.inputs if v is not None), default=-1)
            if node.op_type == "Shape" and node.inputs[0] in graph.inputs:
                number = -1  # the sizes of one layer's cache are those of all
            depends.update(dict.fromkeys(node.outputs, number))
            if number < 0:
                waiting.append(node)
                continue
            if number == len(segments):
                if number == 0:
                    before, waiting = waiting, []
                segments.append(Segment())
            if number != len(segments) - 1:
                raise IrregularError
            twin = segments[min(self.first[self.kinds[number]], number)]
            if number == depth - 1 and len(segments[-1].own) == len(twin.own):
                after += [*waiting, node]
            else:
                segments[-1].nodes += [*waiting, node]
                segments[-1].own.append(node)
            waiting = []
        if len(segments) != depth:
            raise IrregularError
        return before, segments, after + waiting

    def _find_ends(self) -> None:
        """Set each layer's entry and exit. What more than the next layer reads is no exit."""
        readers: dict[ir.Value, set[int]] = {}
        for layer, segment in enumerate(self.segments):
            for node in segment.nodes:
                for value in node.inputs:
                    if value in self._where and self._where[value][0] != layer:
                        readers.setdefault(value, set()).add(layer)
        for layer, (segment, following) in enumerate(zip(self.segments, self.segments[1:], strict=False)):
            leaving = [v for node in segment.own for v in node.outputs if readers.get(v) == {layer + 1}]
            if len(leaving) != 1:
                raise IrregularError
            segment.exit = following.entry = leaving[0]
        twin = self.segments[self.first[self.kinds[-1]]]
        if len(self.segments[-1].own) != len(twin.own):
            raise IrregularError
        place, output = self._place(twin.exit)
        self.segments[-1].exit = self.segments[-1].own[place].outputs[output]
        read = {value for node in self.after for value in node.inputs if value in self._where}
        if read - {self.segments[-1].exit}:
            raise IrregularError

    def _place(self, value: ir.Value | None) -> tuple[int, int]:
        assert value is not None
        return self._where[value][1]

    def _check_alike(self) -> None:
        signatures = [self._signature(layer) for layer in range(len(self.segments))]
        for layer, kind in enumerate(self.kinds):
            segment = self.segments[layer]
            shares = len(segment.nodes) != len(segment.own)
            if signatures[layer] != signatures[self.latest[kind]] or (shares and layer != self.first[kind]):
                raise IrregularError

    def _signature(self, layer: int) -> Hashable:
        """All that makes a layer's nodes what they are but which layer's they are."""
        segment = self.segments[layer]
        entry = segment.entry if layer else self._entry_of_first()

        def role(value: ir.Value) -> Hashable:
            if entry is not None and value is entry:
                return "entry"
            made_in, place = self._where.get(value, (None, None))
            if made_in == layer:
                return place
            if made_in:
                raise IrregularError  # only the first layer is the same one among the samples and among all
            owner = self.layer(value) if value.producer() is None else None
            if owner is None:
                return id(value)
            if owner != layer:
                raise IrregularError
            tensor = value.const_value
            contents = None if tensor is None else tensor.tobytes()
            return (self.renamed(value, 0), value.dtype, str(value.shape), contents)

        def result(value: ir.Value) -> Hashable:
            named = value.is_graph_output() and self.layer(value) == layer
            if value.is_graph_output() and not named and value is not self.segments[-1].exit:
                raise IrregularError
            return (value.dtype, self.renamed(value, 0) if named else None)

        nodes = tuple(
            (
                (node.domain, node.op_type, node.overload, node.version),
                tuple(sorted((key, _attribute(a)) for key, a in node.attributes.items())),
                tuple(None if value is None else role(value) for value in node.inputs),
                tuple(map(result, node.outputs)),
            )
            for node in segment.own
        )
        return (nodes, self._place(segment.exit))

    def _entry_of_first(self) -> ir.Value | None:
        """What the first layer reads where another of its kind reads its entry; None without another."""
        example = self.segments[self.latest[self.kinds[0]]]
        for ours, theirs in zip(self.segments[0].own, example.own, strict=False):
            for one, other in zip(ours.inputs, theirs.inputs, strict=False):
                if other is not None and other is example.entry:
                    return one
        return None


def _attribute(attribute: ir.Attr) -> Hashable:
    value = attribute.value
    if isinstance(value, ir.TensorProtocol):
        return (str(attribute.type), str(value.dtype), str(value.shape), value.tobytes())
    return (str(attribute.type), repr(value))
