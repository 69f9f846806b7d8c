"""Tidy a freshly traced graph: fold what is constant, drop what does nothing, name what a person reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from .names import BATCH, SEQUENCE
from .skips import mark_sums


def tidy(model: ir.Model, weights: frozenset[str], *, standard: bool = False) -> None:
    """Optimise `model` in place; the initializers named in `weights` have no values and are left alone.

    A weight is shown to the optimiser as a graph input, so nothing that depends on it can be folded.
    Where the graph is to be of `standard` operators, sums are not marked for others (`skips.py`).
    """
    graph = model.graph
    hidden = [graph.initializers.pop(name) for name in sorted(weights)]
    graph.inputs.extend(hidden)
    onnxscript.optimizer.optimize(model)
    _drop_reshape_pairs(graph)
    _copy_sizes(graph)
    onnxscript.optimizer.optimize(model)
    if not standard:
        mark_sums(graph)
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


def _copy_sizes(graph: ir.Graph) -> None:
    """Where what varies in the shape asked of a `Reshape` are its input's own sizes at the same place, let it
    copy them (a 0 in a constant shape) and infer one size more (-1) instead of computing the shape."""
    made: dict[tuple[int, ...], ir.Value] = {}
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        given, asked = node.inputs[0].shape, node.outputs[0].shape
        if given is None or asked is None or node.inputs[1].const_value is not None:
            continue
        sizes = tuple(
            size if isinstance(size, int) else 0 if _same_size(size, given, axis) else -1
            for axis, size in enumerate(asked)
        )
        if sizes.count(-1) > 1 or 0 in asked:
            continue
        if sizes not in made:
            tensor = ir.tensor(np.array(sizes, np.int64), name="sizes_" + "_".join(map(str, sizes)))
            made[sizes] = ir.Value(
                name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
            graph.register_initializer(made[sizes])
        node.replace_input_with(1, made[sizes])
        node.attributes.pop("allowzero", None)


def _same_size(size: ir.SymbolicDim, given: ir.Shape, axis: int) -> bool:
    return size.value is not None and axis < len(given) and given[axis] == size


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


def name_values(model: ir.Model, weights: frozenset[str]) -> None:
    """Name nodes, what lies between them and nameless constants by their turn in the graph, in place, and put
    the constants in the order of their first use, then the weights in that of their names.

    The exporter counts what it has traced, not what is left: its names would tell how a graph was made. A
    buffer keeps its own name, which holds a dot, and so do inputs and outputs.
    """
    graph = model.graph
    constants = {v: None for node in graph for v in node.inputs if v is not None and v.is_initializer()}
    held = [v for v in (*constants, *graph.initializers.values()) if v.name not in weights]
    held = list(dict.fromkeys(held)) + [graph.initializers[name] for name in sorted(weights)]
    graph.initializers.clear()
    turn = 0
    for value in held:
        if value.name not in weights and "." not in str(value.name) and not value.is_graph_input():
            value.name = f"constant_{turn}"
            turn += 1
        graph.initializers.add(value)
    turns: Counter[str] = Counter()
    for node in graph:
        node.name = f"{node.op_type}_{turns[node.op_type]}"
        turns[node.op_type] += 1
        for number, value in enumerate(node.outputs):
            if value.name != "" and not value.is_graph_output():
                value.name = f"{node.name}.{number}" if number else node.name
    for value in (*graph.inputs, *held, *(v for node in graph for v in node.outputs)):
        value.metadata_props.clear()
