"""A deep model's graph from a trace of a few of its layers.

Layers of one kind are the same nodes around other weights. A model with a few layers of each kind is traced
and tidied; its graph is cut into what comes before the layers, one segment a layer, and what comes after; and
the segments are copied as often as the model has layers. What does not fit this picture exactly is refused:
then the whole model has to be traced.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch.onnx import OnnxExporterError

from .segments import PORT, IrregularError, Samples
from .stack import Stack, find_stacks, keep_layers, layer_of
from .tasks import Task
from .template import GraphTemplate
from .tidy import name_values
from .trace import torch_dtype, trace_model, trace_seq2seq_model
from .weightless import WeightlessModel, build_weightless


def trace_replicated(
    model_dir: Path, task: Task, dtype: np.dtype[Any], *, portable: bool = False, trusted: bool = False
) -> GraphTemplate | None:
    """Trace a few layers of the model that `model_dir/config.json` describes, and repeat them.

    Args and errors: see `trace`. Returns what `trace` does, node for node; None where it is not certain that
    all layers are like the traced ones.
    """
    weightless = build_weightless(model_dir, task, torch_dtype(dtype), portable=portable, trusted=trusted)
    whole = _replicated(weightless, lambda few: {"": trace_model(few, task, dtype)})
    return None if whole is None else whole[""]


def trace_seq2seq_replicated(
    model_dir: Path, task: Task, dtype: np.dtype[Any]
) -> dict[str, GraphTemplate] | None:
    """Do as `trace_replicated` for all graphs of `trace_seq2seq`; None where one of them cannot be had so."""
    weightless = build_weightless(model_dir, task, torch_dtype(dtype))
    return _replicated(weightless, lambda few: trace_seq2seq_model(few, dtype))


def _replicated(
    weightless: WeightlessModel, traced: Callable[[WeightlessModel], dict[str, GraphTemplate]]
) -> dict[str, GraphTemplate] | None:
    """Return whole graphs for those that `traced` makes of the model with few layers; None if one fails."""
    stacks = find_stacks(weightless)
    if not stacks:
        return None
    few, computed = keep_layers(weightless, stacks)
    try:
        templates = traced(few)
    except OnnxExporterError:  # layers that refer to one another by number do not run without the others
        return None
    if computed:
        return None
    whole = {file: replicate(template, stacks, weightless.aliases) for file, template in templates.items()}
    found = {file: template for file, template in whole.items() if template is not None}
    return None if len(found) < len(whole) else found


def replicate(
    template: GraphTemplate, stacks: Sequence[Stack], aliases: Mapping[str, tuple[str, ...]]
) -> GraphTemplate | None:
    """Return the graph of all layers, given the graph of the samples of each of `stacks`.

    Args:
        template: tidied; left as it is.
        stacks: of the whole model; those that the graph has no weights of do not matter.
        aliases: of the whole model's parameters, in order.

    Returns None where the layers of one kind are not the same nodes in the same wiring.
    """
    used = [s for s in stacks if any(layer_of(s.path, name) is not None for name in template.aliases)]
    ports = [
        v for v in (*template.model.graph.inputs, *template.model.graph.outputs) if PORT.match(str(v.name))
    ]
    if not used or (len(used) > 1 and ports):
        return None  # nothing to repeat, or nothing that tells whose layers the cache is of
    model = template.model
    try:
        for stack in used:
            model = _Copies(Samples(model, stack)).model()
    except IrregularError:
        return None
    found = {name: group for name, group in aliases.items() if name in model.graph.initializers}
    unused = tuple(alias for name, group in aliases.items() if name not in found for alias in group)
    name_values(model, frozenset(found))
    decoder = None if template.decoder is None else replace(template.decoder, layers=len(used[0].kinds))
    return replace(template, model=model, aliases=found, unused=unused, decoder=decoder)


class _Copies:
    """The graph of all layers, made of copies of the samples: the first layer of a kind of the first sample,
    which may compute what others share, and the others of the latest."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._nodes: list[ir.Node] = []
        self._named: dict[str, ir.Value] = {}  # what belongs to a layer by its name
        graph = samples.source.graph
        self._constants = [v for v in graph.initializers.values() if samples.layer(v) is None]
        self._shared: dict[ir.Value, ir.Value] = {
            value: _copy(value, value.name)
            for value in (*graph.inputs, *self._constants)
            if samples.layer(value) is None
        }

    def model(self) -> ir.Model:
        samples, shared = self._samples, self._shared
        self._put(samples.before, shared, 0, 0)
        carried: ir.Value | None = None
        seen: set[int] = set()
        for layer, kind in enumerate(samples.stack.kinds):
            sample = (samples.latest if kind in seen else samples.first)[kind]
            segment = samples.segments[sample]
            inner: dict[ir.Value, ir.Value] = {}
            known = ChainMap(inner, shared)
            if carried is not None:
                assert segment.entry is not None
                inner[segment.entry] = carried
            self._put(segment.nodes, known, sample, layer)
            assert segment.exit is not None
            carried = inner[segment.exit]
            if kind not in seen:
                seen.add(kind)
                shared.update((v, made) for v, made in inner.items() if v is not segment.entry)
        last = samples.segments[-1].exit
        assert last is not None
        assert carried is not None
        known = ChainMap({last: carried}, shared)
        self._put(samples.after, known, -1, -1)
        return self._assembled(known)

    def _put(
        self, nodes: Sequence[ir.Node], known: MutableMapping[ir.Value, ir.Value], sample: int, layer: int
    ) -> None:
        """Append copies of `nodes`, a sample's, as those of `layer`; note their values in `known`."""
        samples = self._samples

        def mapped(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in known:
                return None if value is None else known[value]
            if value.producer() is not None or samples.layer(value) != sample:
                raise IrregularError
            return self._of_layer(value, layer)

        for node in nodes:
            inputs = [mapped(value) for value in node.inputs]
            outputs = []
            for value in node.outputs:
                port = value.is_graph_output() and samples.layer(value) is not None
                made = self._of_layer(value, layer) if port else _copy(value, None)
                if not value.is_graph_output():
                    made.shape = None
                known[value] = made
                outputs.append(made)
            self._nodes.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    list(node.attributes.values()),
                    overload=node.overload,
                    outputs=outputs,
                    version=node.version,
                )
            )

    def _of_layer(self, value: ir.Value, layer: int) -> ir.Value:
        name = self._samples.renamed(value, layer)
        if name not in self._named:
            self._named[name] = _copy(value, name)
        return self._named[name]

    def _assembled(self, known: Mapping[ir.Value, ir.Value]) -> ir.Model:
        model = self._samples.source
        source = model.graph
        inputs = self._all_layers(source.inputs, lambda value: self._shared[value])

        def output(value: ir.Value) -> ir.Value:
            if value not in known:
                raise IrregularError
            made = known[value]
            made.name = value.name
            made.shape = None if value.shape is None else value.shape.copy()
            return made

        outputs = self._all_layers(source.outputs, output)
        outside = {id(value) for value in (*inputs, *outputs)}
        for node in self._nodes:
            for made in node.outputs:
                if id(made) not in outside:
                    made.name, made.shape = None, None
        constants = [self._shared[value] for value in self._constants]
        layered = [v for v in self._named.values() if id(v) not in outside]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._nodes,
            initializers=[*constants, *layered],
            opset_imports=dict(source.opset_imports),
            name=source.name,
        )
        return ir.Model(
            graph,
            ir_version=model.ir_version,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
        )

    def _all_layers(
        self, values: Sequence[ir.Value], other: Callable[[ir.Value], ir.Value]
    ) -> list[ir.Value]:
        """Inputs or outputs, those of the samples in the place of those of all layers."""
        samples = self._samples
        owners = [samples.layer(value) for value in values]
        ported = [place for place, owner in enumerate(owners) if owner is not None]
        if not ported:
            return [other(value) for value in values]
        start, stop = ported[0], ported[-1] + 1
        run = [owner for owner in owners[start:stop] if owner is not None]
        if len(run) != stop - start or run != sorted(run):
            raise IrregularError
        made = [
            self._of_layer(value, layer)
            for layer, kind in enumerate(samples.stack.kinds)
            for value, owner in zip(values, owners, strict=True)
            if owner == samples.latest[kind]
        ]
        return [*map(other, values[:start]), *made, *map(other, values[stop:])]


def _copy(value: ir.Value, name: str | None) -> ir.Value:
    tensor = value.const_value
    return ir.Value(
        name=name,
        type=value.type,
        shape=None if value.shape is None else value.shape.copy(),
        const_value=None if tensor is None else ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name),
    )
