"""Tidy a freshly traced graph: fold what is constant, drop what does nothing, name what a person reads."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from .names import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    LOGITS,
    PAST_SEQUENCE,
    PRESENT_SEQUENCE,
    SEQUENCE,
    TOTAL_SEQUENCE,
    past_names,
    present_names,
)


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


def name_dimensions(model: ir.Model, layers: int, kv_heads: int, width: int) -> None:
    """Name the dynamic dimensions of inputs and outputs and drop the shapes of what lies between, whose
    traced symbols no longer mean anything."""
    shapes: dict[str, list[int | str]] = {
        INPUT_IDS: [BATCH, SEQUENCE],
        ATTENTION_MASK: [BATCH, TOTAL_SEQUENCE],
    }
    shapes |= {name: [BATCH, kv_heads, PAST_SEQUENCE, width] for name in past_names(layers)}
    shapes |= {name: [BATCH, kv_heads, PRESENT_SEQUENCE, width] for name in present_names(layers)}
    graph = model.graph
    vocabulary = next(v for v in graph.outputs if v.name == LOGITS).shape
    assert vocabulary is not None
    shapes[LOGITS] = [BATCH, SEQUENCE, int(vocabulary[-1])]
    outside = {str(v.name): v for v in (*graph.inputs, *graph.outputs)}
    for node in graph:
        for value in node.outputs:
            if str(value.name) not in outside:
                value.shape = None
    for name, shape in shapes.items():
        outside[name].shape = ir.Shape(shape)
