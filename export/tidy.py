"""Tidy a freshly traced graph: fold what is constant, drop what does nothing, name what a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from .names import BATCH, SEQUENCE


def tidy(model: ir.Model, weights: frozenset[str]) -> None:
    """Optimise `model` in place; the initializers named in `weights` have no values and are left alone.

    A weight is shown to the optimiser as a graph input, so nothing that depends on it can be folded.
    """
    graph = model.graph
    hidden = [graph.initializers.pop(name) for name in sorted(weights)]
    graph.inputs.extend(hidden)
    onnxscript.optimizer.optimize(model)
    _drop_reshape_pairs(graph)
    onnxscript.optimizer.optimize(model)
    for value in hidden:
        graph.inputs.remove(value)
        graph.initializers[str(value.name)] = value
    ClearMetadataAndDocStringPass()(model)


def _drop_reshape_pairs(graph: ir.Graph) -> None:
    """`Reshape(Reshape(x))` whose symbolic shape is x's own is x: the heads are split for the modelling
    code and joined again for the attention operator."""
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != "Reshape" or inner.inputs[0] is None:
            continue
        source, result = inner.inputs[0], node.outputs[0]
        if source.shape is not None and source.shape == result.shape and not result.is_graph_output():
            result.replace_all_uses_with(source)
            graph.remove(node, safe=True)


def name_dimensions(
    model: ir.Model, inputs: Mapping[str, Sequence[int | str]], outputs: Mapping[str, Sequence[int | str]]
) -> None:
    """Give inputs and outputs these shapes and drop the shapes of what lies between, whose traced symbols no
    longer mean anything. An output that is given none keeps its sizes; what varies is batch, then sequence.
    """
    graph = model.graph
    shapes = {**inputs, **outputs}
    outside = {str(v.name): v for v in (*graph.inputs, *graph.outputs)}
    for node in graph:
        for value in node.outputs:
            if str(value.name) not in outside:
                value.shape = None
    for name, shape in shapes.items():
        value = outside[name]
        traced = value.shape
        if not shape:
            assert traced is not None
            shape = [
                size if isinstance(size, int) else (BATCH, SEQUENCE)[axis] for axis, size in enumerate(traced)
            ]
        value.shape = ir.Shape(shape)
